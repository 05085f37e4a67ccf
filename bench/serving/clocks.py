"""CPU time and memory of other processes, and percentiles of latencies."""

from __future__ import annotations

import ctypes
import math
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def cpu_seconds(pid: int) -> float:
    """CPU time of a process with its threads in seconds, with a resolution of nanoseconds.

    Raises:
        ProcessLookupError: there is no such process.
    """
    # POSIX has a CPU clock for every process; Python does not wrap the call that finds it.
    libc, clock = ctypes.CDLL(None), ctypes.c_int()
    if libc.clock_getcpuclockid(pid, ctypes.byref(clock)):
        raise ProcessLookupError(f"no process {pid}")
    return time.clock_gettime(clock.value)


def process_tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    pids = [pid]
    for ancestor in pids:
        pids += [child for child, parent in parents.items() if parent == ancestor]
    return pids


def resident_mib(pid: int) -> float:
    """Resident memory of a process in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The count, mean, percentiles and maximum of one or more values."""
    ordered = sorted(values)
    at = {name: ordered[math.ceil(share * len(ordered)) - 1] for name, share in QUANTILES.items()}
    return {"count": len(ordered), "mean": sum(ordered) / len(ordered), **at}
