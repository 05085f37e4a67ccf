"""What an evaluation returns beside its figures: the pictures and numbers that a report shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from likely.answers import Accepted, Doubles, Floats, Labels, Pixels

EVALUATION, REPORT = "evaluation.json", "report.html"  # files that an evaluation adds to a bundle
BOUND = "bound_nats"  # figure of a model whose bundle has no graph of log p(x)


@dataclass(frozen=True, slots=True)
class PictureSet:
    """One set of pictures, in or out of distribution, with the bundle's answers.

    Attributes:
        examples: a few of its pictures, uint8 (k, c, h, w).
        nats: -log p(x), float64 (n,).
        unusualness: the score that is ranked, float64 (n,).
        p_value: float64 (n,).
    """

    examples: Pixels
    nats: Doubles
    unusualness: Doubles
    p_value: Doubles


@dataclass(frozen=True, slots=True)
class Labelled:
    """The test part as labelled by one of the bundle's rules.

    Attributes:
        y: true labels, int64 (n,).
        posterior: float64 (n, labels).
        p_value: p-values of the pictures, float64 (n,).
    """

    y: Labels
    posterior: Doubles
    p_value: Doubles


@dataclass(frozen=True, slots=True)
class Completed:
    """Pictures with a hidden part, and the model's completions.

    Attributes:
        x: the originals, uint8 (n, c, h, w).
        known: whether a pixel was given, bool (n, c, h, w).
        drawn: completions, uint8 (n, k, c, h, w).
    """

    x: Pixels
    known: Accepted
    drawn: Pixels


@dataclass(frozen=True, slots=True)
class Compared:
    """How much each pixel favours one of two labels over the other.

    Attributes:
        pair: first and second label, int64 (n, 2).
        log_ratio: log p(x|first) - log p(x|second), or that of their bounds, nats, float64 (n,).
        maps: each pixel's term of the log-ratio, by the chain rule, float32 (n, c, h, w); or the
            mean loss of log-ratio over the occluding patches that contain the pixel, (n, 1, h, w).
        patch: side of those patches; None if the maps sum to the log-ratio.
    """

    pair: Labels
    log_ratio: Doubles
    maps: Floats
    patch: int | None = None


@dataclass(frozen=True, slots=True)
class Explained:
    """Pictures with explanations.

    Attributes:
        x: uint8 (n, c, h, w).
        surprise: float32 (n, c, h, w), nats, which sum to -log p(x).
        compared: comparison of two labels for each picture; None if there are not two.
    """

    x: Pixels
    surprise: Floats
    compared: Compared | None = None


@dataclass(frozen=True, slots=True)
class Material:
    """Everything that a report shows beside the figures.

    Attributes:
        levels: number of levels.
        labels: names of the labels.
        sets: sets of pictures by name; `corruptions.INLIERS` is the test part.
        labelled: labels by p(x|y), if the bundle has it.
        discriminated: labels by p(y|x), if the bundle has it.
        drawn: draws by label, uint8 (labels, k, c, h, w); (1, k, c, h, w) without labels; None
            if the bundle cannot draw.
        nearest: draws beside their nearest training pictures, uint8 (k, 2, c, h, w).
        completed: completions, if the bundle completes.
        explained: a few test pictures; with labels, those that are hardest to label.
    """

    levels: int
    labels: tuple[str, ...]
    sets: Mapping[str, PictureSet]
    labelled: Labelled | None = None
    discriminated: Labelled | None = None
    drawn: Pixels | None = None
    nearest: Pixels | None = None
    completed: Completed | None = None
    explained: Explained | None = None
