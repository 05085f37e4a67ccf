"""Computes the figures in `build/bench-serving.json` from measurements."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from bench.environment import environment
from bench.serving import measures, processes
from bench.serving.clocks import resident_mib
from bench.serving.measures import Arrangement, Bench, Pace, Result, cpu_per_request
from bench.serving.processes import RunningServer
from likely import machine

Figures = dict[str, Any]
Report = Callable[[str], None]
Samples = defaultdict[str, list[float]]
# Many callers, few callers, pictures in a large request.
MANY_CALLERS, FEW_CALLERS, LARGE_REQUEST_IMAGES = 32, 4, 64
OVERLOAD_FACTOR = 10  # offered load under overload, as a multiple of the peak throughput
# Pictures per request under overload: fewer requests, as the load shares the cores.
OVERLOAD_IMAGES = 8
STREAM_WINDOW = 8  # messages in flight on each stream


def collect(bundles: Mapping[str, Path], pace: Pace, report: Report) -> Figures:
    """All figures, by name.

    Args:
        bundles: bundles of the two scorers, `heavy` and `light`.
        pace: duration and number of the measurements.
        report: called with a description of each step as it begins.
    """
    cores = machine.cores()
    figures: Figures = {
        "environment": {**environment(), "threads": cores},
        "rounds": pace.rounds,
        "seconds": pace.seconds,
    }
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench = stack.enter_context(measures.open_bench(bundles, work, pace))
        report("start")
        figures |= _measure_start(pace)
        echo = stack.enter_context(processes.run_echo())
        servers = {
            name: stack.enter_context(processes.run_server(path)) for name, path in bundles.items()
        }
        idle = {name: resident_mib(server.pid) for name, server in servers.items()}
        for name, server in servers.items():
            report(f"{name}: raw runs")
            arrangement, rates = bench.find_best_arrangement(name, cores)
            figures[f"raw.{name}"] = {"best": arrangement.describe(), "images_per_second": rates}
            figures |= _compare_server(bench, name, server, echo, arrangement, pace, report)
        report("overload")
        figures |= _measure_overload(bench, servers["heavy"])
        figures["memory"] = {
            "idle_mib": idle,
            "after_mib": {name: resident_mib(server.pid) for name, server in servers.items()},
        }
    with (
        tempfile.TemporaryDirectory() as folder,
        measures.open_bench(bundles, Path(folder), pace) as bench,
    ):
        for name, path in bundles.items():
            report(f"{name}: workers")
            figures |= _compare_workers(bench, name, path, pace)
    return figures


def _measure_start(pace: Pace) -> Figures:
    """Time, CPU time and memory from the start of the process until the shipped bundle serves."""
    starts = []
    for _ in range(min(3, pace.rounds)):
        with processes.run_server(None) as server:
            starts.append((server.ready_seconds, server.ready_cpu, resident_mib(server.pid)))
    seconds, cpu, memory = (min(column) for column in zip(*starts, strict=True))
    return {"ready.seconds": seconds, "ready.cpu_seconds": cpu, "ready.idle_mib": memory}


def _compare_server(
    bench: Bench,
    name: str,
    server: RunningServer,
    echo: RunningServer,
    arrangement: Arrangement,
    pace: Pace,
    report: Report,
) -> Figures:
    """Measures a scorer's server, raw runs and the echo in turn."""
    seen: Samples = defaultdict(list)
    for round_ in range(pace.rounds):
        report(f"{name}: round {round_ + 1} of {pace.rounds}")
        raw = bench.measure_raw(name, arrangement)
        seen["raw.rate"].append(raw["rate"])
        seen["raw.cpu"].append(raw["cpu"])
        seen["raw.lone"].append(bench.measure_raw(name, Arrangement(1, 1, 1))["run"])
        seen["raw.lone.wide"].append(
            bench.measure_raw(name, Arrangement(1, machine.cores(), 1))["run"]
        )
        _add_samples(seen, "echo", bench.measure_echo(echo, name, MANY_CALLERS), 1)
        _add_samples(seen, "32x1", bench.measure_unary(server, name, MANY_CALLERS, 1), 1)
        _add_samples(
            seen,
            "4x64",
            bench.measure_unary(server, name, FEW_CALLERS, LARGE_REQUEST_IMAGES),
            LARGE_REQUEST_IMAGES,
        )
        seen["echo.lone"].append(_median_latency(bench.measure_echo(echo, name, 1)))
        seen["lone"].append(_median_latency(bench.measure_unary(server, name, 1, 1)))
        _add_samples(
            seen, "stream", bench.measure_stream(server, name, FEW_CALLERS, STREAM_WINDOW), 1
        )
    return {
        f"throughput.{name}.32x1.of_raw": _ratio_of_maxima(seen, "32x1.rate", "raw.rate"),
        f"throughput.{name}.4x64.of_raw": _ratio_of_maxima(seen, "4x64.rate", "raw.rate"),
        f"throughput.{name}.32x1.requests_per_second": _summary(seen["32x1.rate"], most=True),
        f"throughput.{name}.32x1.of_echo": _ratio_of_maxima(seen, "32x1.rate", "echo.rate"),
        f"cpu.{name}.32x1.of_echo": _ratio_of_minima(seen, "32x1.cpu", "echo.cpu"),
        f"cpu.{name}.32x1.of_raw": _ratio_of_minima(seen, "32x1.cpu", "raw.cpu"),
        f"cpu.{name}.32x1.around_the_model.of_echo": _cpu_around_model(seen),
        f"cpu.{name}.4x64.of_raw": _ratio_of_minima(seen, "4x64.cpu", "raw.cpu"),
        f"cpu.{name}.stream.of_unary": _ratio_of_minima(seen, "stream.cpu", "32x1.cpu"),
        f"latency.{name}.lone.over_raw.of_echo": _latency_over_raw(seen),
        f"latency.{name}.32x1.p99_seconds": _summary(seen["32x1.p99"]),
        f"{name}.microseconds": {
            key: _summary([1e6 * value for value in seen[key]])
            for key in ("raw.cpu", "raw.lone", "raw.lone.wide", "echo.cpu", "echo.lone", "32x1.cpu",
                        "lone", "stream.cpu")
        },
    }  # fmt: skip


def _add_samples(seen: Samples, key: str, result: Result, images: int) -> None:
    seen[f"{key}.rate"].append(result["rate"] * images)
    seen[f"{key}.cpu"].append(cpu_per_request(result) / images)
    seen[f"{key}.p99"].append(result["latency"]["OK"]["p99"])


def _median_latency(result: Result) -> float:
    return float(result["latency"]["OK"]["p50"])


def _measure_overload(bench: Bench, server: RunningServer) -> Figures:
    """Overloads a server: goodput, latency of answers, and latency of refusals."""
    peaked = bench.measure_unary(server, "heavy", MANY_CALLERS // 2, OVERLOAD_IMAGES)
    peak = peaked["rate"]
    overloaded = bench.measure_overload(server, "heavy", OVERLOAD_IMAGES, OVERLOAD_FACTOR * peak)
    shed = overloaded["latency"].get("RESOURCE_EXHAUSTED", {})
    asked = sum(overloaded["codes"].values()) / overloaded["seconds"]
    late = overloaded["codes"].get("DEADLINE_EXCEEDED", 0)  # admitted, and not answered in time
    return {
        "overload.offered_of_peak": asked / peak,
        "overload.goodput_of_peak": overloaded["rate"] / peak,
        # The load shares the cores. CPU time per answer, refusals included, does not depend on it.
        "overload.goodput_of_peak.by_cpu": cpu_per_request(peaked) / cpu_per_request(overloaded),
        "overload.p99_of_deadline": overloaded["latency"]["OK"]["p99"] / measures.DEADLINE,
        "overload.late_of_accepted": late / max(1, late + overloaded["codes"].get("OK", 0)),
        "overload.shed_seconds": {share: shed.get(share) for share in ("p50", "p90", "p99")},
        "overload.codes": overloaded["codes"],
    }


def _compare_workers(bench: Bench, name: str, bundle: Path, pace: Pace) -> Figures:
    """Compares two workers of one thread each with one such worker.

    If the load comes from the same cores, one worker and the load may already fill them, and two
    workers gain nothing. The CPU time per request tells what two workers would do on cores of
    their own.
    """
    seen: Samples = defaultdict(list)
    with ExitStack() as stack:
        servers = {
            n: stack.enter_context(processes.run_server(bundle, "--workers", n, "--threads", "1"))
            for n in ("1", "2")
        }
        for _ in range(pace.rounds):
            for n, server in servers.items():
                tally = bench.measure_unary(server, name, MANY_CALLERS, 1, connections=8)
                seen[n].append(tally["rate"])
                seen[f"{n}.per_second"].append(int(n) / cpu_per_request(tally))
    return {
        f"workers.{name}.two_over_one": _ratio_of_maxima(seen, "2", "1"),
        f"workers.{name}.two_over_one.by_cpu": _ratio_of_maxima(
            seen, "2.per_second", "1.per_second"
        ),
    }


def _ratio_of_maxima(seen: Samples, key: str, other: str) -> dict[str, float]:
    """The ratio of the maxima and the ratio of the medians over the rounds."""
    return {
        "best": max(seen[key]) / max(seen[other]),
        "median": median(seen[key]) / median(seen[other]),
    }


def _ratio_of_minima(seen: Samples, key: str, other: str) -> dict[str, float]:
    """The ratio of the minima and the ratio of the medians over the rounds."""
    return {
        "best": min(seen[key]) / min(seen[other]),
        "median": median(seen[key]) / median(seen[other]),
    }


def _cpu_around_model(seen: Samples) -> dict[str, float]:
    """The server's CPU time without the model's own runs, as a multiple of the echo's."""
    return {
        kind: (of(seen["32x1.cpu"]) - of(seen["raw.cpu"])) / of(seen["echo.cpu"])
        for kind, of in (("best", min), ("median", median))
    }


def _latency_over_raw(seen: Samples) -> dict[str, float]:
    """A lone request's latency beyond a raw run on one core or all, as a multiple of the echo's."""
    return {
        kind: (of(seen["lone"]) - min(of(seen["raw.lone"]), of(seen["raw.lone.wide"])))
        / of(seen["echo.lone"])
        for kind, of in (("best", min), ("median", median))
    }


def _summary(values: list[float], *, most: bool = False) -> dict[str, float]:
    return {"best": max(values) if most else min(values), "median": median(values)}
