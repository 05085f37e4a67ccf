"""The draw of one pixel from features and noise, whatever its distribution is written as."""

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
        self.register_buffer("logits", copied(logits))
        self.register_buffer("embedding", copied(functional.pad(head.embedding, (0, 1))))

    def forward(self, features: Tensor, noise: Tensor) -> Tensor:
        """Levels (n, c) of one pixel, int64, digit by digit.

        Args:
            features: (n, head + 1), the last of them 1.
            noise: (n, c * digits * base), standard Gumbel noise.
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

    Not term and level by two noises, which costs less: noise would fix no level,
    and a temperature would be another one than the softmaxes'.
    """

    weight: Tensor

    def __init__(self, head: MixtureHead) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("weight", copied(torch.cat([head.weight, head.bias[None]])))

    def forward(self, features: Tensor, noise: Tensor) -> Tensor:
        """Levels (n, c) of one pixel, int64; arguments as those of `Softmaxes`."""
        noises = noise.chunk(self.head.factors, -1) if self.head.factors > 1 else [noise]

        def loudest(k: int, table: Tensor) -> Tensor:
            return (table + noises[k]).argmax(-1)

        levels = self.head.chain(torch.relu(features) @ self.weight, loudest)
        return torch.stack(levels, -1)


def drawing(head: Head) -> nn.Module:
    """What draws a pixel of that head."""
    if isinstance(head, MixtureHead):
        return Mixture(head)
    return Softmaxes(cast(PixelHead, head))


def copied(matrix: Tensor) -> Tensor:
    """A copy of its own, rows one after the other."""
    return matrix.detach().clone(memory_format=torch.contiguous_format)
