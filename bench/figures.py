"""Computes the figures in `build/bench.json` from measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from bench import measures, memory, models
from bench.clock import Timing
from bench.environment import environment
from bench.exports import Exports
from likely.bundle import Role
from likely.versions.loading import shipped

Figures = dict[str, object]
Report = Callable[[str], None]
Timings = dict[int, dict[str, Timing]]
BOUND_BATCHES = (1, 16, 64)
FIXED_POINTS = 64


def collect(cache: Path, batches: Sequence[int], rounds: int, report: Report) -> Figures:
    """All figures, by name.

    Args:
        cache: folder for exported graphs.
        batches: batch sizes of the sampler.
        rounds: least number of rounds of every measurement.
        report: called with a description of each step as it begins.
    """
    exports = Exports.load_or_export(cache, report)
    timings: Timings = {}
    for batch in batches:
        report(f"sampling, batch {batch}")
        timings[batch] = measures.time_sampling(exports, batch, rounds)
    return {
        "environment": environment(),
        "rounds": rounds,
        "model": _model(exports),
        **_sampling(timings),
        "sampling.differing_pixels": measures.count_differing_pixels(
            exports, min(FIXED_POINTS, max(batches))
        ),
        **_pass(timings),
        **_conditional(exports, [n for n in BOUND_BATCHES if n <= max(batches)], rounds, report),
        "export.seconds": exports.seconds,
        "load.seconds": measures.load_seconds(exports, ("pass", "sample"), 3),
        "memory.sample": memory.measure_peak(exports.path("sample"), min(64, max(batches))),
        "shipped": _shipped(batches, rounds, report),
    }


def _model(exports: Exports) -> Figures:
    model, config = models.pixelcnn(), asdict(models.PIXELCNN)
    sizes = {name: exports.path(name).stat().st_size for name in ("pass", "sample")}
    return {
        "config": config,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "pass_flops": models.pass_flops(models.PIXELCNN),
        "bytes": sizes,
    }


def _sampling(timings: Timings) -> Figures:
    _, h, w = models.PIXELCNN.shape
    ratio = {n: by_call["sample"].ratio_to(by_call["pass"]) for n, by_call in timings.items()}
    naive = {
        n: by_call["naive"].scaled_by(h * w).ratio_to(by_call["pass"])
        for n, by_call in timings.items()
    }
    return {
        **_minima_and_medians("sampling.ratio", ratio),
        **_minima_and_medians("sampling.naive_ratio", naive),
        **_minima_and_medians("sampling.ms_per_picture", _milliseconds(timings, "sample")),
        **_minima_and_medians("noise.ms_per_picture", _milliseconds(timings, "noise")),
    }


def _pass(timings: Timings) -> Figures:
    rows, inner, columns = models.MATMUL
    limit = 2 * rows * inner * columns
    flops = models.pass_flops(models.PIXELCNN)
    # Share of the MatMul's speed = its time per operation over that of the pass.
    share = {
        n: by_call["matmul"].scaled_by(flops * n / limit).ratio_to(by_call["pass"])
        for n, by_call in timings.items()
    }
    largest = max((n for n in share if n <= 64), default=min(share))
    fastest = min(by_call["matmul"].minimum for by_call in timings.values())
    return {
        "pass.matmul_share": round(share[largest].minimum, 3),
        **_minima_and_medians("pass.matmul_share_by_batch", share),
        **_minima_and_medians("pass.ms_per_picture", _milliseconds(timings, "pass")),
        "matmul.gflops": round(limit / fastest / 1e9, 1),
    }


def _conditional(exports: Exports, batches: Sequence[int], rounds: int, report: Report) -> Figures:
    figures: Figures = {}
    for name in models.BOUNDS:
        timings = {}
        for n in batches:
            report(f"conditional, {name}, batch {n}")
            timings[n] = measures.time_conditional(exports, name, n, rounds)
        speedup = {
            n: by_call["single"].ratio_to(by_call["fused"]) for n, by_call in timings.items()
        }
        key = "conditional" if name == "bernoulli" else f"conditional.{name}"
        figures |= _minima_and_medians(f"{key}.fused_speedup", speedup)
        figures |= _minima_and_medians(f"{key}.ms_per_picture", _milliseconds(timings, "fused"))
    return figures


def _shipped(batches: Sequence[int], rounds: int, report: Report) -> Figures:
    figures: Figures = {}
    for folder in shipped():
        report(f"bundle {folder.name}")
        timings = {n: measures.time_bundle(folder, n, rounds) for n in batches}
        figures[folder.name] = _minima_and_medians(
            "sampling.ratio",
            {
                n: t[Role.SAMPLE].ratio_to(t[Role.DENSITY])
                for n, t in timings.items()
                if len(t) == 2
            },
        ) | _minima_and_medians("pass.ms_per_picture", _milliseconds(timings, Role.DENSITY))
    return figures


def _milliseconds(timings: Timings, call: str) -> dict[int, Timing]:
    return {n: by_call[call].scaled_by(1000 / n) for n, by_call in timings.items()}


def _minima_and_medians(name: str, values: dict[int, Timing]) -> Figures:
    """The minima under `name` and the medians under `name.median`, each by batch size."""
    return {
        name: {str(n): round(value.minimum, 4) for n, value in values.items()},
        f"{name}.median": {str(n): round(value.median, 4) for n, value in values.items()},
    }
