"""Draws one pixel from features and noise, for each kind of head."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from likely_export.heads import Head, PixelHead
from likely_export.mixture import MixtureHead


class Softmaxes(nn.Module):
    """Draws a pixel from a chain of softmaxes."""

    logits: Tensor
    embedding: Tensor

    def __init__(self, head: PixelHead) -> None:
        super().__init__()
        self.head = head
        logits = torch.cat([head.weight, head.bias[:, None]], 1)
        self.register_buffer("logits", detached_copy(logits))
        self.register_buffer("embedding", detached_copy(functional.pad(head.embedding, (0, 1))))

    def forward(self, features: Tensor, noise: Tensor) -> Tensor:
        """Levels of one pixel, int64 (n, c), drawn digit by digit.

        Args:
            features: (n, head + 1), of which the last is 1.
            noise: standard Gumbel noise, (n, c * digits * base).
        """
        head = self.head
        noises = noise.chunk(head.factors, -1) if head.factors > 1 else [noise]
        digits: list[Tensor] = []
        for k, part in enumerate(noises):
            if k:
                features = features + self.embedding[k - 1].index_select(0, digits[-1][:, 0])
            logits = torch.addmm(part, torch.relu(features), self.logits[k])
            digits.append(logits.argmax(-1, keepdim=True))
        levels = []
        for first in range(0, head.factors, head.digits):
            level = digits[first]
            for digit in digits[first + 1 : first + head.digits]:
                level = level * head.base + digit
            levels.append(level)
        return torch.cat(levels, -1) if len(levels) > 1 else levels[0]


class Mixture(nn.Module):
    """Draws a pixel from a mixture of logistics, by the masses of its digits.

    Drawing the term and the level from two noise variables would cost less. But then no noise
    could fix a level, and a temperature would mean something else than for softmaxes.
    """

    weight: Tensor

    def __init__(self, head: MixtureHead) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("weight", detached_copy(torch.cat([head.weight, head.bias[None]])))

    def forward(self, features: Tensor, noise: Tensor) -> Tensor:
        """Levels of one pixel, int64 (n, c); the arguments are those of `Softmaxes`."""
        noises = noise.chunk(self.head.factors, -1) if self.head.factors > 1 else [noise]

        def draw_digit(k: int, table: Tensor) -> Tensor:
            return (table + noises[k]).argmax(-1)

        levels = self.head.choose_levels(torch.relu(features) @ self.weight, draw_digit)
        return torch.stack(levels, -1)


def pixel_drawer(head: Head) -> nn.Module:
    """Returns the module that draws pixels for this head."""
    if isinstance(head, MixtureHead):
        return Mixture(head)
    return Softmaxes(cast(PixelHead, head))


def detached_copy(matrix: Tensor) -> Tensor:
    """Returns a detached copy that is contiguous row by row."""
    return matrix.detach().clone(memory_format=torch.contiguous_format)
