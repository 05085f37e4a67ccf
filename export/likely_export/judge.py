"""A small convolutional classifier: an independent judge of a bundle's draws and decisions.

It shares nothing with the models that it judges, and learns from the training part or from
draws alone.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from likely.answers import Doubles, Labels, Pixels

BATCH = 64
RATE = 3e-3


class Judge(nn.Module):
    """p(y|x) by three convolutions.

    Args:
        shape: channels, rows, columns of a picture.
        levels: number of levels.
        labels: number of labels.
    """

    def __init__(self, shape: tuple[int, int, int], levels: int, labels: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.levels = levels
        self.features = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.Conv2d(32, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * math.ceil(height / 4) * math.ceil(width / 4), 128),
            nn.ReLU(),
        )
        self.out = nn.Linear(128, labels)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, labels) of x, uint8 (n, c, h, w)."""
        logits: Tensor = self.out(self.features(x.float() * (2 / (self.levels - 1)) - 1))
        return logits

    @torch.no_grad()
    def posterior(self, x: Pixels) -> Doubles:
        """p(y|x), (n, labels), of x, uint8 (n, c, h, w)."""
        self.eval()
        parts = [torch.softmax(self(part), 1) for part in torch.from_numpy(x).split(256)]
        posterior: Doubles = torch.cat(parts).double().numpy()
        return posterior


def train_judge(
    x: Pixels, y: Labels, levels: int, labels: int, *, steps: int, seed: int = 0
) -> Judge:
    """Trains a judge on these pictures.

    Args:
        x: uint8 (n, c, h, w).
        y: labels, int64 (n,).
        levels: number of levels.
        labels: number of labels.
        steps: number of steps, of 64 pictures each.
        seed: seed of weights and order.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge((x.shape[1], x.shape[2], x.shape[3]), levels, labels)
        judge = judge.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimiser = torch.optim.AdamW(judge.parameters(), RATE, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
        order = np.random.Generator(np.random.Philox(key=[seed, 3]))
        judge.train()
        for rows in _rows(len(x), steps, order):
            loss = functional.cross_entropy(
                judge(torch.from_numpy(x[rows])), torch.from_numpy(y[rows]), label_smoothing=0.02
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return judge.eval()


def _rows(n: int, steps: int, order: np.random.Generator) -> list[npt.NDArray[np.int64]]:
    """The rows of each step: every picture is used once before any is used twice."""
    size = min(BATCH, n)
    rounds = -(-steps * size // n)
    stream = np.concatenate([order.permutation(n) for _ in range(rounds)])
    return [stream[step * size : (step + 1) * size] for step in range(steps)]
