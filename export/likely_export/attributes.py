"""Measurable attributes of a bright figure on a dark ground: slant, stroke width and size.

Let ink a be the level relative to its range, at row r and column c, with m = sum a, means r0
and c0, and central moments mu_pq = sum a (c - c0)^p (r - r0)^q / m. The attributes of pictures
without ink are 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from likely.answers import Doubles, Pixels

_NONE = 1e-12


def slant(ink: Doubles) -> Doubles:
    """-mu_11 / mu_02: columns to the right per row upwards, by least squares, (n, h, w) to (n,)."""
    return -_ratio(_moment(ink, 1, 1), _moment(ink, 0, 2))


def stroke(ink: Doubles) -> Doubles:
    """2 m / sum |grad a|: twice the area over the length of the outline, in pixels, (n,).

    For a line much longer than wide, this is its width, because the outline runs along both sides.
    """
    padded = np.pad(ink, ((0, 0), (1, 1), (1, 1)))
    down = np.diff(padded, axis=1)[:, :, :-1]
    across = np.diff(padded, axis=2)[:, :-1, :]
    return _ratio(2 * ink.sum((1, 2)), np.hypot(down, across).sum((1, 2)))


def size(ink: Doubles) -> Doubles:
    """sqrt(mu_20 + mu_02): the root mean square distance from the centre, in pixels, (n,)."""
    distance: Doubles = np.sqrt(_moment(ink, 2, 0) + _moment(ink, 0, 2))
    return distance


ATTRIBUTES: Mapping[str, Callable[[Doubles], Doubles]] = MappingProxyType(
    {"slant": slant, "stroke": stroke, "size": size}
)


def measured(name: str, x: Pixels, levels: int) -> Doubles:
    """Measures pictures x, uint8 (n, c, h, w), with ink averaged over channels, (n,)."""
    return ATTRIBUTES[name](x.mean(1) / (levels - 1))


def _moment(ink: Doubles, p: int, q: int) -> Doubles:
    mass = ink.sum((1, 2))
    rows, columns = np.arange(ink.shape[1])[:, None], np.arange(ink.shape[2])
    r0 = _ratio((ink * rows).sum((1, 2)), mass)[:, None, None]
    c0 = _ratio((ink * columns).sum((1, 2)), mass)[:, None, None]
    return _ratio((ink * (columns - c0) ** p * (rows - r0) ** q).sum((1, 2)), mass)


def _ratio(above: Doubles, below: Doubles) -> Doubles:
    """above / below, or 0 where below is 0."""
    ratio: Doubles = np.where(below > _NONE, above / np.maximum(below, _NONE), 0.0)
    return ratio
