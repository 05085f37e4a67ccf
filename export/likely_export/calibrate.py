"""Fits what turns a bundle's outputs into decisions, on held-out pictures.

The combination of statistics, the experts' weights and the temperature are fitted on the
*fit* split. The ranks are taken once, on the *calibrate* split. No model was trained on either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize, minimize_scalar
from scipy.stats import beta, norm
from sklearn.covariance import LedoitWolf
from sklearn.linear_model import LogisticRegression
from sklearn.mixture import GaussianMixture

from likely import bayes
from likely.answers import Doubles, Labels
from likely.errors import InvalidInput
from likely.outliers import (
    Combination,
    Contrast,
    Mahalanobis,
    Mixture,
    Neighbours,
    Part,
    Ranks,
    label_score,
)
from likely_export.measures import label_nats

_Kept = TypeVar("_Kept", Ranks, Mahalanobis, Mixture, Neighbours, Contrast)

KNOTS = 257
FOLDS = 4
SMOOTHING = 0.02  # noise before ranking, in standard deviations
CONFIDENCE = 0.95
SMALLEST_VARIANCE = 1e-6  # of normal scores
MIN_LABEL_PICTURES = 100  # fit pictures of a label, from which its own deviation is used
PRIOR_PICTURES = 10.0  # weight of the variance within labels, in pictures, for labels with fewer
EQUALITY_TOLERANCE = 1e-9  # normal scores with no larger deviation count as equal
MIXTURE_STEPS = 1000  # of expectation maximisation; 100 did not converge on 9,000 pictures


@dataclass(frozen=True, slots=True)
class PartConfig:
    """One part of the combination.

    Attributes:
        kind: how the part turns statistics into a score; `contrast` needs corrupted pictures.
        statistics: names of the statistics that it uses; empty for all of the bundle's.
        weight: weight of its normal score in the average.
        dimensions: largest number of principal components that a mixture keeps.
        components: number of normal distributions in a mixture.
        neighbours: number of nearest pictures whose mean distance is taken.
        strength: inverse of the penalty on a contrast's weights.
    """

    kind: Literal["mahalanobis", "mixture", "neighbours", "contrast"] = "mahalanobis"
    statistics: tuple[str, ...] = ()
    weight: float = 1.0
    dimensions: int = 40
    components: int = 10
    neighbours: int = 5
    strength: float = 0.03

    def __post_init__(self) -> None:
        for name in ("weight", "strength"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidInput(name, f"{getattr(self, name)}; it must be above 0 and finite")
        for name in ("dimensions", "components", "neighbours"):
            if getattr(self, name) < 1:
                raise InvalidInput(name, f"{getattr(self, name)}; at least 1 is needed")


@dataclass(frozen=True, slots=True)
class Seen:
    """The density graph's outputs for some pictures.

    Attributes:
        statistics: (n, s).
        label: predicted labels, int64 (n,); all 0 if the graph does not predict labels.
    """

    statistics: npt.NDArray[np.floating]
    label: Labels

    def __len__(self) -> int:
        return len(self.label)


def places(widths: Mapping[str, int]) -> dict[str, npt.NDArray[np.int64]]:
    """Returns the columns of each statistic, given the number of columns of each."""
    ends = np.cumsum(list(widths.values()))
    return {
        name: np.arange(end - width, end)
        for (name, width), end in zip(widths.items(), ends, strict=True)
    }


def combination(
    fit: Seen,
    parts: Sequence[PartConfig],
    columns: Mapping[str, npt.NDArray[np.integer]],
    corrupted: Seen | None = None,
    labels: int = 1,
    original_rows: npt.ArrayLike = (),
) -> Combination:
    """Fits the combination of statistics to one score on the fit split.

    How a part's scores rank is determined by cross-fitting, on pictures that the part was not
    fitted on.

    Args:
        fit: the fit split.
        parts: parts of the combination.
        columns: columns of each statistic.
        corrupted: corrupted fit pictures, which `contrast` needs.
        labels: number of labels that may be predicted, whether or not they occur in the split.
        original_rows: row in the fit split from which each corrupted picture was made;
            cross-fitting holds out both together.
    """
    ranks = _ranks(fit.statistics)
    normal = ranks(fit.statistics)
    corrupted_normal = (
        np.empty((0, normal.shape[1])) if corrupted is None else ranks(corrupted.statistics)
    )

    def fit_parts(rows: npt.NDArray[np.integer], corrupted_rows: Doubles) -> tuple[Part, ...]:
        return tuple(
            _part(
                part, _columns(part, columns), normal[rows], fit.label[rows], corrupted_rows, labels
            )
            for part in parts
        )

    folds = np.arange(len(fit)) % FOLDS
    corrupted_folds = np.asarray(original_rows, np.int64) % FOLDS
    scores = np.empty((len(fit), len(parts)))
    for fold in range(FOLDS):
        fitted = fit_parts(np.flatnonzero(folds != fold), corrupted_normal[corrupted_folds != fold])
        held = folds == fold
        for index, part in enumerate(fitted):
            scores[held, index] = part(normal[held], fit.label[held])
    whole = fit_parts(np.arange(len(fit)), corrupted_normal)
    part_ranks = _ranks(scores)
    weights = np.array([part.weight for part in parts])
    average = part_ranks(scores) @ (weights / weights.sum())
    usual = _mean_and_deviation_by_label(average, fit.label, labels)
    return Combination(ranks, whole, part_ranks, weights / weights.sum(), usual)


def detector(
    learnt: Combination, calibrate: Seen, posterior: Doubles | None = None, y: Labels | None = None
) -> dict[str, npt.NDArray[Any]]:
    """Returns the arrays of `likely.outliers.Detector`.

    Args:
        learnt: the combination.
        calibrate: the calibration split.
        posterior: p(y|x) of its pictures, (n, labels); None without labels.
        y: their true labels.
    """
    arrays: dict[str, npt.NDArray[Any]] = {
        key: _to_float32(value) for key, value in learnt.stored().items()
    }
    scores = Combination.read(arrays)(calibrate.statistics, calibrate.label)
    n = len(scores)
    # P(false rejection | split), if scores above the k-th largest are rejected: Beta(k, n + 1 - k).
    arrays["confident"] = beta.ppf(CONFIDENCE, np.arange(n + 1) + 1, n - np.arange(n + 1))
    arrays["confident"][-1] = 1.0
    arrays["scores"] = np.sort(scores)
    arrays["label_scores"], arrays["label_counts"] = np.empty(0), np.empty(0, np.int64)
    if posterior is not None and y is not None:
        true_label_scores = label_score(scores, posterior)[np.arange(n), y]
        arrays["label_scores"] = np.concatenate(
            [np.sort(true_label_scores[y == label]) for label in range(posterior.shape[1])]
        )
        arrays["label_counts"] = np.bincount(y, minlength=posterior.shape[1])
    return arrays


def fit_temperature(log_pxy: npt.NDArray[np.floating], y: Labels, priors: Doubles) -> float:
    """The temperature of log p(x|y) that maximises the labels' likelihood (Guo et al., 2017)."""

    def label_nll(log_temperature: float) -> float:
        return _label_nll(log_pxy, y, priors, float(np.exp(log_temperature)))

    optimum = minimize_scalar(label_nll, bounds=(np.log(0.1), np.log(1000)), method="bounded")
    return float(np.exp(optimum.x))


def fit_expert_weights(
    evidence: npt.NDArray[np.floating], y: Labels, priors: Doubles
) -> tuple[tuple[float, ...], float]:
    """The experts' weights, which sum to 1, and the temperature that maximise labels' likelihood.

    The pooled evidence sum_e w_e log p_e(x|y) is a product of experts; all labels share its
    weights.

    Args:
        evidence: log p_e(x|y), (n, experts, labels).
        y: labels, int64 (n,).
        priors: p(y), (labels,).
    """
    experts = evidence.shape[1]

    def label_nll(log_scales: Doubles) -> float:
        return _label_nll(bayes.pooled(evidence, np.exp(log_scales)), y, priors, 1.0)

    start = np.full(experts, np.log(0.05))
    optimum = minimize(label_nll, start, method="Nelder-Mead", options={"maxiter": 400})
    scales = np.exp(optimum.x)
    return tuple((scales / scales.sum()).tolist()), float(1 / scales.sum())


def _label_nll(
    log_pxy: npt.NDArray[np.floating], y: Labels, priors: Doubles, temperature: float
) -> float:
    return float(label_nats(bayes.posterior(log_pxy, priors, temperature), y).mean())


def _columns(
    part: PartConfig, columns: Mapping[str, npt.NDArray[np.integer]]
) -> npt.NDArray[np.integer]:
    return np.concatenate([columns[name] for name in part.statistics or columns])


def _ranks(values: npt.NDArray[np.floating]) -> Ranks:
    values = values.astype(np.float64)
    levels = (np.arange(KNOTS) + 0.5) / KNOTS
    # Not a robust spread: if most pictures agree and a few differ, these few set the scale. The
    # floor keeps a statistic that hardly varies on the fit split from exploding outside it.
    spreads = np.maximum(values.std(0), 1e-3 * np.maximum(1.0, np.abs(values).max(0)))
    # Pictures that agree up to rounding must not differ in rank, or another machine would decide
    # differently. Ranks are therefore those of values with a little noise.
    noise = np.random.Generator(np.random.Philox(key=[0, 11])).standard_normal(values.shape)
    knots = np.quantile(values + SMOOTHING * spreads * noise, levels, axis=0)
    return _round_part(Ranks(knots, norm.ppf(levels), spreads))


def _part(
    config: PartConfig,
    columns: npt.NDArray[np.integer],
    normal: Doubles,
    label: Labels,
    corrupted: Doubles,
    labels: int,
) -> Mahalanobis | Mixture | Neighbours | Contrast:
    chosen, v = columns.astype(np.float64), normal[:, columns]
    match config.kind:
        case "mahalanobis":
            return _round_part(_mahalanobis(chosen, v, label, labels))
        case "mixture":
            return _round_part(_mixture(config, chosen, v))
        case "neighbours":
            return _round_part(_neighbours(config, chosen, v))
        case "contrast":
            return _round_part(_contrast(config, chosen, v, corrupted[:, columns]))


def _mahalanobis(columns: Doubles, v: Doubles, label: Labels, labels: int) -> Mahalanobis:
    overall = v.mean(0)
    centres = np.stack(
        [v[label == k].mean(0) if np.any(label == k) else overall for k in range(labels)]
    )
    return Mahalanobis(columns, centres, _whitening(v - centres[label])[1])


def _mixture(config: PartConfig, columns: Doubles, v: Doubles) -> Mixture:
    centre = v.mean(0)
    values, vectors = np.linalg.eigh(np.atleast_2d(np.cov((v - centre).T)))
    largest = np.argsort(-values)[: config.dimensions]
    whitening = vectors[:, largest] / np.sqrt(np.maximum(values[largest], SMALLEST_VARIANCE))
    mixture = GaussianMixture(
        config.components, reg_covar=0.05, max_iter=MIXTURE_STEPS, random_state=0
    )
    mixture.fit((v - centre) @ whitening)
    roots = mixture.precisions_cholesky_
    offsets = np.log(mixture.weights_) + np.log(np.diagonal(roots, axis1=1, axis2=2)).sum(1)
    return Mixture(columns, centre, whitening, mixture.means_, roots, offsets)


def _neighbours(config: PartConfig, columns: Doubles, v: Doubles) -> Neighbours:
    centre, whitening = _whitening(v)
    bank = (v - centre) @ whitening
    return Neighbours(columns, centre, whitening, bank, np.array(float(config.neighbours)))


def _contrast(config: PartConfig, columns: Doubles, v: Doubles, corrupted: Doubles) -> Contrast:
    held = np.clip(np.concatenate([v, corrupted]), -Contrast.HELD, Contrast.HELD)
    is_corrupted = np.repeat([0, 1], [len(v), len(corrupted)])
    regression = LogisticRegression(C=config.strength, max_iter=1000, class_weight="balanced")
    regression.fit(np.concatenate([held, np.abs(held)], 1), is_corrupted)
    slopes, bends = np.split(regression.coef_[0], 2)
    return Contrast(columns, slopes, bends)


def _whitening(v: Doubles) -> tuple[Doubles, Doubles]:
    """The mean, and a root of the inverse shrunk covariance (Ledoit and Wolf, 2004).

    If the covariance is singular in spite of the shrinkage, all variances are slightly enlarged.
    """
    covariance = LedoitWolf().fit(v)
    try:
        return covariance.location_, np.linalg.cholesky(covariance.precision_)
    except np.linalg.LinAlgError:
        floored = covariance.covariance_ + SMALLEST_VARIANCE * np.eye(v.shape[1])
        return covariance.location_, np.linalg.cholesky(np.linalg.inv(floored))


def _mean_and_deviation_by_label(average: Doubles, label: Labels, labels: int) -> Doubles:
    """Mean and deviation of the average for each predicted label, (labels, 2).

    Labels without pictures, or whose pictures are all alike, use those of all pictures; the
    deviation is 1 if all pictures are alike. With fewer than `MIN_LABEL_PICTURES` pictures, a
    label's variance is shrunk towards the variance within labels, and the variance of its mean is
    added. Otherwise a few pictures that happen to agree would make the next one unusual.
    """
    overall = [average.mean(), average.std() if average.std() > EQUALITY_TOLERANCE else 1.0]
    of_label = [average[label == k] for k in range(labels)]
    within = sum(values.var() * values.size for values in of_label if values.size) / average.size

    def mean_and_deviation(values: Doubles) -> list[float]:
        n = values.size
        if 0 < n < MIN_LABEL_PICTURES and within > EQUALITY_TOLERANCE**2:
            variance = (
                (n * values.var() + PRIOR_PICTURES * within) / (n + PRIOR_PICTURES) * (1 + 1 / n)
            )
            return [values.mean(), np.sqrt(variance)]
        return [values.mean(), values.std()] if n and values.std() > EQUALITY_TOLERANCE else overall

    return np.array([mean_and_deviation(values) for values in of_label])


def _round_part(part: _Kept) -> _Kept:
    """Returns the part rounded as in the archive, so that ranks are those of the served part."""
    return type(part).read({key: _to_float32(value) for key, value in part.stored().items()})


def _to_float32(values: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    return np.asarray(values, np.float32)
