"""The door of a server: tracks the requests inside, and closes in steps at shutdown."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NoReturn, TypeAlias

from likely.errors import Unavailable

Tasks: TypeAlias = "set[asyncio.Task[object]]"


class Inside:
    """Context of one request inside the door; a class, as a generator would cost much more."""

    __slots__ = ("_cut_off", "_emptied", "_inside", "_task")

    def __init__(self, inside: Tasks, cut_off: Tasks, emptied: asyncio.Event) -> None:
        self._inside = inside
        self._cut_off = cut_off
        self._emptied = emptied

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._inside.add(task)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._inside.discard(self._task)
        if not self._inside:
            self._emptied.set()
        if self._task in self._cut_off:
            self._cut_off.discard(self._task)
            if isinstance(error, asyncio.CancelledError):
                self._task.uncancel()
                raise Unavailable("the server shut down before this was answered") from None


class Door:
    """Lets requests in until it is closed.

    A request inside is accepted: it is answered, unless it is cut off at the end of the drain.
    Requests that arrive after `close` wait, so that the server can first tell their connections
    to go elsewhere. After `turn_away`, they are refused.
    """

    def __init__(self) -> None:
        self._inside: Tasks = set()
        self._cut_off: Tasks = set()
        self._readers: set[asyncio.Task[None]] = set()
        self._closed = False
        self._turned_away = asyncio.Event()
        self._emptied = asyncio.Event()

    @property
    def closed(self) -> bool:
        """Whether no more requests are let in."""
        return self._closed

    async def refuse(self) -> NoReturn:
        """Holds a request that arrives at a closed door, then refuses it.

        Raises:
            Unavailable: requests are turned away.
        """
        await self._turned_away.wait()
        raise Unavailable("the server is shutting down")

    def inside(self) -> Inside:
        """Context in which the current task counts as inside.

        `cut_off` raises Unavailable in it.
        """
        return Inside(self._inside, self._cut_off, self._emptied)

    @contextmanager
    def cancelled_on_close(self, reader: asyncio.Task[None]) -> Iterator[None]:
        """Context in which `close` cancels a task that reads more messages for a request inside."""
        self._readers.add(reader)
        try:
            if self._closed:
                reader.cancel()
            yield
        finally:
            self._readers.discard(reader)

    def close(self) -> None:
        """Lets no more requests in; newcomers wait, and streams inside stop reading."""
        self._closed = True
        for reader in self._readers:
            reader.cancel()

    def turn_away(self) -> None:
        """Refuses the requests that wait, and all newcomers."""
        self._closed = True
        self._turned_away.set()

    async def wait_until_empty(self, seconds: float) -> bool:
        """Waits until no request is inside, for at most `seconds`; returns whether none is."""
        if self._inside:
            self._emptied.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self._emptied.wait()
            except TimeoutError:
                return False
        return True

    def cut_off(self) -> int:
        """Cuts off all requests inside, and returns their number."""
        self._cut_off |= self._inside
        for task in self._cut_off:
            task.cancel()
        return len(self._cut_off)
