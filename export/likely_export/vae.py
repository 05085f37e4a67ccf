"""Variational autoencoder of p(x), and what its decoder returns: means, deviations and draws.

This is a CVAE (`cvae`) without labels:

    z ~ N(0, I),    p(x|z) = prod_i p(x_i|z),    q(z|x) = N(mean, exp(log_variance))

Kingma and Welling, 2014 (https://arxiv.org/abs/1312.6114). The features of a picture are a
distribution, and so is the picture of given features. The graphs here return exact draws
from it, and the mean and standard deviation of every pixel. With two levels, these are
p(x_i = 1) = p and sqrt(p (1 - p)).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from likely_export import logistic
from likely_export.cvae import CVAE


class VAE(CVAE):
    """A lower bound on log p(x); all methods ignore their y."""


class Encode(nn.Module):
    """The graph that encodes a picture without a label."""

    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, float32 (n, z), of x, uint8 (n, c, h, w)."""
        return self.model.encode(x, _no_label(x))


class Draw(nn.Module):
    """The graph that draws a picture from the prior."""

    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.pixels = Pixels(model)

    def forward(self, eps: Tensor, gumbel: Tensor) -> Tensor:
        """x: levels, uint8 (n, c, h, w).

        Args:
            eps: standard normal noise (n, z).
            gumbel: standard Gumbel noise, (n, *noise_axes).
        """
        return self.pixels.draw(self.pixels.parameters_of(eps, _no_label(eps)), gumbel)


class Decode(nn.Module):
    """The graph that decodes features."""

    def __init__(self, model: CVAE) -> None:
        super().__init__()
        self.pixels = Pixels(model)

    def forward(
        self, z: Tensor, gumbel: Tensor, y: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and deviation, float32 (n, c, h, w) relative to the range, and a draw, uint8.

        Args:
            z: features (n, z), as returned by `Encode`.
            gumbel: standard Gumbel noise, (n, *noise_axes).
            y: labels, int64 (n,), for a model with labels.
        """
        parameters = self.pixels.parameters_of(z, _no_label(z) if y is None else y)
        mean, deviation = self.pixels.moments(parameters)
        return mean, deviation, self.pixels.draw(parameters, gumbel)


class Pixels(nn.Module):
    """The distributions of all pixels, from the parameters that `CVAE.decode` returns."""

    def __init__(self, model: CVAE) -> None:
        super().__init__()
        self.model = model

    def parameters_of(self, z: Tensor, y: Tensor) -> Tensor:
        """The parameters, given features (n, z) and labels (n,)."""
        return self.model.decode(self.model.sample_prior(z, y)[:, None], y)[:, 0]

    def moments(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every pixel, levels rescaled to [0, 1], (n, c, h, w)."""
        config = self.model.config
        if config.logistics:
            mean, deviation = logistic.moments(parameters, config.levels)
        else:
            levels = torch.linspace(0, 1, config.levels, device=parameters.device)
            probabilities = torch.softmax(parameters, -1)
            mean = probabilities @ levels
            away = (levels - mean[..., None]).square()
            deviation = torch.sqrt((probabilities * away).sum(-1))
        return mean.unflatten(1, config.shape), deviation.unflatten(1, config.shape)

    def draw(self, parameters: Tensor, gumbel: Tensor) -> Tensor:
        """Draws levels, uint8 (n, c, h, w), with standard Gumbel noise (n, h, w, c, ...)."""
        config = self.model.config
        noise = gumbel.permute(0, 3, 1, 2, 4).flatten(1, 3)
        if config.logistics:
            levels = logistic.draw(parameters, noise, config.levels)
        else:
            levels = (torch.log_softmax(parameters, -1) + noise).argmax(-1)
        return levels.to(torch.uint8).unflatten(1, config.shape)


def noise_axes(model: CVAE) -> tuple[int, int, int, int]:
    """Axes of a picture's Gumbel noise: rows, columns, channels, and numbers per channel.

    A mixture of logistics takes one number for each term and two for the level; a softmax takes
    one for each level.
    """
    c, h, w = model.config.shape
    terms = model.config.logistics
    return h, w, c, terms + 2 if terms else model.config.levels


def _no_label(rows: Tensor) -> Tensor:
    return torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
