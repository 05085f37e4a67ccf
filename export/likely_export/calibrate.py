"""What held-out pictures teach about scores: how statistics combine, how they rank, how sure.

The combination and the temperature are fitted on the *fit* split, the ranks taken
on the *calibrate* split, once; neither split trained a model.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.stats import norm
from sklearn.covariance import LedoitWolf

from likely import bayes
from likely.answers import Doubles, Labels
from likely.outliers import Detector

KNOTS = 257


def detector(
    fit: npt.NDArray[np.floating], calibrate: npt.NDArray[np.floating]
) -> dict[str, Doubles]:
    """The arrays of `likely.outliers.Detector`, from statistics on the two splits.

    Args:
        fit: statistics (n, s) that the combination is fitted on.
        calibrate: statistics (m, s) that scores are ranked against.
    """
    values = fit.astype(np.float64)
    ranks = (np.arange(KNOTS) + 0.5) / KNOTS
    knots = np.quantile(values, ranks, axis=0)
    # Not a robust spread: where most pictures agree and few differ, those few set the scale.
    # One that hardly varies on the fit split must not explode outside it.
    spreads = np.maximum(values.std(0), 1e-3 * np.maximum(1.0, np.abs(values).max(0)))
    arrays = {
        "knots": knots,
        "normals": norm.ppf(ranks),
        "spreads": spreads,
        "centre": np.zeros(values.shape[1]),
        "whitening": np.eye(values.shape[1]),
        "scores": np.zeros(1),
    }
    normal = Detector(arrays).normal_scores(values)
    covariance = LedoitWolf().fit(normal)
    arrays["centre"] = covariance.location_
    arrays["whitening"] = np.linalg.cholesky(covariance.precision_)
    arrays["scores"] = np.sort(Detector(arrays).score(calibrate))
    return arrays


def temperature(log_pxy: npt.NDArray[np.floating], y: Labels, priors: Doubles) -> float:
    """The temperature of log p(x|y) that makes the labels likeliest (Guo et al., 2017)."""

    def label_nll(log_temperature: float) -> float:
        posterior = bayes.posterior(log_pxy, priors, float(np.exp(log_temperature)))
        taken = posterior[np.arange(len(y)), y]
        return float(-np.log(np.maximum(taken, 1e-300)).mean())

    found = minimize_scalar(label_nll, bounds=(np.log(0.1), np.log(100)), method="bounded")
    return float(np.exp(found.x))
