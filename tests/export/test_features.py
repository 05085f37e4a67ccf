"""Linear probes of features."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from likely.answers import Floats, Labels
from likely.engine import Engine
from likely_export import features
from likely_export.data import Dataset
from likely_export.features import Sizes, probe


def test_a_probe_reads_what_is_linear_in_the_features() -> None:
    z = np.random.default_rng(0).normal(size=(400, 3))
    y = (z[:, 1] > 0).astype(np.int64)
    found = probe(z[:300], y[:300], z[300:], y[300:], (50, 1_000))
    assert set(found) == {50, 300}
    assert found[300] > 0.95 and found[50] > 0.85


def test_one_label_among_what_is_learnt_from_is_what_a_probe_says() -> None:
    z = np.random.default_rng(0).normal(size=(60, 3))
    y = np.repeat([1, 0, 1], 20)  # the fifth that penalties are chosen on, and the rest, differ
    assert probe(z, np.ones(60, np.int64), z, y, (60,)) == {60: np.mean(y == 1)}
    assert set(probe(z, y, z, y, (25, 60))) == {25, 60}


def test_components_are_no_more_than_the_pictures_that_show_them(
    engine: Engine, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []

    def probe(x: Floats, *_: object) -> dict[int, float]:
        widths.append(x.shape[1])
        return {}

    monkeypatch.setattr(features, "probe", probe)
    features._evaluated(engine, data, Sizes((2,), 20, traversed=1, draws=1, steps=5))
    assert widths[1] == 64 and widths[2] == min(widths[0], 2)


def test_what_is_tested_on_is_from_all_over_the_test_part(
    engine: Engine, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested: list[Labels] = []

    def looked_at(_: object, __: object, ___: object, y: Labels, ____: object) -> dict[int, float]:
        tested.append(y)
        return {}

    monkeypatch.setattr(features, "probe", looked_at)
    by_label = data.test.take(np.argsort(data.test.y, kind="stable"))
    sizes = Sizes((50,), 20, traversed=1, draws=1, steps=5)
    features._evaluated(engine, replace(data, test=by_label), sizes)
    assert len(tested) == 3 and all(len(np.unique(y)) == 10 for y in tested)
