"""Outlier statistics from one forward pass; to add one, write a function and list it below.

Each function takes the `Tables` of a pass and returns (n, k) numbers. How they are combined is
fitted on the fit split (`calibrate`). The likelihood alone would not do, because simple
pictures can be likelier than real ones (Nalisnick et al., 2019).
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
    """A CVAE's view of a picture, at the mean of its posterior under its likeliest label.

    Attributes:
        log_weights: log p(x, z|y) - log q(z|x) at the posterior mean z, for every label, nats,
            (n, labels). The ELBO is the mean of this over z; it is no bound itself.
        mean: posterior mean of the latent features relative to their prior's mean, (n, z).
        log_variance: posterior log-variance of the latent features, (n, z).
        expected: expected picture, levels rescaled to [0, 1], (n, c, h, w).
        picture: the picture itself, rescaled in the same way, (n, c, h, w).
    """

    log_weights: Tensor
    mean: Tensor
    log_variance: Tensor
    expected: Tensor
    picture: Tensor


@dataclass(frozen=True)
class Tables:
    """The values of every pixel in one pass, each (n, c, h, w), in nats.

    Attributes:
        surprise: s = -log p(pixel | before); in two passes, of the sketch and of the level.
        coarse: the part of the surprise that comes from the pixel's first digit.
        entropy: H, the expectation of the surprise under the model.
        variance: V, the variance of the surprise under the model.
        local: surprise under a model of neighbours only; None if the role names none.
        reconstruction: the CVAE's view of the picture; None if the role names no CVAE.
    """

    surprise: Tensor
    coarse: Tensor
    entropy: Tensor
    variance: Tensor
    local: Tensor | None = None
    reconstruction: Reconstruction | None = None

    @property
    def gain(self) -> Tensor:
        """What the full model predicts of each pixel beyond its neighbours, nats."""
        assert self.local is not None
        return self.local - self.surprise

    @property
    def redrawn(self) -> Reconstruction:
        """The reconstruction, which must exist."""
        assert self.reconstruction is not None
        return self.reconstruction


def tables(log_probs: Tensor, digits: Tensor, channels: int) -> Tables:
    """Returns the tables of a pass.

    The entropy of a digit is conditional on the true digits before it, so the entropy of a pixel
    is the sum over its digits.

    Args:
        log_probs: log-probabilities of every digit, (n, h, w, c * digits, base).
        digits: true digits, int64 (n, h, w, c * digits).
        channels: number of channels c.
    """
    probs = log_probs.exp()
    entropy = -(probs * log_probs).sum(-1)
    # Not E[l^2] - H^2, which rounding can make negative.
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
    """The expectation of the surprise under the model."""
    return _total(t.entropy)


def excess(t: Tables) -> Tensor:
    """The surprise beyond its expectation, in standard deviations under the model."""
    return (_total(t.surprise) - _total(t.entropy)) * torch.rsqrt(_total(t.variance) + 1e-6)


def surprise_shares(t: Tables) -> Tensor:
    """The share of pixels whose surprise lies above each interval of `EDGES`, smoothed."""
    return _shares(t.surprise, EDGES)


def gain(t: Tables) -> Tensor:
    """What the full model predicts beyond the local model, nats."""
    return _total(t.gain)


def local_ratio(t: Tables) -> Tensor:
    """The ratio of surprise to local surprise."""
    assert t.local is not None
    return _total(t.surprise) / (_total(t.local) + 1.0)


def gain_shares(t: Tables) -> Tensor:
    """The share of pixels whose gain lies above each interval of `GAINS`, smoothed."""
    return _shares(t.gain, GAINS)


def regional_gain(t: Tables) -> Tensor:
    """Gains, summed over each region of a grid."""
    return _regional(t.gain)


def bound(t: Tables) -> Tensor:
    """The largest log-weight over all labels."""
    return t.redrawn.log_weights.topk(1, 1).values  # ReduceMax would have no CUDA kernel


def margin(t: Tables) -> Tensor:
    """The difference between the two largest log-weights."""
    weights = t.redrawn.log_weights
    best = weights.topk(min(2, weights.shape[1]), 1).values
    return best[:, :1] - best[:, -1:]


def disagreement(t: Tables) -> Tensor:
    """log p(x) of the density minus the largest log-weight of the CVAE."""
    return -bound(t) - _total(t.surprise)


def divergence(t: Tables) -> Tensor:
    """The KL divergence of the features' posterior from their prior."""
    mean, log_variance = t.redrawn.mean, t.redrawn.log_variance
    terms = mean.square() + torch.exp(log_variance) - 1 - log_variance
    return 0.5 * terms.sum(1, keepdim=True)


def latent_norms(t: Tables) -> Tensor:
    """Norms of the features' posterior mean and standard deviation (Huang et al., 2024: LPath)."""
    squares = (t.redrawn.mean.square(), torch.exp(t.redrawn.log_variance))
    return torch.cat([square.sum(1, keepdim=True).sqrt() for square in squares], 1)


def latent(t: Tables) -> Tensor:
    """The features' posterior mean."""
    return t.redrawn.mean


def error(t: Tables) -> Tensor:
    """The squared distance of the picture from the expected one, absolute and relative."""
    size = _total(t.redrawn.picture.square())
    squared = _total((t.redrawn.picture - t.redrawn.expected).square())
    return torch.cat([squared, squared / (size + 0.25)], 1)


def regional_error(t: Tables) -> Tensor:
    """Squared differences from the expected picture, summed over each region of a grid."""
    return _regional((t.redrawn.picture - t.redrawn.expected).square())


def regional_bias(t: Tables) -> Tensor:
    """Signed differences from the expected picture, summed over each region of a grid."""
    return _regional(t.redrawn.picture - t.redrawn.expected)


def regional_surprise(t: Tables) -> Tensor:
    """Surprise, summed over each region of a grid."""
    return _regional(t.surprise)


def regional_entropy(t: Tables) -> Tensor:
    """Expected surprise, summed over each region of a grid."""
    return _regional(t.entropy)


@dataclass(frozen=True)
class Statistic:
    """A named statistic.

    Attributes:
        compute: function that computes it.
        needs: family that must accompany the density in its role; None if none must.
    """

    compute: Callable[[Tables], Tensor]
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
    """Returns the statistics of these names side by side, (n, s)."""
    return torch.cat([STATISTICS[name].compute(t) for name in names], 1)


def _total(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1, keepdim=True)


def _shares(values: Tensor, edges: tuple[float, ...]) -> Tensor:
    """The share of values above each interval of the edges, (n, intervals).

    A value below an interval counts 0, a value above it 1, and in between the count rises
    linearly. Rounding can therefore not move a value from one bin to the next.
    """
    flat = values.flatten(1)
    shares = [((flat - low) / (high - low)).clamp(0, 1).mean(1) for low, high in pairwise(edges)]
    return torch.stack(shares, 1)


def _regional(values: Tensor) -> Tensor:
    """Sums over a grid of at most 4x4 regions, (n, regions)."""
    rows = _membership(values.shape[2])
    columns = _membership(values.shape[3])
    return (rows @ values.sum(1) @ columns.T).flatten(1)


def _membership(size: int) -> Tensor:
    """Indicator of the region that each of `size` positions belongs to, float32 (regions, size)."""
    regions = min(REGIONS, size)
    member = torch.zeros(regions, size)
    member[torch.arange(size) * regions // size, torch.arange(size)] = 1
    return member
