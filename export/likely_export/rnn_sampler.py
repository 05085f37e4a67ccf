"""Exact sampling of a PixelRNN's pictures in one graph, which computes no pixel twice.

Rows and columns are nested `scan`s, as in `sampler`. What the states of a row take from
the row above is summed once per row. What they take from the left, and what the layers
take from one another, is computed pixel by pixel.

In a Diagonal BiLSTM, the direction from left to right is computed along with the pixels.
The direction from right to left is needed one row later. Once a row is drawn, it runs
back over that row, for all layers at once, because the features of all layers are known.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan  # private path: torch is pinned
from torch.nn import functional

from likely_export.drawing import detached_copy
from likely_export.pixelrnn import (
    DiagonalBiLSTM,
    Layer,
    PixelRNN,
    RowLSTM,
    States,
    cell,
    neighbours,
)
from likely_export.raster import RasterSampler, push_pixel, windows


class _Out(nn.Module):
    """The end of a layer: adds its state's output to the features of a pixel."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.out = _matrix(layer.out.weight)
        self.bias = nn.Parameter(detached_copy(layer.out.bias), False)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """The next features, from x (n, 2 * channels) and the state h (n, channels)."""
        return torch.addmm(x, h, self.out) + self.bias


class RecurrentSampler(RasterSampler):
    """Samples x from p(x), or p(x|y), of a trained PixelRNN."""

    model: PixelRNN
    bias: Tensor

    def __init__(self, model: PixelRNN) -> None:
        super().__init__(model)
        self.layers = [cast(Layer, layer) for layer in model.layers]
        self.outs = nn.ModuleList(_Out(layer) for layer in self.layers)
        self.register_copies(bias=sum(self.stem_biases(), torch.zeros(())))

    def forward(self, gumbel: Tensor, y: Tensor | None = None) -> Tensor:
        """Samples pictures.

        Args:
            gumbel: standard Gumbel noise, float32 (n, h, w, c, digits, base).
            y: labels, int64 (n,), which may be null labels; None for p(x).

        Returns:
            Levels, uint8 (n, c, h, w).
        """
        n = gumbel.shape[0]
        y = self.model.conditioning_labels(y)
        biases = [layer.bias(y) for layer in self.layers]
        mix_bias = self.mix_biases(y, n)
        rows_above, side, to_the_left = self.model.config.stem
        seen = torch.arange(self.width * n)[:, None] + torch.arange(2 * side + 1) * n
        noises, places = gumbel.flatten(3).flatten(0, 2), self.places(n)
        # new_full, because new_zeros exports to an operator without a CUDA kernel.
        blank = gumbel.new_full((side * n, rows_above * self.channels), self.blank)
        start_pixel = [
            gumbel.new_full((n, to_the_left * self.channels), self.blank),
            *[gumbel.new_full((n, size), 0.0) for size in self.left_sizes],
        ]

        def pixel(state: States, inputs: States) -> tuple[States, States]:
            """One column: from the pixels and features to the left, draws the pixel here."""
            left, *beside = state
            noise, x, *from_above = inputs
            x = torch.addmm(x, left, self.stem_horizontal)
            x, beside, kept = self.pixel(x, beside, from_above)
            levels = self.draw(torch.addmm(mix_bias, torch.relu(x), self.mix), noise)
            return [push_pixel(left, levels.to(torch.float32)), *beside], [levels.clone(), *kept]

        def row(state: States, inputs: States) -> tuple[States, Tensor]:
            """One row: from the rows above and the last row's states, draws the row here."""
            above, *carried = state
            noise = functional.embedding(places + inputs[0] * self.width, noises)
            x = windows(above.flatten(0, 1), blank, seen) @ self.stem_vertical + self.bias
            from_above = self.row_inputs(carried, biases)
            inputs = [noise, x.unflatten(0, (self.width, -1)), *from_above]
            _, (levels, *kept) = scan(pixel, start_pixel, inputs)
            carried = self.next_row_states(kept, carried, biases)
            return [push_pixel(above, levels.to(torch.float32)), *carried], levels.clone()

        start_row = [
            gumbel.new_full((self.width, n, rows_above * self.channels), self.blank),
            *[
                gumbel.new_full((self.width, n, self.model.config.channels), 0.0)
                for _ in range(2 * len(self.layers))
            ],
        ]
        _, levels = scan(row, start_row, [torch.arange(self.height)])
        pictures: Tensor = levels.permute(2, 3, 0, 1).to(torch.uint8)
        return pictures

    @property
    def left_sizes(self) -> list[int]:
        """Sizes of the tensors that a pixel takes from the one to its left, over all layers."""
        raise NotImplementedError

    def row_inputs(self, carried: States, biases: list[Tensor | None]) -> States:
        """What a row's pixels take from the row above: two tensors per layer, (w, n, size).

        Args:
            carried: what the row above left: two states per layer, (w, n, channels).
            biases: the label's biases, one per layer.
        """
        raise NotImplementedError

    def pixel(self, x: Tensor, left: States, from_above: States) -> tuple[Tensor, States, States]:
        """Computes a pixel: its last features, what the next pixel takes, and what its row keeps.

        Args:
            x: the first features, (n, 2 * channels).
            left: what the pixel to the left passes on, for all layers.
            from_above: this pixel's part of what `row_inputs` returned for the row.
        """
        raise NotImplementedError

    def next_row_states(self, kept: States, carried: States, biases: list[Tensor | None]) -> States:
        """What a row passes to the next one, from what its pixels kept and what it was passed."""
        raise NotImplementedError


class RowSampler(RecurrentSampler):
    """Samples from a Row LSTM: rows pass on h and c, pixels pass on features."""

    def __init__(self, model: PixelRNN) -> None:
        super().__init__(model)
        lstms = [cast(RowLSTM, layer.lstm) for layer in self.layers]
        self.states = nn.ParameterList(_matrix(lstm.state.weight) for lstm in lstms)
        self.inputs = nn.ParameterList(_matrix(lstm.input.weight) for lstm in lstms)
        self.biases = nn.ParameterList(_row(lstm.input.bias) for lstm in lstms)

    @property
    def left_sizes(self) -> list[int]:
        """Sizes of the tensors that a pixel takes from the one to its left, over all layers."""
        return [2 * self.model.config.channels] * len(self.layers)

    def row_inputs(self, carried: States, biases: list[Tensor | None]) -> States:
        """What a row's pixels take from the row above: partial sums of the gates, and c."""
        edge = carried[0].new_full(carried[0][:1].shape, 0.0)
        from_above = []
        for k, bias in enumerate(biases):
            h, c = carried[2 * k : 2 * k + 2]
            sums = neighbours(h, edge) @ self.states[k]
            from_above += [sums + _add_label_bias(self.biases[k], bias), c]
        return from_above

    def pixel(self, x: Tensor, left: States, from_above: States) -> tuple[Tensor, States, States]:
        """The last features of a pixel, the features that each layer passes on, and its h and c."""
        beside, kept = [], []
        for k, out in enumerate(self.outs):
            sums, c = from_above[2 * k : 2 * k + 2]
            beside.append(x.clone())
            gates = torch.addmm(sums, torch.cat([left[k], x], -1), self.inputs[k])
            h, c = cell(gates, c)
            kept += [h, c]
            x = out(x, h)
        return x, beside, kept

    def next_row_states(self, kept: States, carried: States, biases: list[Tensor | None]) -> States:  # noqa: ARG002
        """The h and c of a row."""
        return [state.clone() for state in kept]


class DiagonalSampler(RecurrentSampler):
    """Samples from a Diagonal BiLSTM: rows pass on h of both directions."""

    back_inputs: Tensor
    back_states: Tensor
    back_above: Tensor
    back_bias: Tensor

    def __init__(self, model: PixelRNN) -> None:
        super().__init__(model)
        lstms = [cast(DiagonalBiLSTM, layer.lstm) for layer in self.layers]
        there, back = [lstm.rightward for lstm in lstms], [lstm.leftward for lstm in lstms]
        c = model.config.channels
        self.above = nn.ParameterList(_matrix(lstm.state.weight[:, c:]) for lstm in there)
        self.inputs = nn.ParameterList(
            _matrix(torch.cat([lstm.input.weight, lstm.state.weight[:, :c]], 1)) for lstm in there
        )
        self.biases = nn.ParameterList(_row(lstm.input.bias) for lstm in there)
        self.register_copies(
            back_inputs=torch.stack([lstm.input.weight.T for lstm in back])[:, None],
            back_above=torch.stack([lstm.state.weight[:, c:].T for lstm in back])[:, None],
            back_states=torch.stack([lstm.state.weight[:, :c].T for lstm in back]),
            back_bias=torch.stack([lstm.input.bias for lstm in back])[:, None, None],
        )

    @property
    def left_sizes(self) -> list[int]:
        """Sizes of the tensors that a pixel takes from the one to its left, over all layers."""
        return [self.model.config.channels] * (2 * len(self.layers))

    def row_inputs(self, carried: States, biases: list[Tensor | None]) -> States:
        """What a row's pixels take from the row above: partial sums of gates, and leftward h."""
        from_above = []
        for k, bias in enumerate(biases):
            h, back = carried[2 * k : 2 * k + 2]
            label_bias = None if bias is None else bias.chunk(2, -1)[0]
            from_above += [h @ self.above[k] + _add_label_bias(self.biases[k], label_bias), back]
        return from_above

    def pixel(self, x: Tensor, left: States, from_above: States) -> tuple[Tensor, States, States]:
        """The last features of a pixel, each layer's h and c, and each layer's features and h."""
        beside, kept = [], []
        for k, out in enumerate(self.outs):
            (sums, back), (h, c) = from_above[2 * k : 2 * k + 2], left[2 * k : 2 * k + 2]
            kept.append(x.clone())
            h, c = cell(torch.addmm(sums, torch.cat([x, h], -1), self.inputs[k]), c)
            kept.append(h.clone())
            beside += [h, c]
            x = out(x, h + back)
        return x, beside, kept

    def next_row_states(self, kept: States, carried: States, biases: list[Tensor | None]) -> States:
        """The h of both directions of a row; the leftward one is computed here, from the right."""
        x, above = torch.stack(kept[::2]), torch.stack(carried[1::2])  # (layers, w, n, size)
        sums = x @ self.back_inputs + above @ self.back_above + self.back_bias
        if biases[0] is not None:
            labels = torch.stack([cast(Tensor, bias).chunk(2, -1)[1] for bias in biases])
            sums = sums + labels[:, None]
        backwards = torch.arange(self.width - 1, -1, -1)
        none = above.new_full(above[:, 0].shape, 0.0)

        def column(state: States, inputs: States) -> tuple[States, Tensor]:
            h, c = cell(inputs[0] + state[0] @ self.back_states, state[1])
            return [h, c], h.clone()

        columns = sums.transpose(0, 1).index_select(0, backwards)
        back = scan(column, [none, none.clone()], [columns])[1].index_select(0, backwards)
        pairs = zip(kept[1::2], back.unbind(1), strict=True)
        # A plain clone of one column would keep the strides of the stack, unlike the start state.
        whole = torch.contiguous_format
        return [state.clone(memory_format=whole) for pair in pairs for state in pair]


def _matrix(weight: Tensor) -> nn.Parameter:
    """A linear layer's weight as the right-hand matrix of a product."""
    return nn.Parameter(detached_copy(weight.T), False)


def _row(bias: Tensor) -> nn.Parameter:
    return nn.Parameter(detached_copy(bias), False)


def _add_label_bias(bias: Tensor, label: Tensor | None) -> Tensor:
    return bias if label is None else bias + label
