"""Which pixels speak for which label, where what every pixel says is known."""

from typing import Any, cast

import numpy as np
import pytest

from likely.graphs import Array, Session
from likely_export import attribution

N, LABELS = 3, 4


class Linear:
    """A conditional graph with log p(x|y) = sum_d weights[y, d] x_d, a sum over pixels."""

    def __init__(self, *shape: int) -> None:
        self.weights = np.random.default_rng(0).normal(size=(LABELS, *shape))
        self.spec = self

    def input(self, _: str) -> None:
        """It takes pictures alone."""

    def run(self, feeds: dict[str, Array], outputs: list[str]) -> list[Array]:
        says = feeds["x"][:, None] * self.weights
        found = {"surprise": -says, "log_pxy": says.sum((2, 3, 4))}
        return [found[name].astype(np.float32) for name in outputs]

    def ratio(self, x: Array, pair: Array) -> Array:
        """What every pixel adds, (n, c, h, w)."""
        return cast(Array, (self.weights[pair[:, 0]] - self.weights[pair[:, 1]]) * x)


def session(model: Linear) -> Session:
    return cast(Session, model)


def pairs() -> Any:
    return np.array([[0, 2], [1, 0], [3, 1]])


def test_every_pixel_adds_its_own() -> None:
    model, x = Linear(2, 5, 6), np.random.default_rng(1).integers(0, 9, (N, 2, 5, 6), np.uint8)
    found = attribution.by_pixel(session(model), x, pairs())
    assert np.allclose(found, model.ratio(x, pairs()), atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 9, 7), (3, 8, 8), (2, 3, 2)])
def test_a_pixel_gets_the_mean_over_the_patches_that_hold_it(shape: tuple[int, ...]) -> None:
    model, generator = Linear(*shape), np.random.default_rng(2)
    x = generator.integers(0, 9, (N, *shape), np.uint8)
    instead = generator.integers(0, 9, shape, np.uint8)
    ratios, found = attribution.by_occlusion(session(model), x, pairs(), instead)
    assert np.allclose(ratios, model.ratio(x, pairs()).sum((1, 2, 3)), atol=1e-3)
    # What a pixel adds by itself, of all channels together, and no other replaced.
    apart = (model.ratio(x, pairs()) - model.ratio(instead[None], pairs())).sum(1)
    assert found.shape == (N, 1, *shape[1:])
    for i in range(shape[1]):
        for j in range(shape[2]):
            patches = [
                apart[:, top : top + 4, left : left + 4].sum((1, 2))
                for top in range(0, max(1, shape[1] - 2), 2)
                for left in range(0, max(1, shape[2] - 2), 2)
                if top <= i < top + 4 and left <= j < left + 4
            ]
            assert np.allclose(found[:, 0, i, j], np.mean(patches, 0), atol=1e-3)
