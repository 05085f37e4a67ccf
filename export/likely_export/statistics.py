"""Outlier statistics that one forward pass gives; adding one is a function and a line.

Each takes the pass's `Tables` and gives (n, k) numbers. What they are worth
together is settled on the fit split (`calibrate`); a single likelihood would not
do, since simple pictures can be likelier than real ones (Nalisnick et al., 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor

EDGES = (0.0, 0.01, 0.05, 0.2, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
GAINS = (-6.0, -4.0, -2.0, -1.0, -0.5, -0.1, 0.1, 0.5, 1.0, 2.0, 4.0, 6.0)
REGIONS = 4


@dataclass(frozen=True)
class Reconstruction:
    """What a CVAE says of a picture at the mean of its posterior, under its likeliest label.

    Attributes:
        log_weights: (n, labels), log p(x, z|y) - log q(z|x) at that mean z for every label, nats:
            what the ELBO is the mean of, and itself no bound.
        mean: (n, z), of the latent features, from the mean of their prior.
        log_variance: (n, z).
        expected: (n, c, h, w), the expected picture, levels scaled to [0, 1].
        picture: (n, c, h, w), the picture itself, scaled likewise.
    """

    log_weights: Tensor
    mean: Tensor
    log_variance: Tensor
    expected: Tensor
    picture: Tensor


@dataclass(frozen=True)
class Tables:
    """What one pass says of every pixel, each (n, c, h, w), in nats.

    Attributes:
        surprise: s = -log p(pixel | before).
        coarse: the part of it that is due to the pixel's first digit.
        entropy: H, the surprise that the model expected.
        variance: V, the variance that it expected of the surprise.
        local: the surprise of a model of neighbours only, where the role names one.
        reconstruction: of a CVAE, where the role names one.
    """

    surprise: Tensor
    coarse: Tensor
    entropy: Tensor
    variance: Tensor
    local: Tensor | None = None
    reconstruction: Reconstruction | None = None

    @property
    def gain(self) -> Tensor:
        """What the full model knows of each pixel beyond its neighbours, nats."""
        assert self.local is not None
        return self.local - self.surprise

    @property
    def redrawn(self) -> Reconstruction:
        """The reconstruction, which must be there."""
        assert self.reconstruction is not None
        return self.reconstruction


def tables(log_probs: Tensor, digits: Tensor, channels: int) -> Tables:
    """The tables of a pass.

    Args:
        log_probs: of every digit, (n, h, w, c * digits, base).
        digits: the true ones, int64 (n, h, w, c * digits).
        channels: c.

    A digit's entropy is that given the true digits before it, so a pixel's is
    the sum over its digits.
    """
    probs = log_probs.exp()
    entropy = -(probs * log_probs).sum(-1)
    # Not E[l^2] - H^2, whose rounding can fall below 0.
    variance = (probs * (log_probs + entropy[..., None]).square()).sum(-1)
    taken = -log_probs.gather(-1, digits[..., None])[..., 0]
    first = taken.unflatten(-1, (channels, -1))[..., 0].permute(0, 3, 1, 2)
    surprise, entropy, variance = (_by_pixel(part, channels) for part in (taken, entropy, variance))
    return Tables(surprise, first, entropy, variance)


def _by_pixel(values: Tensor, channels: int) -> Tensor:
    return values.unflatten(-1, (channels, -1)).sum(-1).permute(0, 3, 1, 2)


def total_surprise(t: Tables) -> Tensor:
    """-log p(x)."""
    return _total(t.surprise)


def coarse_surprise(t: Tables) -> Tensor:
    """-log p of the pixels' first digits."""
    return _total(t.coarse)


def total_entropy(t: Tables) -> Tensor:
    """The surprise that the model expected of this picture."""
    return _total(t.entropy)


def excess(t: Tables) -> Tensor:
    """Surprise beyond the expected, in its own standard deviations."""
    return (_total(t.surprise) - _total(t.entropy)) * torch.rsqrt(_total(t.variance) + 1e-6)


def surprise_shares(t: Tables) -> Tensor:
    """How much of the pixels' surprise lies in each interval of `EDGES`: a smooth histogram."""
    return _shares(t.surprise, EDGES)


def gain(t: Tables) -> Tensor:
    """What the full model knows beyond its local one, nats."""
    return _total(t.gain)


def local_ratio(t: Tables) -> Tensor:
    """Surprise over local surprise."""
    assert t.local is not None
    return _total(t.surprise) / (_total(t.local) + 1.0)


def gain_shares(t: Tables) -> Tensor:
    """The same histogram of the gains, over `GAINS`."""
    return _shares(t.gain, GAINS)


def regional_gain(t: Tables) -> Tensor:
    """Gains summed over a grid of regions."""
    return _regional(t.gain)


def bound(t: Tables) -> Tensor:
    """The largest of the labels' log-weights."""
    return t.redrawn.log_weights.topk(1, 1).values  # the exporter's ReduceMax has no CUDA kernel


def margin(t: Tables) -> Tensor:
    """By how much the likeliest label's log-weight exceeds the next one's."""
    weights = t.redrawn.log_weights
    best = weights.topk(min(2, weights.shape[1]), 1).values
    return best[:, :1] - best[:, -1:]


def disagreement(t: Tables) -> Tensor:
    """log p(x) of the density beyond the largest log-weight of the CVAE."""
    return -bound(t) - _total(t.surprise)


def divergence(t: Tables) -> Tensor:
    """KL of the features' posterior from their prior."""
    mean, log_variance = t.redrawn.mean, t.redrawn.log_variance
    terms = mean.square() + torch.exp(log_variance) - 1 - log_variance
    return 0.5 * terms.sum(1, keepdim=True)


def latent_norms(t: Tables) -> Tensor:
    """Lengths of the features' mean and standard deviation (Huang et al., 2024: LPath)."""
    squares = (t.redrawn.mean.square(), torch.exp(t.redrawn.log_variance))
    return torch.cat([square.sum(1, keepdim=True).sqrt() for square in squares], 1)


def latent(t: Tables) -> Tensor:
    """The features' mean."""
    return t.redrawn.mean


def error(t: Tables) -> Tensor:
    """Squared distance of the picture from the expected one, plain and by its own size."""
    size = _total(t.redrawn.picture.square())
    squared = _total((t.redrawn.picture - t.redrawn.expected).square())
    return torch.cat([squared, squared / (size + 0.25)], 1)


def regional_error(t: Tables) -> Tensor:
    """Squared distances summed over a grid of regions."""
    return _regional((t.redrawn.picture - t.redrawn.expected).square())


def regional_bias(t: Tables) -> Tensor:
    """Signed distances summed over a grid of regions."""
    return _regional(t.redrawn.picture - t.redrawn.expected)


def regional_surprise(t: Tables) -> Tensor:
    """Surprise summed over a grid of regions."""
    return _regional(t.surprise)


def regional_entropy(t: Tables) -> Tensor:
    """Expected surprise summed over a grid of regions."""
    return _regional(t.entropy)


@dataclass(frozen=True)
class Statistic:
    """A named statistic.

    Attributes:
        of: what computes it.
        needs: the family that the density's role must name beside its first model.
    """

    of: Callable[[Tables], Tensor]
    needs: str | None = None


STATISTICS: Mapping[str, Statistic] = MappingProxyType(
    {
        "surprise": Statistic(total_surprise),
        "coarse_surprise": Statistic(coarse_surprise),
        "entropy": Statistic(total_entropy),
        "excess": Statistic(excess),
        "surprise_shares": Statistic(surprise_shares),
        "regional_surprise": Statistic(regional_surprise),
        "regional_entropy": Statistic(regional_entropy),
        "gain": Statistic(gain, "local"),
        "local_ratio": Statistic(local_ratio, "local"),
        "gain_shares": Statistic(gain_shares, "local"),
        "regional_gain": Statistic(regional_gain, "local"),
        "bound": Statistic(bound, "cvae"),
        "margin": Statistic(margin, "cvae"),
        "disagreement": Statistic(disagreement, "cvae"),
        "divergence": Statistic(divergence, "cvae"),
        "latent_norms": Statistic(latent_norms, "cvae"),
        "latent": Statistic(latent, "cvae"),
        "error": Statistic(error, "cvae"),
        "regional_error": Statistic(regional_error, "cvae"),
        "regional_bias": Statistic(regional_bias, "cvae"),
    }
)


def statistics(t: Tables, names: tuple[str, ...]) -> Tensor:
    """The statistics of those names side by side, (n, s)."""
    return torch.cat([STATISTICS[name].of(t) for name in names], 1)


def _total(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1, keepdim=True)


def _shares(values: Tensor, edges: tuple[float, ...]) -> Tensor:
    """How many of the values lie above each interval of the edges, those within it in part.

    A value counts 0 below an interval, 1 above, and rises linearly within, so that no
    rounding can move it from one bin to the next.
    """
    flat = values.flatten(1)
    shares = [((flat - low) / (high - low)).clamp(0, 1).mean(1) for low, high in pairwise(edges)]
    return torch.stack(shares, 1)


def _regional(values: Tensor) -> Tensor:
    """Sums over a grid of at most 4 x 4 regions of rows and columns, (n, regions)."""
    rows = _membership(values.shape[2])
    columns = _membership(values.shape[3])
    return (rows @ values.sum(1) @ columns.T).flatten(1)


def _membership(size: int) -> Tensor:
    """Which of `size` positions belong to which region, float32 (regions, size)."""
    regions = min(REGIONS, size)
    member = torch.zeros(regions, size)
    member[torch.arange(size) * regions // size, torch.arange(size)] = 1
    return member
