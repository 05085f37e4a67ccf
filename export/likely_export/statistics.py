"""Outlier statistics that one forward pass of a density gives; adding one is a function and a line.

Each takes the pass's `Tables` and gives (n, k) numbers. What they are worth
together is settled on the fit split (`calibrate`); a single likelihood would not
do, since simple pictures can be likelier than real ones (Nalisnick et al., 2019).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

EDGES = (0.0, 0.01, 0.05, 0.2, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
REGIONS = 4


@dataclass(frozen=True)
class Tables:
    """What one pass says of every pixel, each (n, c, h, w), in nats.

    Attributes:
        surprise: s = -log p(pixel | before).
        entropy: H, the surprise that the model expected.
        variance: V, the variance that it expected of the surprise.
    """

    surprise: Tensor
    entropy: Tensor
    variance: Tensor


def tables(log_probs: Tensor, surprise: Tensor, channels: int) -> Tables:
    """The tables of digits' log-probabilities (n, h, w, c * digits, base).

    A digit's entropy is that given the true digits before it, so a pixel's is
    the sum over its digits.
    """
    probs = log_probs.exp()
    entropy = -(probs * log_probs).sum(-1)
    # Not E[l^2] - H^2, whose rounding can fall below 0.
    variance = (probs * (log_probs + entropy[..., None]).square()).sum(-1)
    return Tables(surprise, *(_by_pixel(part, channels) for part in (entropy, variance)))


def _by_pixel(values: Tensor, channels: int) -> Tensor:
    return values.unflatten(-1, (channels, -1)).sum(-1).permute(0, 3, 1, 2)


def total_surprise(t: Tables) -> Tensor:
    """-log p(x)."""
    return _total(t.surprise)


def total_entropy(t: Tables) -> Tensor:
    """The surprise that the model expected of this picture."""
    return _total(t.entropy)


def excess(t: Tables) -> Tensor:
    """Surprise beyond the expected, in its own standard deviations."""
    return (_total(t.surprise) - _total(t.entropy)) * torch.rsqrt(_total(t.variance) + 1e-6)


def surprise_shares(t: Tables) -> Tensor:
    """How much of the pixels' surprise lies in each interval of `EDGES`: a smooth histogram.

    A pixel counts 0 below an interval, 1 above, and rises linearly within, so
    that no rounding can move it from one bin to the next.
    """
    flat = t.surprise.flatten(1)
    shares = [((flat - low) / (high - low)).clamp(0, 1).mean(1) for low, high in pairwise(EDGES)]
    return torch.stack(shares, 1)


def regional_surprise(t: Tables) -> Tensor:
    """Surprise summed over a grid of regions."""
    return _regional(t.surprise)


def regional_entropy(t: Tables) -> Tensor:
    """Expected surprise summed over a grid of regions."""
    return _regional(t.entropy)


STATISTICS: dict[str, Callable[[Tables], Tensor]] = {
    "surprise": total_surprise,
    "entropy": total_entropy,
    "excess": excess,
    "surprise_shares": surprise_shares,
    "regional_surprise": regional_surprise,
    "regional_entropy": regional_entropy,
}


def statistics(t: Tables, names: tuple[str, ...]) -> Tensor:
    """The statistics of those names side by side, (n, s)."""
    return torch.cat([STATISTICS[name](t) for name in names], 1)


def _total(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1, keepdim=True)


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
