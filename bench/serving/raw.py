"""Runs a bundle's density graph as fast as session.run will go, in a process of its own.

Reads what to run as JSON from each line of standard input, and writes what it took.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from bench.serving.pictures import pictures
from likely.bundle import Bundle, Role
from likely.graphs import Device, Session

OUTPUTS = ("log_px", "statistics")  # what an answer to Score is made from


def run(bundle: Path, batch: int, threads: int, sessions: int, seconds: float) -> dict[str, float]:
    """Images a second, processor time of one image, and the median time of a run, all in seconds.

    Args:
        bundle: whose density graph is run.
        batch: pictures of one run.
        threads: of each run.
        sessions: runs at once.
        seconds: to spend.
    """
    session, feeds = _session(bundle, threads), _feeds(bundle, batch)
    session.run(feeds, OUTPUTS)

    def work(until: float) -> list[float]:
        took: list[float] = []
        while not took or time.perf_counter() < until:
            began = time.perf_counter()
            session.run(feeds, OUTPUTS)
            took.append(time.perf_counter() - began)
        return took

    with ThreadPoolExecutor(sessions) as pool:
        cpu, began = time.process_time(), time.perf_counter()
        each = list(pool.map(work, [began + seconds] * sessions))
        passed, used = time.perf_counter() - began, time.process_time() - cpu
    images = batch * sum(map(len, each))
    return {
        "rate": images / passed,
        "cpu": used / images,
        "run": statistics.median(time for part in each for time in part),
    }


@cache
def _session(bundle: Path, threads: int) -> Session:
    opened = Bundle.open(bundle)
    spec = opened.manifest.graphs[Role.DENSITY]
    return Session(opened.graph(Role.DENSITY), spec, Device("cpu"), threads)


@cache
def _feeds(bundle: Path, batch: int) -> Mapping[str, Any]:
    return {"x": pictures(bundle, batch)}


def main() -> None:
    """Runs what it is asked to."""
    for line in sys.stdin:
        asked = json.loads(line)
        found = run(**{**asked, "bundle": Path(asked["bundle"])})
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
