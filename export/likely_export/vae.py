"""Variational autoencoder of p(x), and what its decoder says: means, deviations and draws.

A CVAE (`cvae`) that is told no label:

    z ~ N(0, I),    p(x|z) = prod_i p(x_i|z),    q(z|x) = N(mean, exp(log_variance))

Kingma and Welling, 2014 (https://arxiv.org/abs/1312.6114). Its features are a distribution,
and what stands behind features is one too: of every pixel the graphs here give mean and
deviation, which for two levels are p(x_i = 1) and what follows from it, and exact draws.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from likely_export import logistic
from likely_export.cvae import CVAE


class VAE(CVAE):
    """log p(x) bounded from below; the y of every method is not looked at."""


class Encode(nn.Module):
    """The latent features of a picture without a label, as one graph."""

    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance float32 (n, z) of uint8 x (n, c, h, w)."""
        return self.model.encode(x, _no_label(x))


class Draw(nn.Module):
    """A picture from the prior, as one graph."""

    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.pixels = Pixels(model)

    def forward(self, eps: Tensor, gumbel: Tensor) -> Tensor:
        """x uint8 (n, c, h, w) of levels.

        Args:
            eps: standard normal noise (n, z).
            gumbel: standard Gumbel noise, `noise_axes` of it a picture.
        """
        return self.pixels.draw(self.pixels.parameters_of(eps, _no_label(eps)), gumbel)


class Decode(nn.Module):
    """What stands behind features, as one graph."""

    def __init__(self, model: CVAE) -> None:
        super().__init__()
        self.pixels = Pixels(model)

    def forward(
        self, z: Tensor, gumbel: Tensor, y: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and deviation float32 (n, c, h, w) in units of the range, and a draw uint8.

        Args:
            z: features (n, z) as `Encode` gives them.
            gumbel: standard Gumbel noise, `noise_axes` of it a picture.
            y: int64 (n,) of labels, for a model with labels.
        """
        parameters = self.pixels.parameters_of(z, _no_label(z) if y is None else y)
        mean, deviation = self.pixels.moments(parameters)
        return mean, deviation, self.pixels.draw(parameters, gumbel)


class Pixels(nn.Module):
    """The distributions of all pixels, as parameters that `CVAE.decode` gives."""

    def __init__(self, model: CVAE) -> None:
        super().__init__()
        self.model = model

    def parameters_of(self, z: Tensor, y: Tensor) -> Tensor:
        """The parameters given features (n, z) and labels (n,)."""
        return self.model.decode(self.model.drawn(z, y)[:, None], y)[:, 0]

    def moments(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every pixel, levels scaled to [0, 1], (n, c, h, w)."""
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
        """Levels uint8 (n, c, h, w), drawn with standard Gumbel noise (n, h, w, c, ...)."""
        config = self.model.config
        noise = gumbel.permute(0, 3, 1, 2, 4).flatten(1, 3)
        if config.logistics:
            levels = logistic.drawn(parameters, noise, config.levels)
        else:
            levels = (torch.log_softmax(parameters, -1) + noise).argmax(-1)
        return levels.to(torch.uint8).unflatten(1, config.shape)


def noise_axes(model: CVAE) -> tuple[int, int, int, int]:
    """The axes of a picture's Gumbel noise, rows, columns, channels and numbers a pixel.

    A mixture of logistics takes one for each term and two for the level, a softmax one a level.
    """
    c, h, w = model.config.shape
    terms = model.config.logistics
    return h, w, c, terms + 2 if terms else model.config.levels


def _no_label(rows: Tensor) -> Tensor:
    return torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
