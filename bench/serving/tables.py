"""The figures as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

# By name of a figure: its label, whether the goal is a minimum (≥) or a maximum (≤), and the goal.
GOALS: Mapping[str, tuple[str, str, float]] = {
    "throughput.heavy.32x1.of_raw": ("heavy, 32 callers x 1: throughput / raw", "≥", 0.95),
    "throughput.heavy.4x64.of_raw": ("heavy, 4 callers x 64: throughput / raw", "≥", 0.97),
    "throughput.light.4x64.of_raw": ("light, 4 callers x 64: throughput / raw", "≥", 0.75),
    "throughput.light.32x1.requests_per_second": ("light, 32 callers x 1: requests/s", "≥", 1990),
    "cpu.light.32x1.of_echo": ("light, 32 callers x 1: CPU / echo", "≤", 1.6),
    "cpu.light.stream.of_unary": ("light, streams: CPU / unary requests", "≤", 0.6),
    "latency.light.lone.over_raw.of_echo": ("light, lone request: (time - raw) / echo", "≤", 1.2),
    "latency.heavy.lone.over_raw.of_echo": ("heavy, lone request: (time - raw) / echo", "≤", 1.2),
    "overload.goodput_of_peak": ("overload: goodput / peak throughput", "≥", 0.9),
    "overload.p99_of_deadline": ("overload: p99 latency of answers / deadline", "≤", 1.0),
    "overload.late_of_accepted": ("overload: late share of admitted requests", "≤", 0.01),
    "workers.heavy.two_over_one": ("heavy, two workers / one", "≥", 1.7),
    "workers.light.two_over_one": ("light, two workers / one", "≥", 1.7),
    "ready.seconds": ("ready, s", "≤", 3.0),
}
OTHERS: Mapping[str, str] = {
    "throughput.light.32x1.of_raw": "light, 32 callers x 1: throughput / raw",
    "throughput.light.32x1.of_echo": "light, 32 callers x 1: throughput / echo",
    "cpu.light.32x1.around_the_model.of_echo": "  CPU without the model's own runs / echo",
    "cpu.light.4x64.of_raw": "light, 4 callers x 64: CPU / raw",
    "cpu.heavy.32x1.of_raw": "heavy, 32 callers x 1: CPU / raw",
    "cpu.heavy.4x64.of_raw": "heavy, 4 callers x 64: CPU / raw",
    "workers.heavy.two_over_one.by_cpu": "heavy, two workers / one, by CPU per request",
    "workers.light.two_over_one.by_cpu": "light, two workers / one, by CPU per request",
    "overload.goodput_of_peak.by_cpu": "overload: goodput / peak, by the server's CPU",
    "overload.offered_of_peak": "overload: offered load / peak throughput",
    "ready.cpu_seconds": "ready, s of CPU",
    "ready.idle_mib": "idle, MiB",
}


def goals_table(figures: Mapping[str, Any]) -> Table:
    """A table of the figures with goals: best and median over the rounds, and the goal."""
    table = Table(box=box.SIMPLE, title="best over rounds (median)", padding=(0, 1, 0, 0))
    for name in ("figure", "found", "goal"):
        table.add_column(name, justify="left" if name == "figure" else "right", no_wrap=True)
    for key, (label, sign, goal) in GOALS.items():
        table.add_row(label, _cell(figures[key]), f"{sign} {goal:g}")
    shed = figures["overload.shed_seconds"]
    table.add_row("overload: latency of refusals, ms, p50 (p99)", _milliseconds(shed), "≤ 10")
    return table


def others(figures: Mapping[str, Any]) -> Table:
    """A table of further figures, which explain those with goals."""
    table = Table(box=box.SIMPLE, show_header=False)
    for key, label in OTHERS.items():
        table.add_row(label, _cell(figures[key]))
    for name in ("heavy", "light"):
        raw = figures[f"raw.{name}"]
        fastest = max(raw["images_per_second"].values())
        table.add_row(f"{name}, raw", f"{fastest:.0f} images/s, {raw['best']}")
        for key, value in figures[f"{name}.microseconds"].items():
            table.add_row(f"  {key}, µs", _cell(value))
    where = figures["environment"]
    table.add_row("machine", f"{where['cpu']}, {where['cores']} cores")
    return table


def soak_table(figures: Mapping[str, Any]) -> Table:
    """A table of the figures of a soak test."""
    table = Table(box=box.SIMPLE, show_header=False)
    for key, value in figures.items():
        if not isinstance(value, list):
            table.add_row(key, _cell(value) if isinstance(value, float) else str(value))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{_short(value['best'])} ({_short(value['median'])})"
    return _short(value)


def _short(value: float) -> str:
    return f"{value:.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}"


def _milliseconds(shares: Mapping[str, float | None]) -> str:
    if shares["p50"] is None or shares["p99"] is None:
        return "none refused"
    return f"{_short(1e3 * shares['p50'])} ({_short(1e3 * shares['p99'])})"
