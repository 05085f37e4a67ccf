"""Devices are named and checked; rows that fill a batch up change no answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from likely import graphs
from likely.bundle import Bundle, Role
from likely.errors import BundleError, SettingsError
from likely.graphs import CPU, CUDA, Device, Session

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
    assert [graphs.padded_size(n) for n in range(1, 10)] == [1, 2, 4, 4, 8, 8, 8, 8, 16]
    assert all(graphs.padded_size(n) == n for n in (16, 32, 64, 256))


@pytest.mark.parametrize("n", SIZES)
def test_a_batch_is_filled_up_with_its_last_row(n: int) -> None:
    x = np.arange(n * 6, dtype=np.uint8).reshape(n, 1, 2, 3)
    y = np.arange(n)[::-1]  # in no order of memory that a runtime would take
    given: dict[str, Any] = {"x": x, "y": y}
    filled = graphs.pad_rows(given, graphs.padded_size(n))
    for name, feed in given.items():
        assert len(filled[name]) == graphs.padded_size(n)
        assert filled[name].dtype == feed.dtype and filled[name].flags.c_contiguous
        assert np.array_equal(filled[name][:n], feed)
        assert np.array_equal(filled[name][n:], np.repeat(feed[-1:], graphs.padded_size(n) - n, 0))


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


@pytest.mark.parametrize(
    ("providers", "cards", "kind"),
    [((CUDA, CPU), 1, "cuda"), ((CUDA, CPU), 0, "cpu"), ((CPU,), 1, "cpu")],
)
def test_auto_is_a_card_where_both_runtime_and_driver_have_one(
    monkeypatch: pytest.MonkeyPatch, providers: tuple[str, ...], cards: int, kind: str
) -> None:
    runtime = SimpleNamespace(get_available_providers=lambda: providers)
    monkeypatch.setattr(graphs, "runtime", lambda: runtime)
    monkeypatch.setattr(graphs, "cuda_devices", lambda: cards)
    assert str(Device("auto").resolve()) == ("cuda:0" if kind == "cuda" else kind)


def test_a_card_computes_as_exactly_as_was_promised_and_within_its_memory() -> None:
    usual = {"device_id": "3", "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    assert graphs._cuda_options(Device("cuda", 3)) == usual
    limits = {"gpu_mem_limit": "5000", "arena_extend_strategy": "kSameAsRequested"}
    assert graphs._cuda_options(Device("cuda", 3, 5000)) == usual | limits


def test_a_graph_is_opened_for_as_many_threads_as_asked(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, asked, opened = Bundle.open(toy.path), [], graphs.runtime().InferenceSession

    def noted(path: str, options: Any, **more: Any) -> Any:
        asked.append((options.intra_op_num_threads, options.inter_op_num_threads))
        return opened(path, options, **more)

    monkeypatch.setattr(graphs.runtime(), "InferenceSession", noted)
    for threads in (1, 2):
        spec = bundle.manifest.graphs[Role.DENSITY]
        Session(bundle.graph(Role.DENSITY), spec, Device("cpu"), threads)
    assert asked == [(1, 1), (2, 1)]


@pytest.mark.parametrize("what", ["inputs", "outputs"])
def test_a_graph_of_another_signature_is_refused(toy: Toy, what: str) -> None:
    bundle = Bundle.open(toy.path)
    spec = bundle.manifest.graphs[Role.ENCODE]
    other = spec.model_copy(update={what: getattr(spec, what)[:1]})
    with pytest.raises(BundleError, match=f"has the {what} .* where the manifest says"):
        Session(bundle.graph(Role.ENCODE), other, Device("cpu"))


def test_what_agrees_is_of_one_kind_and_near() -> None:
    x = np.array([0.0, 1000.0], np.float32)
    assert graphs.agrees(x + np.array([9e-4, 0.09], np.float32), x)
    assert not graphs.agrees(x + np.float32(2e-3) * (x == 0), x)
    assert not graphs.agrees(x * np.float32(1.0002), x)
    assert not graphs.agrees(x.astype(np.float64), x) and not graphs.agrees(x[:1], x)
    assert not graphs.agrees(np.array([1, 2]), np.array([1, 3]))
