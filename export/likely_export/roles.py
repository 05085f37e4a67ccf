"""The graphs that models give to a bundle: each a module with named tensors in and out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from likely.bundle import Kind, Role, TensorSpec
from likely.errors import InvalidInput
from likely_export.cvae import CVAE, Conditional, Encode, Generate
from likely_export.pixelcnn import PixelCNN
from likely_export.sampler import Sampler
from likely_export.statistics import statistics, tables


@dataclass(frozen=True)
class GraphSource:
    """A module that is one graph of a bundle.

    Attributes:
        module: in evaluation mode; takes `inputs` and gives `outputs` in their order.
        inputs: names, types and shapes; axis 0 is the batch.
        outputs: likewise.
        kind: what the log-likelihoods are, where it gives any.
        importance_samples: behind a bound.
    """

    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    kind: Kind | None = None
    importance_samples: int = 0


class Density(nn.Module):
    """x -> log p(x), the surprise of every pixel, the outlier statistics."""

    def __init__(self, model: PixelCNN, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log_px (n,), surprise (n, c, h, w), statistics (n, s) of uint8 x (n, c, h, w)."""
        log_probs = self.model.log_probs(x)
        surprise = self.model.head.surprise(log_probs, x)
        seen = tables(log_probs, surprise, self.model.config.shape[0])
        return -surprise.flatten(1).sum(1), surprise, statistics(seen, self.names)


class EveryLabel(nn.Module):
    """x -> log p(x|y) for all labels, exactly, in one call."""

    def __init__(self, model: PixelCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """log_pxy (n, labels) of uint8 x (n, c, h, w)."""
        labels = self.model.config.labels
        n, c, h, w = x.shape
        each = x[:, None].expand(n, labels, c, h, w).reshape(n * labels, c, h, w)
        y = torch.arange(labels, device=x.device).expand(n, labels).reshape(-1)
        return self.model.log_prob(each, y).view(n, labels)


def density(model: PixelCNN, names: tuple[str, ...]) -> GraphSource:
    """The graph of log p(x) and its statistics."""
    shape = model.config.shape
    module = Density(model, names).eval()
    with torch.no_grad():
        width = module(torch.zeros(1, *shape, dtype=torch.uint8))[2].shape[1]
    outputs = (_floats("log_px"), _floats("surprise", *shape), _floats("statistics", width))
    return GraphSource(module, (_pictures(shape),), outputs, Kind.EXACT)


def conditional(model: PixelCNN | CVAE) -> GraphSource:
    """The graph of log p(x|y) for all labels."""
    config = model.config
    outputs = (_floats("log_pxy", config.labels),)
    if isinstance(model, PixelCNN):
        return GraphSource(
            EveryLabel(model).eval(), (_pictures(config.shape),), outputs, Kind.EXACT
        )
    k = model.config.importance_samples
    inputs = (_pictures(config.shape), _floats("eps", k, model.config.latent))
    return GraphSource(
        Conditional(model).eval(), inputs, outputs, Kind.IWAE if k > 1 else Kind.ELBO, k
    )


def sample(model: PixelCNN) -> GraphSource:
    """The graph that draws pixel by pixel, exactly."""
    c, h, w = model.config.shape
    inputs: tuple[TensorSpec, ...] = (
        _floats("gumbel", h, w, c, model.head.digits, model.head.base),
    )
    if model.config.labels:
        inputs += (_labels(),)
    return GraphSource(Sampler(model).eval(), inputs, (_pictures(model.config.shape),))


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


def source(role: Role, model: nn.Module, names: tuple[str, ...]) -> GraphSource:
    """The graph of that role.

    Args:
        role: what the graph answers.
        model: of a family that can answer it.
        names: the statistics of the density graph.

    Raises:
        InvalidInput: this family cannot answer it.
    """
    match role, model:
        case Role.DENSITY, PixelCNN():
            return density(model, names)
        case Role.CONDITIONAL, (PixelCNN() | CVAE()) if model.config.labels:
            return conditional(model)
        case Role.SAMPLE, PixelCNN():
            return sample(model)
        case Role.GENERATE, CVAE():
            return generate(model)
        case Role.ENCODE, CVAE():
            return encode(model)
    raise InvalidInput(f"roles.{role}", f"a {type(model).__name__} has no such graph")


def _pictures(shape: tuple[int, int, int]) -> TensorSpec:
    return TensorSpec(name="x", dtype="uint8", shape=("batch", *shape))


def _labels() -> TensorSpec:
    return TensorSpec(name="y", dtype="int64", shape=("batch",))


def _floats(name: str, *axes: int) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=("batch", *axes))
