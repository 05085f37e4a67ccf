"""The mixture of logistics over a pixel: exact, bounded, the same whatever the digits."""

import itertools

import numpy as np
import pytest
import torch
from autoregressive import Opener
from scipy.special import expit, softmax

from likely.bundle import TensorSpec
from likely_export import logistic
from likely_export.mixture import UNIFORM_SHARE, MixtureHead
from likely_export.roles import GraphSource


def made(channels: int, levels: int, digits: int = 1, spread: float = 1.0) -> MixtureHead:
    head = MixtureHead(4, channels, levels, digits, logistics=3)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        head.weight.add_(torch.randn(head.weight.shape, generator=generator) * spread)
    return head


def features(n: int, side: int = 1) -> torch.Tensor:
    return torch.randn(n, 4, side, side, generator=torch.Generator().manual_seed(3))


def by_the_paper(head: MixtureHead, f: np.ndarray, pixel: tuple[int, ...]) -> float:
    """p of a pixel as equations 2 and 3 of the paper have it, in double precision."""
    c, levels = head.channels, head.levels
    weight, bias = (p.detach().double().numpy() for p in (head.weight, head.bias))
    rows = (np.maximum(f, 0) @ weight + bias).reshape(-1, head.logistics)
    u = [2 * level / (levels - 1) - 1 for level in pixel]
    p, pair = softmax(rows[0]), 1 + 2 * c
    for i, level in enumerate(pixel):
        mean = rows[1 + i].copy()
        for j in range(i):
            mean += np.tanh(rows[pair]) * u[j]
            pair += 1
        scale = np.exp(rows[1 + c + i].clip(logistic.SHARPEST, logistic.FLATTEST))
        half = 1 / (levels - 1)
        high = expit((u[i] + half - mean) / scale) if level < levels - 1 else 1.0
        low = expit((u[i] - half - mean) / scale) if level else 0.0
        p = p * ((1 - UNIFORM_SHARE) * (high - low) + UNIFORM_SHARE / levels)
    return float(p.sum())


@pytest.mark.parametrize(("channels", "levels", "digits"), [(1, 9, 2), (2, 5, 1), (3, 4, 2)])
def test_every_pixel_has_the_probability_of_the_paper(
    channels: int, levels: int, digits: int
) -> None:
    head, f = made(channels, levels, digits), features(1)
    every = list(itertools.product(range(levels), repeat=channels))
    x = torch.tensor(every, dtype=torch.uint8).view(-1, channels, 1, 1)
    nats = head.nats(f.expand(len(x), -1, -1, -1), x).sum((1, 2, 3))
    expected = [by_the_paper(head, f[0, :, 0, 0].double().numpy(), pixel) for pixel in every]
    assert torch.exp(-nats).detach().numpy() == pytest.approx(np.array(expected), rel=1e-4)
    assert sum(expected) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("digits", [1, 2, 4])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_digits_write_the_same_distribution(digits: int, spread: float) -> None:
    head, f = made(3, 256, digits, spread), features(4, 3)
    x = torch.randint(0, 256, (4, 3, 3, 3), generator=torch.Generator().manual_seed(4)).byte()
    x[0] = torch.tensor([0, 255, 0])[:, None, None]  # the tails
    log_probs = head.log_probs(f, x)
    assert log_probs.shape == (4, 3, 3, 3 * digits, round(256 ** (1 / digits)))
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(()), atol=1e-5)
    exactly = made(3, 256, 1, spread).double().nats(f.double(), x)
    for nats in (head.nats(f, x), head.surprise(log_probs, x)):
        assert torch.allclose(nats.double(), exactly, atol=1e-4)


@pytest.mark.parametrize("spread", [1.0, 1000.0])
def test_surprise_is_bounded_and_has_a_gradient(spread: float) -> None:
    head, f = made(3, 256, 2, spread), features(8, 4)
    x = torch.randint(0, 256, (8, 3, 4, 4), generator=torch.Generator().manual_seed(5)).byte()
    nats = head.nats(f, x)
    assert nats.max() <= -np.log(UNIFORM_SHARE / 256) + 1e-3
    nats.sum().backward()
    for weight in head.parameters():
        assert weight.grad is not None and weight.grad.isfinite().all()
        assert weight.grad.abs().sum() > 0


class Taken(torch.nn.Module):
    def __init__(self, head: MixtureHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.head.nats(features, x), self.head.log_probs(features, x)


def test_onnx_runtime_keeps_the_tails(opened: Opener) -> None:
    head, n = made(3, 256, 2), 64
    source = GraphSource(
        Taken(head).eval(),
        (
            TensorSpec(name="eps", dtype="float32", shape=("batch", 4, 2, 2)),
            TensorSpec(name="x", dtype="uint8", shape=("batch", 3, 2, 2)),
        ),
        (
            TensorSpec(name="nats", dtype="float32", shape=("batch", 3, 2, 2)),
            TensorSpec(name="tables", dtype="float32", shape=("batch", 2, 2, 6, 16)),
        ),
    )
    f = features(n, 2)
    x = torch.randint(0, 256, (n, 3, 2, 2), generator=torch.Generator().manual_seed(6)).byte()
    found = opened(source, 256, 0).run({"eps": f.numpy(), "x": x.numpy()}, ["nats", "tables"])
    with torch.no_grad():
        exactly = made(3, 256, 2).double().nats(f.double(), x).numpy()
        tables = made(3, 256, 2).double().log_probs(f.double(), x).numpy()
    assert exactly.max() > 14, "some levels must lie far in the tails"
    assert np.abs(found[0] - exactly).max() < 1e-4
    assert np.abs(found[1] - tables).max() < 1e-4
