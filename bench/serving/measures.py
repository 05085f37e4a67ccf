"""The measurements of servers, raw runs and the echo, which a round makes in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.serving import echo, processes
from bench.serving.clocks import process_tree
from bench.serving.load import Plan
from bench.serving.pictures import write_request
from bench.serving.processes import LineProcess, RunningServer

SCORE = "/likely.v1.ScoringService/Score"
STREAM = "/likely.v1.ScoringService/ScoreStream"
DEADLINE = 1.0  # seconds: deadline of each request under overload
Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Pace:
    """Duration and number of the measurements.

    Attributes:
        rounds: number of rounds of every measurement.
        seconds: duration of each measurement.
        batches: batch sizes to try for raw runs.
    """

    rounds: int
    seconds: float
    batches: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How raw runs share the cores.

    Attributes:
        batch: number of pictures in a run.
        threads: number of threads of a run.
        sessions: number of concurrent runs.
    """

    batch: int
    threads: int
    sessions: int

    def describe(self) -> str:
        """The arrangement in words."""
        return f"{self.sessions} x {self.threads} threads, batches of {self.batch}"


class Bench:
    """The measurements that are compared with each other, with their processes running."""

    def __init__(
        self,
        load: Callable[[Plan], Result],
        raw: LineProcess,
        bundles: Mapping[str, Path],
        work: Path,
        pace: Pace,
    ) -> None:
        """A bench.

        Args:
            load: carries out a plan in the load generator.
            raw: the process of raw runs.
            bundles: bundle folders by scorer.
            work: folder for the files of requests.
            pace: duration and number of the measurements.
        """
        self._load = load
        self._raw = raw
        self._bundles = bundles
        self._work = work
        self._pace = pace

    def measure_raw(self, scorer: str, arrangement: Arrangement, seconds: float = 0.0) -> Result:
        """Measures raw runs: images per second, CPU time per image, median duration of a run."""
        return self._raw.ask(
            {
                "bundle": str(self._bundles[scorer]),
                "batch": arrangement.batch,
                "threads": arrangement.threads,
                "sessions": arrangement.sessions,
                "seconds": seconds or self._pace.seconds,
            }
        )

    def find_best_arrangement(
        self, scorer: str, cores: int
    ) -> tuple[Arrangement, dict[str, float]]:
        """The arrangement with the most images per second, and the rates of all arrangements."""
        tried = {
            arrangement.describe(): arrangement
            for batch in self._pace.batches
            for arrangement in (Arrangement(batch, cores, 1), Arrangement(batch, 1, cores))
        }
        rates = dict.fromkeys(tried, 0.0)
        for _ in range(2):
            for name, arrangement in tried.items():
                share = self._pace.seconds / 3
                rates[name] = max(rates[name], self.measure_raw(scorer, arrangement, share)["rate"])
        return tried[max(rates, key=rates.__getitem__)], rates

    def measure_unary(
        self, server: RunningServer, scorer: str, callers: int, images: int, **more: Any
    ) -> Result:
        """Measures callers that score `images` pictures per request."""
        path = write_request(self._bundles[scorer], images, self._work)
        return self._run(
            server, Plan(server.address, SCORE, path, callers=callers, answers=2 * callers, **more)
        )

    def measure_echo(self, server: RunningServer, scorer: str, callers: int) -> Result:
        """Measures callers that send a request of one picture to the bare echo."""
        path = write_request(self._bundles[scorer], 1, self._work)
        return self._run(server, Plan(server.address, echo.UNARY, path, callers=callers))

    def measure_stream(
        self, server: RunningServer, scorer: str, callers: int, window: int
    ) -> Result:
        """Measures callers that send messages of one picture on a stream each."""
        path = write_request(self._bundles[scorer], 1, self._work, stream=True)
        plan = Plan(server.address, STREAM, path, callers=callers, streams=True)
        return self._run(server, replace(plan, window=window, outcomes=1))

    def measure_overload(
        self, server: RunningServer, scorer: str, images: int, rate: float
    ) -> Result:
        """Measures `rate` requests per second, each with the deadline `DEADLINE`."""
        path = write_request(self._bundles[scorer], images, self._work)
        seconds = max(5 * self._pace.seconds, 2 * DEADLINE)
        plan = Plan(server.address, SCORE, path, rate=rate, seconds=seconds, deadline=DEADLINE)
        return self._load(replace(plan, watched=_server_processes(server)))

    def measure_cancelling(
        self, server: RunningServer, scorer: str, callers: int, seconds: float, cancelled: float
    ) -> Result:
        """Measures callers that cancel the share `cancelled` of their requests."""
        path = write_request(self._bundles[scorer], 1, self._work)
        plan = Plan(server.address, SCORE, path, callers=callers, seconds=seconds)
        return self._load(replace(plan, cancelled=cancelled, watched=_server_processes(server)))

    def _run(self, server: RunningServer, plan: Plan) -> Result:
        connections = min(plan.connections, plan.callers)
        plan = replace(plan, connections=connections, seconds=self._pace.seconds)
        return self._load(replace(plan, watched=_server_processes(server)))


def _server_processes(server: RunningServer) -> dict[str, int]:
    """A server's processes by name: itself and its workers."""
    first, *workers = process_tree(server.pid)
    return {"server": first} | {f"server.{i}": pid for i, pid in enumerate(workers)}


def cpu_per_request(result: Result) -> float:
    """CPU time of the server per answer, in seconds."""
    seconds: float = sum(result["cpu"][name] for name in result["cpu"] if name != "client")
    return seconds / max(1, int(result["codes"].get("OK", 0)))


@contextmanager
def open_bench(bundles: Mapping[str, Path], work: Path, pace: Pace) -> Iterator[Bench]:
    """A bench with running processes for the load generator and the raw runs."""
    with ExitStack() as stack:
        load = stack.enter_context(processes.run_load_generator())
        raw = stack.enter_context(processes.run_module("bench.serving.raw"))
        yield Bench(load, raw, bundles, work, pace)
