"""Figures of the digits' bundle, those that need neither a judge nor draws."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from likely.answers import Doubles, Floats, Labels, Verdict
from likely.bundle import Bundle
from likely.engine import Engine
from likely.graphs import Array, Session
from likely_export import corruptions, costs, measures
from likely_export.corruptions import HARD, INLIERS, PANEL
from likely_export.data import Dataset, evenly_spaced
from likely_export.evaluate import _Evaluation
from likely_export.generated import Sizes
from likely_export.judge import Judge
from likely_export.material import PictureSet

FOLDER = Path("bundles/digits")


def evaluation(engine: Engine, data: Dataset, alphas: Sequence[float]) -> _Evaluation:
    sizes = Sizes(test=60, outliers=10)
    return _Evaluation(Bundle.open(FOLDER), engine, data, alphas, {}, sizes)


def test_a_label_without_test_pictures_has_no_rates(engine: Engine, data: Dataset) -> None:
    without = data.test.take(np.flatnonzero(data.test.y != 9))
    made = evaluation(engine, replace(data, test=without), (0.1,))
    taken = asyncio.run(made._classify(made.test.x))
    rates, figures = made._false_rejection(taken.p_value, 0.1), made._labels(taken)
    found = figures["label_set"]["0.1"]
    for by_label in (rates["by_label"], rates["band_by_label"], found["coverage_by_label"]):
        assert by_label["9"] is None and by_label["8"] is not None
    assert found["least_by_label"]["9"] is None
    assert json.loads(json.dumps([rates, figures], allow_nan=False))


def test_where_nothing_is_accepted_nothing_is_said_of_it(engine: Engine, data: Dataset) -> None:
    made = evaluation(engine, data, (0.1,))
    taken = asyncio.run(made._classify(16 - made.test.x))
    assert not np.any(taken.verdict == Verdict.ACCEPTED)
    assert made._labels(taken)["accuracy_of_accepted"] is None


def test_alphas_that_are_too_fine_are_named(engine: Engine, data: Dataset) -> None:
    made = evaluation(engine, data, (0.1, 0.001, 0.05))
    assert (made.alphas, made.left_out, made.largest) == ([0.1, 0.05], [0.001], 0.1)
    none = evaluation(engine, data, (0.001, 0.002))
    assert (none.alphas, none.left_out) == ([], [0.001, 0.002])
    scores = asyncio.run(none._score(none.corruptible))
    assert len(scores.p_value) == len(none.corruptible)


def test_what_is_given_the_label_says_which_bound_it_is(engine: Engine, data: Dataset) -> None:
    made = evaluation(engine, data, (0.1,))
    bound = made._labels(asyncio.run(made._classify(made.test.x)))["conditional_nll_nats"]
    assert (bound["kind"], bound["importance_samples"]) == ("iwae", 32)


def test_what_combines_statistics_is_part_of_their_cost(engine: Engine, data: Dataset) -> None:
    made = evaluation(engine, data, (0.1,))

    def slow(statistics: Floats, label: Labels | None = None) -> Doubles:
        began = time.process_time()
        while time.process_time() < began + 0.2:  # many plain passes
            pass
        return made._p_value(statistics, label)

    found = costs.measure(Bundle.open(FOLDER), slow, data.test.x[:16])
    assert found["statistics_cost"] > found["combination_cost"] > 5


def test_each_graph_is_timed_in_the_batches_that_suit_it(
    data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, now = Session.run, 0.0

    def timed(session: Session, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        nonlocal now
        pictures = len(feeds["x"])
        labels = 10 if "log_pxy" in outputs else 1
        now += pictures * labels * (2 if pictures * labels > 40 else 1)
        return run(session, feeds, outputs)

    monkeypatch.setattr(Session, "run", timed)
    monkeypatch.setattr(costs, "time", SimpleNamespace(process_time=lambda: now))
    found = costs.measure(Bundle.open(FOLDER), lambda *seen: None, data.test.x[:16])
    assert found["classification_cost"] == 10 and found["statistics_cost"] == 1


def test_of_a_larger_set_as_many_are_mixed_in_as_there_are_test_pictures(
    engine: Engine, data: Dataset
) -> None:
    x = data.train.x[:100, :, ::-1].copy()
    sizes = Sizes(test=60, outliers=100)
    made = _Evaluation(Bundle.open(FOLDER), engine, data, (0.1,), {"turned": x}, sizes)
    judge = Judge(data.shape, data.levels, len(data.labels))
    found = asyncio.run(made._open_set_figures(judge, asyncio.run(made._classify(made.test.x))))
    assert found["turned"]["size"] == 60


def test_the_figures_of_sets_have_errors_and_the_panel_those_of_its_own(
    engine: Engine, data: Dataset
) -> None:
    made = evaluation(engine, data, (0.1,))
    names = [INLIERS, *PANEL]
    sets = {
        name: PictureSet(
            made.corruptible[:1], *np.random.default_rng(at).normal(at / 9, 1, (3, size))
        )
        for at, (name, size) in enumerate(zip(names, [60, *[10] * len(PANEL)], strict=True))
    }
    found = made._separations(sets)
    panel, least = found["panel"], min(PANEL, key=lambda name: found["outliers"][name]["auroc"])
    assert panel["auroc_min"] == found["outliers"][least]["auroc"]
    assert panel["auroc_min_standard_error"] == found["outliers"][least]["auroc_standard_error"]
    aurocs, errors = (
        [found["outliers"][name][key] for name in PANEL]
        for key in ("auroc", "auroc_standard_error")
    )
    assert panel["auroc_mean"] == pytest.approx(np.mean(aurocs))
    # The sets share the test part, and are otherwise independent here.
    for name in PANEL:
        one, outside = found["outliers"][name], sets[name].unusualness
        apart = measures.separation(sets[INLIERS].unusualness, outside, evenly_spaced(60, 10))
        assert apart.items() <= one.items()
    assert np.mean(errors) / np.sqrt(len(PANEL)) < panel["auroc_mean_standard_error"]
    assert panel["auroc_mean_standard_error"] < np.mean(errors)
    accepted = found["outliers"][least]["accepted_standard_error"]
    assert accepted.keys() == {"0.1"} and accepted["0.1"] > 0


def test_a_corruption_that_tells_nothing_is_no_set(
    engine: Engine, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    panel = {**PANEL, "salt": lambda x, *_: x}
    monkeypatch.setattr(corruptions, "PANEL", panel)
    made = evaluation(engine, data, (0.1,))
    noise = np.random.default_rng(0).normal(0, 1, (3, len(made.test)))
    sets = {INLIERS: PictureSet(made.corruptible[:1], *noise)}
    sets |= asyncio.run(made._outside())
    assert set(sets) == {INLIERS, *PANEL, *HARD} - {"salt"}
    found = made._separations(sets)
    aurocs = [found["outliers"][name]["auroc"] for name in PANEL if name != "salt"]
    assert found["panel"]["auroc_mean"] == pytest.approx(np.mean(aurocs))
