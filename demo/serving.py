"""Runs `likely serve` in its own process for the duration of a block."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

PATIENCE = 60.0  # seconds for the server to become ready, and to end
COMMAND = (sys.executable, "-m", "likely", "serve")


class ServerFailed(Exception):
    """The server did not start or did not end properly; the message has the log's last line."""


@dataclass(frozen=True)
class Served:
    """A server whose health is SERVING.

    Attributes:
        address: gRPC address, host:port.
        metrics: Prometheus address, host:port.
    """

    address: str
    metrics: str


@contextmanager
def served(log: Path, *bundles: Path, command: Sequence[str] = COMMAND) -> Iterator[Served]:
    """Runs a server on free ports until the block ends, then stops it and checks its exit code.

    Args:
        log: file for the server's log.
        bundles: folders of the bundles to serve; none for those that the package ships.
        command: command that starts a server, without its options.

    Raises:
        ServerFailed: the server ended early, did not become ready in a minute, or exited with
            another code than 0 after SIGTERM.
        subprocess.TimeoutExpired: the server did not end within a minute of SIGTERM.
    """
    options = ["--port", "0", "--metrics-port", "0", "--log-format", "json"]
    for bundle in bundles:
        options += ["--bundle", str(bundle)]
    with log.open("wb") as sink, subprocess.Popen([*command, *options], stderr=sink) as process:
        try:
            yield _ready(process, log)
        finally:
            process.terminate()
            try:
                code = process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
    if code != 0:
        raise ServerFailed(f"the server ended with code {code}: {_last_words(log)}")


def _ready(process: subprocess.Popen[bytes], log: Path) -> Served:
    heard = _listening(process, log)
    server = Served(f"{heard['host']}:{heard['port']}", f"{heard['host']}:{heard['metrics']}")
    with grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        try:
            for answer in health.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE):
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return server
        except grpc.RpcError as error:
            raise ServerFailed(f"not ready: {_last_words(log)}") from error
    raise ServerFailed(f"not ready: {_last_words(log)}")


def _listening(process: subprocess.Popen[bytes], log: Path) -> dict[str, Any]:
    """The log event that names the ports."""
    end = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < end:
        for line in log.read_text().splitlines(keepends=True):
            if line.startswith("{") and line.endswith("\n"):
                event: dict[str, Any] = json.loads(line)
                if event["event"] == "listening":
                    return event
        time.sleep(0.05)
    raise ServerFailed(f"not listening: {_last_words(log)}")


def _last_words(log: Path) -> str:
    return (log.read_text().splitlines() or ["it said nothing"])[-1]
