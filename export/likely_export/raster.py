"""What every sampler does: it draws pixel after pixel, row after row, with the noise as input.

Gumbel noise g: argmax(logits + g) draws from softmax(logits). So t * g in its place
draws at temperature t, and noise that towers at one level fixes a pixel to it:
completion needs no other graph.

Columns stand before pictures, (w * n, channels): a row's windows are one Gather,
and products are large where the batch lies. Levels stay raw, and scaling them to
[-1, 1] is folded into the stem.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from likely_export.autoregressive import Autoregressive
from likely_export.drawing import copied, drawing


class RasterSampler(nn.Module):
    """The first look at pixels already drawn, and the draw of the next one.

    The weights are copied, as matrices that a row or a pixel is multiplied with.
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
        # The level that scales to 0, which is what lies outside the picture.
        self.blank = (config.levels - 1) / 2
        scale = 2 / (config.levels - 1)
        taps_vertical, taps_horizontal = self.taps()
        # One more feature, always 1, carries the biases of the head.
        self.keep(
            stem_vertical=taps_vertical * scale,
            stem_horizontal=taps_horizontal * scale,
            mix=functional.pad(model.mix.weight[:, :, 0, 0].T, (0, 1)),
            mix_bias=functional.pad(bias_of(model.mix), (0, 1), value=1.0),
        )
        self.draw = drawing(model.head)

    def keep(self, **matrices: Tensor) -> None:
        """Copies matrices into buffers of those names."""
        for name, matrix in matrices.items():
            self.register_buffer(name, copied(matrix))

    def taps(self) -> tuple[Tensor, Tensor]:
        """The stem's kernels above and to the left, for scaled levels, each (taps, width)."""
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
        """The bias of the last hidden layer's mix, the label's included, broadcast over n."""
        if y is None:
            return self.mix_bias
        label = self.model.label(y)
        bias = self.mix_bias + torch.cat([label, torch.zeros_like(label[:, :1])], -1)
        return bias + bias.new_full((n, 1), 0.0)

    def places(self, n: int) -> Tensor:
        """Where the noise of the first row lies among all pixels' in turn, (w, n)."""
        return torch.arange(self.width)[:, None] + torch.arange(n) * (self.height * self.width)


def bias_of(conv: nn.Conv2d) -> Tensor:
    """The bias, which must be there."""
    assert conv.bias is not None
    return conv.bias


def windows(row: Tensor, edge: Tensor, taps: Tensor) -> Tensor:
    """Each column's neighbours in a row (w * n, k), itself among them: (w * n, taps * k)."""
    return functional.embedding(taps, torch.cat([edge, row, edge])).flatten(1)


def pushed(window: Tensor, latest: Tensor) -> Tensor:
    """The window (..., k * c) with its oldest pixel gone and the latest (..., c) at the end."""
    channels = latest.shape[-1]
    if window.shape[-1] == channels:
        return latest.clone()
    return torch.cat([window[..., channels:], latest], -1)
