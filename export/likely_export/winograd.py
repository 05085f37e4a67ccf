"""Convolutions with three taps along a row, by four products for two columns instead of six.

This is F(2, 3) of Winograd (Arithmetic Complexity of Computations, 1980), which Lavin and
Gray (2016) brought to convolutional networks. A row is processed as pairs of an even and an
odd column, which share half of the products. The results agree with those of a convolution
up to rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """A row of w columns as pairs; if w is odd, the last odd column lies outside the row."""

    even: Tensor  # (pairs, n, channels)
    odd: Tensor  # (pairs, n, channels)

    @classmethod
    def from_row(cls, row: Tensor, edge: Tensor) -> Pairs:
        """Splits a row (w, n, channels) into pairs; edge (1, n, channels) pads an odd width."""
        if row.shape[0] % 2:
            row = torch.cat([row, edge])
        columns = row.unflatten(0, (-1, 2))
        return cls(columns[:, 0], columns[:, 1])

    def row(self, w: int) -> Tensor:
        """The w columns in order, (w, n, channels)."""
        columns: Tensor = torch.stack(list(self), 1).flatten(0, 1)
        return columns[:w] if w % 2 else columns


def product_inputs(row: Pairs, edge: Tensor, w: int) -> list[Tensor]:
    """The inputs of the four products for a row of w columns, each (pairs, n, channels).

    Args:
        row: the columns.
        edge: zeros (1, n, channels), the values outside the row.
        w: number of columns inside the row.
    """
    even, odd = row
    if w % 2:
        odd = torch.cat([odd[:-1], edge])
    left = torch.cat([edge, odd[:-1]])
    right = torch.cat([even[1:], edge])
    return [left - odd, even + odd, odd - even, even - right]


def factors(left: Tensor, middle: Tensor, right: Tensor) -> list[Tensor]:
    """The matrices of the four products, each (channels, units), from a kernel's three taps."""
    outer, inner = (left + right) / 2, middle / 2
    return [left, outer + inner, outer - inner, -right]


def sums(read: list[Tensor], weights: list[Tensor], bias: Tensor) -> tuple[Tensor, Tensor]:
    """The results for even and for odd columns, bias included, each (m, units).

    Each ends in a matrix product, because ONNX Runtime fuses a product with the activation that
    follows it.

    Args:
        read: the four inputs of `product_inputs`, each (m, channels).
        weights: the four matrices of `factors`, each (channels, units).
        bias: (units,) or (m, units).
    """
    one, other = torch.addmm(bias, read[1], weights[1]), read[2] @ weights[2]
    return (
        torch.addmm(one + other, read[0], weights[0]),
        torch.addmm(one - other, read[3], weights[3]),
    )
