"""PixelCNN: log p(x), or log p(x|y), exactly, by the chain rule over pixels in raster order.

Two stacks of cropped convolutions see everything above and to the left of a
pixel, without the blind spot of a single masked stack (van den Oord et al.,
2016, https://arxiv.org/abs/1606.05328). For the pixel o:

    v v v v v      v: vertical stack, all rows above
    v v v v v      h: horizontal stack, the pixels to the left,
    h h o . .         fed by the vertical stack
    . . . . .      .: never seen

Kernels are cropped to the part that a mask would leave, so nothing is multiplied
by zero. Optionally, a transformer over rows feeds the vertical stack. Its tokens
are the rows of the picture; token i sees the whole of all rows before i.

Channels and digits of a pixel are chained in the head (`heads.Head`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from likely.errors import InvalidInput
from likely_export.autoregressive import Autoregressive, AutoregressiveConfig, LabelEmbedding
from likely_export.limits import at_least


@dataclass(frozen=True)
class PixelCNNConfig(AutoregressiveConfig):
    """Configuration of a PixelCNN with `layers` blocks, whose stacks are `channels` wide.

    Attributes:
        gated: whether units are tanh(a) * sigmoid(b), as in the paper; else relu.
        positions: whether both stacks have a learned bias for every position.
        row_layers: blocks of the row transformer; 0 for no transformer.
        row_width: width of its tokens.
        row_heads: number of its attention heads.
    """

    gated: bool = True
    positions: bool = False
    row_layers: int = 0
    row_width: int = 128
    row_heads: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, self, "row_layers")
        at_least(1, self, "row_width", "row_heads")
        if self.row_layers and self.row_width % self.row_heads:
            raise InvalidInput(
                "row_width", f"{self.row_width} is no multiple of {self.row_heads} (row_heads)"
            )


class Block(nn.Module):
    """One layer of both stacks, with residual connections.

    v <- v + unit(conv_2x3(v) + y)
    h <- h + W unit(conv_1x2(h) + V v + y)
    """

    def __init__(self, config: PixelCNNConfig) -> None:
        super().__init__()
        c = config.channels
        self.gated = config.gated
        self.units = 2 * c if self.gated else c
        self.vertical = nn.Conv2d(c, self.units, (2, 3))
        self.across = nn.Conv2d(c, self.units, 1, bias=False)
        self.horizontal = nn.Conv2d(c, self.units, (1, 2))
        self.out = nn.Conv2d(c, c, 1, bias=False)
        self.dropout = config.dropout
        if config.labels:
            self.label = LabelEmbedding(config, 2 * self.units)
            nn.init.zeros_(self.label.weight)

    def forward(self, v: Tensor, h: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """The next v and h, each (n, channels, rows, columns)."""
        bias_v, bias_h = self.biases(y)
        above = functional.pad(v, (1, 1, 1, 0))
        v = v + self._unit([(self.vertical, above)], bias_v)
        left = functional.pad(h, (1, 0, 0, 0))
        unit = self._unit([(self.horizontal, left), (self.across, v)], bias_h)
        if self.dropout:
            unit = functional.dropout(unit, self.dropout, self.training)
        return v, h + self.out(unit)

    def biases(self, y: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The label's biases for the vertical and the horizontal stack, each (n, units)."""
        if y is None:
            return None, None
        biases = self.label(y)
        return biases[:, : self.units], biases[:, self.units :]

    def _unit(self, terms: list[tuple[nn.Conv2d, Tensor]], bias: Tensor | None) -> Tensor:
        if not self.gated:
            return torch.relu(_sum(terms, bias, slice(None)))
        # One convolution per half, so that ONNX Runtime fuses each with its activation.
        half = self.units // 2
        content = _sum(terms, bias, slice(0, half))
        gate = _sum(terms, bias, slice(half, None))
        return torch.tanh(content) * torch.sigmoid(gate)


def _sum(terms: list[tuple[nn.Conv2d, Tensor]], bias: Tensor | None, units: slice) -> Tensor:
    total = None
    for conv, x in terms:
        conv_bias = None if conv.bias is None else conv.bias[units]
        term = functional.conv2d(x, conv.weight[units], conv_bias)
        total = term if total is None else total + term
    assert total is not None
    return total if bias is None else total + bias[:, units, None, None].to(total.dtype)


class RowTransformer(nn.Module):
    """A causal transformer in which token i stands for everything above row i.

    token_i = A row_{i-1} + position_i + label, followed by pre-norm attention and MLP
    blocks. The output is reshaped and added to row i of the vertical stack.
    """

    def __init__(self, config: PixelCNNConfig) -> None:
        super().__init__()
        c, h, w = config.shape
        width = config.row_width
        self.embed = nn.Linear(c * w, width, bias=False)
        self.position = nn.Parameter(torch.randn(h, width) * 0.02)
        if config.labels:
            self.label = LabelEmbedding(config, width)
            nn.init.normal_(self.label.weight, std=0.02)
        self.blocks = nn.ModuleList(RowBlock(config) for _ in range(config.row_layers))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, w * config.channels, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, z: Tensor, y: Tensor | None) -> Tensor:
        """What to add to v, (n, channels, rows, columns), from scaled pixels z (n, c, h, w)."""
        n, _, h, w = z.shape
        rows = z.permute(0, 2, 1, 3).flatten(2)
        before = torch.cat([torch.zeros_like(rows[:, :1]), rows[:, :-1]], 1)
        tokens = self.embed(before) + self.position
        if y is not None:
            tokens = tokens + self.label(y)[:, None]
        mask = torch.ones(h, h, dtype=torch.bool, device=z.device).tril()
        for block in self.blocks:
            tokens = block(tokens, mask)
        return self.out(self.norm(tokens)).view(n, h, w, -1).permute(0, 3, 1, 2)


class RowBlock(nn.Module):
    """A pre-norm transformer block: attention over rows, then an MLP."""

    def __init__(self, config: PixelCNNConfig) -> None:
        super().__init__()
        width = config.row_width
        self.heads = config.row_heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.merge = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 3 * width)
        self.narrow = nn.Linear(3 * width, width, bias=False)
        nn.init.zeros_(self.merge.weight)
        nn.init.zeros_(self.narrow.weight)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The next tokens (n, rows, width); `mask` (rows, rows) is true where a row may attend."""
        q, k, v = self.project(tokens)
        return self.advance(tokens, q, k, v, mask)

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (n, rows, width)."""
        q, k, v = self.qkv(self.norm_attention(tokens)).chunk(3, -1)
        return q, k, v

    def advance(self, tokens: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """The next tokens, from attention of the queries over keys and values, and the MLP."""
        heads = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v)]
        weights = heads[0] @ heads[1].transpose(-1, -2) * heads[0].shape[-1] ** -0.5
        weights = torch.softmax(weights.masked_fill(~mask, -1e9), -1)
        tokens = tokens + self.merge((weights @ heads[2]).transpose(1, 2).flatten(2))
        hidden = functional.gelu(self.widen(self.norm_mlp(tokens)), approximate="tanh")
        return tokens + self.narrow(hidden)


class PixelCNN(Autoregressive):
    """An autoregressive density computed by two stacks of convolutions."""

    config: PixelCNNConfig
    rows: RowTransformer

    def __init__(self, config: PixelCNNConfig) -> None:
        super().__init__(config, config.channels)
        _, h, w = config.shape
        width = config.channels
        if config.positions:
            self.position_vertical = nn.Parameter(torch.zeros(width, h, w))
            self.position_horizontal = nn.Parameter(torch.zeros(width, h, w))
        if config.row_layers:
            self.rows = RowTransformer(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self._add_output_layers(width)

    def features(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The head's input from the pixels before each one, (n, head, h, w)."""
        z = self.scale(x)
        return self.through_stacks(z, *self.stem(z), self.conditioning_labels(y))

    def through_stacks(self, z: Tensor, v: Tensor, h: Tensor, y: Tensor | None) -> Tensor:
        """The head's input (n, head, h, w), from scaled pixels z and the stacks' input v and h."""
        if self.config.positions:
            v = v + self.position_vertical.to(v.dtype)
            h = h + self.position_horizontal.to(h.dtype)
        if self.config.row_layers:
            v = v + self.rows(z, y)
        if self.training:  # the memory layout in which CPUs convolve fastest
            v = v.contiguous(memory_format=torch.channels_last)
            h = h.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            v, h = block(v, h, y)
        return self.head_features(h, y)

    def matrices(self) -> list[Tensor]:
        """The weight matrices between hidden layers, which Muon may train."""
        inner: list[Tensor] = []
        for block in self.blocks:
            inner += [p for p in block.parameters() if p.ndim == 4]
        if self.config.row_layers:
            inner += [p for p in self.rows.blocks.parameters() if p.ndim == 2]
            inner += [self.rows.embed.weight, self.rows.out.weight]
        return inner + super().matrices()
