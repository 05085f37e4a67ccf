"""What an evaluation leaves beside its figures: the pictures and numbers that a report shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from likely.answers import Accepted, Doubles, Floats, Labels, Pixels

EVALUATION, REPORT = "evaluation.json", "report.html"  # the files that it leaves in a bundle
BOUND = "bound_nats"  # of a model whose bundle has no graph that gives log p(x)


@dataclass(frozen=True, slots=True)
class Sets:
    """One set of pictures, in or out of distribution, as the bundle sees it.

    Attributes:
        examples: uint8 (k, c, h, w), a few of its pictures.
        nats: float64 (n,), -log p(x).
        unusualness: float64 (n,), the score that is ranked.
        p_value: float64 (n,).
    """

    examples: Pixels
    nats: Doubles
    unusualness: Doubles
    p_value: Doubles


@dataclass(frozen=True, slots=True)
class Labelled:
    """What one rule of the bundle makes of the test part's labels.

    Attributes:
        y: int64 (n,), the true ones.
        posterior: float64 (n, labels).
        p_value: float64 (n,), of the pictures.
    """

    y: Labels
    posterior: Doubles
    p_value: Doubles


@dataclass(frozen=True, slots=True)
class Completed:
    """Pictures with a part hidden, and what the model drew there.

    Attributes:
        x: uint8 (n, c, h, w), the originals.
        known: bool (n, c, h, w), true where a pixel was given.
        drawn: uint8 (n, k, c, h, w), completions.
    """

    x: Pixels
    known: Accepted
    drawn: Pixels


@dataclass(frozen=True, slots=True)
class Compared:
    """Which pixels speak for which of two labels.

    Attributes:
        pair: int64 (n, 2), the first label and the second.
        log_ratio: float64 (n,), log p(x|first) - log p(x|second), or of their bounds, nats.
        maps: float32 (n, c, h, w), what every pixel given those before it adds to the log-ratio;
            or (n, 1, h, w), what it loses without the patches that hold a pixel.
        patch: side of those patches; None where the maps sum to the log-ratio.
    """

    pair: Labels
    log_ratio: Doubles
    maps: Floats
    patch: int | None = None


@dataclass(frozen=True, slots=True)
class Explained:
    """Pictures and why.

    Attributes:
        x: uint8 (n, c, h, w).
        surprise: float32 (n, c, h, w), nats, summing to -log p(x).
        compared: two labels of each, where there are several.
    """

    x: Pixels
    surprise: Floats
    compared: Compared | None = None


@dataclass(frozen=True, slots=True)
class Material:
    """Everything that a report shows beside the figures.

    Attributes:
        levels: of a pixel.
        labels: their names.
        sets: by name; `corruptions.INLIERS` is the test part.
        labelled: where the bundle classifies by p(x|y).
        discriminated: where it classifies by p(y|x).
        drawn: uint8 (labels, k, c, h, w), draws by label; (1, k, c, h, w) without labels;
            None where the bundle draws nothing.
        nearest: uint8 (k, 2, c, h, w), draws beside their nearest training pictures.
        completed: where the bundle completes.
        explained: a few test pictures, those that are hardest to label where they have labels.
    """

    levels: int
    labels: tuple[str, ...]
    sets: Mapping[str, Sets]
    labelled: Labelled | None = None
    discriminated: Labelled | None = None
    drawn: Pixels | None = None
    nearest: Pixels | None = None
    completed: Completed | None = None
    explained: Explained | None = None
    alphas: tuple[float, ...] = field(default=(0.01, 0.05, 0.1))
