"""Three taps along a row by four products for two columns, in place of six.

F(2, 3) of Winograd (Arithmetic Complexity of Computations, 1980); Lavin and Gray (2016)
brought it to convolutional networks. A row goes by its even and its odd columns: of each
pair of sums, half of what they multiply is shared. Sums agree with a convolution's but for
rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """A row of w columns by pairs; where w is odd, the last odd column lies outside."""

    even: Tensor  # (pairs, n, channels)
    odd: Tensor  # likewise

    @classmethod
    def of(cls, row: Tensor, edge: Tensor) -> Pairs:
        """The columns of a row (w, n, channels); what lies outside is edge (1, n, channels)."""
        if row.shape[0] % 2:
            row = torch.cat([row, edge])
        columns = row.unflatten(0, (-1, 2))
        return cls(columns[:, 0], columns[:, 1])

    def row(self, w: int) -> Tensor:
        """The w columns in their order, (w, n, channels)."""
        columns: Tensor = torch.stack(list(self), 1).flatten(0, 1)
        return columns[:w] if w % 2 else columns


def seen(row: Pairs, edge: Tensor, w: int) -> list[Tensor]:
    """What the four products read of a row of w columns, each (pairs, n, channels).

    Args:
        row: its columns.
        edge: (1, n, channels), what is seen outside: zeros.
        w: how many of the columns lie inside.
    """
    even, odd = row
    if w % 2:
        odd = torch.cat([odd[:-1], edge])
    left = torch.cat([edge, odd[:-1]])
    right = torch.cat([even[1:], edge])
    return [left - odd, even + odd, odd - even, even - right]


def factors(left: Tensor, middle: Tensor, right: Tensor) -> list[Tensor]:
    """What the four products multiply with, of a kernel's taps, each (channels, units)."""
    outer, inner = (left + right) / 2, middle / 2
    return [left, outer + inner, outer - inner, -right]


def sums(read: list[Tensor], weights: list[Tensor], bias: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of even and of odd columns, each (m, units), bias included.

    Each ends in a product, since ONNX Runtime fuses a product with the activation after it.

    Args:
        read: what the products read, four times (m, channels), of `seen`.
        weights: what they multiply it with, four times (channels, units), of `factors`.
        bias: (units,) or (m, units).
    """
    one, other = torch.addmm(bias, read[1], weights[1]), read[2] @ weights[2]
    return (
        torch.addmm(one + other, read[0], weights[0]),
        torch.addmm(one - other, read[3], weights[3]),
    )
