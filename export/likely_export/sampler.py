"""Exact sampling of whole pictures in one graph, at about the cost of one forward pass.

The vertical stack and the row transformer depend only on the rows above, so they
run once per row. The horizontal stack runs once per pixel, on what it kept of the
pixel to the left. Rows and columns are nested `scan`s, which export to nested ONNX
Scans: one call samples a batch of pictures, and the state carried is one row and
one pixel per layer, never a picture.

The layout suits ONNX Runtime, which multiplies fast and moves memory slowly. A
horizontal unit is one product over all that it sees. Neighbouring vertical units
share products (`winograd`). The two halves of a gated unit have separate products,
so that each fuses with its activation.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan  # private path: torch is pinned
from torch.nn import functional

from likely_export.drawing import detached_copy
from likely_export.pixelcnn import Block, PixelCNN, RowBlock, RowTransformer
from likely_export.raster import RasterSampler, bias_of, push_pixel, windows
from likely_export.winograd import Pairs, factors, product_inputs, sums


class Sampler(RasterSampler):
    """Samples x from p(x), or p(x|y), of a trained PixelCNN."""

    model: PixelCNN
    bias_vertical: Tensor
    bias_horizontal: Tensor
    position_vertical: Tensor
    position_horizontal: Tensor

    def __init__(self, model: PixelCNN) -> None:
        super().__init__(model)
        config = model.config
        self.layers = [_Layer(cast(Block, block)) for block in model.blocks]
        self.steps = nn.ModuleList(self.layers)
        bias_vertical, bias_horizontal = self.stem_biases()
        self.register_copies(bias_vertical=bias_vertical, bias_horizontal=bias_horizontal)
        if config.positions:  # apart from the biases, so that they stay exact in half precision
            self.register_copies(
                position_vertical=model.position_vertical.flatten(1).T,
                position_horizontal=model.position_horizontal.flatten(1).T,
            )

    def forward(
        self,
        gumbel: Tensor,
        y: Tensor | None = None,
        beside: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Samples pictures.

        Args:
            gumbel: standard Gumbel noise, float32 (n, h, w, c, digits, base).
            y: labels, int64 (n,), which may be null labels; None for p(x).
            beside: what to add to both stacks, each (n, channels, h, w); None for nothing.

        Returns:
            Levels, uint8 (n, c, h, w).
        """
        n, config = gumbel.shape[0], self.model.config
        y = self.model.conditioning_labels(y)
        pairs = (self.width + 1) // 2
        biases = [layer.biases(y, pairs, n) for layer in self.layers]
        mix_bias = self.mix_biases(y, n)
        depth = len(self.layers)
        rows_above, side, to_the_left = config.stem
        # Gather indices: a column's neighbours in a padded row, and a pixel's noise.
        seen_by_stem = torch.arange(self.width * n)[:, None] + torch.arange(2 * side + 1) * n
        noises = gumbel.flatten(3).flatten(0, 2)
        places = self.places(n)
        # new_full, because new_zeros exports to an operator without a CUDA kernel.
        blank = gumbel.new_full((side * n, rows_above * self.channels), self.blank)
        edge = gumbel.new_full((1, n, config.channels), 0.0)
        start_pixel = [
            gumbel.new_full((n, to_the_left * self.channels), self.blank),
            *[gumbel.new_full((n, config.channels), 0.0) for _ in self.layers],
        ]

        def pixel(state: list[Tensor], inputs: list[Tensor]) -> tuple[list[Tensor], Tensor]:
            """One column: from the pixels and each layer's h to the left, draws the pixel here."""
            left, *h_left = state
            position, place, *across = inputs
            h = torch.addmm(position, left, self.stem_horizontal)
            kept = []
            for k, (layer, bias) in enumerate(zip(self.layers, biases, strict=True)):
                kept.append(h.clone())
                h = layer.pixel(h_left[k], h, across[k], bias.horizontal)
            features = torch.addmm(mix_bias, torch.relu(h), self.mix)
            levels = self.draw(features, functional.embedding(place, noises))
            latest = levels.to(torch.float32)
            return [push_pixel(left, latest), *kept], levels.clone()

        def row(state: list[Tensor], inputs: list[Tensor]) -> tuple[list[Tensor], Tensor]:
            """One row: from the rows above and what the products read of each v, draws the row."""
            above, seen_above, caches = state[0], state[1 : 4 * depth + 1], state[4 * depth + 1 :]
            position, position_left, index = inputs
            window = windows(above.flatten(0, 1), blank, seen_by_stem)
            v = (window @ self.stem_vertical).view(self.width, -1, config.channels)
            v = v + position
            if config.row_layers:
                fed, caches = self._row_transformer(above[:, :, -self.channels :], caches, index, y)
                v = v + fed
            columns = Pairs.from_row(v, edge)
            kept, across = [], []
            for k, (layer, bias) in enumerate(zip(self.layers, biases, strict=True)):
                here = product_inputs(columns, edge, self.width)
                rows = zip(seen_above[4 * k : 4 * k + 4], here, strict=True)
                both = [torch.cat(pair, -1).flatten(0, 1) for pair in rows]
                columns = layer.row(columns, both, bias.vertical)
                kept += here
                across.append(columns.row(self.width))
            by_column = [position_left, places + index * self.width, *across]
            _, levels = scan(pixel, start_pixel, by_column)
            latest = levels.to(torch.float32)
            return [push_pixel(above, latest), *kept, *caches], levels.clone()

        start_row = [
            gumbel.new_full((self.width, n, rows_above * self.channels), self.blank),
            *[gumbel.new_full((pairs, n, config.channels), 0.0) for _ in range(4 * depth)],
            *[
                gumbel.new_full((n, self.height, config.row_width), 0.0)
                for _ in range(2 * config.row_layers)
            ],
        ]
        rows = torch.arange(self.height)
        inputs = [*self._positions(beside), rows]
        _, levels = scan(row, start_row, inputs)
        pictures: Tensor = levels.permute(2, 3, 0, 1).to(torch.uint8)
        return pictures

    def _positions(self, beside: tuple[Tensor, Tensor] | None) -> list[Tensor]:
        """What enters the stacks of every row besides the stem, for all pictures or for each."""
        grid = (self.height, self.width, self.model.config.channels)
        if self.model.config.positions:
            vertical = (self.position_vertical + self.bias_vertical).view(grid)
            horizontal = (self.position_horizontal + self.bias_horizontal).view(grid)
        else:
            vertical = self.bias_vertical.expand(grid).clone()
            horizontal = self.bias_horizontal.expand(grid).clone()
        if beside is None:
            return [vertical[:, :, None], horizontal]
        by_row = [part.permute(2, 3, 0, 1) for part in beside]
        return [vertical[:, :, None] + by_row[0], horizontal[:, :, None] + by_row[1]]

    def _row_transformer(
        self, latest: Tensor, caches: list[Tensor], index: Tensor, y: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """What to add to v's row, (w, n, channels), and the updated keys and values."""
        rows: RowTransformer = self.model.rows
        # A token lists its columns channel by channel, as in training.
        scaled = self.model.scale(latest).permute(1, 2, 0).flatten(1)
        token = rows.embed(scaled) + rows.position.index_select(0, index[None])
        if y is not None:
            token = token + rows.label(y)
        token = token[:, None]
        # The slots hold rows, oldest first. Slots for rows before row 0 are still empty.
        mask = torch.arange(self.height) >= self.height - 1 - index
        kept = []
        for module, keys, values in zip(rows.blocks, caches[::2], caches[1::2], strict=True):
            block = cast(RowBlock, module)
            q, k, v = block.project(token)
            keys = torch.cat([keys[:, 1:], k], 1)
            values = torch.cat([values[:, 1:], v], 1)
            token = block.advance(token, q, keys, values, mask)
            kept += [keys, values]
        fed = rows.out(rows.norm(token[:, 0]))
        return fed.unflatten(-1, (self.width, -1)).transpose(0, 1), kept


class _Biases(NamedTuple):
    """The biases of a layer's two stacks, one tensor for each half of a unit."""

    vertical: list[Tensor]  # each (channels,), or (pairs * n, channels) with labels
    horizontal: list[Tensor]  # each (channels,), or (n, channels) with labels


class _Layer(nn.Module):
    """A block's weights as matrices for one row or one pixel, split into halves of a unit."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block
        self.halves = 2 if block.gated else 1
        self.width = block.units // self.halves
        # In each tap's rows, the channels of the row above come before those of this row.
        taps = block.vertical.weight.permute(3, 2, 1, 0).flatten(1, 2)
        halves = zip(*[self._matrices(tap) for tap in taps], strict=True)
        self.seen_by_v = nn.ModuleList(nn.ParameterList(half) for half in halves)
        left_and_here = block.horizontal.weight[:, :, 0].permute(2, 1, 0).flatten(0, 1)
        across = block.across.weight[:, :, 0, 0].T
        self.seen_by_h = self._matrices(torch.cat([left_and_here, across]))
        self.out = nn.Parameter(block.out.weight[:, :, 0, 0].T.detach().clone(), False)

    def biases(self, y: Tensor | None, pairs: int, n: int) -> _Biases:
        """The biases of both stacks with the label's added, (channels,) or one row per picture."""
        vertical, horizontal = bias_of(self.block.vertical), bias_of(self.block.horizontal)
        of_label = self.block.biases(y)
        if of_label[0] is None or of_label[1] is None:
            return _Biases(self._parts(vertical), self._parts(horizontal))
        # A Gemm's C input must match its rows exactly: one per pair and picture.
        everywhere = (vertical + of_label[0]).expand(pairs, n, -1).reshape(pairs * n, -1)
        return _Biases(self._parts(everywhere), self._parts(horizontal + of_label[1]))

    def row(self, v: Pairs, both: list[Tensor], biases: list[Tensor]) -> Pairs:
        """The next v, from v and what the products read of the row above and of this row."""
        halves = [
            sums(both, factors(*cast(nn.ParameterList, taps)), bias)
            for taps, bias in zip(self.seen_by_v, biases, strict=True)
        ]
        units = [self._unit(list(parts)) for parts in zip(*halves, strict=True)]
        return Pairs(
            *[columns + unit.view_as(columns) for columns, unit in zip(v, units, strict=True)]
        )

    def pixel(self, left: Tensor, h: Tensor, v: Tensor, biases: list[Tensor]) -> Tensor:
        """The next h (n, channels), from h to the left, and h and v here."""
        window = torch.cat([left, h, v], -1)
        parts = [
            torch.addmm(bias, window, matrix)
            for matrix, bias in zip(self.seen_by_h, biases, strict=True)
        ]
        return torch.addmm(h, self._unit(parts), self.out)

    def _unit(self, parts: list[Tensor]) -> Tensor:
        if self.halves == 1:
            return torch.relu(parts[0])
        return torch.tanh(parts[0]) * torch.sigmoid(parts[1])

    def _parts(self, bias: Tensor) -> list[Tensor]:
        parts = bias.detach().split(self.width, -1)
        return [part.clone() for part in parts]  # scan rejects inputs that share memory

    def _matrices(self, matrix: Tensor) -> nn.ParameterList:
        parts = matrix.detach().split(self.width, -1)
        return nn.ParameterList(nn.Parameter(detached_copy(part), False) for part in parts)
