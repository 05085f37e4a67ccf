"""Autoencoder: features of a picture, and the picture that features stand for.

    z = f(x),    r = g(z)

Training minimises the cross-entropy -sum_i x_i log r_i + (1 - x_i) log(1 - r_i) of levels
x rescaled to [0, 1] (Hinton and Salakhutdinov, 2006,
https://doi.org/10.1126/science.1127647). There is no density: z has no distribution, so
nothing can be sampled, and r is a picture, not a distribution of pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from likely_export.limits import at_least, in_unit_interval
from likely_export.moves import NO_MOVES, Moves
from likely_export.trunks import layers, trunk


@dataclass(frozen=True)
class AutoencoderConfig:
    """Configuration of an autoencoder.

    Attributes:
        shape: channels, rows, columns of a picture.
        levels: levels of a channel.
        labels: number of labels in the data; an autoencoder does not use them.
        latent: size of z.
        width: features of every hidden layer.
        depth: hidden layers of the encoder's trunk, and of the decoder.
        dropout: share of hidden features dropped in training.
        convolutions: channels of the trunk's first stages, each of which halves height and
            width; empty for a trunk of linear layers only.
        convolution_depth: 3x3 convolutions per stage; the last one has a stride of 2.
        moves: augmentation of training pictures.
    """

    shape: tuple[int, int, int]
    levels: int
    labels: int = 0
    latent: int = 16
    width: int = 256
    depth: int = 1
    dropout: float = 0.0
    convolutions: tuple[int, ...] = ()
    convolution_depth: int = 1
    moves: Moves = NO_MOVES

    def __post_init__(self) -> None:
        if isinstance(self.moves, Mapping):  # as stored in a file of weights
            object.__setattr__(self, "moves", Moves(**self.moves))
        at_least(1, self, "latent", "width", "depth", "convolutions", "convolution_depth")
        in_unit_interval(self, "dropout")


class Autoencoder(nn.Module):
    """Features and reconstructions of discrete pictures."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.trunk = trunk(
            config.shape,
            convolutions=config.convolutions,
            convolution_depth=config.convolution_depth,
            width=width,
            depth=config.depth,
            dropout=config.dropout,
        )
        self.features_out = nn.Linear(width, config.latent)
        self.decoder = layers(config.latent, width, config.depth, config.dropout)
        c, h, w = config.shape
        self.decoder_out = nn.Linear(width, c * h * w)

    def encode(self, x: Tensor) -> Tensor:
        """The features (n, z) of x, uint8 (n, c, h, w)."""
        features: Tensor = self.features_out(self.trunk(self._scaled(x) * 2 - 1))
        return features

    def decode(self, z: Tensor) -> Tensor:
        """The pictures (n, c, h, w) that features (n, z) stand for, levels rescaled to [0, 1]."""
        return torch.sigmoid(self._log_odds(z))

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        """The training loss in nats, (n,): the cross-entropy, which is no log-likelihood."""
        return self.evaluate(self.config.moves.apply(x) if self.config.moves else x, y)

    def evaluate(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002, the loop's signature
        """The cross-entropy of pictures without augmentation, nats (n,); y is ignored."""
        log_odds = self._log_odds(self.encode(x))
        lost = functional.binary_cross_entropy_with_logits(
            log_odds, self._scaled(x), reduction="none"
        )
        return lost.flatten(1).sum(1)

    def _scaled(self, x: Tensor) -> Tensor:
        return x.float() / (self.config.levels - 1)

    def _log_odds(self, z: Tensor) -> Tensor:
        log_odds: Tensor = self.decoder_out(self.decoder(z))
        return log_odds.unflatten(1, self.config.shape)


class Encode(nn.Module):
    """The graph that encodes a picture."""

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Features, float32 (n, z), of x, uint8 (n, c, h, w)."""
        return self.model.encode(x)


class Decode(nn.Module):
    """The graph that decodes features."""

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, z: Tensor) -> Tensor:
        """Levels rescaled to [0, 1], float32 (n, c, h, w), of features (n, z)."""
        return self.model.decode(z)
