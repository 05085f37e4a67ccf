"""Exact sampling in two passes in one graph: the sketch, then every pixel's level given it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from likely_export.sampler import Sampler
from likely_export.sketch import Sketched

FIXED = 5e5  # noise above this fixes a digit: half of what the service adds to the digit of a level


class SketchedSampler(nn.Module):
    """Samples x from p(x), or p(x|y), in two passes.

    The noise of a pixel has one row for its level in the sketch, at the places 1, 2, ... of the
    row, and one for each of its digits. Noise that fixes a level by its digits leaves the first
    of these rows without effect, because the row's place 0 is not used. The level in the sketch
    is then fixed by the first digit.
    """

    def __init__(self, model: Sketched) -> None:
        super().__init__()
        self.detail = model.detail
        self.sketch_levels = model.config.sketch_levels
        self.sketch_sampler = Sampler(model.sketch.density)
        self.detail_sampler = Sampler(model.detail)

    def forward(self, gumbel: Tensor, y: Tensor | None = None) -> Tensor:
        """Samples pictures.

        Args:
            gumbel: standard Gumbel noise, float32 (n, h, w, c, 1 + digits, base).
            y: labels, int64 (n,), which may be null labels; None for p(x).

        Returns:
            Levels, uint8 (n, c, h, w).
        """
        of_sketch, of_first, of_rest = gumbel[..., 0, :], gumbel[..., 1, :], gumbel[..., 2:, :]
        fixed = torch.relu(of_first - FIXED).unflatten(-1, (self.sketch_levels, -1)).sum(-1)
        sketch = self.sketch_sampler(of_sketch[..., 1 : 1 + self.sketch_levels] + fixed, y)
        of_first = of_first + self.detail.head.restrict(sketch)
        noise = torch.cat([of_first[..., None, :], of_rest], -2)
        pictures: Tensor = self.detail_sampler(noise, y, self.detail.beside(sketch))
        return pictures
