"""What encoders and decoders of one vector a picture are made of: convolutions, then layers."""

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
    """Scaled pixels (n, c, h, w) to features (n, width).

    Args:
        shape: channels, rows, columns.
        convolutions: channels of the stages, each of which halves the picture.
        convolution_depth: layers of a stage, of 3 x 3 pixels; the last has a stride of 2.
        width: features of every hidden layer.
        depth: hidden layers behind the stages.
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
    """`depth` linear layers with rectifiers, (..., inputs) to (..., width)."""
    found: list[nn.Module] = []
    for _ in range(depth):
        found += [nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(dropout)]
        inputs = width
    return nn.Sequential(*found)
