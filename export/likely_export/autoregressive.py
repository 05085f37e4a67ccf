"""What densities by the chain rule over pixels share: log p(x), or log p(x|y), exactly.

    log p(x) = sum_i log p(x_i | x_1, ..., x_i-1), pixels in raster order

A family says what it makes of the pixels before each one (`features`); the first
look at them (a 7x7 kernel under mask A, say, cropped to the part that the mask
leaves), the distribution of the pixel (`mixture.head`, which chains channels and
digits) and labels, withheld at random in training, are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from likely.errors import InvalidInput
from likely_export import mixture
from likely_export.limits import at_least, shares


@dataclass(frozen=True)
class AutoregressiveConfig:
    """What shapes every autoregressive density.

    Attributes:
        shape: channels, rows, columns of a picture.
        levels: levels of a pixel.
        labels: labels to condition on; 0 models p(x) alone.
        channels: width of the hidden layers.
        layers: number of them.
        stem: rows above and columns to either side that the first kernel above
            sees, pixels to the left that the first one beside it sees.
        head: features before the last softmax.
        digits: digits a level is written with (2 for 256 levels: two nibbles).
        logistics: terms of a discretised logistic mixture over the pixel, which takes
            the place of the softmax; 0 for none.
        label_dropout: share of training pictures whose label is withheld, so
            that the same weights give p(x) and p(x|y); 0 teaches no p(x), 1 no p(x|y).
        dropout: share of hidden features dropped in training.
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

    def __post_init__(self) -> None:
        shares(self, "label_dropout", "dropout")
        at_least(1, self, "channels", "layers", "head", "digits")
        at_least(0, self, "logistics")
        rows, side, left = self.stem
        if rows < 1 or side < 0 or left < 1:
            raise InvalidInput("stem", f"{list(self.stem)}; at least [1, 0, 1] is needed")


class Autoregressive(nn.Module):
    """An autoregressive density over discrete pictures.

    Args:
        config: what shapes it.
        width: channels of what the stem gives.
    """

    config: AutoregressiveConfig
    label: nn.Embedding

    def __init__(self, config: AutoregressiveConfig, width: int) -> None:
        super().__init__()
        self.config = config
        c, rows, side, left = config.shape[0], *config.stem
        self.stem_vertical = nn.Conv2d(c, width, (rows, 2 * side + 1))
        self.stem_horizontal = nn.Conv2d(c, width, (1, left))

    def _end(self, width: int) -> None:
        """Makes what follows the hidden layers, the last of which has `width` channels."""
        config = self.config
        self.mix = nn.Conv2d(width, config.head, 1)
        if config.labels:
            self.label = nn.Embedding(config.labels + 1, config.head)
            nn.init.zeros_(self.label.weight)
        self.head = mixture.head(
            config.head, config.shape[0], config.levels, config.digits, config.logistics
        )

    @property
    def null_label(self) -> int:
        """The label that stands for none: p(x|null) is p(x)."""
        return self.config.labels

    def features(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """What the head sees of the pixels before each one, (n, head, h, w).

        Args:
            x: uint8 (n, c, h, w) of levels.
            y: int64 (n,) of labels, `null_label` where there is none; None for all null.
        """
        raise NotImplementedError

    def scale(self, x: Tensor) -> Tensor:
        """Levels as float32 in [-1, 1]."""
        return x.float() * (2 / (self.config.levels - 1)) - 1

    def stem(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The first look above and to the left, each (n, width, h, w), at scaled z (n, c, h, w)."""
        rows, side, left = self.config.stem
        # Cropping the last row (column) shifts the kernel strictly above (to the left).
        above = self.stem_vertical(functional.pad(z[:, :, :-1], (side, side, rows, 0)))
        beside = self.stem_horizontal(functional.pad(z[..., :-1], (left, 0, 0, 0)))
        return above, beside

    def mixed(self, hidden: Tensor, y: Tensor | None) -> Tensor:
        """The features (n, head, h, w) of the last hidden layer and the label."""
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
        """Nats a picture to minimise in training, (n,); labels are withheld at random."""
        return self._told(x, y, self.head.nats)

    def expected_objective(self, x: Tensor, y: Tensor, chances: Tensor) -> Tensor:
        """The same for pictures of two levels, whose pixels were drawn one apart from the other.

        Each pixel counts with the mean of what it would cost over its own draw; only as what
        others are told by is it the draw in x. The mean over all draws is the objective's. Each
        pixel's part spreads no more than drawn (Rao and Blackwell's theorem); of their sum that
        is no theorem, but what was measured (docs/decisions/0032).

        Args:
            x: uint8 (n, c, h, w), drawn by Bernoulli(chances).
            y: int64 (n,), labels.
            chances: float32 (n, c, h, w).
        """

        def nats(features: Tensor, x: Tensor) -> Tensor:
            return self.head.expected(self.head.log_probs(features, x), chances)

        return self._told(x, y, nats)

    def _told(self, x: Tensor, y: Tensor, nats: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The sum (n,) of what `nats` makes of the features and x, labels withheld at random."""
        if self.config.labels:
            withheld = torch.rand(y.shape, device=y.device) < self.config.label_dropout
            y = torch.where(withheld, self.null_label, y)
        features = self.features(x, y)
        # Under mixed precision the hidden layers may round, the head may not.
        with torch.autocast(x.device.type, enabled=False):
            return nats(features.float(), x).flatten(1).sum(1)

    def evaluate(self, x: Tensor, y: Tensor) -> Tensor:
        """The expected objective in nats, (n,): of -log p(x|y) and -log p(x), as often as seen."""
        withheld = self.config.label_dropout if self.config.labels else 1.0
        nats = torch.zeros(len(x), device=x.device)
        if withheld:
            nats = nats - withheld * self.log_prob(x)
        if withheld < 1:
            nats = nats - (1 - withheld) * self.log_prob(x, y)
        return nats

    def matrices(self) -> list[Tensor]:
        """The weights that are matrices between hidden layers, which Muon may train."""
        return [self.mix.weight]

    def labels(self, y: Tensor | None) -> Tensor | None:
        """The labels to condition on, null ones (1,) for None; None if the model takes none."""
        if not self.config.labels:
            return None
        if y is not None:
            return y
        return torch.tensor([self.null_label], device=self.mix.weight.device)
