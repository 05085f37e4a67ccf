"""Figures by which decisions are judged: functions of arrays, independent of any model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import beta, betabinom, spearmanr

from likely.answers import Accepted, Doubles, Labels

BINS = 15
BAND = 0.99
KEPT = 0.95  # share of inliers accepted, at which FPR95 is read
SAMPLES = 200  # bootstrap samples
SEED = 20261122


def mean(values: npt.NDArray[Any]) -> dict[str, float]:
    """Returns the mean and its standard error."""
    values = np.asarray(values, np.float64)
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "standard_error": error}


def share(values: Accepted) -> float | None:
    """Returns the share of true values, or None if there are no values."""
    return float(np.mean(values)) if len(values) else None


def rank_correlation(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Spearman's rank correlation of (n,) and (n,); 0 if one of them is constant."""
    return float(spearmanr(a, b).statistic) if np.ptp(a) > 0 and np.ptp(b) > 0 else 0.0


def standard_error(values: npt.NDArray[Any]) -> float | None:
    """Returns the standard error of a mean or a share, or None if there are no values."""
    return mean(values)["standard_error"] if len(values) else None


def by_label(name: str, values: Accepted, y: Labels, labels: Sequence[str]) -> dict[str, Any]:
    """Returns the share of true values for each label, under this name, and its standard error."""
    grouped = {label: values[y == k] for k, label in enumerate(labels)}
    return {
        name: {label: share(one) for label, one in grouped.items()},
        f"{name}_standard_error": {label: standard_error(one) for label, one in grouped.items()},
    }


def separation(
    inliers: Doubles, outliers: Doubles, original_rows: Labels | None = None
) -> dict[str, float]:
    """AUROC, FPR95 (share of outliers accepted where 95 % of inliers are) and AUPR.

    Large values are unusual. Each figure comes with its standard error, which is 0 if the sets do
    not overlap. AUPR counts outliers as positives, so it depends on the sizes of both sets.

    Args:
        inliers: (n,).
        outliers: (m,).
        original_rows: the inlier from which each outlier was made, int64 (m,), all different;
            standard errors then account for what the pairs have in common. None for unrelated
            outliers.
    """
    auroc = placement_mean(*placements(inliers, outliers), original_rows)
    return {
        "auroc": auroc["mean"],
        "auroc_standard_error": auroc["standard_error"],
        "fpr95": _accepted_share(inliers, outliers),
        "fpr95_standard_error": (
            error_below_quantile(outliers, inliers, KEPT)
            if original_rows is None
            else _resampled_error(_accepted_share, inliers, outliers, original_rows)
        ),
        "aupr": average_precision(inliers, outliers),
        "aupr_standard_error": _resampled_error(
            average_precision, inliers, outliers, original_rows
        ),
    }


def placements(
    inliers: Doubles, outliers: Doubles, counted: Accepted | None = None
) -> tuple[Doubles, Doubles]:
    """The share of outliers above each inlier, and the share of inliers below each outlier.

    Ties count half.

    Args:
        inliers: (n,), large values are unusual.
        outliers: (m,).
        counted: (n,); where it is false, no outlier counts as above the inlier.
    """
    kept = np.ones(len(inliers), bool) if counted is None else counted
    over = kept * _share_below(-inliers, -outliers)
    return over, np.mean(kept) * _share_below(outliers, inliers[kept])


def placement_mean(
    over: Doubles, under: Doubles, original_rows: Labels | None = None
) -> dict[str, float]:
    """The mean of placements, which is AUROC, and its standard error (DeLong et al., 1988).

    Args:
        over: placements of inliers, (n,).
        under: placements of outliers, (m,).
        original_rows: the inlier from which each outlier was made, int64 (m,); None for unrelated
            ones.
    """
    inside, outside = (mean(placed)["standard_error"] for placed in (over, under))
    variance = inside**2 + outside**2
    if original_rows is not None and len(under) > 1:
        variance += 2 * float(np.cov(over[original_rows], under)[0, 1]) / len(over)
    return {"mean": float(np.mean(over)), "standard_error": float(np.sqrt(max(0.0, variance)))}


def open_set_rate(doubt: Doubles, right: Accepted, outliers: Doubles) -> dict[str, float]:
    """OSCR, the area under the correct classification rate over the outliers' acceptance rate.

    Dhamija et al., 2018. It is the probability that a picture is labelled correctly and less
    doubtful than an outlier. Comes with its standard error.

    Args:
        doubt: doubt about pictures that have a label, (n,).
        right: whether the label assigned to them is correct, (n,).
        outliers: doubt about outliers, (m,).
    """
    return placement_mean(*placements(doubt, outliers, right))


def open_set(doubt: Doubles, right: Accepted, outliers: Doubles) -> dict[str, float]:
    """AURC, counting accepted outliers as errors, and OSCR, with their standard errors.

    Args:
        doubt: doubt about pictures that have a label, (n,).
        right: whether the label assigned to them is correct, (n,).
        outliers: doubt about outliers, (m,).
    """

    def risk(inside: npt.NDArray[np.intp], outside: npt.NDArray[np.intp]) -> float:
        wrong = np.concatenate([~right[inside], np.ones(len(outside), bool)])
        return selective_risk(np.concatenate([doubt[inside], outliers[outside]]), wrong)

    rate, sizes = open_set_rate(doubt, right, outliers), (len(doubt), len(outliers))
    return {
        "aurc": risk(*map(np.arange, sizes)),
        "aurc_standard_error": bootstrap_error(risk, *sizes),
        "oscr": rate["mean"],
        "oscr_standard_error": rate["standard_error"],
    }


def average_precision(inliers: Doubles, outliers: Doubles) -> float:
    """AUPR: the mean over outliers of the share of outliers among all values as large or larger."""
    caught, lost = (
        len(values) - np.searchsorted(np.sort(values), outliers, "left")
        for values in (outliers, inliers)
    )
    return float(np.mean(caught / (caught + lost)))


def error_below_quantile(values: Doubles, of: Doubles, level: float) -> float:
    """The standard error of the share of values at or below a quantile of other values.

    This is the bootstrap's, without resampling: the rank of a sample quantile follows a beta
    distribution, and given the quantile the share is binomial.
    """
    n, k = len(of), level * (len(of) + 1)
    ranks = beta.ppf((np.arange(1000) + 0.5) / 1000, k, n + 1 - k)
    thresholds = np.quantile(of, ranks)
    shares = np.searchsorted(np.sort(values), thresholds, "right") / len(values)
    return float(np.sqrt(np.var(shares) + np.mean(shares * (1 - shares)) / len(values)))


def bootstrap_error(figure: Callable[..., float], *sizes: int) -> float:
    """The bootstrap's standard error of a figure: its deviation over resamples with replacement.

    Args:
        figure: function of the rows (n,) drawn from each group; all values of a picture are
            thereby drawn together.
        sizes: sizes of the groups.
    """
    generator = np.random.Generator(np.random.Philox(key=[SEED, 0]))
    replicates = [
        figure(*(generator.integers(0, n or 1, n) for n in sizes)) for _ in range(SAMPLES)
    ]
    return float(np.std(replicates, ddof=1))


def rejection_band(alpha: float, calibration: int, test: int) -> tuple[float, float] | None:
    """The 99 % band of the false rejection rate on a test part.

    None if alpha is too small to reject anything, or if there is no test part.

    The rate given one calibration split is Beta(k, n + 1 - k) with k = floor(alpha (n + 1))
    (Vovk, 2012), so the count on a test part is beta-binomial.
    """
    k = int(np.floor(alpha * (calibration + 1) + 1e-9))
    if k == 0 or test == 0:
        return None
    tail = (1 - BAND) / 2
    low, high = betabinom.ppf([tail, 1 - tail], test, k, calibration + 1 - k)
    return float(low / test), float(high / test)


def calibration_error(posterior: Doubles, y: Labels) -> float:
    """ECE: the mean gap between confidence and accuracy, in 15 equal bins (Guo et al., 2017)."""
    sure, right = posterior.max(1), posterior.argmax(1) == y
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    gaps = [
        abs(float(right[bins == k].mean() - sure[bins == k].mean())) * float(np.mean(bins == k))
        for k in range(BINS)
        if np.any(bins == k)
    ]
    return float(sum(gaps))


def labelling(posterior: Doubles, y: Labels, kept: Accepted | None = None) -> dict[str, Any]:
    """Judges a posterior: accuracy, label NLL in nats, ECE and AURC, with standard errors.

    Args:
        posterior: (n, labels); the most probable label is assigned.
        y: true labels, int64 (n,).
        kept: whether each picture is accepted, (n,). If given, the accuracy of accepted pictures
            is returned too, or None if there are none.
    """
    n, right, doubt = len(y), posterior.argmax(1) == y, -posterior.max(1)
    accuracies: dict[str, Any] = {"accuracy": mean(right)}
    if kept is not None:
        accuracies["accuracy_of_accepted"] = mean(right[kept]) if kept.any() else None
    return {
        **accuracies,
        "label_nll_nats": mean(label_nats(posterior, y)),
        "ece": calibration_error(posterior, y),
        "ece_standard_error": bootstrap_error(
            lambda at: calibration_error(posterior[at], y[at]), n
        ),
        "aurc": selective_risk(doubt, ~right),
        "aurc_standard_error": bootstrap_error(lambda at: selective_risk(doubt[at], ~right[at]), n),
    }


def label_nats(posterior: Doubles, y: Labels) -> Doubles:
    """-log p(y|x) of the true labels y (n,), from a posterior (n, labels), nats; always finite."""
    nats: Doubles = -np.log(np.maximum(posterior[np.arange(len(y)), y], 1e-300))
    return nats


def selective_risk(doubt: Doubles, wrong: Accepted) -> float:
    """AURC: the mean error among the least doubtful pictures, over all shares kept.

    Geifman and El-Yaniv, 2017. Equally doubtful pictures each count as their mean.
    """
    _, group = np.unique(doubt, return_inverse=True)
    error = np.bincount(group, weights=wrong) / np.bincount(group)
    errors = np.cumsum(error[np.sort(group)])
    return float(np.mean(errors / np.arange(1, len(doubt) + 1)))


def _accepted_share(inliers: Doubles, outliers: Doubles) -> float:
    """FPR95: the share of outliers that are accepted where 95 % of inliers are."""
    return float(np.mean(outliers <= np.quantile(inliers, KEPT)))


def _resampled_error(
    figure: Callable[[Doubles, Doubles], float],
    inliers: Doubles,
    outliers: Doubles,
    original_rows: Labels | None,
) -> float:
    """The bootstrap's standard error; each outlier is drawn with the inlier it was made from."""
    n, m = len(inliers), len(outliers)
    if original_rows is None:
        return bootstrap_error(lambda a, b: figure(inliers[a], outliers[b]), n, m)
    shared, alone = inliers[original_rows], np.delete(inliers, original_rows)
    return bootstrap_error(
        lambda a, b: figure(np.concatenate([shared[a], alone[b]]), outliers[a]), m, n - m
    )


def _share_below(values: Doubles, among: Doubles) -> Doubles:
    """The share of `among` below each value, (n,); equal values count half."""
    ordered = np.sort(among)
    twice = sum(np.searchsorted(ordered, values, side) for side in ("left", "right"))
    return np.asarray(twice / max(1, 2 * len(among)))
