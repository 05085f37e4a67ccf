"""The bundle of digits keeps its promises on digits that nothing of it has seen."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demo import pictures
from likely.answers import Verdict
from likely.bundle import Bundle
from likely.engine import Engine
from likely.graphs import Device

FOLDER = Path(__file__).parents[2] / "bundles" / "digits"
SIZE_LIMIT = 2_000_000


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    opened = Engine.load(Bundle.open(FOLDER), device=Device("cpu"), threads=2, max_batch=16)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def digits(engine: Engine) -> tuple[Any, Any]:
    return pictures.held_out(engine.manifest)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1])
def test_false_rejections_lie_in_the_binomial_band(
    engine: Engine, digits: tuple[Any, Any], alpha: float
) -> None:
    binom = pytest.importorskip("scipy.stats").binom
    x, _ = digits
    rejected = int(np.sum(asyncio.run(engine.score(x, alpha)).verdict == Verdict.OUTLIER))
    low, high = binom.interval(0.99, len(x), alpha)
    assert low <= rejected <= high


@pytest.mark.parametrize("make", [pictures.noise, pictures.blank, pictures.inverted])
def test_what_is_no_digit_is_rejected(engine: Engine, digits: tuple[Any, Any], make: Any) -> None:
    outliers = make(digits[0], np.random.default_rng(0))
    assert np.all(asyncio.run(engine.score(outliers, 0.05)).verdict == Verdict.OUTLIER)


def test_labels_are_right_and_the_evaluation_says_how_often(
    engine: Engine, digits: tuple[Any, Any]
) -> None:
    x, y = digits
    figures = json.loads((FOLDER / "evaluation.json").read_text())
    answer = asyncio.run(engine.classify(x, 0.05))
    accuracy = float(np.mean(answer.label == y))
    assert accuracy > figures["baselines"]["logistic_regression_accuracy"]
    assert accuracy == pytest.approx(figures["accuracy"]["mean"])
    scores = asyncio.run(engine.score(x, 0.05))
    assert -scores.log_px.mean() == pytest.approx(figures["nll_nats"]["mean"], abs=1e-3)
    assert figures["nll_nats"]["mean"] < figures["baselines"]["gaussian_mixture_nll_nats"]


def test_the_bundle_is_small(engine: Engine) -> None:
    assert sum(record.size for record in engine.manifest.files.values()) < SIZE_LIMIT
