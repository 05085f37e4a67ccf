"""Devices are named and checked; rows that fill a batch up change no answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from likely import graphs
from likely.bundle import Bundle, Role
from likely.errors import SettingsError
from likely.graphs import Device, Session

if TYPE_CHECKING:
    from tests.conftest import Toy

SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 33)


def feeds(session: Session, n: int) -> dict[str, Any]:
    rng = np.random.default_rng(n)
    return {
        spec.name: rng.standard_normal(spec.array_shape(n), dtype=np.float32)
        if spec.dtype == "float32"
        else rng.integers(0, 3, spec.array_shape(n)).astype(spec.dtype)
        for spec in session.spec.inputs
    }


def test_buckets_are_the_powers_of_two() -> None:
    assert [graphs.bucket(n) for n in range(1, 10)] == [1, 2, 4, 4, 8, 8, 8, 8, 16]
    assert all(graphs.bucket(n) == n for n in (16, 32, 64, 256))


@pytest.mark.parametrize("n", SIZES)
def test_a_batch_is_filled_up_with_its_last_row(n: int) -> None:
    x = np.arange(n * 6, dtype=np.uint8).reshape(n, 1, 2, 3)
    y = np.arange(n)[::-1]  # in no order of memory that a runtime would take
    given: dict[str, Any] = {"x": x, "y": y}
    filled = graphs.filled(given, graphs.bucket(n))
    for name, feed in given.items():
        assert len(filled[name]) == graphs.bucket(n)
        assert filled[name].dtype == feed.dtype and filled[name].flags.c_contiguous
        assert np.array_equal(filled[name][:n], feed)
        assert np.array_equal(filled[name][n:], np.repeat(feed[-1:], graphs.bucket(n) - n, 0))


@pytest.mark.parametrize("role", Role)
def test_a_bound_run_answers_as_a_plain_one(role: Role, toy: Toy) -> None:
    bundle = Bundle.open(toy.path)
    session = Session(bundle.graph(role), bundle.manifest.graphs[role], Device("cpu"))
    names = [spec.name for spec in session.spec.outputs]
    for n in SIZES:
        given = feeds(session, n)
        plain, bound = session.run(given, names), session.run_bound(given, names)
        for name, expected, got in zip(names, plain, bound, strict=True):
            assert got.dtype == expected.dtype
            assert np.array_equal(got, expected), f"{name} of {n} rows"


def test_outputs_outlive_the_run_that_gave_them(toy: Toy) -> None:
    bundle = Bundle.open(toy.path)
    spec = bundle.manifest.graphs[Role.DENSITY]
    session = Session(bundle.graph(Role.DENSITY), spec, Device("cpu"))
    first = session.run_bound(feeds(session, 5), ["surprise"])[0]
    kept = first.copy()
    session.run_bound(feeds(session, 6), ["surprise"])
    assert np.array_equal(first, kept)


def test_a_device_is_what_its_name_says() -> None:
    assert Device.parse("cuda:3", memory=5) == Device("cuda", 3, 5)
    assert Device.parse("auto", memory=5) == Device("auto", 0, 5)
    assert str(Device.parse("cuda:3")) == "cuda:3"
    with pytest.raises(SettingsError, match="none of auto, cpu, cuda"):
        Device.parse("gpu")


def test_auto_keeps_its_limit_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "cuda_devices", lambda: 0)
    assert Device("auto", memory=5).resolve() == Device("cpu", memory=5)
