"""A PixelCNN that sees four neighbours: the likelihood that texture alone explains.

The full model's log-likelihood beyond this one's is the contribution of shape. Simple
pictures have a high likelihood under any model, and the difference removes this (Ren et
al., 2019, https://arxiv.org/abs/1906.02845; Zhang et al., 2021,
https://arxiv.org/abs/2106.08461). The neighbours n of the pixel o:

    n n n
    n o .
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from likely_export import mixture
from likely_export.limits import at_least


@dataclass(frozen=True)
class LocalConfig:
    """Configuration of a local PixelCNN.

    Attributes:
        shape: channels, rows, columns of a picture.
        levels: levels of a channel.
        labels: number of labels in the data; a local model does not use them.
        channels: hidden features per pixel.
        layers: hidden 1x1 layers after the first look at the neighbours.
        digits: digits per level (2 for 256 levels: two nibbles).
        logistics: number of discretised logistics in a mixture that replaces the softmax; 0
            for a softmax.
    """

    shape: tuple[int, int, int]
    levels: int
    labels: int = 0
    channels: int = 32
    layers: int = 2
    digits: int = 1
    logistics: int = 0

    def __post_init__(self) -> None:
        at_least(1, self, "channels", "digits")
        at_least(0, self, "layers", "logistics")


class LocalPixelCNN(nn.Module):
    """log p(x) by the chain rule, where each pixel depends on its four nearest predecessors.

    The model knows neither positions nor labels. In addition to the neighbours' levels it is
    told which of them are 0, the background of many data sets.
    """

    def __init__(self, config: LocalConfig) -> None:
        super().__init__()
        self.config = config
        c = config.shape[0]
        self.above = nn.Conv2d(2 * c, config.channels, (1, 3))
        self.left = nn.Conv2d(2 * c, config.channels, 1)
        self.mix = nn.ModuleList(
            nn.Conv2d(config.channels, config.channels, 1) for _ in range(config.layers)
        )
        self.head = mixture.head(config.channels, c, config.levels, config.digits, config.logistics)

    def features(self, x: Tensor) -> Tensor:
        """The head's input from each pixel's neighbours, (n, channels, h, w), of uint8 x."""
        z = x.float() * (2 / (self.config.levels - 1)) - 1
        z = torch.cat([z, (z < -1 + 1e-6).float()], 1)
        features = self.above(functional.pad(z[:, :, :-1], (1, 1, 1, 0)))
        features = features + self.left(functional.pad(z[..., :-1], (1, 0)))
        for layer in self.mix:
            features = layer(torch.relu(features))
        return features

    def log_probs(self, x: Tensor) -> Tensor:
        """Log-probabilities of every digit (n, h, w, c * digits, base), nats, of uint8 x."""
        return self.head.log_probs(self.features(x), x)

    def surprise(self, x: Tensor) -> Tensor:
        """-log p(pixel | neighbours before it) in nats, (n, c, h, w)."""
        return self.head.nats(self.features(x), x)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, (n,)."""
        return -self.surprise(x).flatten(1).sum(1)

    def objective(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        """-log p(x) in nats, (n,)."""
        return -self.log_prob(x)

    evaluate = objective
