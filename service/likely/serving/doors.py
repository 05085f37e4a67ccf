"""The door of a server: who is inside, who may still come in, and how all leave."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NoReturn, TypeAlias

from likely.errors import Unavailable

Tasks: TypeAlias = "set[asyncio.Task[object]]"


class Inside:
    """One request inside: a context, as a class, since a generator costs more than all the rest."""

    __slots__ = ("_cut", "_empty", "_inside", "_task")

    def __init__(self, inside: Tasks, cut: Tasks, empty: asyncio.Event) -> None:
        self._inside = inside
        self._cut = cut
        self._empty = empty

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
            self._empty.set()
        if self._task in self._cut:
            self._cut.discard(self._task)
            if isinstance(error, asyncio.CancelledError):
                self._task.uncancel()
                raise Unavailable("the server ended before this was answered") from None


class Door:
    """Lets requests in until it is closed.

    A request that came in has been accepted: it is answered, unless it is cut off in the end.
    Between `close` and `shut` newcomers wait, so that the server can first tell their
    connections to go elsewhere; then they are refused.
    """

    def __init__(self) -> None:
        self._inside: Tasks = set()
        self._cut: Tasks = set()
        self._warned: set[asyncio.Task[None]] = set()
        self._closed = False
        self._shut = asyncio.Event()
        self._empty = asyncio.Event()

    @property
    def closed(self) -> bool:
        """Whether nobody is let in any more."""
        return self._closed

    async def refused(self) -> NoReturn:
        """What comes of a newcomer to a closed door.

        Raises:
            Unavailable: once it is shut.
        """
        await self._shut.wait()
        raise Unavailable("the server is ending")

    def inside(self) -> Inside:
        """While it is entered, a request is inside, and cut off with Unavailable if need be."""
        return Inside(self._inside, self._cut, self._empty)

    @contextmanager
    def warned(self, reader: asyncio.Task[None]) -> Iterator[None]:
        """While it is entered, that task, which reads more from inside, is cancelled on `close`."""
        self._warned.add(reader)
        try:
            if self._closed:
                reader.cancel()
            yield
        finally:
            self._warned.discard(reader)

    def close(self) -> None:
        """Lets nobody in any more, newcomers wait; those inside are to bring nothing new."""
        self._closed = True
        for reader in self._warned:
            reader.cancel()

    def shut(self) -> None:
        """Refuses those that wait, and all that come."""
        self._closed = True
        self._shut.set()

    async def empty(self, seconds: float) -> bool:
        """Whether all that were inside have left within that time."""
        if self._inside:
            self._empty.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self._empty.wait()
            except TimeoutError:
                return False
        return True

    def cut(self) -> int:
        """Cuts off all that are inside; how many they are."""
        self._cut |= self._inside
        for task in self._cut:
            task.cancel()
        return len(self._cut)
