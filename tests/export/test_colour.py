"""Colour from pictures to answers: a mixture of logistics trained, built and served, very small."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import numpy as np
import pytest
import torch

from likely.answers import Draws, Pixels
from likely.bundle import Bundle
from likely.engine import Engine
from likely.graphs import Device
from likely_export import recipes, runs
from likely_export.build import build

pytestmark = pytest.mark.timeout(900)  # they train, on whatever is left of the machine
RECIPE = """
name = "colours"
version = "1"
[data]
source = "colours.npz"
levels = 16
splits = { fit = 150, calibrate = 99, validate = 50 }
[models.density]
family = "pixelcnn"
channels = 8
layers = 1
gated = false
head = 16
digits = 2
logistics = 2
label_dropout = 0.5
training = { steps = 200, batch = 32, learning_rate = 1e-2, validations = 2 }
[models.texture]
family = "local"
channels = 8
layers = 1
digits = 2
logistics = 2
training = { steps = 60, batch = 32, learning_rate = 1e-2, validations = 1 }
[roles]
density = ["density", "texture"]
conditional = "density"
sample = "density"
[calibration]
statistics = ["surprise", "coarse_surprise", "entropy", "excess", "gain", "regional_surprise"]
"""


def pictures(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Slopes along rows or columns, uint8 (n, 6, 5, 3): green near red, blue its opposite."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    i, j = np.indices((6, 5)) / 6
    slope = np.where(y[:, None, None] == 0, i, j)
    red = 40 + 120 * slope + rng.normal(0, 12, (n, 6, 5)) + rng.uniform(-30, 60, (n, 1, 1))
    each = [red, red + rng.normal(0, 6, red.shape), 250 - red + rng.normal(0, 6, red.shape)]
    return np.stack(each, -1).clip(0, 255).astype(np.uint8), y.astype(np.uint8)


async def drawn(stream: AsyncGenerator[Draws, None]) -> Pixels:
    return np.concatenate([chunk.images async for chunk in stream])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("colour")
    x, y = pictures(1000, 0)
    x_test, y_test = pictures(200, 1)
    names = np.array(["rows", "columns"])
    np.savez(
        folder / "colours.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test,
        class_names=names,
    )  # fmt: skip
    (folder / "recipe.toml").write_text(RECIPE)
    runs.train_all(recipes.load(folder / "recipe.toml"), folder / "run")
    build(folder / "run", folder / "bundle", lambda _: None)
    return folder


@pytest.mark.slow
def test_a_colour_bundle_scores_classifies_draws_and_completes(run: Path) -> None:
    data = recipes.load(run / "recipe.toml").data.load()
    x, y = data.test.x, data.test.y
    assert data.shape == (3, 6, 5) and data.labels == ("rows", "columns")
    engine = Engine.load(Bundle.open(run / "bundle"), device=Device("cpu"), threads=1, max_batch=64)
    try:
        scores = asyncio.run(engine.score(x, 0.05, surprise=True))
        assert scores.surprise is not None and scores.surprise.shape == x.shape
        assert -scores.log_px == pytest.approx(scores.surprise.sum((1, 2, 3)), abs=1e-3)
        trained = runs.Run.open(run / "run").model("density")
        with torch.no_grad():
            log_px = trained.log_prob(torch.from_numpy(x))  # type: ignore[operator]
        # The bundle's weights are rounded to half precision.
        assert scores.log_px == pytest.approx(log_px.numpy(), abs=0.2)
        assert np.mean(scores.p_value <= 0.05) < 0.15
        # Each channel likely by itself, their colours not.
        mixed = np.concatenate([x[:, :1], np.roll(x[:, 1:], 1, 0)], 1)
        odd = asyncio.run(engine.score(mixed, 0.05))
        assert np.median(odd.log_px) < np.median(scores.log_px) - 20
        assert np.mean(odd.p_value <= 0.05) > 0.8

        taken = asyncio.run(engine.classify(x, 0.05))
        assert np.mean(taken.label == y) > 0.8

        images = asyncio.run(drawn(engine.generate(0, 20, 3, chunk=8)))
        assert images.shape == (20, 3, 6, 5) and images.max() < 16
        alone = asyncio.run(drawn(engine.generate(0, 1, 3, first_index=13)))
        assert np.array_equal(alone[0], images[13])
        # Red and green are drawn as alike as they are in the data.
        apart = [np.abs(each[:, 0].astype(int) - each[:, 1]).mean() for each in (images, x)]
        assert apart[0] < apart[1] + 1

        known = np.zeros(x[:4].shape, np.bool_)
        known[:, :, :3], known[:, 0] = True, True  # the upper half, and red throughout
        found = asyncio.run(drawn(engine.complete(x[:4], known, None, 2, 5)))
        fixed = known.repeat(2, 0)
        assert np.array_equal(found[fixed], x[:4].repeat(2, 0)[fixed])
        assert not np.array_equal(found[::2], found[1::2])
    finally:
        engine.close()
