"""The Fashion-MNIST bundle of the repository keeps what it is said to reach."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from likely.bundle import Bundle
from likely.engine import Engine
from likely.graphs import Device
from likely_export import recipes
from likely_export.corruptions import PANEL, corrupt

FOLDER = Path(__file__).parents[2] / "bundles" / "fashion_mnist"
DATA = Path(__file__).parents[3] / "shared" / "data"
SIZE_LIMIT = 10_000_000

needs_data = pytest.mark.skipif(
    not (DATA / "fashion_mnist.npz").is_file(), reason="needs ../shared/data/fashion_mnist.npz"
)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine.load(Bundle.open(FOLDER), device=Device("cpu"), threads=1, max_batch=16)
    yield engine
    engine.close()


def test_it_is_small_and_made_by_the_recipe_of_its_name() -> None:
    manifest = Bundle.open(FOLDER).manifest
    assert sum(record.size for record in manifest.files.values()) < SIZE_LIMIT
    recipe = recipes.from_table(dict(manifest.recipe))
    assert recipe == recipes.load("fashion_mnist")
    assert manifest.decisions_compared == 10_000 and manifest.decisions_changed == 0


def test_its_evaluation_says_what_is_promised() -> None:
    told = json.loads((FOLDER / "evaluation.json").read_text())
    assert told["bits_per_dim"]["mean"] < 2.8
    assert (
        told["outliers"]["mnist"]["auroc"] > 0.997 > 0.2 > told["likelihood_only"]["mnist"]["auroc"]
    )
    assert told["panel"]["auroc_min"] > 0.9 and told["panel"]["auroc_mean"] > 0.985
    assert set(PANEL) <= set(told["outliers"])
    for rejected in told["false_rejection"].values():
        low, high = rejected["band"]
        assert low <= rejected["overall"] <= high


@needs_data
def test_it_does_what_its_evaluation_says(engine: Engine) -> None:
    told = json.loads((FOLDER / "evaluation.json").read_text())
    with np.load(DATA / "fashion_mnist.npz") as arrays:
        x, y = arrays["x_test"][::50, None], arrays["y_test"][::50]
    with np.load(DATA / "mnist.npz") as arrays:
        digits = arrays["x_test"][::200, None]
    answer = asyncio.run(engine.classify(x, 0.05))
    error = 3 * np.sqrt(told["accuracy"]["mean"] * 0.1 / len(x))
    assert np.mean(answer.label == y) == pytest.approx(told["accuracy"]["mean"], abs=error)
    assert np.mean(answer.p_value <= 0.05) < 0.05 + 4 * np.sqrt(0.05 * 0.95 / len(x))
    for odd in (digits, corrupt("patch_swap", x[:50], 256), corrupt("blank", x[:2], 256)):
        scores = asyncio.run(engine.score(odd, 0.05))
        assert np.mean(scores.p_value <= 0.05) > 0.95
