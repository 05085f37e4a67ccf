"""Simple densities and a linear classifier on the same parts of the data, for comparison.

A density model that does not beat them has learnt nothing worth serving. All are true
distributions over levels, so their nats are comparable with the models'.
"""

from __future__ import annotations

import io
import zlib
from typing import Any

import numpy as np
from PIL import Image
from scipy.special import log_ndtr, logsumexp
from sklearn.linear_model import LogisticRegression
from sklearn.mixture import GaussianMixture

from likely.answers import Doubles, Labels, Pixels
from likely_export.data import Dataset, Split

COMPONENTS = (1, 2, 4, 8, 16, 32, 64)
VARIANCES = (0.05, 0.25, 1.0)  # in levels squared
MAX_TRAIN = 5000  # training pictures of mixtures and regression: ten times as many take minutes
SMALL = 256  # dimensions above which large mixtures take longer than they are worth


class IndependentPixels:
    """p(x) = prod_i p(x_i), each factor a table of counts plus one for every level (Laplace).

    Args:
        x: pictures to count, uint8 (n, c, h, w).
        levels: number of levels.
    """

    def __init__(self, x: Pixels, levels: int) -> None:
        flat = x.reshape(len(x), -1)
        dimensions = flat.shape[1]
        counts = np.ones((dimensions, levels))
        for pixel in range(dimensions):
            counts[pixel] += np.bincount(flat[:, pixel], minlength=levels)
        self.tables = np.log(counts / counts.sum(1, keepdims=True))

    def log_prob(self, x: Pixels) -> Doubles:
        """log p(x) in nats, (n,), of x, uint8 (n, c, h, w)."""
        flat = x.reshape(len(x), -1)
        taken: Doubles = self.tables[np.arange(flat.shape[1]), flat].sum(1)
        return taken


class DiscretisedMixture:
    """A diagonal Gaussian mixture whose components are integrated over every level.

    The probability of a level is the Gaussian's mass within half a level of it. The first and the
    last level also take the tails, so that the probabilities of all levels sum to 1.

    Args:
        x: pictures to fit, uint8 (n, c, h, w).
        levels: number of levels.
        components: number of components.
        variance: added to every variance, in levels squared.
    """

    def __init__(self, x: Pixels, levels: int, components: int, variance: float) -> None:
        self.levels = levels
        self.mixture = GaussianMixture(
            components, covariance_type="diag", reg_covar=variance, random_state=0
        ).fit(x.reshape(len(x), -1).astype(np.float64))

    def log_prob(self, x: Pixels) -> Doubles:
        """log p(x) in nats, (n,), of x, uint8 (n, c, h, w)."""
        means, sds = self.mixture.means_, np.sqrt(self.mixture.covariances_)
        # (components, d, levels): with few levels and many pictures, tables are cheapest.
        edges = np.arange(1, self.levels) - 0.5
        standard = (edges - means[..., None]) / sds[..., None]
        tables = _log_masses(standard)
        flat = x.reshape(len(x), -1)
        log_px = np.stack([table[np.arange(flat.shape[1]), flat].sum(1) for table in tables], 1)
        total: Doubles = logsumexp(log_px + np.log(self.mixture.weights_), axis=1)
        return total


def _log_masses(edges: Doubles) -> Doubles:
    """log of the normal masses between ascending edges (..., m) and of both tails, (..., m + 1).

    By symmetry, differences are taken in the lower tail, where they do not cancel.
    """
    low = np.concatenate([np.full((*edges.shape[:-1], 1), -np.inf), edges], -1)
    high = np.concatenate([edges, np.full((*edges.shape[:-1], 1), np.inf)], -1)
    flip = low > 0
    low, high = np.where(flip, -high, low), np.where(flip, -low, high)
    upper = log_ndtr(high)
    with np.errstate(divide="ignore"):
        masses: Doubles = upper + np.log(-np.expm1(log_ndtr(low) - upper))
    return masses


def best_mixture(data: Dataset) -> DiscretisedMixture:
    """Returns the mixture with the lowest nats on the validation part."""
    train = data.train.x[:MAX_TRAIN]
    candidates = [
        DiscretisedMixture(train, data.levels, components, variance)
        for components in (COMPONENTS if train[0].size <= SMALL else COMPONENTS[:3])
        if components <= len(train) // 2
        for variance in VARIANCES
    ]
    return max(candidates, key=lambda mixture: mixture.log_prob(data.validate.x).mean())


def logistic_regression(x: Pixels, y: Labels, levels: int) -> LogisticRegression:
    """Fits scikit-learn's logistic regression on pixels rescaled to [0, 1]."""
    return LogisticRegression(max_iter=2000).fit(_features(x, levels), y)


def bits_per_dim(x: Pixels, levels: int) -> dict[str, float]:
    """Returns the size under general compressors, in bits per pixel and channel.

    With two levels, zlib is given eight pixels per byte, and PNG each channel as a one-bit picture.
    """
    n, c, h, w = x.shape
    deflated, pngs = 0, 0
    for picture in x:
        deflated += len(zlib.compress(_packed(picture, levels), 9))
        pngs += _png_size(picture, levels)
    return {"zlib": 8 * deflated / (n * c * h * w), "png": 8 * pngs / (n * c * h * w)}


def _packed(picture: Pixels, levels: int) -> bytes:
    bits = np.packbits(picture) if levels == 2 else picture
    return bits.tobytes()


def _png_size(picture: Pixels, levels: int) -> int:
    if levels == 2:
        images = [Image.fromarray(channel * 255).convert("1") for channel in picture]
    else:
        images = [Image.fromarray(picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0))]
    into = io.BytesIO()
    for image in images:
        image.save(into, "PNG", optimize=True)
    return into.tell()


def evaluate(data: Dataset) -> dict[str, Any]:
    """Returns nats per picture and accuracies of the baselines on the whole test part.

    They are fitted on the training part; the mixture and the regression on its first `MAX_TRAIN`
    pictures, the number of which is among the figures. Regression is left out if these have one
    label only, and everything about labels if there are none.
    """
    test, train = data.test, data.train
    marginal = IndependentPixels(train.x, data.levels)
    mixture = best_mixture(data)
    return {
        "test_size": len(test),
        "independent_pixels_nll_nats": _nats(marginal.log_prob(test.x)),
        **_given_label(data),
        "gaussian_mixture_nll_nats": _nats(mixture.log_prob(test.x)),
        "gaussian_mixture_components": len(mixture.mixture.weights_),
        "gaussian_mixture_train_size": min(len(train), MAX_TRAIN),
        **_regressed(train.take(np.arange(min(len(train), MAX_TRAIN))), test, data.levels),
        "bits_per_dim": {**bits_per_dim(test.x, data.levels), "test_size": len(test)},
    }


def _given_label(data: Dataset) -> dict[str, float]:
    """Nats per picture given its label, and accuracy by Bayes' rule, with independent pixels."""
    if not data.labels:
        return {}
    test, train = data.test, data.train
    per_label = [
        IndependentPixels(train.x[train.y == label], data.levels)
        for label in range(len(data.labels))
    ]
    log_pxy = np.stack([pixels.log_prob(test.x) for pixels in per_label], 1)
    with np.errstate(divide="ignore"):
        joint = log_pxy + np.log(data.priors)
    return {
        "independent_pixels_given_label_nll_nats": _nats(log_pxy[np.arange(len(test)), test.y]),
        "independent_pixels_accuracy": float(np.mean(joint.argmax(1) == test.y)),
    }


def _regressed(few: Split, test: Split, levels: int) -> dict[str, float]:
    """The accuracy of logistic regression on these training pictures, if they have two labels."""
    if len(np.unique(few.y)) < 2:
        return {}
    classifier = logistic_regression(few.x, few.y, levels)
    right = classifier.predict(_features(test.x, levels)) == test.y
    return {
        "logistic_regression_accuracy": float(np.mean(right)),
        "logistic_regression_train_size": len(few),
    }


def _nats(log_p: Doubles) -> float:
    return float(-log_p.mean())


def _features(x: Pixels, levels: int) -> Doubles:
    features: Doubles = x.reshape(len(x), -1) / (levels - 1)
    return features
