"""What all autoregressive densities share: log p(x), or log p(x|y), exactly.

    log p(x) = sum_i log p(x_i | x_1, ..., x_i-1), pixels in raster order

A family implements `features`: what it computes from the pixels before each one. The
following parts are the same for all families: the first kernels (for example 7x7 under
mask A, cropped to the part that the mask leaves), the distribution of a pixel
(`mixture.head`, which chains channels and digits), and labels, which training withholds
at random.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from likely.errors import InvalidInput
from likely_export import mixture
from likely_export.limits import at_least, in_unit_interval
from likely_export.moves import NO_MOVES, Moves

MOVED = 0.5  # of the training pictures, where a density has `moves`


@dataclass(frozen=True)
class AutoregressiveConfig:
    """Configuration that all autoregressive densities share.

    Attributes:
        shape: channels, rows, columns of a picture.
        levels: levels of a channel.
        labels: number of labels to condition on; 0 models p(x) alone.
        channels: width of the hidden layers.
        layers: number of hidden layers.
        stem: receptive field of the first kernels: rows above, columns to either side of
            these, and pixels to the left.
        head: features before the output distribution.
        digits: digits per level (2 for 256 levels: two nibbles).
        logistics: number of discretised logistics in a mixture that replaces the softmax; 0
            for a softmax.
        label_dropout: share of training pictures whose label is withheld, so that the same
            weights give p(x) and p(x|y). With 0, p(x) is not learnt; with 1, p(x|y) is not.
        dropout: share of hidden features dropped in training.
        moves: augmentation of half of the training pictures. The model is told which they are, so
            its density is that of pictures as they come (distribution augmentation, Jun et al.,
            2020, https://proceedings.mlr.press/v119/jun20a.html). It needs labels.
        contrast: weight in the training loss of how well the label can be told from the picture,
            log(1 + p(x|y') / p(x|y)) summed over the other labels y', of which each picture that
            keeps its label is given one at random. The mean of p(x|y') / p(x|y) over pictures x of
            y is how often the model, asked for y', draws what it should draw for y.
    """

    shape: tuple[int, int, int]
    levels: int
    labels: int = 0
    channels: int = 64
    layers: int = 8
    stem: tuple[int, int, int] = (2, 2, 2)
    head: int = 64
    digits: int = 1
    logistics: int = 0
    label_dropout: float = 0.1
    dropout: float = 0.0
    moves: Moves = NO_MOVES
    contrast: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.moves, Mapping):  # as stored in a file of weights
            object.__setattr__(self, "moves", Moves(**self.moves))
        if self.moves and not self.labels:
            raise InvalidInput("moves", "need labels, among which moved pictures are told apart")
        if self.contrast and self.labels < 2:
            raise InvalidInput("contrast", f"needs two labels; there are {self.labels}")
        in_unit_interval(self, "label_dropout", "dropout")
        at_least(1, self, "channels", "layers", "head", "digits")
        at_least(0, self, "logistics", "contrast")
        rows, side, left = self.stem
        if rows < 1 or side < 0 or left < 1:
            raise InvalidInput("stem", f"{list(self.stem)}; at least [1, 0, 1] is needed")


class LabelEmbedding(nn.Embedding):
    """A vector for every label, and one for none; moved pictures have one added to theirs.

    Args:
        config: configuration of the density.
        width: numbers in a vector.
    """

    moved: nn.Parameter | None

    def __init__(self, config: AutoregressiveConfig, width: int) -> None:
        super().__init__(config.labels + 1, width)
        self.moved = nn.Parameter(torch.zeros(width)) if config.moves else None

    def forward(self, y: Tensor) -> Tensor:
        """The vectors (n, width) of labels y, int64 (n,).

        In training, `num_embeddings` is to be added to the labels of moved pictures.
        """
        if self.moved is None or not self.training:
            return super().forward(y)
        moved = y >= self.num_embeddings
        return super().forward(y % self.num_embeddings) + moved[:, None] * self.moved


class Autoregressive(nn.Module):
    """An autoregressive density over discrete pictures.

    Args:
        config: its configuration.
        width: channels of the stem's output.
    """

    config: AutoregressiveConfig
    label: LabelEmbedding

    def __init__(self, config: AutoregressiveConfig, width: int) -> None:
        super().__init__()
        self.config = config
        c, rows, side, left = config.shape[0], *config.stem
        self.stem_vertical = nn.Conv2d(c, width, (rows, 2 * side + 1))
        self.stem_horizontal = nn.Conv2d(c, width, (1, left))

    def _add_output_layers(self, width: int) -> None:
        """Adds what follows the hidden layers, the last of which has `width` channels."""
        config = self.config
        self.mix = nn.Conv2d(width, config.head, 1)
        if config.labels:
            self.label = LabelEmbedding(config, config.head)
            nn.init.zeros_(self.label.weight)
        self.head = mixture.head(
            config.head, config.shape[0], config.levels, config.digits, config.logistics
        )

    @property
    def null_label(self) -> int:
        """The label that stands for no label: p(x|null) is p(x)."""
        return self.config.labels

    @property
    def digits(self) -> int:
        """Digits of a channel."""
        return self.head.digits

    @property
    def base(self) -> int:
        """Values that a digit can take."""
        return self.head.base

    def to_digits(self, x: Tensor) -> Tensor:
        """Writes levels (n, c, h, w) as digits, int64 (n, h, w, c * digits)."""
        return self.head.to_digits(x)

    def features(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The head's input from the pixels before each one, (n, head, h, w).

        Args:
            x: levels, uint8 (n, c, h, w).
            y: labels, int64 (n,), `null_label` for pictures without one; None for none at all.
        """
        raise NotImplementedError

    def scale(self, x: Tensor) -> Tensor:
        """Levels as float32 in [-1, 1]."""
        return x.float() * (2 / (self.config.levels - 1)) - 1

    def stem(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The first kernels' outputs, above and to the left, each (n, width, h, w), of scaled z."""
        rows, side, left = self.config.stem
        # Dropping the last row (column) makes the kernel see only rows above (pixels to the left).
        above = self.stem_vertical(functional.pad(z[:, :, :-1], (side, side, rows, 0)))
        beside = self.stem_horizontal(functional.pad(z[..., :-1], (left, 0, 0, 0)))
        return above, beside

    def head_features(self, hidden: Tensor, y: Tensor | None) -> Tensor:
        """The features (n, head, h, w) from the last hidden layer and the label."""
        features: Tensor = self.mix(torch.relu(hidden))
        return (
            features if y is None else features + self.label(y)[:, :, None, None].to(features.dtype)
        )

    def log_probs(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Log-probabilities of every digit (n, h, w, c * digits, base), nats."""
        return self.head.log_probs(self.features(x, y), x)

    def surprise(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """-log p(pixel | pixels before it[, y]) in nats, (n, c, h, w)."""
        return self.head.nats(self.features(x, y), x)

    def log_prob(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """log p(x), or log p(x|y), in nats, (n,)."""
        return -self.surprise(x, y).flatten(1).sum(1)

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        """The training loss in nats per picture, (n,); labels are withheld at random."""
        return self.loss(*self.augment(x, y))

    def augment(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Moves some pictures, and withholds some labels, at random.

        Args:
            x: levels, uint8 (n, c, h, w), of a density or of a picture that it is to be made of.
            y: labels, int64 (n,).

        Returns:
            The same as `loss` expects them.
        """
        y = self._withhold(y)
        if not self.config.moves:
            return x, y
        moved = self._draw_moved(y)
        x = torch.where(moved[:, None, None, None], self.config.moves.apply(x), x)
        return x, self._mark(y, moved)

    def loss(self, x: Tensor, y: Tensor, chances: Tensor | None = None) -> Tensor:
        """The training loss in nats, (n,), for labels from `augment`.

        Where the chances of pixels to be 1 are given, each pixel's own loss is the mean over its
        draw; see `expected_objective`.
        """
        features = self.features(x, y)
        # Mixed precision may round in the hidden layers, but not in the head.
        with torch.autocast(x.device.type, enabled=False):
            if chances is None:
                nats = self.head.nats(features.float(), x)
            else:
                nats = self.head.expected(self.head.log_probs(features.float(), x), chances)
        loss = nats.flatten(1).sum(1)
        return loss + self._contrast(features, x, y) if self.config.contrast else loss

    def expected_objective(self, x: Tensor, y: Tensor, chances: Tensor) -> Tensor:
        """The training loss averaged over the binarisation of each pixel, (n,).

        Pixels are context for later pixels as they are drawn in x, but each pixel's own loss is
        the mean over its draw. The expectation over x equals that of `objective`. Each pixel's
        part of the gradient varies no more than that of `objective` (Rao-Blackwell theorem). For
        the sum of the parts this is not a theorem, but it was measured (docs/decisions/0032).

        Args:
            x: uint8 (n, c, h, w), drawn by Bernoulli(chances), independently for each pixel.
            y: labels, int64 (n,).
            chances: float32 (n, c, h, w), probabilities of 1.
        """
        y = self._withhold(y)
        if self.config.moves:
            moved = self._draw_moved(y)
            where = moved[:, None, None, None]
            elsewhere = self.config.moves.interpolate(chances).clamp(0, 1)
            chances = torch.where(where, elsewhere, chances)
            x = torch.where(where, torch.bernoulli(chances).to(x.dtype), x)
            y = self._mark(y, moved)
        return self.loss(x, y, chances)

    def _contrast(self, features: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The contrast's share of the loss, (n,), of pictures x that have these features given y.

        Labels that are withheld have no share.
        """
        n, labels = len(y), self.config.labels
        known = (y % self.label.num_embeddings != self.null_label).nonzero()[:, 0]
        x, y, features = x[known], y[known], features[known]
        label = y % self.label.num_embeddings
        other = (label + torch.randint(1, labels, label.shape, device=y.device)) % labels
        in_its_place = self.features(x, y - label + other)
        with torch.autocast(x.device.type, enabled=False):
            nats, of_other = (
                self.head.nats(each.float(), x).flatten(1).sum(1)
                for each in (features, in_its_place)
            )
        share = self.config.contrast * (labels - 1) * functional.softplus(nats - of_other)
        return share.new_zeros(n).index_add(0, known, share)

    def _withhold(self, y: Tensor) -> Tensor:
        """The labels, some of which are replaced by null labels at random."""
        if not self.config.labels:
            return y
        withheld = torch.rand(y.shape, device=y.device) < self.config.label_dropout
        return torch.where(withheld, self.null_label, y)

    @staticmethod
    def _draw_moved(y: Tensor) -> Tensor:
        """Which pictures are to be moved, bool (n,)."""
        return torch.rand(y.shape, device=y.device) < MOVED

    def _mark(self, y: Tensor, moved: Tensor) -> Tensor:
        """The labels as `LabelEmbedding` expects them, of which some, bool (n,), are moved."""
        return y + moved * self.label.num_embeddings

    def evaluate(self, x: Tensor, y: Tensor) -> Tensor:
        """The expected loss in nats, (n,): -log p(x|y) and -log p(x), weighted as in training."""
        withheld = self.config.label_dropout if self.config.labels else 1.0
        nats = torch.zeros(len(x), device=x.device)
        if withheld:
            nats = nats - withheld * self.log_prob(x)
        if withheld < 1:
            nats = nats - (1 - withheld) * self.log_prob(x, y)
        return nats

    def matrices(self) -> list[Tensor]:
        """The weight matrices between hidden layers, which Muon may train."""
        return [self.mix.weight]

    def conditioning_labels(self, y: Tensor | None) -> Tensor | None:
        """The labels to condition on: null labels (1,) for None; None if the model takes none."""
        if not self.config.labels:
            return None
        if y is not None:
            return y
        return torch.tensor([self.null_label], device=self.mix.weight.device)
