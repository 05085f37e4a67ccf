"""PixelRNN: log p(x), or log p(x|y), exactly, by recurrences over rows or over diagonals.

van den Oord et al., 2016, https://arxiv.org/abs/1601.06759. The first kernel is
under mask A and sees only pixels before each one. LSTM layers with residual
connections follow. Their kernels are under mask B: they also read the features at
their own pixel, which do not depend on its level. At the pixel o, a layer's state
is computed from:

    Row LSTM          Diagonal BiLSTM
    . s s s .         . . s . .    s: states of this layer
    . x o . .         . s o . .    x, o: features of the layer before

Through its states, a Row LSTM sees a triangle above the pixel, and a Diagonal
BiLSTM everything above and to the left. The second direction of the BiLSTM runs
from right to left. Its states are shifted down by one row, so that it sees no
pixel to the right in the same row. Together, the two directions see every pixel
before o except the last one of the row above, which only the kernel under mask A
can reach.

Channels and digits of a pixel are chained in the head (`heads.Head`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan  # private path: torch is pinned
from torch.nn import functional

from likely_export.autoregressive import Autoregressive, AutoregressiveConfig, LabelEmbedding

SHUT = -1e4  # an input for which a sigmoid is exactly 0 in float32
States = list[Tensor]


@dataclass(frozen=True)
class PixelRNNConfig(AutoregressiveConfig):
    """Configuration of a PixelRNN with `layers` LSTMs of `channels` features each.

    The residual stream between the layers has twice as many features.

    Attributes:
        kind: `row` for the Row LSTM, `diagonal` for the Diagonal BiLSTM.
    """

    stem: tuple[int, int, int] = (3, 3, 3)
    kind: Literal["row", "diagonal"] = "diagonal"


class RowLSTM(nn.Module):
    """A recurrence over rows, from the states above and the features at a pixel and left of it.

    o, f, i, g = K_state * h_above + K_input * x
    c = sigmoid(f) c_above + sigmoid(i) tanh(g)
    h = sigmoid(o) tanh(c)
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.input = nn.Linear(2 * 2 * channels, 4 * channels)
        self.state = nn.Linear(3 * channels, 4 * channels, bias=False)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """States (h, w, n, channels).

        Args:
            x: features (h, w, n, 2 * channels).
            bias: the label's bias of the gates, (n, 4 * channels).
        """
        outside = x.new_full((x.shape[0], 1, *x.shape[2:]), 0.0)
        left = torch.cat([outside, x[:, :-1]], 1)
        inputs = _biased(self.input(torch.cat([left, x], -1)), bias)
        _, w, n, _ = inputs.shape
        none = inputs.new_full((w, n, self.channels), 0.0)
        edge = inputs.new_full((1, n, self.channels), 0.0)

        def row(state: States, scan_inputs: States) -> tuple[States, Tensor]:
            h, c = state
            h, c = cell(scan_inputs[0] + self.state(neighbours(h, edge)), c)
            return [h, c], h.clone()

        if torch.compiler.is_exporting():
            return scan(row, [none, none.clone()], [inputs])[1]
        state, rows = [none, none], []
        for row_inputs in inputs.unbind():
            state, h = row(state, [row_inputs])
            rows.append(h)
        return torch.stack(rows)


class DiagonalLSTM(nn.Module):
    """A recurrence over diagonals in one direction, from the states beside and above a pixel.

    Rows are skewed, each shifted by one against the row above, so that both of these states
    lie in the column before:

        a b c          a b c . .
        d e f    ->    . d e f .
        g h i          . . g h i

    Args:
        shape: rows and columns of a picture.
        channels: size of a state.
        leftward: whether to run from right to left, over reversed columns.
    """

    skewed: Tensor
    straight: Tensor

    def __init__(self, shape: tuple[int, int], channels: int, leftward: bool) -> None:
        super().__init__()
        self.shape, self.channels = shape, channels
        self.input = nn.Linear(2 * channels, 4 * channels)
        self.state = nn.Linear(2 * channels, 4 * channels, bias=False)
        h, w = shape
        pixels = torch.arange(h * w).view(h, w)
        columns = torch.arange(h + w - 1)[:, None] - torch.arange(h)
        inside = (columns >= 0) & (columns < w)
        self.sizes: list[int] = inside.sum(1).tolist()
        if leftward:
            pixels = pixels.flip(1)
        # (h + w - 1, h): index of the pixel in each place, h * w if there is none.
        skewed = torch.full(inside.shape, h * w)
        skewed[inside] = pixels[torch.arange(h).expand_as(columns)[inside], columns[inside]]
        self.register_buffer("skewed", skewed, persistent=False)
        straight = skewed.flatten().argsort()[: h * w]
        self.register_buffer("straight", straight, persistent=False)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """States (h, w, n, channels).

        Args:
            x: features (h, w, n, 2 * channels).
            bias: the label's bias of the gates, (n, 4 * channels).
        """
        inputs = _biased(self.input(x), bias).flatten(0, 1)
        along = self._scanned if torch.compiler.is_exporting() else self._looped
        return along(inputs).unflatten(0, self.shape)

    def _scanned(self, inputs: Tensor) -> Tensor:
        """States (h * w, n, channels), computed by one Scan over whole columns.

        Where a column contains no pixel, all gates are shut, so that the state there is 0.
        """
        outside = inputs.new_full(inputs[:1].shape, SHUT)
        none = inputs.new_full((self.shape[0], inputs.shape[1], self.channels), 0.0)
        edge = inputs.new_full((1, inputs.shape[1], self.channels), 0.0)

        def column(state: States, scan_inputs: States) -> tuple[States, Tensor]:
            h, c = state
            above = torch.cat([edge, h[:-1]])
            h, c = cell(scan_inputs[0] + self.state(torch.cat([h, above], -1)), c)
            return [h, c], h.clone()

        padded = torch.cat([inputs, outside])
        columns = padded.index_select(0, self.skewed.flatten()).unflatten(0, self.skewed.shape)
        states = scan(column, [none, none.clone()], [columns])[1]
        return states.flatten(0, 1).index_select(0, self.straight)

    def _looped(self, inputs: Tensor) -> Tensor:
        """The same states, computed only where there are pixels, which halves the work."""
        h, w = self.shape
        order = self.skewed[self.skewed < h * w]
        edge = inputs.new_full((1, inputs.shape[1], self.channels), 0.0)
        state = c = edge[:0]
        states = []
        for t, column_inputs in enumerate(inputs.index_select(0, order).split(self.sizes)):
            # From column w on, the first row of the column before has no pixel in this column.
            first, size = int(t >= w), len(column_inputs)
            beside = torch.cat([edge, state, edge])[first : first + size + 1]
            c = torch.cat([c, edge])[first : first + size]
            sums = self.state(torch.cat([beside[1:], beside[:-1]], -1))
            state, c = cell(column_inputs + sums, c)
            states.append(state)
        return torch.cat(states).index_select(0, order.argsort())


class DiagonalBiLSTM(nn.Module):
    """The sum of both directions; the one from right to left is shifted down by one row."""

    def __init__(self, shape: tuple[int, int], channels: int) -> None:
        super().__init__()
        self.rightward = DiagonalLSTM(shape, channels, leftward=False)
        self.leftward = DiagonalLSTM(shape, channels, leftward=True)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """States (h, w, n, channels).

        Args:
            x: features (h, w, n, 2 * channels).
            bias: the label's bias of the gates of both directions, (n, 8 * channels).
        """
        biases = (None, None) if bias is None else bias.chunk(2, -1)
        rightward, leftward = self.rightward(x, biases[0]), self.leftward(x, biases[1])
        edge = leftward.new_full((1, *leftward.shape[1:]), 0.0)
        return rightward + torch.cat([edge, leftward[:-1]])


class Layer(nn.Module):
    """An LSTM with a residual connection: x <- x + W h(x)."""

    def __init__(self, config: PixelRNNConfig) -> None:
        super().__init__()
        c, row = config.channels, config.kind == "row"
        self.lstm = RowLSTM(c) if row else DiagonalBiLSTM(config.shape[1:], c)
        self.out = nn.Linear(c, 2 * c)
        self.dropout = config.dropout
        if config.labels:
            self.label = LabelEmbedding(config, (4 if row else 8) * c)
            nn.init.zeros_(self.label.weight)

    def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        """The next x, (h, w, n, 2 * channels)."""
        h = self.lstm(x, self.bias(y))
        if self.dropout:
            h = functional.dropout(h, self.dropout, self.training)
        return x + self.out(h)

    def bias(self, y: Tensor | None) -> Tensor | None:
        """The label's bias of the gates, (n, gates)."""
        return None if y is None else self.label(y)


class PixelRNN(Autoregressive):
    """An autoregressive density computed by LSTM layers."""

    config: PixelRNNConfig

    def __init__(self, config: PixelRNNConfig) -> None:
        width = 2 * config.channels
        super().__init__(config, width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self._add_output_layers(width)

    def features(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The head's input from the pixels before each one, (n, head, h, w)."""
        y = self.conditioning_labels(y)
        above, beside = self.stem(self.scale(x))
        hidden = (above + beside).permute(2, 3, 0, 1)  # rows first, because layers loop over rows
        for layer in self.layers:
            hidden = layer(hidden, y)
        return self.head_features(hidden.permute(2, 3, 0, 1), y)

    def matrices(self) -> list[Tensor]:
        """The weight matrices between hidden layers, which Muon may train."""
        inner: list[Tensor] = []
        for layer in self.layers:
            inner += [
                p for name, p in layer.named_parameters() if p.ndim > 1 and "label" not in name
            ]
        return inner + super().matrices()


def cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The next h and c, each (..., channels), from the gates o, f, i, g (..., 4 * channels)."""
    channels = c.shape[-1]
    opened, content = gates.split([3 * channels, channels], -1)
    o, f, i = torch.sigmoid(opened).chunk(3, -1)
    c = f * c + i * torch.tanh(content)
    return o * torch.tanh(c), c


def neighbours(row: Tensor, edge: Tensor) -> Tensor:
    """Joins each place of a row (w, n, k) with both of its neighbours: (w, n, 3 * k)."""
    padded = torch.cat([edge, row, edge])
    return torch.cat([padded[:-2], padded[1:-1], padded[2:]], -1)


def _biased(inputs: Tensor, bias: Tensor | None) -> Tensor:
    return inputs if bias is None else inputs + bias.to(inputs.dtype)
