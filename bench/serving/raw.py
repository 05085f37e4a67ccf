"""Raw runs: calls session.run of a bundle's density graph without pause, in its own process.

Reads the arguments of `run` as JSON from each line of standard input, and writes its result as a
line of JSON.
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

from bench.serving.pictures import bundle_pictures
from likely.bundle import Bundle, Role
from likely.graphs import Device, Session

OUTPUTS = ("log_px", "statistics")  # the outputs that an answer to Score needs


def run(bundle: Path, batch: int, threads: int, sessions: int, seconds: float) -> dict[str, float]:
    """Images per second, CPU seconds per image, and median duration of a run in seconds.

    Args:
        bundle: folder of the bundle.
        batch: number of pictures in a run.
        threads: number of threads of a run.
        sessions: number of concurrent runs.
        seconds: duration of the measurement.
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
        durations = list(pool.map(work, [began + seconds] * sessions))
        passed, used = time.perf_counter() - began, time.process_time() - cpu
    images = batch * sum(map(len, durations))
    return {
        "rate": images / passed,
        "cpu": used / images,
        "run": statistics.median(time for part in durations for time in part),
    }


@cache
def _session(bundle: Path, threads: int) -> Session:
    opened = Bundle.open(bundle)
    spec = opened.manifest.graphs[Role.DENSITY]
    return Session(opened.graph(Role.DENSITY), spec, Device("cpu"), threads)


@cache
def _feeds(bundle: Path, batch: int) -> Mapping[str, Any]:
    return {"x": bundle_pictures(bundle, batch)}


def main() -> None:
    """Answers each line of standard input."""
    for line in sys.stdin:
        question = json.loads(line)
        result = run(**{**question, "bundle": Path(question["bundle"])})
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
