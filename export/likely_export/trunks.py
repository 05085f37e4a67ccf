"""The layers that encoders and decoders with one vector per picture share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def trunk(
    shape: tuple[int, int, int],
    *,
    convolutions: Sequence[int],
    convolution_depth: int,
    width: int,
    depth: int,
    dropout: float,
) -> nn.Sequential:
    """Returns a network from scaled pixels (n, c, h, w) to features (n, width).

    Args:
        shape: channels, rows, columns of a picture.
        convolutions: channels of each stage; a stage halves height and width.
        convolution_depth: 3x3 convolutions per stage; the last one has a stride of 2.
        width: features of every hidden layer.
        depth: linear hidden layers after the stages.
        dropout: share of hidden features dropped in training.
    """
    stages: list[nn.Module] = []
    channels, rows, columns = shape
    for wider in convolutions:
        for i in range(convolution_depth):
            stride = 2 if i + 1 == convolution_depth else 1
            stages += [nn.Conv2d(channels, wider, 3, stride, padding=1), nn.ReLU()]
            channels = wider
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
    return nn.Sequential(
        *stages, nn.Flatten(), *layers(channels * rows * columns, width, depth, dropout)
    )


def layers(inputs: int, width: int, depth: int, dropout: float) -> nn.Sequential:
    """Returns `depth` linear layers, each with ReLU and dropout, (..., inputs) to (..., width)."""
    modules: list[nn.Module] = []
    for _ in range(depth):
        modules += [nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(dropout)]
        inputs = width
    return nn.Sequential(*modules)
