"""Evidence by absence, where what every pixel says is known."""

import asyncio

import numpy as np

from likely.answers import Doubles, Pixels
from likely_export import evidence


def test_a_pixel_alone_is_given_what_it_says() -> None:
    weights = np.random.default_rng(0).normal(size=(3, 1, 9, 7))

    async def likelihoods(x: Pixels) -> Doubles:
        found: Doubles = np.einsum("nchw,lchw->nl", x.astype(float), weights)
        return found

    instead = np.full((1, 9, 7), 2, np.uint8)
    x = np.stack([instead] * 2)
    x[0, 0, 4, 3], x[1, 0, 8, 6] = 7, 0
    pair = np.array([[0, 2], [1, 0]])
    found = asyncio.run(evidence.by_absence(likelihoods, x, pair, instead))
    apart = weights[0] - weights[2], weights[1] - weights[0]
    assert np.isclose(found[0, 0, 4, 3], 5 * apart[0][0, 4, 3], atol=1e-5)
    assert np.isclose(found[1, 0, 8, 6], -2 * apart[1][0, 8, 6], atol=1e-5)
    assert np.allclose(found[0, 0, :, 6], 0, atol=1e-5) and np.allclose(found[1, 0, :4], 0)
    log_odds = evidence.log_odds(asyncio.run(likelihoods(x)), pair)
    assert np.allclose(log_odds[0], (apart[0] * x[0]).sum())


def test_every_pixel_lies_in_a_patch() -> None:
    async def of_level(x: Pixels) -> Doubles:
        level = x.sum((1, 2, 3), dtype=float)
        return np.stack([level, -level], 1)

    for shape in ((1, 8, 8), (3, 5, 9), (1, 3, 2)):
        x = np.ones((1, *shape), np.uint8)
        found = asyncio.run(
            evidence.by_absence(of_level, x, np.array([[0, 1]]), np.zeros(shape, np.uint8))
        )
        assert np.all(found > 0)
