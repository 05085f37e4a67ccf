"""Exact sampling of whole pictures in one graph, at about the cost of one forward pass.

The vertical stack and the row transformer depend only on the rows above, so
they run once a row; the horizontal stack runs once a pixel on what it kept of
the pixel to the left. Rows and columns are nested `scan`s, which export to
nested ONNX Scans: one call draws a batch of pictures, and the state carried
is one row and one pixel a layer, never a picture.

Randomness comes in as Gumbel noise g: argmax(logits + g) draws from
softmax(logits). So t * g in its place draws at temperature t, and noise that
towers at one level fixes a pixel to it: completion needs no other graph.

Written for ONNX Runtime, which moves memory slowly and multiplies fast: columns
before pictures, (w * n, channels), so that a row's windows are one Gather, which
serves two rows: what a row gives to the next is kept as the sums that those
start from. Every term is a GEMM whose bias is the sum so far; the halves of a
gated unit are apart, so that each fuses with its activation.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan  # private path: torch is pinned
from torch.nn import functional

from likely_export.heads import Head, PixelHead
from likely_export.mixture import MixtureHead
from likely_export.pixelcnn import Block, PixelCNN, RowBlock, RowTransformer


class Sampler(nn.Module):
    """Draws x from p(x), or p(x|y), of a trained PixelCNN.

    The weights are copied, as matrices that a row or a pixel is multiplied with.
    """

    stem_vertical: Tensor
    stem_horizontal: Tensor
    position_vertical: Tensor
    position_horizontal: Tensor
    mix: Tensor
    mix_bias: Tensor

    def __init__(self, model: PixelCNN) -> None:
        super().__init__()
        config = model.config
        self.model = model
        self.channels, self.height, self.width = config.shape
        self.layers = [_Layer(cast(Block, block)) for block in model.blocks]
        self.steps = nn.ModuleList(self.layers)
        # Levels stay raw; scaling to [-1, 1] is folded into the stems. `blank` is the
        # level that scales to 0, which is what lies outside the picture.
        self.blank = (config.levels - 1) / 2
        vertical, horizontal = model.stem_vertical, model.stem_horizontal
        taps_vertical = vertical.weight.permute(3, 2, 1, 0).flatten(0, 2)
        taps_horizontal = horizontal.weight[:, :, 0].permute(2, 1, 0).flatten(0, 1)
        position_vertical = _bias(vertical) - taps_vertical.sum(0)
        position_horizontal = _bias(horizontal) - taps_horizontal.sum(0)
        if config.positions:
            position_vertical = position_vertical + model.position_vertical.permute(1, 2, 0)
            position_horizontal = position_horizontal + model.position_horizontal.permute(1, 2, 0)
        grid = (self.height, self.width, config.channels)
        scale = 2 / (config.levels - 1)
        # One more feature, always 1, carries the biases of the head.
        matrices = {
            "stem_vertical": taps_vertical * scale,
            "stem_horizontal": taps_horizontal * scale,
            "position_vertical": position_vertical.expand(grid),
            "position_horizontal": position_horizontal.expand(grid),
            "mix": functional.pad(model.mix.weight[:, :, 0, 0].T, (0, 1)),
            "mix_bias": functional.pad(_bias(model.mix), (0, 1), value=1.0),
        }
        for name, matrix in matrices.items():
            self.register_buffer(name, _copied(matrix))
        self.draw = _draw(model.head)

    def forward(self, gumbel: Tensor, y: Tensor | None = None) -> Tensor:
        """Pictures.

        Args:
            gumbel: float32 (n, h, w, c, digits, base), standard Gumbel noise.
            y: int64 (n,) of labels, null ones allowed; None for p(x).

        Returns:
            uint8 (n, c, h, w) of levels.
        """
        n, config = gumbel.shape[0], self.model.config
        y = self.model.labels(y)
        biases = [layer.biases(y, self.width, n) for layer in self.layers]
        mix_bias = self.mix_bias
        if y is not None:
            label = self.model.label(y)
            mix_bias = mix_bias + torch.cat([label, torch.zeros_like(label[:, :1])], -1)
            mix_bias = mix_bias + gumbel.new_full((n, 1), 0.0)
        depth = sum(layer.halves for layer in self.layers)
        rows_above, side, to_the_left = config.stem
        size = self.width * n
        # Where to gather from: a column's neighbours in a row with edges, a row's noise.
        here = torch.arange(size)[:, None]
        seen_by_stem = here + torch.arange(2 * side + 1) * n
        seen_by_layer = here + torch.arange(3) * n
        noises = gumbel.flatten(3).flatten(0, 2)
        places = torch.arange(self.width)[:, None] + torch.arange(n) * (self.height * self.width)
        # Zeros are filled in: new_zeros exports to an operator without a CUDA kernel.
        blank = gumbel.new_full((side * n, rows_above * self.channels), self.blank)
        edge = gumbel.new_full((n, config.channels), 0.0)
        start_pixel = [
            gumbel.new_full((n, to_the_left * self.channels), self.blank),
            *[gumbel.new_full((n, config.channels), 0.0) for _ in self.layers],
        ]

        def pixel(state: list[Tensor], inputs: list[Tensor]) -> tuple[list[Tensor], Tensor]:
            """One column: pixels to the left and each layer's h there -> the pixel here."""
            left, *h_left = state
            position, noise, *across = inputs
            h = torch.addmm(position, left, self.stem_horizontal)
            kept = []
            for k, layer in enumerate(self.layers):
                kept.append(h.clone())
                h = layer.pixel(h_left[k], h, across[layer.halves * k : layer.halves * (k + 1)])
            levels = self.draw(torch.addmm(mix_bias, torch.relu(h), self.mix), noise)
            latest = levels.to(torch.float32)
            return [_pushed(left, latest), *kept], levels.clone()

        def row(state: list[Tensor], inputs: list[Tensor]) -> tuple[list[Tensor], Tensor]:
            """One row: the rows above and what they give to each layer -> the row here."""
            above, given, caches = state[0], state[1 : depth + 1], state[depth + 1 :]
            position, position_left, index = inputs
            noise = functional.embedding(places + index * self.width, noises)
            window = _windows(above.flatten(0, 1), blank, seen_by_stem)
            v = (window @ self.stem_vertical).view(self.width, -1, config.channels)
            v = v + position[:, None]
            if config.row_layers:
                fed, caches = self._row_transformer(above[:, :, -self.channels :], caches, index, y)
                v = v + fed
            v = v.flatten(0, 1)
            kept, across = [], []
            for k, (layer, bias) in enumerate(zip(self.layers, biases, strict=True)):
                window = _windows(v, edge, seen_by_layer)
                sums = given[layer.halves * k : layer.halves * (k + 1)]
                kept += layer.below(window, bias.vertical)
                v = layer.row(window, v, sums)
                across += layer.across(v, bias.horizontal, self.width)
            _, levels = scan(pixel, start_pixel, [position_left, noise, *across])
            latest = levels.to(torch.float32)
            return [_pushed(above, latest), *kept, *caches], levels.clone()

        start_row = [
            gumbel.new_full((self.width, n, rows_above * self.channels), self.blank),
            *[
                bias + gumbel.new_full((size, config.channels), 0.0)
                for layer in biases
                for bias in layer.vertical
            ],
            *[
                gumbel.new_full((n, self.height, config.row_width), 0.0)
                for _ in range(2 * config.row_layers)
            ],
        ]
        rows = torch.arange(self.height)
        inputs = [self.position_vertical, self.position_horizontal, rows]
        _, levels = scan(row, start_row, inputs)
        pictures: Tensor = levels.permute(2, 3, 0, 1).to(torch.uint8)
        return pictures

    def _row_transformer(
        self, latest: Tensor, caches: list[Tensor], index: Tensor, y: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """What to add to v's row, (w, n, channels), and the next keys and values."""
        rows: RowTransformer = self.model.rows
        # Channels outermost within a token, as in training.
        scaled = self.model.scale(latest).permute(1, 2, 0).flatten(1)
        token = rows.embed(scaled) + rows.position.index_select(0, index[None])
        if y is not None:
            token = token + rows.label(y)
        token = token[:, None]
        # Slots hold rows oldest first; those before row 0 are still empty.
        mask = torch.arange(self.height) >= self.height - 1 - index
        kept = []
        for each, keys, values in zip(rows.blocks, caches[::2], caches[1::2], strict=True):
            block = cast(RowBlock, each)
            q, k, v = block.project(token)
            keys = torch.cat([keys[:, 1:], k], 1)
            values = torch.cat([values[:, 1:], v], 1)
            token = block.advance(token, q, keys, values, mask)
            kept += [keys, values]
        fed = rows.out(rows.norm(token[:, 0]))
        return fed.unflatten(-1, (self.width, -1)).transpose(0, 1), kept


class _Softmaxes(nn.Module):
    """Draws a pixel from a chain of softmaxes."""

    logits: Tensor
    embedding: Tensor

    def __init__(self, head: PixelHead) -> None:
        super().__init__()
        self.head = head
        logits = torch.cat([head.weight, head.bias[:, None]], 1)
        self.register_buffer("logits", _copied(logits))
        self.register_buffer("embedding", _copied(functional.pad(head.embedding, (0, 1))))

    def forward(self, features: Tensor, noise: Tensor) -> Tensor:
        """Levels (n, c) of one pixel, int64, digit by digit.

        Args:
            features: (n, head + 1), the last of them 1.
            noise: (n, c * digits * base), standard Gumbel noise.
        """
        head = self.head
        noises = noise.chunk(head.factors, -1) if head.factors > 1 else [noise]
        digits: list[Tensor] = []
        for k, part in enumerate(noises):
            if k:
                features = features + self.embedding[k - 1].index_select(0, digits[-1][:, 0])
            logits = torch.addmm(part, torch.relu(features), self.logits[k])
            digits.append(logits.argmax(-1, keepdim=True))
        levels = []
        for first in range(0, head.factors, head.digits):
            level = digits[first]
            for digit in digits[first + 1 : first + head.digits]:
                level = level * head.base + digit
            levels.append(level)
        return torch.cat(levels, -1) if len(levels) > 1 else levels[0]


class _Mixture(nn.Module):
    """Draws a pixel from a mixture of logistics, by the masses of its digits.

    Not term and level by two noises, which costs less: noise would fix no level,
    and a temperature would be another one than the softmaxes'.
    """

    weight: Tensor

    def __init__(self, head: MixtureHead) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("weight", _copied(torch.cat([head.weight, head.bias[None]])))

    def forward(self, features: Tensor, noise: Tensor) -> Tensor:
        """Levels (n, c) of one pixel, int64; arguments as those of `_Softmaxes`."""
        noises = noise.chunk(self.head.factors, -1) if self.head.factors > 1 else [noise]

        def loudest(k: int, table: Tensor) -> Tensor:
            return (table + noises[k]).argmax(-1)

        levels = self.head.chain(torch.relu(features) @ self.weight, loudest)
        return torch.stack(levels, -1)


def _draw(head: Head) -> nn.Module:
    if isinstance(head, MixtureHead):
        return _Mixture(head)
    return _Softmaxes(cast(PixelHead, head))


def _copied(matrix: Tensor) -> Tensor:
    return matrix.detach().clone(memory_format=torch.contiguous_format)


class _Biases(NamedTuple):
    """The biases of a layer's two stacks, one for each half of a unit."""

    vertical: list[Tensor]
    horizontal: list[Tensor]


class _Layer(nn.Module):
    """A block's weights as matrices for one row or one pixel, the halves of a unit apart."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block
        self.halves = 2 if block.gated else 1
        self.width = block.units // self.halves
        # The kernel's two rows; each a matrix for the three columns of a window.
        above, own = block.vertical.weight.permute(2, 3, 1, 0).flatten(1, 2)
        self.above, self.own = self._matrices(above), self._matrices(own)
        self.over = self._matrices(block.across.weight[:, :, 0, 0].T)
        self.left = self._matrices(block.horizontal.weight[:, :, 0].permute(2, 1, 0).flatten(0, 1))
        self.out = nn.Parameter(block.out.weight[:, :, 0, 0].T.detach().clone(), False)

    def biases(self, y: Tensor | None, width: int, n: int) -> _Biases:
        """Both stacks' biases, the label's included, each (channels,) or (w * n, channels)."""
        own = _bias(self.block.vertical), _bias(self.block.horizontal)
        labels = self.block.biases(y)
        return _Biases(*(self._bias(*pair, width, n) for pair in zip(own, labels, strict=True)))

    def row(self, window: Tensor, v: Tensor, given: list[Tensor]) -> Tensor:
        """The next v (w * n, channels) of this one, its windows, and what the row above gave."""
        sums = [torch.addmm(term, window, m) for term, m in zip(given, self.own, strict=True)]
        return v + self._unit(sums)

    def below(self, window: Tensor, biases: list[Tensor]) -> list[Tensor]:
        """What this row gives to the next one, biases included, each (w * n, channels)."""
        return [torch.addmm(bias, window, m) for bias, m in zip(biases, self.above, strict=True)]

    def across(self, v: Tensor, biases: list[Tensor], columns: int) -> list[Tensor]:
        """What the vertical stack gives to the horizontal one, each (w, n, channels)."""
        return [
            torch.addmm(bias, v, matrix).view(columns, -1, v.shape[-1])
            for bias, matrix in zip(biases, self.over, strict=True)
        ]

    def pixel(self, left: Tensor, h: Tensor, terms: list[Tensor]) -> Tensor:
        """The next h (n, channels) of h to the left and h here."""
        pair = torch.cat([left, h], -1)
        sums = [torch.addmm(term, pair, m) for term, m in zip(terms, self.left, strict=True)]
        return torch.addmm(h, self._unit(sums), self.out)

    def _unit(self, halves: list[Tensor]) -> Tensor:
        if self.halves == 1:
            return torch.relu(halves[0])
        return torch.tanh(halves[0]) * torch.sigmoid(halves[1])

    def _bias(self, own: Tensor, label: Tensor | None, width: int, n: int) -> list[Tensor]:
        bias = own.detach()
        if label is not None:
            # As large as the sums they start, since a GEMM adds rows of one size only.
            bias = (bias + label).expand(width, n, -1).reshape(width * n, -1)
        return [part.clone() for part in bias.split(self.width, -1)]  # scan refuses aliases

    def _matrices(self, matrix: Tensor) -> nn.ParameterList:
        parts = matrix.detach().split(self.width, -1)
        return nn.ParameterList(
            nn.Parameter(part.clone(memory_format=torch.contiguous_format), False) for part in parts
        )


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias


def _windows(row: Tensor, edge: Tensor, taps: Tensor) -> Tensor:
    """Each column's neighbours in a row (w * n, k), itself among them: (w * n, taps * k)."""
    return functional.embedding(taps, torch.cat([edge, row, edge])).flatten(1)


def _pushed(window: Tensor, latest: Tensor) -> Tensor:
    """The window (..., k * c) with its oldest pixel gone and the latest (..., c) at the end."""
    channels = latest.shape[-1]
    if window.shape[-1] == channels:
        return latest.clone()
    return torch.cat([window[..., channels:], latest], -1)
