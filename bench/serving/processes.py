"""Starts and ends the processes of a measurement, and exchanges lines with them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from bench.serving.clocks import cpu_seconds
from bench.serving.load import Plan

ENDS_WITHIN = 20.0  # seconds
BEGINS_WITHIN = 120.0  # seconds
# No library may open a thread pool of its own. Otherwise gRPC would log every closed connection.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "GRPC_VERBOSITY": "ERROR",
}


@dataclass(frozen=True)
class Running:
    """A server's process.

    Attributes:
        pid: process id.
        address: host:port of the server.
        ready_seconds: seconds from the start of the process until it serves.
        ready_cpu: CPU time that it used until then, in seconds.
    """

    pid: int
    address: str
    ready_seconds: float = 0.0
    ready_cpu: float = 0.0


class Talk:
    """A process that runs one of our modules and answers each line with one line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def line(self) -> str:
        """The next line of its output.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return line
        raise RuntimeError(f"{self._process.args!r} ended with {self._process.wait()}")

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Sends a question as JSON and returns the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.line())
        return answer

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid


@contextmanager
def talking(module: str, *arguments: str) -> Iterator[Talk]:
    """Runs a module in a process, which ends when its standard input does."""
    with subprocess.Popen(  # noqa: S603
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    ) as process:
        try:
            yield Talk(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            _ended(process)


@contextmanager
def loading() -> Iterator[Callable[[Plan], dict[str, Any]]]:
    """Runs a load generator; yields a function that carries out a plan there."""
    with talking("bench.serving.load") as talk:
        yield lambda plan: talk.ask({**asdict(plan), "request": str(plan.request)})


@contextmanager
def echoing() -> Iterator[Running]:
    """Runs the bare echo server."""
    with talking("bench.serving.echo") as talk:
        yield Running(talk.pid, f"127.0.0.1:{int(talk.line())}")


@contextmanager
def serving(bundle: Path | None, *flags: str) -> Iterator[Running]:
    """Runs `likely serve` with that bundle, or the shipped ones; yields once it serves."""
    named = ["--bundle", str(bundle)] if bundle else []
    command = [sys.executable, "-m", "likely", "serve", *named, "--port", "0", "--metrics-port"]
    with tempfile.TemporaryFile("w+") as log:
        began = time.perf_counter()
        process = subprocess.Popen(  # noqa: S603
            [
                *command,
                "off",
                "--device",
                "cpu",
                "--log-format",
                "json",
                "--drain-delay",
                "0",
                *flags,
            ],
            stdin=subprocess.DEVNULL,
            stderr=log,
            env={**os.environ, **ENVIRONMENT},
        )
        try:
            port = _port(process, log, began + BEGINS_WITHIN)
            yield Running(
                process.pid,
                f"127.0.0.1:{port}",
                time.perf_counter() - began,
                cpu_seconds(process.pid),
            )
        finally:
            process.send_signal(signal.SIGTERM)
            _ended(process)


def _port(process: subprocess.Popen[bytes], log: IO[str], until: float) -> int:
    """The port of a server, from its log once it serves."""
    text = ""
    while time.perf_counter() < until:
        log.seek(0)
        text = log.read()
        for line in text.splitlines():
            if '"event": "serving"' in line and (found := re.search(r'"port": (\d+)', line)):
                return int(found[1])
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}: {text}")
        time.sleep(0.005)
    raise RuntimeError(f"the server is not ready: {text}")


def _ended(process: subprocess.Popen[Any]) -> None:
    try:
        process.wait(ENDS_WITHIN)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
