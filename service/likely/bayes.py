"""Bayes' rule over labels: log-sum-exp, priors, posterior; pure numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from likely.answers import Doubles
from likely.errors import InvalidInput

BLOCK = 1 << 14  # rows reweighted at once
PRIOR_SUM_TOLERANCE = 1e-6  # by which the sum of priors may differ from 1


def logsumexp(values: npt.NDArray[np.floating], axis: int = -1) -> Doubles:
    """log sum exp along an axis, without overflow; minus infinity where all values are."""
    wide = values.astype(np.float64)
    peak = np.max(wide, axis=axis, keepdims=True)
    peak = np.where(np.isfinite(peak), peak, 0.0)
    with np.errstate(divide="ignore"):
        total = np.log(np.sum(np.exp(wide - peak), axis=axis))
    return np.asarray(total + np.squeeze(peak, axis), dtype=np.float64)


def posterior(
    log_pxy: npt.NDArray[np.floating], priors: Doubles, temperature: float = 1.0
) -> Doubles:
    """p(y|x) (n, labels) by Bayes' rule: log p(x|y) / temperature + log p(y), normalised.

    Args:
        log_pxy: log p(x|y) in nats (n, labels).
        priors: p(y) (labels,), not negative, with a positive sum.
        temperature: above 1 flattens the posterior, because sums over pixels are overconfident.
    """
    wide = log_pxy.astype(np.float64) / temperature
    # Subtracted first: added to 1e30 nats, log-priors would be lost to rounding.
    peak = np.max(wide, axis=-1, keepdims=True, where=priors > 0, initial=-np.inf)
    with np.errstate(divide="ignore"):
        joint = wide - np.where(np.isfinite(peak), peak, 0.0) + np.log(priors)
    normalised: Doubles = np.exp(joint - logsumexp(joint)[:, None])
    return normalised


def composed(
    log_pyx: npt.NDArray[np.floating], log_px: npt.NDArray[np.floating], priors: Doubles
) -> Doubles:
    """log p(x|y) = log p(y|x) + log p(x) - log p(y): Bayes' rule in the other direction.

    Args:
        log_pyx: log p(y|x) of a discriminative model, in nats (n, labels).
        log_px: log p(x) in nats (n,).
        priors: the p(y) of the discriminative model's training (labels,).

    Returns:
        log p(x|y) in nats (n, labels); minus infinity for a label of prior 0. For any x,
        softmax_y(log p(x|y) + log p(y)) is the discriminative p(y|x), with these priors or others.
    """
    seen = priors > 0
    log_py = np.log(priors, out=np.zeros_like(priors), where=seen)
    joint = log_pyx.astype(np.float64) + log_px.astype(np.float64)[:, None]
    log_pxy: Doubles = np.where(seen, joint - log_py, -np.inf)
    return log_pxy


def pooled(evidence: npt.NDArray[np.floating], weights: Doubles) -> Doubles:
    """sum_e weights_e log p_e(x|y), (n, labels): a product of experts (Hinton, 2002).

    Args:
        evidence: log p_e(x|y) in nats (n, experts, labels).
        weights: (experts,), the same for all labels.
    """
    log_product: Doubles = np.einsum("nel,e->nl", evidence.astype(np.float64), weights)
    return log_product


def check_priors(priors: Sequence[float], labels: int) -> Doubles:
    """Returns the priors as an array.

    Raises:
        InvalidInput: there is not one prior for each label, one is negative or not finite, or
            they do not sum to 1 within 1e-6.
    """
    if len(priors) != labels:
        raise InvalidInput("priors", f"{len(priors)} values; the model has {labels} labels")
    values = np.array(priors, dtype=np.float64)
    if np.any(wrong := ~((values >= 0) & (values <= 1 + PRIOR_SUM_TOLERANCE))):
        first = int(np.argmax(wrong))
        raise InvalidInput(f"priors[{first}]", f"{values[first]:g} is no probability in [0, 1]")
    if abs(values.sum() - 1) > PRIOR_SUM_TOLERANCE:
        raise InvalidInput("priors", f"they sum to {values.sum():.9g}; 1 within 1e-6 is needed")
    return values


def reweighted(posterior: Doubles, priors: Doubles, others: Doubles) -> Doubles:
    """p(y|x) under other priors: p(y|x) times the ratio of the priors, normalised.

    Args:
        posterior: p(y|x) under `priors` (n, labels).
        priors: (labels,).
        others: the other priors (labels,). A label that `priors` rule out stays ruled out.

    Returns:
        p(y|x) under `others` (n, labels). A row is left as it was if `others` rule out all of its
        labels.
    """
    ratio = np.divide(others, priors, out=np.zeros_like(others), where=priors > 0)
    weights = posterior * ratio
    total = weights.sum(1, keepdims=True)
    normalised: Doubles = np.divide(weights, total, out=posterior.copy(), where=total > 0)
    return normalised


def under_priors(log_pyx: npt.NDArray[np.floating], priors: Doubles, others: Doubles) -> Doubles:
    """p(y|x) under other priors, from log p(y|x): `reweighted` without underflow.

    Args:
        log_pyx: log p(y|x) under `priors`, in nats (n, labels).
        priors: (labels,).
        others: the other priors (labels,). A label that `priors` rule out stays ruled out.

    Returns:
        p(y|x) under `others` (n, labels). A row is left as it was if `others` rule out all of its
        labels.
    """
    possible = (priors > 0) & (others > 0)
    ratio = np.log(np.divide(others, priors, out=np.ones_like(others), where=possible))
    joint = np.where(possible, log_pyx.astype(np.float64) + ratio, -np.inf)
    total = logsumexp(joint)[:, None]
    left = np.isneginf(total)
    posteriors: Doubles = np.exp(np.where(left, log_pyx, joint - np.where(left, 0.0, total)))
    return posteriors


def estimated_priors(
    posterior: Doubles, priors: Doubles, *, tolerance: float = 1e-9, most: int = 10_000
) -> Doubles:
    """Estimates the p(y) (labels,) of pictures from their posteriors, by maximum likelihood.

    The method is expectation-maximisation (Saerens, Latinne and Decaestecker, 2002,
    https://doi.org/10.1162/089976602753284446). It needs no labels of the pictures, and assumes
    that p(x|y), how the pictures of a label look, has not changed. The likelihood is concave in
    p(y), so the starting point does not matter.

    Args:
        posterior: p(y|x) under `priors` (n, labels); for n = 0, `priors` are returned.
        priors: (labels,).
        tolerance: the iteration ends once no prior changes by more than this.
        most: the largest number of iterations.
    """
    estimate = priors
    for _ in range(most if len(posterior) else 0):
        sums = np.zeros(len(estimate))
        for at in range(0, len(posterior), BLOCK):  # so that copies take little memory
            sums += reweighted(posterior[at : at + BLOCK], priors, estimate).sum(0)
        moved = sums / len(posterior)
        close = np.abs(moved - estimate).max() <= tolerance
        estimate = moved
        if close:
            break
    return estimate
