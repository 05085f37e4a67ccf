"""Linear probes of features."""

from __future__ import annotations

import numpy as np

from likely_export.features import probe


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
