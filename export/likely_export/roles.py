"""The graphs that models give to a bundle: each a module with named tensors in and out."""

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
from likely_export.raster import RasterSampler
from likely_export.rnn_sampler import DiagonalSampler, RowSampler
from likely_export.sampler import Sampler
from likely_export.statistics import Reconstruction, Tables, statistics, tables
from likely_export.vae import VAE


@dataclass(frozen=True)
class GraphSource:
    """A module that is one graph of a bundle.

    Attributes:
        module: in evaluation mode; takes `inputs` and gives `outputs` in their order.
        inputs: names, types and shapes; axis 0 is the batch.
        outputs: likewise.
        kind: what the log-likelihoods are, where it gives any.
        importance_samples: behind a bound.
        widths: how many numbers each statistic gives, of a density.
    """

    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    kind: Kind | None = None
    importance_samples: int = 0
    widths: Mapping[str, int] = field(default_factory=dict)

    def graph(self, file: str) -> Graph:
        """Its entry in a manifest, as an ONNX file of that name."""
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
        names: the statistics.
        local: a model of neighbours only, for the statistics that need one.
        cvae: likewise; it also says which label a picture is taken for.
    """

    def __init__(
        self,
        model: Autoregressive,
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
        """What the statistics are computed from, of uint8 x (n, c, h, w)."""
        log_probs = self.model.log_probs(x)
        seen = tables(log_probs, self.model.head.split(x), self.model.config.shape[0])
        if self.local is not None:
            seen = replace(seen, local=self.local.surprise(x))
        if self.cvae is not None:
            seen = replace(seen, reconstruction=_reconstruction(self.cvae, x))
        return seen

    @torch.no_grad()
    def widths(self) -> dict[str, int]:
        """How many numbers each statistic gives, in their order."""
        seen = self.tables(torch.zeros(1, *self.model.config.shape, dtype=torch.uint8))
        return {name: statistics(seen, (name,)).shape[1] for name in self.names}


def _reconstruction(cvae: CVAE, x: Tensor) -> Reconstruction:
    """The picture as the CVAE redraws it, of uint8 x (n, c, h, w)."""
    labels = torch.arange(cvae.config.labels, device=x.device)
    mean, log_variance = cvae.posterior(cvae.features(x)[:, None], labels)
    middle = torch.zeros(1, 1, 1, cvae.config.latent, device=x.device)
    levels = x.flatten(1)[:, None, None]
    weights = cvae.weights_of(mean, log_variance, levels, labels, middle)[..., 0]
    likeliest = weights.argmax(1)
    chosen = likeliest[:, None, None].expand(-1, 1, cvae.config.latent)
    mean, log_variance = (
        part.expand(-1, len(labels), -1).gather(1, chosen)[:, 0] for part in (mean, log_variance)
    )
    return Reconstruction(
        log_weights=weights,
        mean=cvae.from_centre(mean, likeliest),
        log_variance=log_variance,
        expected=cvae.expected(mean, likeliest),
        picture=x.float() / (cvae.config.levels - 1),
    )


class EveryLabel(nn.Module):
    """x -> log p(x|y) for all labels, exactly, in one call."""

    def __init__(self, model: Autoregressive) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log_pxy (n, labels), and its pixels' surprise (n, labels, c, h, w), of uint8 x."""
        labels = self.model.config.labels
        n, c, h, w = x.shape
        each = x[:, None].expand(n, labels, c, h, w).reshape(n * labels, c, h, w)
        y = torch.arange(labels, device=x.device).expand(n, labels).reshape(-1)
        surprise = self.model.surprise(each, y).view(n, labels, c, h, w)
        return -surprise.flatten(2).sum(2), surprise


class Experts(nn.Module):
    """x, noise -> log p(x|y) for all labels, by an exact model and one that gives a bound.

    Args:
        models: an `EveryLabel` and a `Conditional`, the one that leads first.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(models)

    def forward(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log_pxy (n, labels) of the first expert, evidence (n, experts, labels), surprise."""
        each, surprise = [], None
        for expert in self.experts:
            if isinstance(expert, EveryLabel):
                log_pxy, own = expert(x)
                each.append(log_pxy)
                surprise = own if surprise is None else surprise
            else:
                each.append(expert(x, eps))
        assert surprise is not None
        return each[0], torch.stack(each, 1), surprise


def density(
    model: Autoregressive, names: tuple[str, ...], companions: Sequence[nn.Module] = ()
) -> GraphSource:
    """The graph of log p(x) and its statistics.

    Raises:
        InvalidInput: a companion is neither a local model nor a CVAE.
    """
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
                raise InvalidInput("roles.density", f"a {kind} has no place beside a density")
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


def conditional(*models: Autoregressive | CVAE) -> GraphSource:
    """The graph of log p(x|y) for all labels: of the first model, and of each beside it.

    Raises:
        InvalidInput: two of them are of one family.
    """
    if len({type(model) for model in models}) < len(models):
        raise InvalidInput("roles.conditional", "names two models of one family")
    config = models[0].config
    inputs = [_pictures(config.shape)]
    outputs = [_floats("log_pxy", config.labels)]
    modules: list[nn.Module] = []
    for model in models:
        if isinstance(model, Autoregressive):
            modules.append(EveryLabel(model))
        else:
            inputs.append(_floats("eps", model.config.importance_samples, model.config.latent))
            modules.append(Conditional(model))
    module = modules[0]
    if len(models) > 1:
        module = Experts(modules)
        outputs.append(_floats("evidence", len(models), config.labels))
    if any(isinstance(model, Autoregressive) for model in models):
        outputs.append(_floats("surprise", config.labels, *config.shape))
    kind, k = _kind(models[0])
    return GraphSource(module.eval(), tuple(inputs), tuple(outputs), kind, k)


def _kind(model: Autoregressive | CVAE) -> tuple[Kind, int]:
    """What the model's log p(x|y) is, and how many importance samples are behind it."""
    if isinstance(model, Autoregressive):
        return Kind.EXACT, 0
    k = model.config.importance_samples
    return (Kind.IWAE if k > 1 else Kind.ELBO), k


def sample(model: Autoregressive) -> GraphSource:
    """The graph that draws pixel by pixel, exactly."""
    c, h, w = model.config.shape
    inputs: tuple[TensorSpec, ...] = (
        _floats("gumbel", h, w, c, model.head.digits, model.head.base),
    )
    if model.config.labels:
        inputs += (_labels(),)
    return GraphSource(sampler(model).eval(), inputs, (_pictures(model.config.shape),))


def sampler(model: Autoregressive) -> RasterSampler:
    """What draws a picture of that model for its noise.

    Raises:
        InvalidInput: models of its family are not drawn from.
    """
    match model:
        case PixelCNN():
            return Sampler(model)
        case PixelRNN() if model.config.kind == "row":
            return RowSampler(model)
        case PixelRNN():
            return DiagonalSampler(model)
    raise InvalidInput("roles.sample", f"a {type(model).__name__} has no such graph")


def generate(model: CVAE) -> GraphSource:
    """The graph that draws a picture from its latent features in one pass."""
    c, h, w = model.config.shape
    inputs = (
        _labels(),
        _floats("eps", model.config.latent),
        _floats("gumbel", h, w, c, model.config.levels),
    )
    return GraphSource(Generate(model).eval(), inputs, (_pictures(model.config.shape),))


def encode(model: CVAE) -> GraphSource:
    """The graph of the latent features' mean and log-variance."""
    latent = model.config.latent
    outputs = (_floats("mean", latent), _floats("log_variance", latent))
    return GraphSource(Encode(model).eval(), (_pictures(model.config.shape), _labels()), outputs)


def discriminate(model: Classifier) -> GraphSource:
    """The graph of log p(y|x) for all labels, temperature and softmax inside."""
    config = model.config
    outputs = (_floats("log_pyx", config.labels),)
    return GraphSource(model.eval(), (_pictures(config.shape),), outputs)


def features(model: VAE | Autoencoder) -> GraphSource:
    """The graph of features without a label; an autoencoder's have no variance."""
    pictures, latent = (_pictures(model.config.shape),), model.config.latent
    mean = _floats("mean", latent)
    if isinstance(model, Autoencoder):
        return GraphSource(autoencoder.Encode(model).eval(), pictures, (mean,))
    outputs = (mean, _floats("log_variance", latent))
    return GraphSource(vae.Encode(model).eval(), pictures, outputs)


def prior(model: VAE) -> GraphSource:
    """The graph that draws a picture without a label in one pass."""
    inputs = (_floats("eps", model.config.latent), _floats("gumbel", *vae.noise_axes(model)))
    return GraphSource(vae.Draw(model).eval(), inputs, (_pictures(model.config.shape),))


def decode(model: CVAE | Autoencoder) -> GraphSource:
    """The graph of what stands behind features; an autoencoder's is a picture alone."""
    shape = model.config.shape
    z, mean = _floats("z", model.config.latent), _floats("mean", *shape)
    if isinstance(model, Autoencoder):
        return GraphSource(autoencoder.Decode(model).eval(), (z,), (mean,))
    labels = (_labels(),) if model.config.labels else ()
    inputs = (z, _floats("gumbel", *vae.noise_axes(model)), *labels)
    outputs = (mean, _floats("deviation", *shape), _pictures(shape))
    return GraphSource(vae.Decode(model).eval(), inputs, outputs)


def source(role: Role, models: Sequence[nn.Module], names: tuple[str, ...]) -> GraphSource:
    """The graph of that role.

    Args:
        role: what the graph answers.
        models: of families that can answer it together; the first gives the role's name.
        names: the statistics of the density graph.

    Raises:
        InvalidInput: these families cannot answer it, or a model does not learn what it asks.
    """
    for model in models:
        if isinstance(model, Autoregressive):
            _check_withheld(role, model.config)
    match role, models:
        case Role.DENSITY, [Autoregressive() as model, *companions]:
            return density(model, names, companions)
        case Role.CONDITIONAL, _ if all(map(_is_conditional, models)):
            return conditional(*cast("Sequence[Autoregressive | CVAE]", models))
        case Role.SAMPLE, [Autoregressive() as model]:
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


def _check_withheld(role: Role, config: AutoregressiveConfig) -> None:
    """Returns if the model learns what the role asks it.

    Raises:
        InvalidInput: it never sees a picture without its label, or never one with it.
    """
    share = config.label_dropout
    if not config.labels or 0 < share < 1:
        return
    if share == 0 and role in (Role.DENSITY, Role.SAMPLE):
        raise InvalidInput(f"roles.{role}", "label_dropout = 0 teaches no p(x): take more than 0")
    if share == 1 and role in (Role.CONDITIONAL, Role.SAMPLE):
        raise InvalidInput(f"roles.{role}", "label_dropout = 1 teaches no p(x|y): take less than 1")


def _is_conditional(model: nn.Module) -> bool:
    return isinstance(model, Autoregressive | CVAE) and model.config.labels > 0


def _pictures(shape: tuple[int, int, int]) -> TensorSpec:
    return TensorSpec(name="x", dtype="uint8", shape=("batch", *shape))


def _labels() -> TensorSpec:
    return TensorSpec(name="y", dtype="int64", shape=("batch",))


def _floats(name: str, *axes: int) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=("batch", *axes))
