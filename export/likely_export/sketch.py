"""A picture in two passes: a sketch of few levels first, then the exact level of every pixel.

    p(x|y) = p(s|y) p(x|s, y)    where s, the sketch, is x with neighbouring levels merged

`Sketch` is a PixelCNN of p(s|y). `Detail`, of p(x|s, y), is a PixelCNN that also sees the
whole sketch, with the parts to the right of and below a pixel. What a picture shows is thus
decided by a model that has nothing else to learn, and a level that was drawn by bad luck
cannot lead it astray (Kolesnikov and Lampert, 2017, https://arxiv.org/abs/1612.08185, whose
sketch has 16 levels).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from likely.errors import InvalidInput
from likely_export.heads import PixelHead
from likely_export.limits import at_least
from likely_export.pixelcnn import PixelCNN, PixelCNNConfig

EXCLUDED = -1e4  # log-probability of a digit that contradicts the sketch; -inf would give nan


@dataclass(frozen=True)
class SketchConfig(PixelCNNConfig):
    """Configuration of the PixelCNN of a sketch, whose level is drawn as one digit.

    Attributes:
        sketch_levels: levels of the sketch, a divisor of `levels`. `moves` are of the picture.
    """

    sketch_levels: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.digits != 1:
            raise InvalidInput("digits", f"{self.digits}; the level of a sketch is one digit")
        _check_sketch(self.sketch_levels, self.levels)

    def density(self) -> PixelCNNConfig:
        """The configuration of the PixelCNN, for which the sketch is the picture."""
        names = [field.name for field in dataclasses.fields(PixelCNNConfig)]
        options = {name: getattr(self, name) for name in names}
        return PixelCNNConfig(**{**options, "levels": self.sketch_levels})


class Sketch(nn.Module):
    """log p(s), or log p(s|y), of the sketch s of a picture."""

    def __init__(self, config: SketchConfig) -> None:
        super().__init__()
        self.config = config
        self.density = PixelCNN(config.density())

    def of(self, x: Tensor) -> Tensor:
        """The sketch of a picture of any levels, uint8 (n, c, h, w), below `sketch_levels`."""
        return merge(x, self.config.levels // self.config.sketch_levels)

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        """The training loss in nats per picture, (n,); labels are withheld at random."""
        x, y = self.density.augment(x, y)
        return self.density.loss(self.of(x), y)

    def evaluate(self, x: Tensor, y: Tensor) -> Tensor:
        """The expected loss in nats, (n,): -log p(s|y) and -log p(s), weighted as in training."""
        return self.density.evaluate(self.of(x), y)

    def matrices(self) -> list[Tensor]:
        """The weight matrices between hidden layers, which Muon may train."""
        return self.density.matrices()


@dataclass(frozen=True)
class DetailConfig(PixelCNNConfig):
    """Configuration of the PixelCNN of a picture given its sketch.

    Attributes:
        sketch_levels: levels of the sketch. A pixel's first digit must tell its level in the
            sketch, and take more values than that.
        window: rows and columns of the sketch that the first convolution sees, an odd number.
    """

    sketch_levels: int = 2
    window: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_sketch(self.sketch_levels, round(self.levels ** (1 / self.digits)))
        at_least(1, self, "window")
        if self.window % 2 == 0:
            raise InvalidInput("window", f"{self.window} is not odd")
        if self.logistics:
            raise InvalidInput("logistics", "a detail has a softmax, which the sketch restricts")


class RestrictedHead(PixelHead):
    """A chain of softmaxes, whose first digit must agree with the sketch of the picture.

    Args:
        config: configuration of the density.
    """

    restrictions: Tensor

    def __init__(self, config: DetailConfig) -> None:
        super().__init__(config.head, config.shape[0], config.levels, config.digits)
        sketched = torch.arange(self.base) // (self.base // config.sketch_levels)
        contradicts = sketched != torch.arange(config.sketch_levels)[:, None]
        self.register_buffer("restrictions", contradicts * EXCLUDED, persistent=False)
        self.merged = config.levels // config.sketch_levels

    def sketch(self, x: Tensor) -> Tensor:
        """The sketch of a picture, uint8 (n, c, h, w)."""
        return merge(x, self.merged)

    def restrict(self, s: Tensor) -> Tensor:
        """What to add to the logits of the first digits, (n, h, w, c, base): 0 or `EXCLUDED`."""
        return functional.embedding(s.permute(0, 2, 3, 1).long(), self.restrictions)

    def log_probs(self, features: Tensor, x: Tensor) -> Tensor:
        """Log-probabilities of every digit, (n, h, w, c * digits, base), nats."""
        tables = super().log_probs(features, x).unflatten(-2, (self.channels, self.digits))
        first = torch.log_softmax(tables[..., 0, :] + self.restrict(self.sketch(x)), -1)
        return torch.cat([first[..., None, :], tables[..., 1:, :]], -2).flatten(-3, -2)


class Detail(PixelCNN):
    """log p(x|s), or log p(x|s, y), of a picture given its sketch s."""

    config: DetailConfig
    head: RestrictedHead

    def __init__(self, config: DetailConfig) -> None:
        super().__init__(config)
        self.head = RestrictedHead(config)
        width = config.channels
        self.look = nn.Conv2d(config.shape[0], width, config.window, padding=config.window // 2)
        self.look_again = nn.Conv2d(width, width, 3, padding=1)
        self.tell = nn.Conv2d(width, 2 * width, 1)
        nn.init.zeros_(self.tell.weight)

    def features(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The head's input, (n, head, h, w), from the pixels before each one and the sketch."""
        z = self.scale(x)
        v, h = self.stem(z)
        beside_v, beside_h = self.beside(self.head.sketch(x))
        return self.through_stacks(z, v + beside_v, h + beside_h, self.conditioning_labels(y))

    def beside(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """What the whole sketch adds to both stacks, each (n, channels, h, w)."""
        seen = self.look(s.float() * (2 / (self.config.sketch_levels - 1)) - 1)
        seen = seen + self.look_again(torch.relu(seen))
        vertical, horizontal = self.tell(torch.relu(seen)).chunk(2, 1)
        return vertical, horizontal

    def matrices(self) -> list[Tensor]:
        """The weight matrices between hidden layers, which Muon may train."""
        return [*super().matrices(), self.look_again.weight, self.tell.weight]


class Sketched(nn.Module):
    """log p(x), or log p(x|y), in two passes.

    To the digits of a level, its level in the sketch is prepended. All of these are written with
    the base of the other digits. `config` is the detail's, whose digits do not count the first.

    Args:
        sketch: density of the sketch.
        detail: density of the picture given the sketch.

    Raises:
        InvalidInput: the two models are not of the same pictures and sketches.
    """

    def __init__(self, sketch: Sketch, detail: Detail) -> None:
        super().__init__()
        self.sketch = sketch
        self.detail = detail
        self.config = detail.config
        for name in ("shape", "levels", "labels", "sketch_levels"):
            if (one := getattr(sketch.config, name)) != (other := getattr(self.config, name)):
                raise InvalidInput(name, f"is {one} in the sketch and {other} in the detail")

    @property
    def digits(self) -> int:
        """Digits of a channel, with the one of the sketch."""
        return self.detail.head.digits + 1

    @property
    def base(self) -> int:
        """Values that a digit can take; that of the sketch takes the first few."""
        return self.detail.head.base

    def to_digits(self, x: Tensor) -> Tensor:
        """Writes levels (n, c, h, w) as digits, int64 (n, h, w, c * digits)."""
        digits = self.detail.head.to_digits(x).unflatten(-1, (x.shape[1], -1))
        sketched = self.sketch.of(x).permute(0, 2, 3, 1).long()
        return torch.cat([sketched[..., None], digits], -1).flatten(-2)

    def log_probs(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Log-probabilities of every digit (n, h, w, c * digits, base), nats."""
        channels = x.shape[1]
        sketched = self.sketch.density.log_probs(self.sketch.of(x), y)
        absent = (*sketched.shape[:-1], self.base - sketched.shape[-1])
        sketched = torch.cat([sketched, sketched.new_full(absent, EXCLUDED)], -1)
        tables = self.detail.log_probs(x, y).unflatten(-2, (channels, -1))
        return torch.cat([sketched[..., None, :], tables], -2).flatten(-3, -2)

    def surprise(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """-log p(pixel | sketch before, or sketch and pixels before[, y]) in nats, (n, c, h, w)."""
        sketched: Tensor = self.sketch.density.surprise(self.sketch.of(x), y)
        return sketched + self.detail.surprise(x, y)

    def log_prob(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """log p(x), or log p(x|y), in nats, (n,)."""
        return -self.surprise(x, y).flatten(1).sum(1)


def merge(x: Tensor, merged: int) -> Tensor:
    """Levels, uint8 (n, c, h, w), of which so many neighbours become one."""
    return torch.div(x.int(), merged, rounding_mode="trunc").to(torch.uint8)


def _check_sketch(sketch_levels: int, levels: int) -> None:
    if not 2 <= sketch_levels < levels or levels % sketch_levels:
        raise InvalidInput(
            "sketch_levels", f"{sketch_levels} is no divisor of {levels} above 1 and below it"
        )
