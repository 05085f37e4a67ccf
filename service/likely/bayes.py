"""Bayes' rule over labels: log-sum-exp, priors, posterior; pure numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from likely.answers import Doubles
from likely.errors import InvalidInput

SLACK = 1e-6  # by which priors may miss 1


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
        temperature: above 1 flattens: sums over pixels are over-confident.
    """
    wide = log_pxy.astype(np.float64) / temperature
    # Taken off first: beside 1e30 nats, priors and the number of labels would be lost.
    peak = np.max(wide, axis=-1, keepdims=True, where=priors > 0, initial=-np.inf)
    with np.errstate(divide="ignore"):
        joint = wide - np.where(np.isfinite(peak), peak, 0.0) + np.log(priors)
    normalised: Doubles = np.exp(joint - logsumexp(joint)[:, None])
    return normalised


def composed(
    log_pyx: npt.NDArray[np.floating], log_px: npt.NDArray[np.floating], priors: Doubles
) -> Doubles:
    """log p(x|y) = log p(y|x) + log p(x) - log p(y), in nats (n, labels): Bayes' rule turned round.

    Args:
        log_pyx: log p(y|x) of a discriminative model (n, labels).
        log_px: log p(x) (n,).
        priors: p(y) that the discriminative model learnt with (labels,).

    Returns:
        Minus infinity for a label of prior 0. Of any x, softmax_y(log p(x|y) + log p(y)) is
        the discriminative p(y|x), under those priors or others.
    """
    seen = priors > 0
    log_py = np.log(priors, out=np.zeros_like(priors), where=seen)
    joint = log_pyx.astype(np.float64) + log_px.astype(np.float64)[:, None]
    found: Doubles = np.where(seen, joint - log_py, -np.inf)
    return found


def pooled(evidence: npt.NDArray[np.floating], weights: Doubles) -> Doubles:
    """sum_e weights_e log p_e(x|y), (n, labels): a product of experts (Hinton, 2002).

    Args:
        evidence: log p_e(x|y) in nats (n, experts, labels).
        weights: (experts,), the same for all labels.
    """
    found: Doubles = np.einsum("nel,e->nl", evidence.astype(np.float64), weights)
    return found


def check_priors(priors: Sequence[float], labels: int) -> Doubles:
    """The priors as an array.

    Raises:
        InvalidInput: not one for each label, not finite, negative, or not summing
            to 1 within 1e-6.
    """
    if len(priors) != labels:
        raise InvalidInput("priors", f"{len(priors)} values; the model has {labels} labels")
    values = np.array(priors, dtype=np.float64)
    if np.any(wrong := ~((values >= 0) & (values <= 1 + SLACK))):
        first = int(np.argmax(wrong))
        raise InvalidInput(f"priors[{first}]", f"{values[first]:g} is no probability in [0, 1]")
    if abs(values.sum() - 1) > SLACK:
        raise InvalidInput("priors", f"they sum to {values.sum():.9g}; 1 within 1e-6 is asked")
    return values


def reweighted(posterior: Doubles, priors: Doubles, others: Doubles) -> Doubles:
    """p(y|x) (n, labels) under other priors: what was p(y|x) times other p(y) / p(y), normalised.

    Args:
        posterior: (n, labels), under `priors`.
        priors: (labels,).
        others: (labels,); a label that `priors` rule out stays ruled out.

    Returns:
        Rows that sum to 1; a row for which the others rule out every label is left as it was.
    """
    ratio = np.divide(others, priors, out=np.zeros_like(others), where=priors > 0)
    weights = posterior * ratio
    total = weights.sum(1, keepdims=True)
    normalised: Doubles = np.divide(weights, total, out=posterior.copy(), where=total > 0)
    return normalised


def under_priors(log_pyx: npt.NDArray[np.floating], priors: Doubles, others: Doubles) -> Doubles:
    """p(y|x) (n, labels) under other priors, of log p(y|x) in nats: `reweighted` without underflow.

    Args:
        log_pyx: (n, labels), under `priors`.
        priors: (labels,).
        others: (labels,); a label that `priors` rule out stays ruled out.

    Returns:
        Rows that sum to 1; as they were where the others rule out every label.
    """
    possible = (priors > 0) & (others > 0)
    ratio = np.log(np.divide(others, priors, out=np.ones_like(others), where=possible))
    joint = np.where(possible, log_pyx.astype(np.float64) + ratio, -np.inf)
    total = logsumexp(joint)[:, None]
    left = np.isneginf(total)
    found: Doubles = np.exp(np.where(left, log_pyx, joint - np.where(left, 0.0, total)))
    return found


def estimated_priors(
    posterior: Doubles, priors: Doubles, *, tolerance: float = 1e-9, most: int = 10_000
) -> Doubles:
    """p(y) (labels,) of the pictures that have these posteriors, by maximum likelihood.

    Expectation-maximisation (Saerens, Latinne and Decaestecker, 2002,
    https://doi.org/10.1162/089976602753284446): no picture's label is asked for; that the
    pictures of a label look as they did, p(x|y), is taken for granted. The likelihood is
    concave in p(y), so that the start does not matter.

    Args:
        posterior: (n, labels), under `priors`; for n = 0 the answer is `priors`.
        priors: (labels,).
        tolerance: ends where no prior moves by more.
        most: steps after which it ends all the same.
    """
    found = priors
    for _ in range(most if len(posterior) else 0):
        moved = reweighted(posterior, priors, found).mean(0)
        close = np.abs(moved - found).max() <= tolerance
        found = moved
        if close:
            break
    return found
