"""How processes end by signals, whatever they are at and whoever does not read what they write."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import io
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from likely import logs, signals
from likely.errors import DeviceLost, SettingsError
from likely.processes import process
from likely.settings import load

COMMAND = """
import sys
import click
from likely import cli

@click.command()
def talk():
    while True:
        click.echo("x" * 15, err=sys.argv[1] == "stderr")

cli.Commands.resolve_command = lambda self, ctx, args: ("talk", talk, [])
cli.main(["talk"])
"""
HANDLER = """
import signal
import sys
from likely import signals

signal.signal(signal.SIGTERM, signals.end)
while True:
    getattr(sys, sys.argv[1]).write("x" * 15 + "\\n")
"""


@contextmanager
def unread(code: str, stream: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs that code, and is held up as nobody reads that stream of it.

    Its lines have 16 bytes, so that the pipe has no room left for a shorter one.
    """
    reading, writing = os.pipe()
    streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    streams[stream] = writing
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    child = subprocess.Popen([sys.executable, "-c", code, stream], env=environment, **streams)
    os.close(writing)
    try:
        until, before = time.monotonic() + 60, 0
        while not before or before != unheard(reading):
            assert child.poll() is None and time.monotonic() < until
            before = unheard(reading)
            time.sleep(0.3)
        yield child
    finally:
        child.kill()
        child.wait()
        os.close(reading)


def unheard(pipe: int) -> int:
    """How many bytes lie in it."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_a_command_ends_though_nobody_reads_what_it_writes() -> None:
    with unread(COMMAND, "stdout") as child:
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == -signal.SIGTERM


def test_a_second_signal_ends_a_command_that_cannot_tell_of_the_first() -> None:
    with unread(COMMAND, "stderr") as child:
        child.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(1)
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == -signal.SIGTERM


def test_a_command_ends_by_the_signal_though_it_cannot_say_so() -> None:
    reading, writing = os.pipe()
    with Path("/dev/full").open("w") as full:
        child = subprocess.Popen([sys.executable, "-c", COMMAND, ""], stdout=writing, stderr=full)
    os.close(writing)
    try:
        assert os.read(reading, 1)
        child.send_signal(signal.SIGTERM)
        while os.read(reading, 1 << 16):
            pass
        assert child.wait(20) == -signal.SIGTERM
    finally:
        child.kill()
        child.wait()
        os.close(reading)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_an_end_in_the_middle_of_a_write_is_one(stream: str) -> None:
    with unread(HANDLER, stream) as child:
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == -signal.SIGTERM


def test_what_was_told_and_ends_by_itself_hears_of_a_second_signal() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with pytest.raises(signals.Terminated), signals.ending():
            signal.raise_signal(signal.SIGTERM)
        # The first process of a container has no default that would end it.
        assert signal.getsignal(signal.SIGTERM) is signals.end
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with signals.ending():
            pass
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


class Loading:
    """A server that loads until it is stopped, or beyond; and then cannot pin a label."""

    def __init__(self, beyond: bool) -> None:
        self.device_lost: asyncio.Future[DeviceLost] = asyncio.get_running_loop().create_future()
        self._stopped = asyncio.Event()
        self._beyond = beyond

    async def load(self) -> None:
        await self._stopped.wait()
        raise SettingsError("labels names what is not served")

    async def stop(self, *_: object) -> bool:
        if not self._beyond:
            self._stopped.set()
            await asyncio.sleep(0)
        return not self._beyond


async def ended(beyond: bool, lost: bool) -> list[dict[str, Any]]:
    """What the loop is told of, when a process has run whose server loads as its end comes."""
    loop = asyncio.get_running_loop()
    contexts: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: contexts.append(context))
    server: Any = Loading(beyond)
    ending: asyncio.Future[signal.Signals] = loop.create_future()
    if lost:
        server.device_lost.set_result(DeviceLost("it is gone"))
    else:
        ending.set_result(signal.SIGTERM)
    log = logs.logger("error", stream=io.StringIO())
    await process.run(server, load({}), log, ending, lost_code=3)
    del server
    gc.collect()
    return contexts


def test_a_load_that_fails_while_all_ends_is_no_fault() -> None:
    assert asyncio.run(ended(beyond=False, lost=False)) == []


@pytest.mark.parametrize(("lost", "code"), [(False, 0), (True, 3)])
def test_a_load_that_goes_on_does_not_hold_up_the_end(
    lost: bool, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(signals, "leave", leave)
    with pytest.raises(SystemExit) as left:
        asyncio.run(ended(beyond=True, lost=lost))
    assert left.value.code == code


def test_a_lost_device_is_told_where_nothing_loads() -> None:
    with pytest.raises(DeviceLost):
        asyncio.run(ended(beyond=False, lost=True))
