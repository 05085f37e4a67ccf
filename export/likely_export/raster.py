"""What all samplers share: they draw pixel by pixel in raster order, with the noise as input.

For Gumbel noise g, argmax(logits + g) is a sample of softmax(logits). So t * g samples
at temperature t, and noise that is far larger at one level than at the others fixes the
pixel to that level: completion needs no graph of its own.

In the layout (w * n, channels), columns come before pictures. A row's windows are then
one Gather, and matrix products are large in the batch dimension. Levels are not scaled
to [-1, 1]; the scaling is folded into the stem's weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from likely_export.autoregressive import Autoregressive
from likely_export.drawing import detached_copy, pixel_drawer


class RasterSampler(nn.Module):
    """The stem's view of the pixels already drawn, and the draw of the next pixel.

    The weights are copied, as matrices by which a row or a pixel is multiplied.
    """

    stem_vertical: Tensor
    stem_horizontal: Tensor
    mix: Tensor
    mix_bias: Tensor

    def __init__(self, model: Autoregressive) -> None:
        super().__init__()
        config = model.config
        self.model = model
        self.channels, self.height, self.width = config.shape
        # The level that scales to 0, which fills the padding outside the picture.
        self.blank = (config.levels - 1) / 2
        scale = 2 / (config.levels - 1)
        taps_vertical, taps_horizontal = self.taps()
        # One extra feature, always 1, multiplies the biases of the head.
        self.register_copies(
            stem_vertical=taps_vertical * scale,
            stem_horizontal=taps_horizontal * scale,
            mix=functional.pad(model.mix.weight[:, :, 0, 0].T, (0, 1)),
            mix_bias=functional.pad(bias_of(model.mix), (0, 1), value=1.0),
        )
        self.draw = pixel_drawer(model.head)

    def register_copies(self, **matrices: Tensor) -> None:
        """Copies matrices into buffers with these names."""
        for name, matrix in matrices.items():
            self.register_buffer(name, detached_copy(matrix))

    def taps(self) -> tuple[Tensor, Tensor]:
        """The stem's kernels above and to the left, for scaled levels, each (taps * c, width)."""
        vertical, horizontal = self.model.stem_vertical, self.model.stem_horizontal
        return (
            vertical.weight.permute(3, 2, 1, 0).flatten(0, 2),
            horizontal.weight[:, :, 0].permute(2, 1, 0).flatten(0, 1),
        )

    def stem_biases(self) -> tuple[Tensor, Tensor]:
        """The stem's biases above and to the left, for raw levels, each (width,)."""
        vertical, horizontal = self.taps()
        return (
            bias_of(self.model.stem_vertical) - vertical.sum(0),
            bias_of(self.model.stem_horizontal) - horizontal.sum(0),
        )

    def mix_biases(self, y: Tensor | None, n: int) -> Tensor:
        """The bias of `mix` with the label's added, (n, head + 1); (head + 1,) without labels."""
        if y is None:
            return self.mix_bias
        label = self.model.label(y)
        bias = self.mix_bias + torch.cat([label, torch.zeros_like(label[:, :1])], -1)
        return bias + bias.new_full((n, 1), 0.0)

    def places(self, n: int) -> Tensor:
        """Index of each first-row pixel among the noises of all n * h * w pixels, (w, n)."""
        return torch.arange(self.width)[:, None] + torch.arange(n) * (self.height * self.width)


def bias_of(conv: nn.Conv2d) -> Tensor:
    """The bias of a convolution that is known to have one."""
    assert conv.bias is not None
    return conv.bias


def windows(row: Tensor, edge: Tensor, taps: Tensor) -> Tensor:
    """Joins each column (w * n, k) with its neighbours in the row: (w * n, taps * k)."""
    return functional.embedding(taps, torch.cat([edge, row, edge])).flatten(1)


def push_pixel(window: Tensor, latest: Tensor) -> Tensor:
    """Drops the oldest pixel of a window (..., k * c), and appends the latest (..., c)."""
    channels = latest.shape[-1]
    if window.shape[-1] == channels:
        return latest.clone()
    return torch.cat([window[..., channels:], latest], -1)
