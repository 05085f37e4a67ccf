"""The figures as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from bench.figures import Figures

GOALS: dict[str, Mapping[str, float]] = {
    "sampling.ratio": {"1": 5.0, "16": 1.25, "64": 1.0, "256": 1.0},
    "conditional.fused_speedup": {"1": 1.5, "16": 1.0, "64": 1.0},
    "conditional.logistic.fused_speedup": {"1": 1.5, "16": 1.0, "64": 1.0},
}
BY_BATCH = {
    "sampling.ratio": "sampling / one pass",
    "sampling.naive_ratio": "the naive way / one pass",
    "sampling.ms_per_picture": "sampling, ms a picture",
    "pass.ms_per_picture": "one pass, ms a picture",
    "pass.matmul_share_by_batch": "pass / MatMul, FLOP/s",
    "noise.ms_per_picture": "noise, ms a picture",
    "conditional.fused_speedup": "p(x|y): one call a label / fused",
    "conditional.ms_per_picture": "p(x|y) fused, ms a picture",
    "conditional.logistic.fused_speedup": "p(x|y), logistic: likewise",
    "conditional.logistic.ms_per_picture": "p(x|y) fused, logistic, ms",
}


def by_batch(figures: Mapping[str, Any]) -> Table:
    """Minimum and, in brackets, median over the rounds; goals beside."""
    columns = list(figures["sampling.ratio"])
    table = Table(box=box.SIMPLE, title="minimum (median) over rounds, CPU time, one thread")
    table.add_column("batch")
    for n in columns:
        table.add_column(n, justify="right")
    table.add_column("goal", justify="right")
    for name, title in BY_BATCH.items():
        table.add_row(title, *_cells(figures, name, columns), _goal(name, columns))
    for bundle, found in figures["shipped"].items():
        cells = _cells(found, "sampling.ratio", columns)
        table.add_row(f"bundle {bundle}: sampling / one pass", *cells, "")
    return table


def others(figures: Mapping[str, Any]) -> Table:
    """What is one number, and what was measured with what."""
    seconds, load, memory = (
        figures[name] for name in ("export.seconds", "load.seconds", "memory.sample")
    )
    where, model = figures["environment"], figures["model"]
    peaks = ", ".join(f"{name.removesuffix('_mib')} {mib} MiB" for name, mib in memory.items())
    versions = ("python", "torch", "onnxruntime", "onnxruntime-gpu", "numpy")
    table = Table(box=box.SIMPLE, show_header=False)
    for row in [
        ("pass / MatMul FLOP/s (goal 0.45)", f"{figures['pass.matmul_share']:.2f}"),
        ("MatMul", f"{figures['matmul.gflops']:.0f} GFLOP/s"),
        ("pixels that a pass chooses otherwise", str(figures["sampling.differing_pixels"])),
        ("export of the sampler (goal 60 s)", f"{seconds['sample']:.1f} s"),
        ("session load of the sampler (goal 1 s)", f"{load['sample']:.2f} s"),
        ("peak memory of the sampler", peaks),
        ("model", f"{model['parameters']:,} parameters, {model['pass_flops'] / 1e9:.2f} GFLOP"),
        ("graphs", ", ".join(f"{k} {v / 1e6:.1f} MB" for k, v in model["bytes"].items())),
        ("machine", f"{where['cpu']}, {where['machine']}"),
        ("instructions", " ".join(where["instructions"])),
        ("versions", ", ".join(f"{name} {where[name]}" for name in versions if name in where)),
    ]:
        table.add_row(*row)
    return table


def _cells(figures: Mapping[str, Any], name: str, columns: list[str]) -> list[str]:
    least, median = figures[name], figures[f"{name}.median"]
    return [f"{_short(least[n])} ({_short(median[n])})" if n in least else "" for n in columns]


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def _goal(name: str, columns: list[str]) -> str:
    goals = GOALS.get(name, {})
    sign = "≥" if "speedup" in name else "≤"
    told = [f"{goals[n]:g}" for n in columns if n in goals]
    return f"{sign} {' '.join(told)}" if told else ""


__all__ = ["Figures", "by_batch", "others"]
