"""`likely serve` as a process of its own, and clients that ask it without pause."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from likely import codec
from likely.v1.generation_pb2 import GenerateRequest
from likely.v1.generation_pb2_grpc import GenerationServiceStub
from likely.v1.scoring_pb2 import ScoreRequest
from likely.v1.scoring_pb2_grpc import ScoringServiceStub
from tests.faults.history import History, Outcome, events

if TYPE_CHECKING:
    from tests.conftest import Toy

Metadata = tuple[tuple[str, str | bytes], ...]

COMMAND = [sys.executable, "-c", "from likely.cli import main; main()", "serve"]
# Every request is logged, so that what was accepted is known.
QUIET = ["--metrics-port", "off", "--log-format", "json", "--log-level", "debug",
         "--threads", "1", "--lanes", "1", "--max-batch", "16", "--device", "cpu",
         "--drain-delay", "0"]  # fmt: skip
# Connections are the channel's own, and a failure is seen as it is.
ALONE = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0),
         ("grpc.initial_reconnect_backoff_ms", 50), ("grpc.min_reconnect_backoff_ms", 50),
         ("grpc.max_reconnect_backoff_ms", 200))  # fmt: skip


@dataclass
class Served:
    """A server's process."""

    process: subprocess.Popen[bytes]
    path: Path

    def log(self) -> list[dict[str, Any]]:
        """What it has logged so far."""
        return events(self.path.read_text())

    def wait_for(self, event: str, seconds: float = 60, **more: object) -> dict[str, Any]:
        """The first event of that name, with those values."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            text = self.path.read_text()
            whole = text[: text.rfind("\n") + 1]  # a line that is being written waits
            for one in events(whole):
                if one["event"] == event and more.items() <= one.items():
                    return one
            assert self.process.poll() is None, text
            time.sleep(0.01)
        raise AssertionError(f"no {event} within {seconds} s")

    def address(self, workers: int = 1) -> str:
        """Where it listens, once all its workers serve."""
        fields = {"workers": workers} if workers > 1 else {}
        return f"127.0.0.1:{self.wait_for('serving', **fields)['port']}"


@contextmanager
def served(
    folder: Path,
    *flags: object,
    environment: Mapping[str, str] | None = None,
    before: Sequence[str] = (),
) -> Iterator[Served]:
    """A server with these flags and variables, killed in the end if it still runs.

    `before` is the command that begins it, if another one does.
    """
    path = folder / f"log-{time.monotonic_ns()}"
    with path.open("wb") as log:
        process = subprocess.Popen(
            [*before, *COMMAND, *QUIET, *map(str, flags)],
            stderr=log,
            stdout=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
        )
    try:
        yield Served(process, path)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()


class Questions:
    """What the clients ask about the toy, and what each of its versions answers."""

    def __init__(self, toys: Mapping[str, Toy], drawn: Mapping[tuple[str, int], bytes]) -> None:
        """Questions with their answers.

        Args:
            toys: by version.
            drawn: the pictures of each version and seed.
        """
        self.pictures = next(iter(toys.values())).draw(np.random.default_rng(4), 12)
        self._log_px = {version: toy.log_px(self.pictures) for version, toy in toys.items()}
        self._drawn = drawn

    def right(self, question: object, version: str, answer: object) -> bool:
        """Whether that version answers so, and no other one."""
        assert isinstance(question, tuple)
        kind, key = question
        if version not in self._log_px:
            return False
        if kind == "draw":
            return answer == self._drawn[version, key]
        close = {
            v: np.allclose(np.array(answer), log_px[list(key)], atol=1e-3)
            for v, log_px in self._log_px.items()
        }
        return [v for v, is_close in close.items() if is_close] == [version]

    def pick(self, rng: random.Random) -> tuple[str, Any]:
        """A question: mostly some pictures to score, now and then some to draw."""
        if rng.random() < 0.1:
            return "draw", rng.randrange(4)
        return "score", tuple(rng.sample(range(12), rng.randint(1, 4)))

    def ask(self, channel: grpc.Channel, question: tuple[str, Any], name: str) -> Outcome:
        """How the request ends that asks this."""
        kind, key = question
        metadata = (("x-request-id", name),)
        try:
            if kind == "score":
                images = codec.images(self.pictures[list(key)])
                request = ScoreRequest(model_name="toy", images=images)
                answer = ScoringServiceStub(channel).Score(request, timeout=30, metadata=metadata)
                return Outcome(
                    "OK", answer.model_version, tuple(s.log_likelihood for s in answer.scores)
                )
            return draw(channel, key, "", metadata)
        except grpc.RpcError as error:
            trailing: Any = error.trailing_metadata() or ()
            return Outcome(error.code().name, trailing=dict(trailing))


def draw(channel: grpc.Channel, seed: int, version: str = "", metadata: Metadata = ()) -> Outcome:
    """The toy's first pictures of that seed, in several chunks."""
    request = GenerateRequest(model_name="toy", model_version=version, count=40, label=1, seed=seed)
    stub = GenerationServiceStub(channel)
    chunks = list(stub.Generate(request, timeout=30, metadata=metadata))
    versions = {chunk.model_version for chunk in chunks}
    return Outcome("OK", "+".join(sorted(versions)), b"".join(c.images.data for c in chunks))


class Load:
    """Clients that ask without pause, each over a connection of its own, until told to stop."""

    def __init__(
        self,
        address: str,
        questions: Questions,
        seed: int,
        clients: int,
        *,
        heedful: bool = False,
        patience: float = 0.02,
    ) -> None:
        """Clients, ready to begin.

        Args:
            address: of the server.
            questions: what they ask.
            seed: decides what is asked.
            clients: how many they are.
            heedful: whether they stop asking when health says NOT_SERVING.
            patience: seconds that a client waits after it was refused.
        """
        self.history = History()
        self._address = address
        self._questions = questions
        self._heedful = heedful
        self._patience = patience
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(f"{seed} {client}"),))
            for client in range(clients)
        ]

    def __enter__(self) -> History:
        for thread in self._threads:
            thread.start()
        return self.history

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, rng: random.Random) -> None:
        with grpc.insecure_channel(self._address, options=ALONE) as channel:
            draining = self._watch(channel) if self._heedful else lambda: False
            while not self._stop.is_set() and not draining():
                question = self._questions.pick(rng)
                name = self.history.begin(question)
                outcome = self._questions.ask(channel, question, name)
                self.history.end(name, outcome)
                if outcome.code != "OK":
                    self._stop.wait(self._patience)

    def _watch(self, channel: grpc.Channel) -> Callable[[], bool]:
        draining = threading.Event()

        def watch() -> None:
            with contextlib.suppress(grpc.RpcError):
                for answer in health_pb2_grpc.HealthStub(channel).Watch(
                    health_pb2.HealthCheckRequest()
                ):
                    if answer.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                        draining.set()

        threading.Thread(target=watch, daemon=True).start()
        return draining.is_set


def first_process() -> list[str]:
    """What comes before a command that shall be the first process of its own PID namespace."""
    words = ["unshare", "--pid", "--fork", "--kill-child"]
    for more in ([], ["--user", "--map-root-user"]):  # who is not root may be of a user namespace
        command = [*words, *more]
        if shutil.which("unshare") and not subprocess.run([*command, "true"]).returncode:
            return command
    pytest.skip("no PID namespace can be made here")


def wait_until(reached: Callable[[], bool], seconds: float = 30) -> None:
    """Returns once that is so."""
    until = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < until, "not within the time"
        time.sleep(0.005)
