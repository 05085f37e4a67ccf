import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit

from likely_export import logistic


def parameters(d: int = 3, terms: int = 2, spread: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(4, 3, terms, d, generator=generator, dtype=torch.float64)


@given(st.integers(2, 256), st.integers(1, 4), st.floats(0, 30), st.integers(0, 10))
def test_levels_sum_to_one_and_stay_finite(
    levels: int, terms: int, spread: float, seed: int
) -> None:
    log_p = logistic.log_probs(parameters(terms=terms, spread=spread, seed=seed), levels)
    assert log_p.shape == (4, 3, levels) and log_p.isfinite().all()
    assert torch.allclose(log_p.exp().sum(-1), torch.ones(()).double(), atol=1e-9)


def test_the_formula_of_the_paper_is_met() -> None:
    levels, half = 9, 1 / 8
    given = parameters()
    logits, mean, log_scale = (part.numpy() for part in given.unbind(1))
    log_scale = log_scale.clip(logistic.SHARPEST, logistic.FLATTEST)
    share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = np.zeros((4, 3, levels))
    for level in range(levels):
        u, scale = 2 * level * half - 1, np.exp(log_scale)
        high = expit((u + half - mean) / scale) if level < levels - 1 else 1.0
        low = expit((u - half - mean) / scale) if level else 0.0
        expected[..., level] = (share * (high - low)).sum(1)
    assert np.allclose(logistic.log_probs(given, levels).exp().numpy(), expected, atol=1e-12)


def test_one_level_is_as_in_the_table_of_all() -> None:
    given, levels = parameters(d=5, terms=3), 17
    x = torch.randint(0, levels, (4, 5))
    table = logistic.log_probs(given, levels).gather(-1, x[..., None])[..., 0]
    assert torch.allclose(logistic.log_prob(given, x.double(), levels), table)


@pytest.mark.parametrize("spread", [1.0, 40.0])
def test_gradients_are_finite_in_single_precision(spread: float) -> None:
    given = parameters(spread=spread).float().requires_grad_()
    logistic.log_probs(given, 17).sum().backward()
    assert given.grad is not None and given.grad.isfinite().all()


def test_a_level_far_in_the_tail_keeps_its_logarithm() -> None:
    given = torch.zeros(1, 3, 1, 1)
    given[:, 1] = 1000  # half-ranges away, of scale 1: no probability that a float could hold
    first = logistic.log_probs(given, 3)[0, 0, 0]
    assert first.item() == pytest.approx(-1000.5, abs=1e-3)
