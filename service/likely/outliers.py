"""Turns outlier statistics into one calibrated p-value; pure numpy.

The statistics of a picture (columns of the density graph's `statistics`) are mapped to
normal scores by their ranks on the *fit* split. Several parts each turn some of these
into one score of how unusual the picture is. The parts' scores are mapped to normal
scores again and averaged. The average is standardised by what is usual for the predicted
label, and ranked once against the *calibration* split, which neither the models nor the
combination have seen. Then P(p <= alpha) <= alpha for a new in-distribution picture, for
any alpha and any dependence of the statistics (Vovk et al., 2005; Bates et al., 2023,
https://arxiv.org/abs/2104.08279).

`likely_export.calibrate` makes the arrays that everything here is built from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from likely.answers import Doubles, Guarantee, Labels
from likely.errors import InvalidInput

Arrays = Mapping[str, npt.NDArray[Any]]
BLOCK = 8
MAX_COMPARED_ROWS = 4  # most rows whose values are compared with all knots
GROUP = 16  # values in a group, of which the smallest is found first
ROUNDING = 1e-12  # relative tolerance of a rank's bound


class _Stored:
    """A dataclass of arrays that can be stored in an archive and read back."""

    @classmethod
    def read(cls, arrays: Arrays, prefix: str = "") -> Self:
        """Reads the instance whose fields are stored under a prefix.

        Raises:
            KeyError: a field is missing.
        """
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        return cls(**{name: np.asarray(arrays[prefix + name], np.float64) for name in names})

    def stored(self, prefix: str = "") -> dict[str, Doubles]:
        """The fields by name, each with the prefix."""
        return {prefix + field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]


@dataclass(frozen=True)
class Ranks(_Stored):
    """Maps values to the normal scores of their ranks; linear beyond the outermost knots.

    Attributes:
        knots: (k, s), k quantiles of each of s columns.
        normals: (k,), the standard normal quantiles of the same ranks.
        spreads: (s,), the distance beyond the outermost knots, where ranks would saturate,
            that changes the score by 1.
    """

    knots: Doubles
    normals: Doubles
    spreads: Doubles

    def __call__(self, values: npt.NDArray[np.floating]) -> Doubles:
        """Normal scores (n, s) of values (n, s)."""
        x: Doubles = values.astype(np.float64)
        knot, normal, slope = self._lines[:, self._line_indices(x), np.arange(x.shape[1])]
        scores: Doubles = slope * (x - knot) + normal
        return scores

    def _line_indices(self, values: Doubles) -> npt.NDArray[np.intp]:
        """The index (n, s) of each value's line: the number of knots that are not above it."""
        if len(values) <= MAX_COMPARED_ROWS:  # cheaper for few rows than a search in each column
            return np.asarray(np.count_nonzero(self.knots <= values[:, None], axis=1))
        searched = zip(self._columns, values.T, strict=True)
        return np.stack([column.searchsorted(v, "right") for column, v in searched], 1)

    @cached_property
    def _columns(self) -> tuple[Doubles, ...]:
        return tuple(np.ascontiguousarray(column) for column in self.knots.T)

    @cached_property
    def _lines(self) -> Doubles:
        """The lines between and beyond the knots, (3, k + 1, s): a knot, its score, the slope."""
        k, s = self.knots.shape
        with np.errstate(divide="ignore", invalid="ignore"):  # of equal knots
            slopes = np.diff(self.normals)[:, None] / np.diff(self.knots, axis=0)
        normals = np.append(self.normals[0], self.normals)[:, None]
        beyond = 1 / self.spreads[None]
        return np.stack(
            (
                np.concatenate((self.knots[:1], self.knots)),
                np.broadcast_to(normals, (k + 1, s)),
                np.concatenate((beyond, slopes, beyond)),
            )
        )


class Part(Protocol):
    """One measure of how unusual a vector of normal scores is."""

    def __call__(self, normal: Doubles, label: Labels) -> Doubles:
        """Scores (n,) of normal scores (n, s) and predicted labels (n,); large is unusual."""

    def stored(self, prefix: str = "") -> dict[str, Doubles]:
        """The part's arrays by name, each with the prefix."""


@dataclass(frozen=True)
class Mahalanobis(_Stored):
    """The squared Mahalanobis distance from the centre of the predicted label.

    Attributes:
        columns: (c,), the indices of the statistics that are used.
        centres: (labels, c), the centre of each label; or (1, c), one centre for all.
        whitening: (c, r), maps differences to independent numbers.
    """

    columns: Doubles
    centres: Doubles
    whitening: Doubles

    def __call__(self, normal: Doubles, label: Labels) -> Doubles:
        """The distances (n,)."""
        centres = self.centres[label] if len(self.centres) > 1 else self.centres
        whitened = _multiply_rows(normal[:, self.columns.astype(int)] - centres, self.whitening)
        distance: Doubles = np.square(whitened).sum(1)
        return distance


@dataclass(frozen=True)
class Mixture(_Stored):
    """Minus the log-density of a mixture of normal distributions.

    Attributes:
        columns: (c,), the indices of the statistics that are used.
        centre: (c,), subtracted from their normal scores.
        whitening: (c, r), maps the differences to r principal components.
        means: (m, r), the means of the m terms.
        roots: (m, r, r), for each term a matrix R, where R R' is the inverse covariance.
        offsets: (m,), for each term the logarithm of its weight times the determinant of R.
    """

    columns: Doubles
    centre: Doubles
    whitening: Doubles
    means: Doubles
    roots: Doubles
    offsets: Doubles

    def __call__(self, normal: Doubles, label: Labels) -> Doubles:  # noqa: ARG002
        """Minus log-densities (n,), up to a constant."""
        v = _multiply_rows(normal[:, self.columns.astype(int)] - self.centre, self.whitening)
        roots, origins = self._joined_roots
        independent = (_multiply_rows(v, roots) - origins).reshape(len(v), *self.means.shape)
        terms = self.offsets - 0.5 * np.square(independent).sum(2)
        improbable: Doubles = -np.logaddexp.reduce(terms, axis=1)
        return improbable

    @cached_property
    def _joined_roots(self) -> tuple[Doubles, Doubles]:
        """The roots of all terms as one matrix (r, m * r), and the means times them, (m * r,)."""
        r = self.means.shape[1]
        origins = (self.means[:, None] @ self.roots).reshape(-1)
        return np.ascontiguousarray(self.roots.transpose(1, 0, 2).reshape(r, -1)), origins


@dataclass(frozen=True)
class Neighbours(_Stored):
    """The mean distance to the nearest pictures of the fit split.

    Attributes:
        columns: (c,), the indices of the statistics that are used.
        centre: (c,), subtracted from their normal scores.
        whitening: (c, r), maps the differences to independent numbers.
        bank: (b, r), these numbers for b pictures of the fit split.
        count: (), the number of nearest pictures whose distances are averaged.
    """

    columns: Doubles
    centre: Doubles
    whitening: Doubles
    bank: Doubles
    count: Doubles

    def __call__(self, normal: Doubles, label: Labels) -> Doubles:  # noqa: ARG002
        """The distances (n,)."""
        v = _multiply_rows(normal[:, self.columns.astype(int)] - self.centre, self.whitening)
        ones, k = np.ones((len(v), 1)), int(self.count)
        distances = np.empty(len(v))
        for start in range(0, len(v), BLOCK):  # the distances of a block fit in a cache
            rows = v[start : start + BLOCK]
            apart = _multiply_rows(
                np.concatenate((rows, ones[start : start + BLOCK]), 1), self._distance_matrix
            )
            squares = _smallest(apart, k) + np.square(rows).sum(1)[:, None]
            distances[start : start + BLOCK] = np.sqrt(np.maximum(squares, 0)).mean(1)
        return distances

    @cached_property
    def _distance_matrix(self) -> Doubles:
        """The matrix (r + 1, b) from (v, 1) to |v - u|^2 - |v|^2 for each of the bank's rows u."""
        return np.concatenate((-2 * self.bank.T, np.square(self.bank).sum(1)[None]))


@dataclass(frozen=True)
class Contrast(_Stored):
    """The log-odds of a corrupted picture against a real one.

    Attributes:
        columns: (c,), the indices of the statistics that are used.
        slopes: (c,), the weights of their normal scores, which are clipped to +-`HELD`.
        bends: (c,), the weights of the absolute values of these.
    """

    columns: Doubles
    slopes: Doubles
    bends: Doubles

    HELD = 6.0

    def __call__(self, normal: Doubles, label: Labels) -> Doubles:  # noqa: ARG002
        """The log-odds (n,), up to a constant."""
        v = np.clip(normal[:, self.columns.astype(int)], -self.HELD, self.HELD)
        # numpy sums a row in another order if rows are not contiguous.
        v = np.ascontiguousarray(v)
        odds: Doubles = (v * self.slopes).sum(1) + (np.abs(v) * self.bends).sum(1)
        return odds


PARTS: Mapping[str, type[Mahalanobis | Mixture | Neighbours | Contrast]] = {
    "mahalanobis": Mahalanobis,
    "mixture": Mixture,
    "neighbours": Neighbours,
    "contrast": Contrast,
}


@dataclass(frozen=True)
class Combination:
    """Combines statistics into one score; large is unusual.

    Attributes:
        ranks: maps the statistics to normal scores.
        parts: each turns these normal scores into one score.
        part_ranks: maps the parts' scores to normal scores.
        weights: (parts,), the weights of these in the average.
        usual: (labels, 2), mean and standard deviation of the average for each predicted
            label; or (1, 2), for all labels together.
    """

    ranks: Ranks
    parts: tuple[Part, ...]
    part_ranks: Ranks
    weights: Doubles
    usual: Doubles

    def __call__(self, statistics: npt.NDArray[np.floating], label: Labels) -> Doubles:
        """Scores (n,) of statistics (n, s); about standard normal in distribution."""
        parts = self.part_ranks(self.parts_of(self.ranks(statistics), label))
        average = (parts * self.weights).sum(1)
        mean, deviation = self.usual[label if len(self.usual) > 1 else np.zeros_like(label)].T
        score: Doubles = (average - mean) / deviation
        return score

    def parts_of(self, normal: Doubles, label: Labels) -> Doubles:
        """The parts' scores (n, parts) of normal scores (n, s)."""
        return np.stack([part(normal, label) for part in self.parts], 1)

    @classmethod
    def read(cls, arrays: Arrays) -> Combination:
        """Reads the combination from the arrays of an archive.

        Raises:
            KeyError: an array is missing.
        """
        headed = {key.split(".")[0] for key in arrays if key[:1].isdigit()}
        parts: list[Part] = []
        for head in sorted(headed, key=lambda head: int(head.split("_")[0])):
            kind = head.split("_")[1]
            parts.append(PARTS[kind].read(arrays, f"{head}."))
        return cls(
            Ranks.read(arrays, "statistics."),
            tuple(parts),
            Ranks.read(arrays, "parts."),
            np.asarray(arrays["weights"], np.float64),
            np.asarray(arrays["usual"], np.float64),
        )

    def stored(self) -> dict[str, Doubles]:
        """The arrays of the combination by name."""
        kinds = {kind: name for name, kind in PARTS.items()}
        arrays = {**self.ranks.stored("statistics."), **self.part_ranks.stored("parts.")}
        for index, part in enumerate(self.parts):
            arrays |= part.stored(f"{index}_{kinds[type(part)]}.")  # type: ignore[index]
        return {**arrays, "weights": self.weights, "usual": self.usual}


class Detector:
    """Turns statistics into p-values, with the arrays that calibration wrote.

    Attributes:
        combination: turns statistics into one score.
        scores: float64 (n,), the scores of the calibration split, ascending.
        label_scores: float64 (n,), the scores of the calibration split under the true labels
            (`label_score`), grouped by label and ascending within each; empty without labels.
        label_counts: int64 (labels,), the number of calibration pictures of each label.
        confident: float64 (n + 1,), where entry i is the p-value of the PAC guarantee, with a
            confidence of 95 %, if i calibration scores are at least as large.
    """

    def __init__(self, arrays: Arrays) -> None:
        self.combination = Combination.read(arrays)
        self.scores = np.asarray(arrays["scores"], np.float64)
        self.confident = np.asarray(arrays["confident"], np.float64)
        self.label_scores = np.asarray(arrays["label_scores"], np.float64)
        self.label_counts = np.asarray(arrays["label_counts"], np.int64)

    @property
    def statistics(self) -> int:
        """The number of statistics of a picture."""
        return int(self.combination.ranks.knots.shape[1])

    def flaw(self, labels: int) -> str | None:
        """Says what is wrong with the arrays; None if nothing is.

        Args:
            labels: number of labels under which pictures are ranked; 0 for none.
        """
        counts, n = self.label_counts, len(self.scores)
        if not _is_ascending(self.scores):
            return "scores do not ascend"
        if self.confident.shape != (n + 1,) or not _is_ascending(self.confident):
            return f"confident is not {n + 1} p-values that ascend"
        if not 0 < self.confident[0] <= self.confident[-1] <= 1:
            return "confident is not within (0, 1]"
        if labels and counts.shape != (labels,):
            return f"label_counts is not of {labels} labels"
        if counts.min(initial=0) < 0 or counts.sum() != len(self.label_scores):
            return f"label_counts does not divide {len(self.label_scores)} label_scores"
        if not all(map(_is_ascending, np.split(self.label_scores, np.cumsum(counts)[:-1]))):
            return "label_scores do not ascend within a label"
        return None

    @property
    def finest_alpha(self) -> float:
        """The smallest alpha that n calibration scores can guarantee: 1 / (n + 1)."""
        return 1 / (len(self.scores) + 1)

    def score(self, statistics: npt.NDArray[np.floating], label: Labels | None = None) -> Doubles:
        """The scores (n,) of how unusual pictures are; about standard normal in distribution.

        Args:
            statistics: (n, s), the density graph's statistics.
            label: int64 (n,), the predicted labels; None if the density graph gives none.
        """
        if label is None:
            label = np.zeros(len(statistics), np.int64)
        return self.combination(statistics, label)

    def p_value(self, score: Doubles, guarantee: Guarantee = Guarantee.MARGINAL) -> Doubles:
        """The calibrated p-values (n,), in (0, 1], of scores (n,).

        Calibration scores that are equal to a score count as at least as large. Rejecting at
        p <= alpha rejects at most the share alpha of in-distribution pictures: on average over
        calibration splits (MARGINAL), or with a confidence of 95 % for this split (PAC; Vovk,
        2012: the false-rejection rate of a split is beta-distributed).
        """
        n = len(self.scores)
        as_large = n - np.searchsorted(self.scores, score, side="left")
        if guarantee == Guarantee.PAC:
            return self.confident[as_large]
        return (1 + as_large) / (n + 1)

    def label_p_values(self, score: Doubles, posterior: Doubles) -> Doubles:
        """The p-values under every label (n, labels), of scores (n,) and posteriors (n, labels).

        Each label ranks pictures among its own calibration pictures only. The labels whose
        p-value exceeds alpha therefore form a set that contains the true label with probability
        1 - alpha, whatever that label is (Sadinle et al., 2019). An ambiguous picture has several
        labels in its set. An outlier may have some too: only its own p-value shows that it is an
        outlier. At an alpha below 1 / (n + 1), a label with n calibration pictures is in every set.
        """
        scores = label_score(score, posterior)
        p = np.empty_like(scores)
        starts = np.concatenate([[0], np.cumsum(self.label_counts)])
        for label, count in enumerate(self.label_counts):
            calibration_scores = self.label_scores[starts[label] : starts[label] + count]
            below = np.searchsorted(calibration_scores, scores[:, label], side="left")
            p[:, label] = (1 + count - below) / (count + 1)
        return p

    def check_alpha(self, alpha: float, guarantee: Guarantee = Guarantee.MARGINAL) -> float:
        """Returns alpha, if the calibration can guarantee it.

        Raises:
            InvalidInput: alpha is not in [finest, 1), where PAC has a larger finest alpha.
        """
        finest = self.confident[0] if guarantee == Guarantee.PAC else self.finest_alpha
        require_alpha(alpha, finest, len(self.scores))
        return alpha


def require_alpha(alpha: float, finest: float, size: int) -> None:
    """Checks that a calibration can guarantee alpha.

    Args:
        alpha: the rate of false rejections.
        finest: the smallest alpha that the calibration can guarantee.
        size: number of calibration pictures.

    Raises:
        InvalidInput: alpha is not in [finest, 1).
    """
    if not finest <= alpha < 1:
        fine = f": {size} calibration pictures cannot promise finer"
        raise InvalidInput(
            "alpha", f"{alpha:g} is not in [{finest:.6g}, 1){fine if alpha < finest else ''}"
        )


def label_score(score: Doubles, posterior: Doubles) -> Doubles:
    """How unusual pictures are under each label (n, labels), from scores (n,) and posteriors.

    Half the square of a positive score is about minus the log of a normal tail probability: the
    evidence against the picture, in nats. -log p(y|x), the evidence against the label, is added.
    """
    against: Doubles = np.square(np.maximum(score, 0))[:, None] / 2
    return against - np.log(np.maximum(posterior, 1e-300))


def benjamini_hochberg(p_values: npt.ArrayLike, rate: float) -> npt.NDArray[np.bool_]:
    """Decides which pictures of a batch to reject, at a given false discovery rate.

    The procedure of Benjamini and Hochberg, 1995, is valid for p-values of one calibration split
    (Bates et al., 2023). Of a batch of m, k pictures can only be rejected if
    rate >= m * finest_alpha / k.

    Args:
        p_values: (n,), from `Score` or `Classify` with the marginal guarantee.
        rate: the accepted expected share of in-distribution pictures among those rejected.

    Returns:
        bool (n,), true where a picture is to be rejected.

    Raises:
        InvalidInput: rate is not in (0, 1).
    """
    if not 0 < rate < 1:
        raise InvalidInput("rate", f"{rate:g} is not in (0, 1)")
    p = np.asarray(p_values, np.float64)
    n = len(p)
    order = np.argsort(p, kind="stable")
    # P-values are ratios of whole numbers: one that equals its bound must pass despite rounding.
    bounds = rate * np.arange(1, n + 1) / max(n, 1) * (1 + ROUNDING)
    passing = np.flatnonzero(p[order] <= bounds)
    rejected = np.zeros(n, bool)
    rejected[order[: passing[-1] + 1 if len(passing) else 0]] = True
    return rejected


def _smallest(values: Doubles, k: int) -> Doubles:
    """The k smallest values of each row, (n, k) in no order, of values (n, m).

    They lie in the k groups with the smallest minima, so only these groups are searched.
    """
    n, m = values.shape
    size = m // GROUP * GROUP
    groups = values[:, :size].reshape(n, GROUP, -1)  # of strided values: fastest in numpy
    if k >= groups.shape[2]:
        return np.partition(values, k - 1, axis=1)[:, :k]
    first = np.argpartition(groups.min(1), k - 1, axis=1)[:, :k]
    members = np.take_along_axis(groups, first[:, None], 2).reshape(n, -1)
    among = np.concatenate((members, values[:, size:]), 1)
    return np.partition(among, k - 1, axis=1)[:, :k]


def _multiply_rows(rows: Doubles, matrix: Doubles) -> Doubles:
    """rows @ matrix (n, r), where the bits of a row do not depend on the other rows.

    BLAS chooses its kernel, and with it the order of additions, by the number of rows. Here
    it always gets `BLOCK` rows.
    """
    n, width = rows.shape
    blocks = np.zeros((-(-n // BLOCK), BLOCK, width))
    blocks.reshape(-1, width)[:n] = rows
    products: Doubles = (blocks @ matrix).reshape(-1, matrix.shape[1])[:n]
    return products


def _is_ascending(values: Doubles) -> bool:
    return bool(np.isfinite(values).all() and (np.diff(values) >= 0).all())
