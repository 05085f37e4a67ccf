"""A discriminative model: p(y|x) learnt directly, by a small convolutional network.

It knows nothing of p(x), so it labels whatever it is shown, even noise. Beside a density,
it gives Bayes' rule in the other direction,

    p(x|y) = p(y|x) p(x) / p(y).

Each stage is a 3x3 convolution, a ReLU and 2x2 max pooling, as in LeCun et al., 1998
(https://doi.org/10.1109/5.726791) except for the maximum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from likely.errors import InvalidInput
from likely_export import calibrate
from likely_export.data import Split
from likely_export.limits import at_least, in_unit_interval
from likely_export.moves import NO_MOVES, Moves


@dataclass(frozen=True)
class ClassifierConfig:
    """Configuration of a classifier.

    Attributes:
        shape: channels, rows, columns of a picture.
        levels: levels of a channel.
        labels: number of labels, at least 2.
        channels: channels of each stage; a stage halves height and width.
        width: features of the hidden layer.
        dropout: share of the hidden layer's inputs dropped in training.
        moves: augmentation of training pictures.
    """

    shape: tuple[int, int, int]
    levels: int
    labels: int
    channels: tuple[int, ...] = (16, 32, 64)
    width: int = 128
    dropout: float = 0.2
    moves: Moves = NO_MOVES

    def __post_init__(self) -> None:
        if isinstance(self.moves, Mapping):  # as stored in a file of weights
            object.__setattr__(self, "moves", Moves(**self.moves))
        if self.labels < 2:
            raise InvalidInput("labels", f"{self.labels}; a classifier needs at least 2")
        if not self.channels:
            raise InvalidInput("channels", "none are given; a classifier needs a stage")
        at_least(1, self, "channels", "width")
        in_unit_interval(self, "dropout")


class Classifier(nn.Module):
    """log p(y|x) of discrete pictures, divided by a fitted temperature."""

    temperature: Tensor

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        stages: list[nn.Module] = []
        c, height, width = config.shape
        for channels in config.channels:
            stages += [
                nn.Conv2d(c, channels, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
            c, height, width = channels, -(-height // 2), -(-width // 2)
        self.features = nn.Sequential(
            *stages,
            nn.Flatten(),
            nn.Dropout(config.dropout),
            nn.Linear(c * height * width, config.width),
            nn.ReLU(),
        )
        self.out = nn.Linear(config.width, config.labels)
        self.register_buffer("temperature", torch.ones(()))

    def logits(self, x: Tensor) -> Tensor:
        """log p(y|x) up to temperature and a constant, (n, labels), of x, uint8 (n, c, h, w)."""
        scaled = x.float() * (2 / (self.config.levels - 1)) - 1
        logits: Tensor = self.out(self.features(scaled))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """log p(y|x) in nats, (n, labels), of x, uint8 (n, c, h, w)."""
        return functional.log_softmax(self.logits(x) / self.temperature, 1)

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        """-log p(y|x) of augmented pictures in nats, (n,), for y: int64 (n,), at temperature 1."""
        moves = self.config.moves
        return self.evaluate(moves.apply(x) if moves else x, y)

    def evaluate(self, x: Tensor, y: Tensor) -> Tensor:
        """-log p(y|x) in nats, (n,), for y: int64 (n,), at temperature 1."""
        return functional.cross_entropy(self.logits(x), y, reduction="none")


@torch.no_grad()
def fit_temperature(model: Classifier, held_out: Split, batch: int = 256) -> float:
    """Sets and returns the temperature that maximises the likelihood of held-out labels.

    Guo et al., 2017 (https://arxiv.org/abs/1706.04599).
    """
    parts = [model.logits(part) for part in torch.from_numpy(held_out.x).split(batch)]
    even = np.full(model.config.labels, 1 / model.config.labels)
    temperature = calibrate.fit_temperature(torch.cat(parts).numpy(), held_out.y, even)
    model.temperature.fill_(temperature)
    return temperature
