"""The graphs that models contribute to a bundle: modules with named inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from likely.bundle import Graph, Kind, Role, TensorSpec
from likely.errors import InvalidInput
from likely_export import autoencoder, vae
from likely_export.autoencoder import Autoencoder
from likely_export.autoregressive import Autoregressive, AutoregressiveConfig
from likely_export.classifier import Classifier
from likely_export.cvae import CVAE, Conditional, Encode, Generate
from likely_export.local import LocalPixelCNN
from likely_export.pixelcnn import PixelCNN
from likely_export.pixelrnn import PixelRNN
from likely_export.rnn_sampler import DiagonalSampler, RowSampler
from likely_export.sampler import Sampler
from likely_export.sketch import Detail, Sketch, Sketched
from likely_export.sketch_sampler import SketchedSampler
from likely_export.statistics import Reconstruction, Tables, statistics, tables
from likely_export.vae import VAE

Exact = Autoregressive | Sketched  # densities that give log p(x) itself


@dataclass(frozen=True)
class GraphSource:
    """A module that becomes one graph of a bundle.

    Attributes:
        module: module in evaluation mode that takes `inputs` and returns `outputs`, in order.
        inputs: names, types and shapes of the inputs; axis 0 is the batch.
        outputs: names, types and shapes of the outputs.
        kind: kind of the log-likelihoods; None if it outputs none.
        importance_samples: number of importance samples of a bound.
        widths: number of columns of each statistic of a density.
    """

    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    kind: Kind | None = None
    importance_samples: int = 0
    widths: Mapping[str, int] = field(default_factory=dict)

    def graph(self, file: str) -> Graph:
        """Returns its entry in a manifest, as an ONNX file of this name."""
        return Graph(
            file=file,
            inputs=self.inputs,
            outputs=self.outputs,
            kind=self.kind,
            importance_samples=self.importance_samples,
        )


class Density(nn.Module):
    """x -> log p(x), the surprise of every pixel, the outlier statistics[, the likeliest label].

    Args:
        model: the density.
        names: names of the statistics.
        local: a model of neighbours only, for statistics that need one.
        cvae: a CVAE, for statistics that need one; it also predicts the label.
    """

    def __init__(
        self,
        model: Exact,
        names: tuple[str, ...],
        local: LocalPixelCNN | None = None,
        cvae: CVAE | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.local = local
        self.cvae = cvae

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """log_px (n,), surprise (n, c, h, w), statistics (n, s)[, label (n,)] of uint8 x."""
        seen = self.tables(x)
        label = () if seen.reconstruction is None else (seen.redrawn.log_weights.argmax(1),)
        log_px = -seen.surprise.flatten(1).sum(1)
        return log_px, seen.surprise, statistics(seen, self.names), *label

    def tables(self, x: Tensor) -> Tables:
        """The tables from which the statistics are computed, for x, uint8 (n, c, h, w)."""
        log_probs = self.model.log_probs(x)
        seen = tables(log_probs, self.model.to_digits(x), self.model.config.shape[0])
        if self.local is not None:
            seen = replace(seen, local=self.local.surprise(x))
        if self.cvae is not None:
            seen = replace(seen, reconstruction=_reconstruction(self.cvae, x))
        return seen

    @torch.no_grad()
    def widths(self) -> dict[str, int]:
        """The number of columns of each statistic, in order."""
        seen = self.tables(torch.zeros(1, *self.model.config.shape, dtype=torch.uint8))
        return {name: statistics(seen, (name,)).shape[1] for name in self.names}


def _reconstruction(cvae: CVAE, x: Tensor) -> Reconstruction:
    """The CVAE's view of x, uint8 (n, c, h, w)."""
    labels = torch.arange(cvae.config.labels, device=x.device)
    mean, log_variance = cvae.posterior(cvae.features(x)[:, None], labels)
    middle = torch.zeros(1, 1, 1, cvae.config.latent, device=x.device)
    levels = x.flatten(1)[:, None, None]
    weights = cvae.log_weights_of_posterior(mean, log_variance, levels, labels, middle)[..., 0]
    likeliest = weights.argmax(1)
    chosen = likeliest[:, None, None].expand(-1, 1, cvae.config.latent)
    mean, log_variance = (
        part.expand(-1, len(labels), -1).gather(1, chosen)[:, 0] for part in (mean, log_variance)
    )
    return Reconstruction(
        log_weights=weights,
        mean=cvae.from_centre(mean, likeliest),
        log_variance=log_variance,
        expected=cvae.clamped_mean(mean, likeliest),
        picture=x.float() / (cvae.config.levels - 1),
    )


class EveryLabel(nn.Module):
    """x -> log p(x|y) for all labels, exactly, in one call."""

    def __init__(self, model: Exact) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log_pxy (n, labels), and the pixels' surprise (n, labels, c, h, w), of uint8 x."""
        labels = self.model.config.labels
        n, c, h, w = x.shape
        pictures = x[:, None].expand(n, labels, c, h, w).reshape(n * labels, c, h, w)
        y = torch.arange(labels, device=x.device).expand(n, labels).reshape(-1)
        surprise = self.model.surprise(pictures, y).view(n, labels, c, h, w)
        return -surprise.flatten(2).sum(2), surprise


class Experts(nn.Module):
    """x, noise -> log p(x|y) for all labels, by an exact model and by one with a bound.

    Args:
        models: an `EveryLabel` and a `Conditional`; the first one leads.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(models)

    def forward(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log_pxy (n, labels) of the first expert, evidence (n, experts, labels), surprise."""
        evidence, surprise = [], None
        for expert in self.experts:
            if isinstance(expert, EveryLabel):
                log_pxy, expert_surprise = expert(x)
                evidence.append(log_pxy)
                surprise = expert_surprise if surprise is None else surprise
            else:
                evidence.append(expert(x, eps))
        assert surprise is not None
        return evidence[0], torch.stack(evidence, 1), surprise


def density(
    model: Exact, names: tuple[str, ...], companions: Sequence[nn.Module] = ()
) -> GraphSource:
    """Returns the graph of log p(x) and its statistics.

    Raises:
        InvalidInput: a companion is neither a local model nor a CVAE, or two are of one family.
    """
    if len({type(companion) for companion in companions}) < len(companions):
        raise InvalidInput("roles.density", "names two companions of one family")
    shape = model.config.shape
    local: LocalPixelCNN | None = None
    cvae: CVAE | None = None
    for companion in companions:
        match companion:
            case LocalPixelCNN():
                local = companion
            case CVAE() if companion.config.labels:
                cvae = companion
            case _:
                kind = type(companion).__name__
                raise InvalidInput("roles.density", f"a {kind} cannot stand beside a density")
    module = Density(model, names, local, cvae).eval()
    widths = module.widths()
    outputs = [
        _floats("log_px"),
        _floats("surprise", *shape),
        _floats("statistics", sum(widths.values())),
    ]
    if cvae is not None:
        outputs.append(TensorSpec(name="label", dtype="int64", shape=("batch",)))
    return GraphSource(module, (_pictures(shape),), tuple(outputs), Kind.EXACT, widths=widths)


def conditional(*models: Exact | CVAE) -> GraphSource:
    """Returns the graph of log p(x|y) for all labels, and of the evidence if there are experts.

    Raises:
        InvalidInput: two of the models are of one family.
    """
    if len({type(model) for model in models}) < len(models):
        raise InvalidInput("roles.conditional", "names two models of one family")
    config = models[0].config
    inputs = [_pictures(config.shape)]
    outputs = [_floats("log_pxy", config.labels)]
    modules: list[nn.Module] = []
    for model in models:
        if isinstance(model, Exact):
            modules.append(EveryLabel(model))
        else:
            inputs.append(_floats("eps", model.config.importance_samples, model.config.latent))
            modules.append(Conditional(model))
    module = modules[0]
    if len(models) > 1:
        module = Experts(modules)
        outputs.append(_floats("evidence", len(models), config.labels))
    if any(isinstance(model, Exact) for model in models):
        outputs.append(_floats("surprise", config.labels, *config.shape))
    kind, k = _kind(models[0])
    return GraphSource(module.eval(), tuple(inputs), tuple(outputs), kind, k)


def _kind(model: Exact | CVAE) -> tuple[Kind, int]:
    """Returns what the model's log p(x|y) is, and its number of importance samples."""
    if isinstance(model, Exact):
        return Kind.EXACT, 0
    k = model.config.importance_samples
    return (Kind.IWAE if k > 1 else Kind.ELBO), k


def sample(model: Exact) -> GraphSource:
    """Returns the graph that samples pixel by pixel, exactly."""
    c, h, w = model.config.shape
    inputs: tuple[TensorSpec, ...] = (_floats("gumbel", h, w, c, model.digits, model.base),)
    if model.config.labels:
        inputs += (_labels(),)
    return GraphSource(sampler(model).eval(), inputs, (_pictures(model.config.shape),))


def sampler(model: Exact) -> nn.Module:
    """Returns the module that samples pictures of this model from noise.

    Raises:
        InvalidInput: its family has no sampler.
    """
    match model:
        case Sketched():
            return SketchedSampler(model)
        case PixelCNN():
            return Sampler(model)
        case PixelRNN() if model.config.kind == "row":
            return RowSampler(model)
        case PixelRNN():
            return DiagonalSampler(model)
    raise InvalidInput("roles.sample", f"a {type(model).__name__} has no such graph")


def generate(model: CVAE) -> GraphSource:
    """Returns the graph that draws a picture of a label in one pass, from latent features."""
    c, h, w = model.config.shape
    inputs = (
        _labels(),
        _floats("eps", model.config.latent),
        _floats("gumbel", h, w, c, model.config.levels),
    )
    return GraphSource(Generate(model).eval(), inputs, (_pictures(model.config.shape),))


def encode(model: CVAE) -> GraphSource:
    """Returns the graph of the mean and log-variance of the latent features under a label."""
    latent = model.config.latent
    outputs = (_floats("mean", latent), _floats("log_variance", latent))
    return GraphSource(Encode(model).eval(), (_pictures(model.config.shape), _labels()), outputs)


def discriminate(model: Classifier) -> GraphSource:
    """Returns the graph of log p(y|x) for all labels, with temperature and softmax."""
    config = model.config
    outputs = (_floats("log_pyx", config.labels),)
    return GraphSource(model.eval(), (_pictures(config.shape),), outputs)


def features(model: VAE | Autoencoder) -> GraphSource:
    """Returns the graph of features without a label; those of autoencoders have no variance."""
    pictures, latent = (_pictures(model.config.shape),), model.config.latent
    mean = _floats("mean", latent)
    if isinstance(model, Autoencoder):
        return GraphSource(autoencoder.Encode(model).eval(), pictures, (mean,))
    outputs = (mean, _floats("log_variance", latent))
    return GraphSource(vae.Encode(model).eval(), pictures, outputs)


def prior(model: VAE) -> GraphSource:
    """Returns the graph that draws a picture without a label in one pass."""
    inputs = (_floats("eps", model.config.latent), _floats("gumbel", *vae.noise_axes(model)))
    return GraphSource(vae.Draw(model).eval(), inputs, (_pictures(model.config.shape),))


def decode(model: CVAE | Autoencoder) -> GraphSource:
    """Returns the graph that decodes features; an autoencoder's outputs a picture alone."""
    shape = model.config.shape
    z, mean = _floats("z", model.config.latent), _floats("mean", *shape)
    if isinstance(model, Autoencoder):
        return GraphSource(autoencoder.Decode(model).eval(), (z,), (mean,))
    labels = (_labels(),) if model.config.labels else ()
    inputs = (z, _floats("gumbel", *vae.noise_axes(model)), *labels)
    outputs = (mean, _floats("deviation", *shape), _pictures(shape))
    return GraphSource(vae.Decode(model).eval(), inputs, outputs)


def graph_source(role: Role, models: Sequence[nn.Module], names: tuple[str, ...]) -> GraphSource:
    """Returns the graph of a role.

    Args:
        role: the role.
        models: models of families that can play it together; the first one leads.
        names: names of the statistics of the density graph.

    Raises:
        InvalidInput: these families cannot play the role, or a model does not learn what it needs.
    """
    for model in models:
        if isinstance(model, Autoregressive | Sketch):
            _check_label_dropout(role, model.config)
    match models:
        case [Sketch() as first, Detail() as second, *others]:
            models = [Sketched(first, second), *others]
    if any(isinstance(model, Detail) for model in models):
        raise InvalidInput(f"roles.{role}", "a Detail follows a Sketch, and the two come first")
    match role, models:
        case Role.DENSITY, [Autoregressive() | Sketched() as model, *companions]:
            return density(model, names, companions)
        case Role.CONDITIONAL, _ if all(map(_is_conditional, models)):
            return conditional(*cast("Sequence[Exact | CVAE]", models))
        case Role.SAMPLE, [Autoregressive() | Sketched() as model]:
            return sample(model)
        case Role.GENERATE, [VAE() as model]:
            return prior(model)
        case Role.ENCODE, [VAE() | Autoencoder() as model]:
            return features(model)
        case Role.DECODE, [CVAE() | Autoencoder() as model]:
            return decode(model)
        case Role.GENERATE, [CVAE() as model]:
            return generate(model)
        case Role.ENCODE, [CVAE() as model]:
            return encode(model)
        case Role.DISCRIMINATE, [Classifier() as model]:
            return discriminate(model)
    kinds = " beside a ".join(type(model).__name__ for model in models)
    raise InvalidInput(f"roles.{role}", f"a {kinds} has no such graph")


def _check_label_dropout(role: Role, config: AutoregressiveConfig) -> None:
    """Raises unless training with this label dropout gives the model what the role needs.

    Raises:
        InvalidInput: the model never sees a picture without its label, or never one with it.
    """
    share = config.label_dropout
    if not config.labels or 0 < share < 1:
        return
    if share == 0 and role in (Role.DENSITY, Role.SAMPLE):
        raise InvalidInput(f"roles.{role}", "label_dropout = 0 trains no p(x): set more than 0")
    if share == 1 and role in (Role.CONDITIONAL, Role.SAMPLE):
        raise InvalidInput(f"roles.{role}", "label_dropout = 1 trains no p(x|y): set less than 1")


def _is_conditional(model: nn.Module) -> bool:
    return isinstance(model, Exact | CVAE) and model.config.labels > 0


def _pictures(shape: tuple[int, int, int]) -> TensorSpec:
    return TensorSpec(name="x", dtype="uint8", shape=("batch", *shape))


def _labels() -> TensorSpec:
    return TensorSpec(name="y", dtype="int64", shape=("batch",))


def _floats(name: str, *axes: int) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=("batch", *axes))
