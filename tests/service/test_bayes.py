"""Properties of Bayes' rule."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from likely import bayes
from likely.errors import InvalidInput

nats = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 5), st.integers(1, 6)),
    elements=st.floats(-1e5, 0, allow_nan=False),
)


@given(nats)
def test_logsumexp_is_the_log_of_a_sum_of_exponentials(values: np.ndarray) -> None:
    shifted = values - values.max(1, keepdims=True)
    expected = values.max(1) + np.log(np.exp(shifted).sum(1))
    assert np.allclose(bayes.logsumexp(values), expected)


def test_logsumexp_of_nothing_possible_is_impossible() -> None:
    assert bayes.logsumexp(np.full((1, 3), -np.inf)) == -np.inf


@given(nats, st.floats(0.1, 100))
def test_posteriors_sum_to_one_even_where_all_underflow(
    log_pxy: np.ndarray, temperature: float
) -> None:
    labels = log_pxy.shape[1]
    posterior = bayes.posterior(log_pxy, np.full(labels, 1 / labels), temperature)
    assert np.allclose(posterior.sum(1), 1)
    assert np.all(posterior >= 0)


@given(nats)
def test_a_label_that_cannot_be_gets_nothing(log_pxy: np.ndarray) -> None:
    labels = log_pxy.shape[1]
    priors = np.zeros(labels)
    priors[-1] = 1
    posterior = bayes.posterior(log_pxy, priors)
    assert np.array_equal(posterior, np.broadcast_to(priors, log_pxy.shape))


@pytest.mark.parametrize("nats", [123.0, 1e5, 1e30, float(np.finfo(np.float32).max)])
def test_equal_likelihoods_leave_the_priors(nats: float) -> None:
    priors = np.array([0.7, 0.2, 0.1])
    assert np.allclose(bayes.posterior(np.full((4, 3), -nats), priors), priors)
    impossible = np.array([[0.0, -nats, -nats]])
    assert np.allclose(bayes.posterior(impossible, np.array([0, 0.75, 0.25])), [0, 0.75, 0.25])


@pytest.mark.parametrize(
    ("priors", "field"),
    [
        ([0.5, 0.5], "priors"),
        ([0.5, 0.4, 0.2], "priors"),
        ([0.5, 0.6, -0.1], "priors[2]"),
        ([0.5, float("nan"), 0.5], "priors[1]"),
        ([float("inf"), 0, 0], "priors[0]"),
    ],
)
def test_priors_that_are_none_are_refused(priors: list[float], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        bayes.check_priors(priors, 3)
    assert caught.value.field == field


def test_priors_may_miss_1_by_a_millionth() -> None:
    for priors in ([1 + 5e-7, 0, 0], [0.5, 0.5 - 9e-7, 0]):
        assert bayes.check_priors(priors, 3).tolist() == priors


@given(nats, st.integers(0, 100))
def test_reweighted_posteriors_are_those_of_the_other_priors(
    log_pxy: np.ndarray, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    one, other = rng.dirichlet(np.ones(log_pxy.shape[1]), 2)
    near = log_pxy / 1e4  # so that no posterior is 0, which no other prior can raise
    weighed = bayes.reweighted(bayes.posterior(near, one), one, other)
    assert np.allclose(weighed, bayes.posterior(near, other))


def test_a_posterior_that_the_other_priors_rule_out_is_left() -> None:
    priors, others = np.array([0.5, 0.5]), np.array([0.0, 1.0])
    weighed = bayes.reweighted(np.array([[1.0, 0.0], [0.5, 0.5]]), priors, others)
    assert weighed.tolist() == [[1.0, 0.0], [0.0, 1.0]]


@given(nats, st.integers(0, 100))
def test_in_logs_other_priors_weigh_the_same(log_pxy: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = rng.dirichlet(np.ones(log_pxy.shape[1]), 2)
    log_pyx = log_pxy / 1e4 + np.log(one)
    log_pyx -= bayes.logsumexp(log_pyx)[:, None]
    weighed = bayes.under_priors(log_pyx, one, other)
    assert np.allclose(weighed, bayes.reweighted(np.exp(log_pyx), one, other))


def test_in_logs_the_least_posterior_counts_where_priors_rule_out_the_rest() -> None:
    one = np.array([0.5, 0.5, 0.0])
    log_pyx = np.array([[0.0, -800.0, -900.0]])
    for others, posterior in (
        ([0.0, 1.0, 0.0], [0, 1, 0]),  # exp(-800) is 0
        ([0.0, 0.5, 0.5], [0, 1, 0]),  # the third was ruled out before
        ([0.0, 0.0, 1.0], [1, 0, 0]),  # all are: as it was
    ):
        assert bayes.under_priors(log_pyx, one, np.array(others)).tolist() == [posterior]


@pytest.mark.parametrize("frequent", range(5))
def test_priors_are_estimated_from_pictures_without_labels(
    frequent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One label has half of the pictures, where the model takes all for equal."""
    rng = np.random.default_rng(frequent)
    priors, true = np.full(5, 0.2), np.full(5, 0.125)
    true[frequent] = 0.5
    y = rng.choice(5, size=20_000, p=true)
    centres = 2 * np.eye(5)
    x = centres[y] + rng.normal(size=(len(y), 5))
    posterior = bayes.posterior(-np.square(x[:, None] - centres).sum(2) / 2, priors)
    found = bayes.estimated_priors(posterior, priors)
    with monkeypatch.context() as patch:
        patch.setattr(bayes, "BLOCK", 999)
        assert bayes.estimated_priors(posterior, priors) == pytest.approx(found, abs=1e-12)
    assert np.abs(found - true).max() < 0.02
    assert found.sum() == pytest.approx(1)
    weighed = bayes.reweighted(posterior, priors, found)
    assert (weighed.argmax(1) == y).mean() > (posterior.argmax(1) == y).mean() + 0.01
    # No other priors make these pictures more probable: a step leaves them where they are.
    assert np.allclose(weighed.mean(0), found, atol=1e-8)


def test_priors_of_no_pictures_are_the_models() -> None:
    priors = np.array([0.3, 0.7])
    assert bayes.estimated_priors(np.empty((0, 2)), priors).tolist() == [0.3, 0.7]
