"""The bench of servers stays alive: every figure comes out of a short run over toy bundles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from bench.serving import bundles, clocks, echo, figures, processes, soak, tables
from bench.serving.load import Plan
from bench.serving.measures import Pace
from bench.serving.pictures import write_request
from likely.bundle import Bundle
from tests.conftest import build_toy

SHORT = Pace(rounds=1, seconds=0.05, batches=(1, 4))


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("scorers")
    return {name: build_toy(folder / name, name).path for name in ("heavy", "light")}


@pytest.fixture(scope="module")
def echoing() -> Iterator[processes.RunningServer]:
    with processes.run_echo() as running:
        yield running


@pytest.fixture
def question(tmp_path: Path) -> Path:
    path = tmp_path / "request"
    path.write_bytes(b"0123456789")
    return path


@pytest.mark.timeout(900)  # ten servers begin, on whatever is left of the machine
def test_every_figure_is_there_and_told(toys: dict[str, Path]) -> None:
    found = json.loads(json.dumps(figures.collect(toys, SHORT, lambda _: None)))

    for key in (*tables.GOALS, *tables.OTHERS):
        value = found[key]
        values = value.values() if isinstance(value, dict) else [value]
        assert all(np.isfinite(values_) for values_ in values), key
    assert found["cpu.light.32x1.of_echo"]["best"] > 0
    assert found["overload.offered_of_peak"] > 0
    assert "OK" in found["overload.codes"]
    console = Console(width=100, record=True)
    for table in (tables.goals_table, tables.others):
        console.print(table(found))
    text = console.export_text()
    assert all(label.strip() in text for label, _, _ in tables.GOALS.values())


def test_a_soak_tells_memory_and_who_left(toys: dict[str, Path]) -> None:
    found = soak.soak(toys["light"], 3.0, lambda _: None)

    assert set(found["soak.codes"]) <= {"OK", "CANCELLED"}
    assert found["soak.cancelled_share"] > 0.05
    assert len(found["soak.samples"]) > 20
    assert found["soak.last_mib"] > 20


def test_the_slope_of_memory_is_not_moved_by_a_step() -> None:
    times = np.linspace(0.0, 600.0, 200)
    noise = np.random.default_rng(0).normal(0, 0.1, 200)
    steady = 100 + noise + 20 * (times > 540)
    leaking = 100 + noise + 30 * times / 3600

    assert abs(soak.slope(times, steady)) < 60
    assert soak.slope(times, leaking) == pytest.approx(30, rel=0.1)


def test_a_light_scorer_is_exported_once(tmp_path: Path) -> None:
    messages: list[str] = []

    first = bundles.find_or_export("light", tmp_path, messages.append)
    second = bundles.find_or_export("light", tmp_path, messages.append)

    assert first == second
    assert len(messages) == 1
    assert Bundle.open(first).manifest.name == "light"


def test_callers_ask_again_as_soon_as_they_are_answered(
    echoing: processes.RunningServer, question: Path
) -> None:
    with processes.run_load_generator() as load:
        plan = Plan(echoing.address, echo.UNARY, question, callers=4, seconds=0.2, answers=20)
        found = load(plan)
        streamed = load(Plan(echoing.address, echo.STREAM, question, callers=2, streams=True))

    assert set(found["codes"]) == {"OK"}
    assert found["codes"]["OK"] >= 20
    assert found["rate"] == pytest.approx(found["codes"]["OK"] / found["seconds"])
    assert found["latency"]["OK"]["count"] == found["codes"]["OK"]
    assert set(streamed["codes"]) == {"OK"}


def test_a_rate_is_kept_and_what_fails_is_counted(
    echoing: processes.RunningServer, question: Path
) -> None:
    plan = Plan(echoing.address, echo.UNARY, question, rate=50, seconds=2.0, deadline=5.0)
    with processes.run_load_generator() as load:

        def asked() -> float:
            paced = load(plan)
            return float(sum(paced["codes"].values()) / paced["seconds"])

        # Five standard deviations; a machine that stood still at the end may try again.
        assert any(20 < asked() < 80 for _ in range(3))
        nowhere = load(Plan(echoing.address, "/bench.Echo/No", question, seconds=0.1))

    assert set(nowhere["codes"]) == {"UNIMPLEMENTED"}


def test_processor_time_is_that_of_the_process(echoing: processes.RunningServer) -> None:
    before = clocks.cpu_seconds(echoing.pid)
    time.sleep(0.05)

    assert 0 <= clocks.cpu_seconds(echoing.pid) - before < 5
    assert clocks.resident_mib(echoing.pid) > 5
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    with pytest.raises(ProcessLookupError):
        clocks.cpu_seconds(ended.pid)


def test_a_family_is_a_process_and_those_that_it_began() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        own = clocks.process_tree(os.getpid())
        child.communicate(b"\n")

    assert own[0] == os.getpid()
    assert child.pid in own
    assert child.pid not in clocks.process_tree(os.getpid())


def test_a_request_holds_as_many_pictures_as_it_shall(
    toys: dict[str, Path], tmp_path: Path
) -> None:
    from likely.v1.scoring_pb2 import ScoreRequest, ScoreStreamRequest

    asked = ScoreRequest.FromString(write_request(toys["light"], 3, tmp_path).read_bytes())
    path = write_request(toys["light"], 3, tmp_path, stream=True)

    assert list(asked.images.shape) == [3, 1, 3, 3]
    assert ScoreStreamRequest.FromString(path.read_bytes()).request == asked
