"""The door of a server: who is inside, who may still come in, and how all leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from likely.errors import Unavailable


class Door:
    """Lets requests in until it is closed.

    A request that came in has been accepted: it is answered, unless it is cut off in the end.
    Between `close` and `shut` newcomers wait, so that the server can first tell their
    connections to go elsewhere; then they are refused.
    """

    def __init__(self) -> None:
        self._inside: set[asyncio.Task[object]] = set()
        self._cut: set[asyncio.Task[object]] = set()
        self._warned: set[asyncio.Task[None]] = set()
        self._closed = False
        self._shut = asyncio.Event()
        self._empty = asyncio.Event()

    @asynccontextmanager
    async def inside(self) -> AsyncIterator[None]:
        """While it is entered, a request is inside.

        Raises:
            Unavailable: the door is shut, or the request was cut off.
        """
        if self._closed:
            await self._shut.wait()
            raise Unavailable("the server is ending")
        task = asyncio.current_task()
        assert task is not None
        self._inside.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if task not in self._cut:
                raise
            task.uncancel()
            raise Unavailable("the server ended before this was answered") from None
        finally:
            self._inside.discard(task)
            self._cut.discard(task)
            if not self._inside:
                self._empty.set()

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
