"""Which graphs are opened, for how many cores, and what becomes of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from likely import warmup
from likely.batching import tuning
from likely.batching.batches import Runner
from likely.batching.portions import Portions
from likely.batching.tuning import Best
from likely.bundle import Bundle, Role
from likely.errors import BundleError, RunStopped
from likely.graphs import Device, Session, Stop
from likely.outliers import Detector
from likely.ranking import RANKED, Ranked
from likely.warmup import Warm

if TYPE_CHECKING:
    from tests.conftest import Toy


class Opening:
    """Opens a bundle's graphs, and keeps who was opened for how many cores."""

    def __init__(self, bundle: Bundle, broken: Role | None = None) -> None:
        self.bundle, self.broken = bundle, broken
        self.asked: list[tuple[Role, int]] = []
        self._lock = threading.Lock()

    def __call__(self, role: Role, threads: int) -> Runner:
        with self._lock:
            self.asked.append((role, threads))
        if role is self.broken:
            raise BundleError(f"{role} does not open", "graph")
        graph = self.bundle.manifest.graphs[role]
        return Session(self.bundle.graph(role), graph, Device("cpu"), threads)

    def completed(self, role: Role, runner: Runner) -> Runner:
        if role is not Role.DENSITY:
            return runner
        detector = Detector(self.bundle.calibration())
        return Ranked(runner, detector, self.bundle.manifest.dimensions)

    def warm_up(self, **given: Any) -> Warm:
        options = {"lanes": 1, "cores": 2, "max_batch": 0, **given}
        return warmup.warm_up(self.bundle, self, self.completed, **options)

    @property
    def wide(self) -> list[tuple[Role, int]]:
        return [(role, threads) for role, threads in self.asked if threads > 1]


@pytest.fixture
def bundle(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """The toy, as if its runs were too long for the event loop."""
    monkeypatch.setattr(tuning, "MAX_LOOP_SECONDS", 0.0)
    return Bundle.open(toy.path)


@pytest.mark.parametrize(("cores", "threads"), [(2, 2), (16, warmup.MAX_CORES_PER_RUN)])
@pytest.mark.parametrize("sooner", [True, False])
def test_the_density_is_opened_for_all_cores_and_kept_where_that_is_sooner(
    bundle: Bundle, cores: int, threads: int, sooner: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "is_faster_on_all_cores", lambda *_, **__: sooner)
    opening = Opening(bundle)
    warm = opening.warm_up(cores=cores)
    assert opening.wide == [(Role.DENSITY, threads)]
    assert {role for role, threads in opening.asked if threads == 1} == set(warm.runners)
    kept = warm.best[Role.DENSITY].wide
    assert (kept is not None) == sooner
    assert kept is not warm.runners[Role.DENSITY]
    assert all(best.wide is None for role, best in warm.best.items() if role != Role.DENSITY)


@pytest.mark.parametrize(("cores", "max_batch"), [(1, 0), (2, 4)])
def test_no_graph_is_opened_for_several_cores_where_none_could_be_used(
    bundle: Bundle, cores: int, max_batch: int
) -> None:
    opening = Opening(bundle)
    warm = opening.warm_up(cores=cores, max_batch=max_batch)
    assert opening.wide == []
    assert all(best.wide is None for best in warm.best.values())


def test_what_is_short_enough_for_the_event_loop_stays_there(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "is_faster_on_all_cores", lambda *_, **__: True)
    monkeypatch.setattr(tuning, "MAX_LOOP_SECONDS", 1e6)
    bundle = Bundle.open(toy.path)
    warm = Opening(bundle).warm_up()
    assert warm.best[Role.DENSITY].wide is None


def test_a_graph_that_does_not_open_ends_it(bundle: Bundle) -> None:
    for broken in bundle.manifest.graphs:
        with pytest.raises(BundleError, match=f"{broken} does not open"):
            Opening(bundle, broken).warm_up()


@contextmanager
def sizes_of_runs() -> Iterator[list[int]]:
    """How many rows each run of a session has, within."""
    sizes, run = list[int](), Session.run

    def seen(session: Session, feeds: Any, outputs: Any, stop: Any = None) -> Any:
        sizes.append(len(feeds["x"]))
        return run(session, feeds, outputs, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "run", seen)
        yield sizes


def test_a_batch_that_is_sooner_done_in_several_runs_is_divided_and_ranked_at_once(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening, asked = Opening(bundle), list[int]()
    monkeypatch.setattr(tuning, "find_best_batch", lambda *_, **__: Best(8, rows_per_run=3))
    monkeypatch.setattr(tuning, "is_faster_on_all_cores", lambda *_, **__: False)
    runner = opening.warm_up().runners[Role.DENSITY]
    ranked = opening.completed(Role.DENSITY, opening(Role.DENSITY, 1))
    p_value = Detector.p_value

    def counted(detector: Detector, scores: Any) -> Any:
        asked.append(len(scores))
        return p_value(detector, scores)

    monkeypatch.setattr(Detector, "p_value", counted)
    x = np.resize(bundle.golden()["density/x"], (8, 1, 3, 3))
    with sizes_of_runs() as sizes:
        found = runner.run({"x": x}, ["log_px", RANKED])
        assert (sizes, asked) == ([3, 3, 2], [8])
        assert runner.run({"x": x[:3]}, ["log_px"])[0].shape == (3,)
        assert sizes == [3, 3, 2, 3]
    for array, expected in zip(found, ranked.run({"x": x}, ["log_px", RANKED]), strict=True):
        assert np.allclose(array, expected, rtol=1e-4)


def test_a_batch_in_several_runs_ends_between_them() -> None:
    class Counting:
        spec, providers = None, ()
        ran = 0

        def run(self, feeds: Any, outputs: Any, stop: Any = None) -> Any:
            if stop.options.terminate:
                raise RunStopped("stopped")
            self.ran += 1
            stop.now()
            return [feeds["x"]]

    runner = Counting()
    with pytest.raises(RunStopped):
        Portions(runner, 2).run({"x": np.arange(6)}, ["y"], Stop())  # type: ignore[arg-type]
    assert runner.ran == 1


def test_runs_are_filled_up_to_one_size_and_divided_by_it(bundle: Bundle) -> None:
    opening = Opening(bundle)
    warm = opening.warm_up(max_batch=4, filled=True)
    assert all((best.rows, best.min_rows) == (4, 4) for best in warm.best.values())
    runner = warm.runners[Role.DENSITY]
    x = np.resize(bundle.golden()["density/x"], (11, 1, 3, 3))
    ranked = opening.completed(Role.DENSITY, opening(Role.DENSITY, 1))
    with sizes_of_runs() as sizes:
        found = runner.run({"x": x}, ["log_px", RANKED])
        assert sizes == [4, 4, 4]
        assert runner.run({"x": x[:1]}, ["log_px"])[0].shape == (1,)
        assert sizes == [4] * 4
    for array, expected in zip(found, ranked.run({"x": x}, ["log_px", RANKED]), strict=True):
        assert np.array_equal(array, expected)
    for none in (runner.run({"x": x[:0]}, [RANKED]), runner.empty([RANKED])):
        assert none[0].shape == (0, 4)
