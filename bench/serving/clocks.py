"""What other processes use: processor time, memory; and percentiles of what is timed."""

from __future__ import annotations

import ctypes
import math
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def cpu_seconds(pid: int) -> float:
    """Seconds of processor time that a process and its threads have had, to the nanosecond.

    Raises:
        ProcessLookupError: there is no such process.
    """
    # POSIX gives every process a clock; Python has no name for the call that finds it.
    libc, clock = ctypes.CDLL(None), ctypes.c_int()
    if libc.clock_getcpuclockid(pid, ctypes.byref(clock)):
        raise ProcessLookupError(f"no process {pid}")
    return time.clock_gettime(clock.value)


def family(pid: int) -> list[int]:
    """A process, its children, theirs, and so on."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # ended meanwhile
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found


def resident_mib(pid: int) -> float:
    """MiB of memory that a process holds."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The count, the mean, the percentiles and the largest of some values; at least one."""
    ordered = sorted(values)
    at = {name: ordered[math.ceil(share * len(ordered)) - 1] for name, share in SHARES.items()}
    return {"count": len(ordered), "mean": sum(ordered) / len(ordered), **at}
