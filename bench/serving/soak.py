"""A soak test: does a server's memory grow under a long load with cancelled requests?"""

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
CANCELLED_SHARE = 0.3  # share of requests that are cancelled
SAMPLES = 200
SETTLING_SHARE = 0.3  # share of the time after which arenas and pools have reached their size


def soak(
    bundle: Path, seconds: float, report: Callable[[str], None], cancelled: float = CANCELLED_SHARE
) -> dict[str, Any]:
    """Memory over a time of load, its slope once it has settled, and the counts of answers.

    Args:
        bundle: folder of the bundle to serve.
        seconds: duration of the load.
        report: called with a description of each step as it begins.
        cancelled: share of requests that are cancelled before the answer; the bytes per request
            count them too.
    """
    with tempfile.TemporaryDirectory() as folder:
        pace = Pace(1, seconds, (1,))
        with (
            measures.open_bench({"soaked": bundle}, Path(folder), pace) as bench,
            processes.run_server(bundle) as server,
        ):
            report(f"{seconds:.0f} seconds of load")
            with sample_memory(server.pid, seconds / SAMPLES) as samples:
                tally = bench.measure_cancelling(server, "soaked", CALLERS, seconds, cancelled)
    times, mib = (np.array(column) for column in zip(*samples, strict=True))
    growth = slope(times, mib) * float(times[-1] - times[0]) / 3600
    return {
        "soak.seconds": seconds,
        "soak.codes": tally["codes"],
        "soak.cancelled_share": tally["codes"].get("CANCELLED", 0) / sum(tally["codes"].values()),
        "soak.first_mib": float(mib[0]),
        "soak.last_mib": float(mib[-1]),
        "soak.slope_mib_per_hour": slope(times, mib),
        "soak.growth_mib": growth * (1 - SETTLING_SHARE),
        "soak.bytes_per_request": growth * 2**20 / sum(tally["codes"].values()),
        "soak.samples": [[round(t, 2), round(m, 2)] for t, m in zip(times, mib, strict=True)],
    }


def slope(times: Sequence[float] | np.ndarray, mib: Sequence[float] | np.ndarray) -> float:
    """Growth in MiB per hour: the median slope between settled samples (Theil, 1950).

    A single step, such as an arena that grows once, would move a least-squares line; it does not
    move the median.
    """
    t, m = np.asarray(times), np.asarray(mib)
    settled = t >= t[0] + SETTLING_SHARE * (t[-1] - t[0])
    t, m = t[settled], m[settled]
    i, j = np.triu_indices(len(t), 1)
    return float(3600 * np.median((m[j] - m[i]) / (t[j] - t[i]))) if len(i) else 0.0


@contextmanager
def sample_memory(pid: int, interval: float) -> Iterator[list[tuple[float, float]]]:
    """Samples a process's memory in the background: pairs of a time in seconds, and MiB."""
    samples: list[tuple[float, float]] = []
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(interval):
            samples.append((time.perf_counter(), resident_mib(pid)))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()
