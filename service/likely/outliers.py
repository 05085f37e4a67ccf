"""From outlier statistics to one calibrated p-value; pure numpy.

The statistics of a picture (columns of the density graph's `statistics`) are
mapped to normal scores by their ranks on the *fit* split, combined into one
squared Mahalanobis distance, and that is ranked once against the *calibration*
split, which neither the model nor the combination has seen. Then
P(p <= alpha) <= alpha for a new in-distribution picture, for any alpha and
whatever the dependence of the statistics (Vovk et al., 2005; Bates et al., 2023).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from likely.answers import Doubles
from likely.errors import InvalidInput


class Detector:
    """Turns statistics into p-values by the arrays that calibration wrote.

    Attributes:
        knots: float64 (k, s), quantiles of each of s statistics on the fit split.
        normals: float64 (k,), the standard normal quantiles of the same ranks.
        spreads: float64 (s,), one standard deviation of each statistic: beyond the
            knots, where ranks would saturate, it counts as one normal score.
        centre: float64 (s,), mean of the normal scores.
        whitening: float64 (s, r), maps centred normal scores to r independent ones.
        scores: float64 (n,), the calibration split's distances, ascending.
    """

    def __init__(self, arrays: Mapping[str, npt.NDArray[np.float64]]) -> None:
        self.knots = arrays["knots"]
        self.normals = arrays["normals"]
        self.spreads = arrays["spreads"]
        self.centre = arrays["centre"]
        self.whitening = arrays["whitening"]
        self.scores = arrays["scores"]

    @property
    def finest_alpha(self) -> float:
        """The smallest alpha that n calibration scores can promise: 1 / (n + 1)."""
        return 1 / (len(self.scores) + 1)

    def normal_scores(self, statistics: npt.NDArray[np.floating]) -> Doubles:
        """Statistics (n, s) as normal scores (n, s): by rank inside the knots, linear outside."""
        values = statistics.astype(np.float64)
        ranked = np.empty_like(values)
        for column in range(values.shape[1]):
            ranked[:, column] = np.interp(values[:, column], self.knots[:, column], self.normals)
        excess = values - np.clip(values, self.knots[0], self.knots[-1])
        return ranked + excess / self.spreads

    def score(self, statistics: npt.NDArray[np.floating]) -> Doubles:
        """The squared Mahalanobis distance (n,) of statistics (n, s); large is unusual."""
        whitened = (self.normal_scores(statistics) - self.centre) @ self.whitening
        distance: Doubles = np.einsum("nr,nr->n", whitened, whitened)
        return distance

    def p_value(self, statistics: npt.NDArray[np.floating]) -> Doubles:
        """The calibrated p-value (n,) in (0, 1] of statistics (n, s); ties count against."""
        n = len(self.scores)
        below = np.searchsorted(self.scores, self.score(statistics), side="left")
        return (1 + n - below) / (n + 1)

    def check_alpha(self, alpha: float) -> float:
        """The same alpha if the calibration can promise it.

        Raises:
            InvalidInput: alpha is not in [finest_alpha, 1).
        """
        if not self.finest_alpha <= alpha < 1:
            raise InvalidInput(
                "alpha",
                f"{alpha:g} is not in [{self.finest_alpha:.6g}, 1): "
                f"{len(self.scores)} calibration pictures cannot promise finer",
            )
        return alpha
