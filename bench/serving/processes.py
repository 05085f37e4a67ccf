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

STOP_TIMEOUT = 20.0  # seconds
START_TIMEOUT = 120.0  # seconds
# No library may open a thread pool of its own. Otherwise gRPC would log every closed connection.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "GRPC_VERBOSITY": "ERROR",
}


@dataclass(frozen=True)
class RunningServer:
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


class LineProcess:
    """A process that runs one of our modules and answers each line with one line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def read_line(self) -> str:
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
        answer: dict[str, Any] = json.loads(self.read_line())
        return answer

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid


@contextmanager
def run_module(module: str, *arguments: str) -> Iterator[LineProcess]:
    """Runs a module in a process, which ends when its standard input does."""
    with subprocess.Popen(  # noqa: S603
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    ) as process:
        try:
            yield LineProcess(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            _wait_or_kill(process)


@contextmanager
def run_load_generator() -> Iterator[Callable[[Plan], dict[str, Any]]]:
    """Runs a load generator; yields a function that carries out a plan there."""
    with run_module("bench.serving.load") as process:
        yield lambda plan: process.ask({**asdict(plan), "request": str(plan.request)})


@contextmanager
def run_echo() -> Iterator[RunningServer]:
    """Runs the bare echo server."""
    with run_module("bench.serving.echo") as process:
        yield RunningServer(process.pid, f"127.0.0.1:{int(process.read_line())}")


@contextmanager
def run_server(bundle: Path | None, *flags: str) -> Iterator[RunningServer]:
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
            port = _wait_for_port(process, log, began + START_TIMEOUT)
            yield RunningServer(
                process.pid,
                f"127.0.0.1:{port}",
                time.perf_counter() - began,
                cpu_seconds(process.pid),
            )
        finally:
            process.send_signal(signal.SIGTERM)
            _wait_or_kill(process)


def _wait_for_port(process: subprocess.Popen[bytes], log: IO[str], until: float) -> int:
    """The port of a server, from its log once it serves."""
    text = ""
    while time.perf_counter() < until:
        log.seek(0)
        text = log.read()
        for line in text.splitlines():
            if '"event": "serving"' in line and (match := re.search(r'"port": (\d+)', line)):
                return int(match[1])
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}: {text}")
        time.sleep(0.005)
    raise RuntimeError(f"the server is not ready: {text}")


def _wait_or_kill(process: subprocess.Popen[Any]) -> None:
    try:
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
