"""The figures as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

GOALS: dict[str, Mapping[str, float]] = {
    "sampling.ratio": {"1": 5.0, "16": 1.25, "64": 1.0, "256": 1.0},
    "conditional.fused_speedup": {"1": 1.5, "16": 1.0, "64": 1.0},
    "conditional.logistic.fused_speedup": {"1": 1.0, "16": 1.0, "64": 1.0},  # labels share little
    "conditional.prior.fused_speedup": {"1": 4.0, "16": 4.0, "64": 4.0},  # one decoder pass for all
}
BY_BATCH = {
    "sampling.ratio": "sampling / pass",
    "sampling.naive_ratio": "naive sampling / pass",
    "sampling.ms_per_picture": "sampling, ms",
    "pass.ms_per_picture": "pass, ms",
    "pass.matmul_share_by_batch": "pass / MatMul, FLOP/s",
    "noise.ms_per_picture": "noise, ms",
    "conditional.fused_speedup": "p(x|y) single / fused",
    "conditional.ms_per_picture": "p(x|y) fused, ms",
    "conditional.logistic.fused_speedup": "logistic, likewise",
    "conditional.logistic.ms_per_picture": "logistic, fused, ms",
    "conditional.prior.fused_speedup": "labels in the prior, likewise",
    "conditional.prior.ms_per_picture": "labels in the prior, fused, ms",
}


def by_batch(figures: Mapping[str, Any]) -> Table:
    """A table of the figures by batch size: minimum, median in brackets, and goals."""
    columns = list(figures["sampling.ratio"])
    title = "CPU time on one thread, times per picture: minimum (median) over rounds"
    table = Table(box=box.SIMPLE, title=title, padding=(0, 1, 0, 0))
    table.add_column("batch", no_wrap=True)
    for n in columns:
        table.add_column(n, justify="right", no_wrap=True)
    for name, label in BY_BATCH.items():
        table.add_row(label, *_cells(figures, name, columns))
        if goals := GOALS.get(name):
            sign = "≥" if "speedup" in name else "≤"
            cells = [f"{sign} {goals[n]:g}" if n in goals else "" for n in columns]
            table.add_row("  goal", *cells, style="dim")
    for bundle, shipped in figures["shipped"].items():
        table.add_row(f"{bundle}, sampling / pass", *_cells(shipped, "sampling.ratio", columns))
    return table


def others(figures: Mapping[str, Any]) -> Table:
    """A table of the figures that do not depend on the batch size, and of the environment."""
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
        ("pixels where a pass chooses otherwise", str(figures["sampling.differing_pixels"])),
        ("export of the sampler (goal 60 s)", f"{seconds['sample']:.1f} s"),
        ("load of the sampler (goal 1 s)", f"{load['sample']:.2f} s"),
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
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"
