"""The output distribution of one pixel, exact over its levels and channels.

A level is written with one or more digits, the most significant one first. The digits of
all channels of a pixel form a chain: red before green before blue, and within a channel
the high digit before the low one. Given features f of the pixels before this one,

    p(d_1, ..., d_m | f) = prod_k p(d_k | f, d_1, ..., d_k-1)

Every factor is a table that sums to 1, so the distribution sums to 1 over all levels.
`PixelHead` computes each table by a softmax, `mixture.MixtureHead` from a mixture of
logistics.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Head(nn.Module):
    """p(pixel | features) as a chain of tables, one per digit, which subclasses compute.

    Args:
        channels: channels of a pixel.
        levels: levels of a channel.
        digits: digits per level; levels ** (1 / digits) must be an integer.
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, channels: int, levels: int, digits: int) -> None:
        super().__init__()
        self.channels = channels
        self.digits = digits
        self.base = round(levels ** (1 / digits))
        if self.base**digits != levels:
            raise ValueError(f"{levels} levels cannot be written with {digits} equal digits")
        self.factors = channels * digits

    def to_digits(self, x: Tensor) -> Tensor:
        """Writes levels (n, c, h, w) as digits, int64 (n, h, w, c * digits)."""
        levels = x.permute(0, 2, 3, 1).long()
        if self.digits == 1:
            return levels
        digits: list[Tensor] = []
        for _ in range(self.digits):
            rest = torch.div(levels, self.base, rounding_mode="trunc")
            digits.insert(0, levels - rest * self.base)
            levels = rest
        return torch.stack(digits, -1).flatten(-2)

    def log_probs(self, features: Tensor, x: Tensor) -> Tensor:
        """Log-probabilities of every digit, given the true digits before it.

        Args:
            features: (n, f, h, w).
            x: levels (n, c, h, w).

        Returns:
            Nats, (n, h, w, c * digits, base); the probabilities of each last axis sum to 1.
        """
        raise NotImplementedError

    def surprise(self, log_probs: Tensor, x: Tensor) -> Tensor:
        """-log p(pixel | before) in nats, (n, c, h, w), from the tables of `log_probs`."""
        taken = log_probs.gather(-1, self.to_digits(x)[..., None])[..., 0]
        return -taken.unflatten(-1, (self.channels, self.digits)).sum(-1).permute(0, 3, 1, 2)

    def expected(self, log_probs: Tensor, chances: Tensor) -> Tensor:
        """The expectation of `surprise` over pixels yet to be binarised, nats (n, c, h, w).

        Args:
            log_probs: (n, h, w, c, 2), of a head with two levels.
            chances: float (n, c, h, w), each pixel's probability of being 1, which must not
                depend on the pixels before it.
        """
        zero, one = log_probs.permute(0, 3, 1, 2, 4).unbind(-1)
        return -torch.lerp(zero, one, chances)

    def nats(self, features: Tensor, x: Tensor) -> Tensor:
        """-log p(pixel | before) in nats, (n, c, h, w), directly from features (n, f, h, w)."""
        return self.surprise(self.log_probs(features, x), x)


class PixelHead(Head):
    """A chain of softmaxes over digits, logits_k = W_k relu(f + sum_{j<k} E_j[d_j]) + b_k.

    With one digit per level this is the 256-way softmax of van den Oord et al. (2016); two
    digits of base 16 replace its 256 logits by 16 + 16.

    Args:
        features: size of f.
        channels: channels of a pixel.
        levels: levels of a channel.
        digits: digits per level.
    """

    def __init__(self, features: int, channels: int, levels: int, digits: int = 1) -> None:
        super().__init__(channels, levels, digits)
        self.weight = nn.Parameter(torch.zeros(self.factors, features, self.base))
        self.bias = nn.Parameter(torch.zeros(self.factors, self.base))
        # A single digit needs no embedding, and data-parallel training waits for the gradient of
        # every parameter that requires one.
        self.embedding = nn.Parameter(
            torch.randn(self.factors - 1, self.base, features) * 0.1, self.factors > 1
        )

    def log_probs(self, features: Tensor, x: Tensor) -> Tensor:
        """Log-probabilities of every digit, (n, h, w, c * digits, base), nats."""
        digits = self.to_digits(x)
        context = features.permute(0, 2, 3, 1)
        tables = []
        for k in range(self.factors):
            logits = torch.relu(context) @ self.weight[k] + self.bias[k]
            tables.append(torch.log_softmax(logits, -1))
            if k < self.factors - 1:
                context = context + functional.embedding(digits[..., k], self.embedding[k])
        return torch.stack(tables, -2)
