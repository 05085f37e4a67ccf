"""A server under load for long, with callers that leave: does its memory grow?"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bench.serving import measures, processes
from bench.serving.clocks import resident_mib
from bench.serving.measures import Pace

CALLERS = 32
LEAVING = 0.3  # share of callers that leave
SAMPLES = 200
SETTLED = 0.3  # of the time: arenas and pools have then grown to what they need


def soak(
    bundle: Path, seconds: float, report: Callable[[str], None], leaving: float = LEAVING
) -> dict[str, Any]:
    """Memory over so many seconds of load, its slope once it has settled, and what was answered.

    Args:
        bundle: what is served.
        seconds: of load.
        report: is told what is done.
        leaving: share of callers that leave before they are answered; bytes a request count
            theirs, too.
    """
    with tempfile.TemporaryDirectory() as folder:
        pace = Pace(1, seconds, (1,))
        with (
            measures.prepared({"soaked": bundle}, Path(folder), pace) as bench,
            processes.serving(bundle) as server,
        ):
            report(f"{seconds:.0f} seconds of load")
            with sampled(server.pid, seconds / SAMPLES) as samples:
                found = bench.cancelling(server, "soaked", CALLERS, seconds, leaving)
    times, mib = (np.array(column) for column in zip(*samples, strict=True))
    growth = slope(times, mib) * float(times[-1] - times[0]) / 3600
    return {
        "soak.seconds": seconds,
        "soak.codes": found["codes"],
        "soak.cancelled_share": found["codes"].get("CANCELLED", 0) / sum(found["codes"].values()),
        "soak.first_mib": float(mib[0]),
        "soak.last_mib": float(mib[-1]),
        "soak.slope_mib_per_hour": slope(times, mib),
        "soak.growth_mib": growth * (1 - SETTLED),
        "soak.bytes_per_request": growth * 2**20 / sum(found["codes"].values()),
        "soak.samples": [[round(t, 2), round(m, 2)] for t, m in zip(times, mib, strict=True)],
    }


def slope(times: Sequence[float] | np.ndarray, mib: Sequence[float] | np.ndarray) -> float:
    """MiB an hour, by the median of the slopes between samples of the settled part (Theil, 1950).

    A step that happens once, such as an arena that grows, moves a line of least squares; it does
    not move the median.
    """
    t, m = np.asarray(times), np.asarray(mib)
    settled = t >= t[0] + SETTLED * (t[-1] - t[0])
    t, m = t[settled], m[settled]
    i, j = np.triu_indices(len(t), 1)
    return float(3600 * np.median((m[j] - m[i]) / (t[j] - t[i]))) if len(i) else 0.0


@contextmanager
def sampled(pid: int, every: float) -> Iterator[list[tuple[float, float]]]:
    """A process's memory in MiB with the time in seconds, filled while it is entered."""
    samples: list[tuple[float, float]] = []
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(every):
            samples.append((time.perf_counter(), resident_mib(pid)))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()
