"""What decisions are judged by: functions of arrays, no model behind them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import betabinom, spearmanr
from sklearn.metrics import roc_auc_score

from likely.answers import Accepted, Doubles, Labels

BINS = 15
BAND = 0.99


def mean(values: npt.NDArray[Any]) -> dict[str, float]:
    """The mean and its standard error."""
    values = np.asarray(values, np.float64)
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "standard_error": error}


def share(values: Accepted) -> float | None:
    """How many of these are true, as a share; None of none at all."""
    return float(np.mean(values)) if len(values) else None


def rank_correlation(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Spearman's rank correlation (n,) with (n,); 0 where one of the two is all the same."""
    return float(spearmanr(a, b).statistic) if np.ptp(a) > 0 and np.ptp(b) > 0 else 0.0


def separation(inliers: Doubles, outliers: Doubles) -> dict[str, float]:
    """AUROC, and the share of outliers accepted where 95 % of inliers are; large is unusual."""
    truth = np.repeat([0, 1], [len(inliers), len(outliers)])
    return {
        "auroc": float(roc_auc_score(truth, np.concatenate([inliers, outliers]))),
        "fpr95": float(np.mean(outliers <= np.quantile(inliers, 0.95))),
    }


def rejection_band(alpha: float, calibration: int, test: int) -> tuple[float, float] | None:
    """Where the rate of false rejections on a test part lies, at 99 %; None if never at all.

    None too where there is no test part.

    The rate of one calibration split is Beta(k, n + 1 - k) with k = floor(alpha (n + 1))
    (Vovk, 2012), so the count on a test part is beta-binomial.
    """
    k = int(np.floor(alpha * (calibration + 1) + 1e-9))
    if k == 0 or test == 0:
        return None
    tail = (1 - BAND) / 2
    low, high = betabinom.ppf([tail, 1 - tail], test, k, calibration + 1 - k)
    return float(low / test), float(high / test)


def calibration_error(posterior: Doubles, y: Labels) -> float:
    """ECE: how far confidence is from accuracy, in 15 equal bins (Guo et al., 2017)."""
    sure, right = posterior.max(1), posterior.argmax(1) == y
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    gaps = [
        abs(float(right[bins == k].mean() - sure[bins == k].mean())) * float(np.mean(bins == k))
        for k in range(BINS)
        if np.any(bins == k)
    ]
    return float(sum(gaps))


def selective_risk(doubt: Doubles, wrong: Accepted) -> float:
    """AURC: the mean, over all shares kept, of the error among the least doubtful.

    Geifman and El-Yaniv, 2017. Of pictures as doubtful as one another, each counts as their mean.
    """
    _, group = np.unique(doubt, return_inverse=True)
    error = np.bincount(group, weights=wrong) / np.bincount(group)
    errors = np.cumsum(error[np.sort(group)])
    return float(np.mean(errors / np.arange(1, len(doubt) + 1)))
