"""A mixture of discretised logistics as the joint distribution of a pixel's channels.

Salimans et al., 2017 (PixelCNN++, https://arxiv.org/abs/1701.05517): a pixel belongs to
term k of K with probability pi_k. Within a term, the channels are logistics, discretised
as in `logistic`. Their means depend linearly on the channels before them; with u the
levels rescaled to [-1, 1], the means of term k are

    mu_red,  mu_green + a u_red,  mu_blue + b u_red + c u_green

By the chain rule, each channel is a mixture too. Its weights are the posterior
probabilities of the terms given the channels before it:

    w_k(green) ~ pi_k p_k(red),  w_k(blue) ~ pi_k p_k(red) p_k(green)

The mass of a logistic between t - r and t + r, in units of its scale from its mean, is

    sigma(t + r) - sigma(t - r) = (1 - exp(-2 r)) / (1 + E + exp(-2 r) / E + exp(-2 r))

with E = exp(|t| - r), a form in which nothing cancels. A digit of a level stands for an
interval of levels, and its probability is the mixture's mass in that interval. The
distribution is therefore the same with any number of digits. Where it is needed as a
table (to draw, and for the entropy), two digits of base 16 take 32 masses per term
instead of 256.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from likely_export import logistic
from likely_export.heads import Head, PixelHead

UNIFORM_SHARE = 1e-5  # share of every term that is spread evenly over the levels
TAIL = 60.0  # in scales; further out, a logistic's mass vanishes beside `UNIFORM_SHARE` in float32


class _Terms(NamedTuple):
    """A channel's mixture, each (..., k): weights that sum to 1, means, 1 / s, and both tails.

    `below` and `above` are each term's mass beyond the intervals of the outermost levels. It is
    added to these levels.
    """

    weights: Tensor
    mean: Tensor
    sharpness: Tensor
    below: Tensor
    above: Tensor


class MixtureHead(Head):
    """p(pixel | features) as a mixture of discretised logistics.

    A share `UNIFORM_SHARE` of each term is spread evenly over the levels. This bounds the surprise
    (by 17 nats for 256 levels), and products of masses cannot underflow.

    Args:
        features: size of the features.
        channels: channels of a pixel.
        levels: levels of a channel.
        digits: digits per level.
        logistics: terms of the mixture.
    """

    def __init__(
        self, features: int, channels: int, levels: int, digits: int, logistics: int
    ) -> None:
        super().__init__(channels, levels, digits)
        self.levels = levels
        self.logistics = logistics
        # Rows of k: logits of pi; a mean per channel; a log s per channel; a coefficient per pair.
        rows = 1 + 2 * channels + channels * (channels - 1) // 2
        start = torch.zeros(rows, logistics)
        start[1 : 1 + channels] = torch.linspace(-1, 1, 2 * logistics + 1)[1::2]
        start[1 + channels : 1 + 2 * channels] = -1.5
        self.weight = nn.Parameter(torch.zeros(features, start.numel()))
        self.bias = nn.Parameter(start.flatten())
        for place in range(digits):
            parts = _intervals(levels, self.base ** (place + 1)).view(3, -1, self.base)
            self.register_buffer(f"intervals_{place}", parts.movedim(0, 1), persistent=False)

    def log_probs(self, features: Tensor, x: Tensor) -> Tensor:
        """Log-probabilities of every digit, (n, h, w, c * digits, base), nats."""
        digits, tables = self.to_digits(x), []

        def choose_true_digit(k: int, table: Tensor) -> Tensor:
            tables.append(torch.log_softmax(table, -1))
            return digits[..., k]

        self.choose_levels(self._mixture_parameters(features), choose_true_digit)
        return torch.stack(tables, -2)

    def nats(self, features: Tensor, x: Tensor) -> Tensor:
        """-log p(pixel | before) in nats, (n, c, h, w), from the masses of true levels alone."""
        rows = self._rows(self._mixture_parameters(features))
        weights = torch.softmax(rows[0], -1)
        before: list[Tensor] = []
        nats = []
        for channel, level in enumerate(x.permute(0, 2, 3, 1).long().unbind(-1)):
            joint = weights * self._mass(self._terms(rows, weights, channel, before), level)
            total = joint.sum(-1, keepdim=True)
            weights = joint / total
            nats.append(-torch.log(total[..., 0]))
            before.append(level)
        return torch.stack(nats, 1)

    def choose_levels(
        self, parameters: Tensor, choose: Callable[[int, Tensor], Tensor]
    ) -> list[Tensor]:
        """Chooses a pixel's levels digit by digit; returns int64 (...) for each channel.

        Args:
            parameters: (..., p), the product of relu(features) and the weights, with the bias.
            choose: returns digit k, int64 (...), given k and the logarithms (..., base) of the
                masses of its values.
        """
        rows = self._rows(parameters)
        weights = torch.softmax(rows[0], -1)
        levels: list[Tensor] = []
        for channel in range(self.channels):
            terms = self._terms(rows, weights, channel, levels)
            level = None
            for place in range(self.digits):
                table = self._table(terms, place, level)
                digit = choose(channel * self.digits + place, table)
                level = digit if level is None else level * self.base + digit
            assert level is not None
            levels.append(level)
            if channel < self.channels - 1:
                joint = weights * self._mass(terms, level)
                weights = joint / joint.sum(-1, keepdim=True)
        return levels

    def _mixture_parameters(self, features: Tensor) -> Tensor:
        return torch.relu(features.permute(0, 2, 3, 1)) @ self.weight + self.bias

    def _rows(self, parameters: Tensor) -> tuple[Tensor, ...]:
        return parameters.unflatten(-1, (-1, self.logistics)).unbind(-2)

    def _terms(
        self, rows: tuple[Tensor, ...], weights: Tensor, channel: int, before: list[Tensor]
    ) -> _Terms:
        """The channel's mixture, given the levels (...) of the channels before it."""
        mean, log_scale = rows[1 + channel], rows[1 + self.channels + channel]
        first = 1 + 2 * self.channels + channel * (channel - 1) // 2
        for other, level in enumerate(before[:channel]):
            scaled = level[..., None].to(mean.dtype) * (2 / (self.levels - 1)) - 1
            mean = mean + torch.tanh(rows[first + other]) * scaled
        sharpness = torch.exp(-log_scale.clamp(logistic.SHARPEST, logistic.FLATTEST))
        edge = 1 + 1 / (self.levels - 1)
        below, above = _sigmoid(-sharpness * (mean + edge)), _sigmoid(sharpness * (mean - edge))
        return _Terms(weights, mean, sharpness, below, above)

    def _table(self, terms: _Terms, place: int, before: Tensor | None) -> Tensor:
        """log of the mixture's mass at every digit, (..., base), given the digits before it."""
        width = self.base ** (self.digits - 1 - place)
        intervals = getattr(self, f"intervals_{place}")
        if before is None:
            centre, first, last = intervals[0].unbind(0)
        else:
            rows = functional.embedding(before, intervals.flatten(1))
            centre, first, last = rows.chunk(3, -1)
        half = terms.sharpness * (width / (self.levels - 1))
        weights = terms.weights * logistic.one_minus_exp(2 * half)
        columns = (part[..., None] for part in (terms.mean, terms.sharpness, half))
        mass = (weights[..., None] * _scaled_mass(centre[..., None, :], *columns)).sum(-2)
        mass = mass + first * (terms.weights * terms.below).sum(-1, keepdim=True)
        mass = mass + last * (terms.weights * terms.above).sum(-1, keepdim=True)
        return torch.log((1 - UNIFORM_SHARE) * mass + UNIFORM_SHARE * width / self.levels)

    def _mass(self, terms: _Terms, level: Tensor) -> Tensor:
        """The probability of a level (...) under every term, (..., k)."""
        intervals = getattr(self, f"intervals_{self.digits - 1}").transpose(1, 2).flatten(0, 1)
        centre, first, last = functional.embedding(level, intervals).chunk(3, -1)
        half = terms.sharpness / (self.levels - 1)
        mass = logistic.one_minus_exp(2 * half) * _scaled_mass(
            centre, terms.mean, terms.sharpness, half
        )
        mass = mass + first * terms.below + last * terms.above
        return (1 - UNIFORM_SHARE) * mass + UNIFORM_SHARE / self.levels


def _scaled_mass(centre: Tensor, mean: Tensor, sharpness: Tensor, half: Tensor) -> Tensor:
    """The mass of intervals, divided by 1 - exp(-2 r), where r is half their width in scales."""
    beyond = ((centre - mean) * sharpness).abs() - half
    grown = torch.exp(beyond.clamp(-TAIL, TAIL))
    shrunk = torch.exp(-2 * half)
    return 1 / (grown + shrunk / grown + (1 + shrunk))


def _sigmoid(t: Tensor) -> Tensor:
    """The logistic function, accurate in its tail too: ONNX Runtime's Sigmoid ends at 1e-8."""
    return 1 / (1 + torch.exp(-t.clamp(min=-TAIL)))


def head(features: int, channels: int, levels: int, digits: int, logistics: int) -> Head:
    """Returns a mixture head with that many logistics, or a softmax head if there are none."""
    if logistics:
        return MixtureHead(features, channels, levels, digits, logistics)
    return PixelHead(features, channels, levels, digits)


def _intervals(levels: int, count: int) -> Tensor:
    """Centres in half-ranges, and indicators of the first and the last interval, (3, count)."""
    width = levels // count
    centre = (torch.arange(count) * width + (width - 1) / 2) * (2 / (levels - 1)) - 1
    ends = torch.eye(count)
    return torch.stack([centre, ends[0], ends[-1]])
