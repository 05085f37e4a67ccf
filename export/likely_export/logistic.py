"""Mixtures of logistic distributions, discretised exactly to levels.

Salimans et al., 2017 (PixelCNN++, https://arxiv.org/abs/1701.05517), equations
2 and 3: level l of L stands for the interval of width d = 2 / (L - 1) around
u = 2 l / (L - 1) - 1. The first and the last level also take the tails, so the
probabilities of all levels sum to 1:

    p(l) = sum_k pi_k [sigma((u + d/2 - mu_k) / s_k) - sigma((u - d/2 - mu_k) / s_k)]

If b > a are the two arguments of one term, the form

    sigma(b) - sigma(a) = sigma(b) sigma(-a) (1 - exp(a - b))

avoids cancellation, and log sigma(t) = log sigma(|t|) - relu(-t) keeps its logarithm
from overflowing.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHARPEST, FLATTEST = -7.0, 2.0  # bounds of log s, in units of half the range
TAIL = 100.0  # stands for infinity: sigma and tanh round to 1 there
LEVELS_PER_STEP = 17  # levels per step, so that the intermediate results of a batch fit a cache


def log_prob(parameters: Tensor, x: Tensor, levels: int) -> Tensor:
    """log p(x) in nats, (..., d).

    Args:
        parameters: (..., 3, k, d): logits of pi, means mu, and log s before clamping.
        x: levels as floats, broadcast against (..., d).
        levels: number of levels L.
    """
    logits, mean, log_scale = parameters.unbind(-3)
    x = x[..., None, :]
    sharpness = torch.exp(-log_scale.clamp(SHARPEST, FLATTEST))
    half = 1 / (levels - 1)
    centre = x * (2 * half) - 1 - mean
    is_first, is_last = x < 0.5, x > levels - 1.5
    b = torch.where(is_last, TAIL, (centre + half) * sharpness)
    a = torch.where(is_first, -TAIL, (centre - half) * sharpness)
    inner = one_minus_exp(torch.where(is_first | is_last, TAIL, 2 * half * sharpness))
    product = torch.sigmoid(b.abs()) * torch.sigmoid(a.abs()) * inner
    terms = torch.log(product) - torch.relu(-b) - torch.relu(a)
    return torch.logsumexp(torch.log_softmax(logits, -2) + terms, -2)


def one_minus_exp(t: Tensor) -> Tensor:
    """1 - exp(-t) for t > 0, accurate also for small t."""
    half = torch.tanh(t / 2)
    return 2 * half / (1 + half)


def log_probs(parameters: Tensor, levels: int) -> Tensor:
    """log p of every level in nats, (..., d, levels), from parameters (..., 3, k, d)."""
    d = parameters.shape[-1]
    x = torch.arange(levels, dtype=parameters.dtype, device=parameters.device)
    every = parameters[..., None].expand(*parameters.shape, levels).flatten(-2)
    return torch.unflatten(log_prob(every, x.repeat(d), levels), -1, (d, levels))


def clamped_mean(parameters: Tensor) -> Tensor:
    """The mixture's mean with each term's mean clamped to the range, rescaled to [0, 1], (..., d).

    `moments` has that of the discretised levels.
    """
    logits, mean, _ = parameters.unbind(-3)
    means = (torch.softmax(logits, -2) * mean.clamp(-1, 1)).sum(-2)
    return (means + 1) / 2


def moments(parameters: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the discretised mixture, levels rescaled to [0, 1], (..., d).

    For any level c, with sums of positive terms over the levels l from 1 to L - 1, so that no sum
    loses digits by cancellation,

        E[x - c]     = sum_{l > c} p(x >= l) - sum_{l <= c} p(x < l)
        E[(x - c)^2] = sum_{l > c} p(x >= l) (2 (l - c) - 1) + sum_{l <= c} p(x < l) (2 (c - l) + 1)
    """
    logits, mean, log_scale = parameters.unbind(-3)
    weight = torch.softmax(logits, -2)
    sharpness = torch.exp(-log_scale.clamp(SHARPEST, FLATTEST))
    pivot = torch.round(clamped_mean(parameters) * (levels - 1))
    first, second = torch.zeros_like(pivot), torch.zeros_like(pivot)
    thresholds = torch.arange(1, levels, dtype=parameters.dtype, device=parameters.device)
    for part in thresholds.split(LEVELS_PER_STEP):
        side = torch.where(part > pivot[..., None], 1.0, -1.0)
        edge = (2 * part - 1) / (levels - 1) - 1
        beyond = (edge - mean[..., None]) * sharpness[..., None]
        share = (weight[..., None] * torch.sigmoid(-side[..., None, :, :] * beyond)).sum(-3)
        first = first + (share * side).sum(-1)
        second = second + (share * (2 * (part - pivot[..., None]) - 1).abs()).sum(-1)
    variance = torch.relu(second - first.square())
    return (pivot + first) / (levels - 1), torch.sqrt(variance) / (levels - 1)


def draw(parameters: Tensor, gumbel: Tensor, levels: int) -> Tensor:
    """Draws levels (..., d), as floats, exactly from standard Gumbel noise (..., d, k + 2).

    The first k numbers choose the term. The difference of the last two is standard logistic
    noise; scaled and shifted by the term, it falls into the interval of the level drawn.
    """
    logits, mean, log_scale = parameters.transpose(-1, -2).unbind(-3)
    chosen = (torch.log_softmax(logits, -1) + gumbel[..., :-2]).argmax(-1, keepdim=True)
    scale = torch.exp(log_scale.gather(-1, chosen).clamp(SHARPEST, FLATTEST))[..., 0]
    u = mean.gather(-1, chosen)[..., 0] + scale * (gumbel[..., -2] - gumbel[..., -1])
    return torch.round((u + 1) * ((levels - 1) / 2)).clamp(0, levels - 1)
