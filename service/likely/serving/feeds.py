"""Feeds: questions that come without end on one stream, merged, and answered each by itself."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Hashable,
    Sequence,
)
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from likely.answers import Limits
from likely.batching import callers
from likely.errors import DeadlineExceeded, DeviceLost, InvalidInput, Unavailable
from likely.serving import merging
from likely.serving.doors import Door

MESSAGES = 256  # of one stream that are not answered yet: beyond, it is not read
AT_ONCE = 2  # groups of one stream: one is put together while another runs
OF_ALL = (DeadlineExceeded, DeviceLost, Unavailable)  # no message of a group alone causes them
ROWS = 63  # pictures of a group: as many as a request may have that yields to nobody

R = TypeVar("R")


class Sent(Protocol):
    """A message of a feed."""

    @property
    def sequence_id(self) -> int:
        """The caller's number for it."""

    @property
    def request(self) -> Any:
        """What it asks."""

    def ByteSize(self) -> int:  # noqa: N802
        """Bytes on the wire."""


Outcome = tuple[int, R | Exception]


@dataclass(slots=True)
class _Waiting:
    """A message that was read; `key` is equal for those that may be answered together."""

    sequence_id: int
    request: Any
    nbytes: int
    key: Hashable


class Feed(Generic[R]):
    """One stream's questions on their way to their answers."""

    def __init__(
        self,
        answer: Callable[[Any], Awaitable[Any]],
        door: Door,
        limits: Limits,
        *,
        at_once: int = AT_ONCE,
        merges: bool = True,
    ) -> None:
        """A feed.

        Args:
            answer: answers one request, or raises what it is refused with.
            door: tells when the server ends.
            limits: of a request; all messages that are not answered yet share its bytes.
            at_once: groups that are answered at once.
            merges: whether messages go together, as those of ScoreStream and ClassifyStream
                do, which ask one model; else each is a group.
        """
        self._answer = answer
        self._at_once = at_once
        self._merges = merges
        self._door = door
        self._most_bytes = limits.request_bytes
        self._most_rows = min(ROWS, limits.images_per_request)
        self._waiting: deque[_Waiting] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._ready: deque[tuple[list[Outcome[R]], int]] = deque()
        self._count = self._nbytes = 0
        self._model = ""
        self._stirred = asyncio.Event()
        self._room = asyncio.Event()

    async def outcomes(
        self, messages: AsyncIterator[Sent]
    ) -> AsyncGenerator[list[Outcome[R]], None]:
        """What came of the messages, a few at a time, by sequence id.

        Raises:
            Unavailable: the server ends; all that was read has been answered.
        """
        reader = asyncio.create_task(self._read(messages))
        reader.add_done_callback(self._stir)
        try:
            with self._door.warned(reader):
                while self._ready or self._waiting or self._running or not reader.done():
                    while self._waiting and len(self._running) < self._at_once:
                        self._begin()
                    if self._ready:
                        outcomes, nbytes = self._ready.popleft()
                        yield outcomes
                        self._free(len(outcomes), nbytes)
                    else:
                        self._stirred.clear()
                        await self._stirred.wait()
            if reader.cancelled():
                raise Unavailable("the server is ending: what has no answer is asked elsewhere")
            reader.result()
        finally:
            tasks = (reader, *self._running)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, messages: AsyncIterator[Sent]) -> None:
        async for message in messages:
            request, nbytes = message.request, message.ByteSize()
            key = merging.key(request) if self._merges else None
            self._model = self._model or request.model_name
            self._waiting.append(_Waiting(message.sequence_id, request, nbytes, key))
            self._count += 1
            self._nbytes += nbytes
            self._stirred.set()
            while self._count >= MESSAGES or self._nbytes >= self._most_bytes:
                self._room.clear()
                await self._room.wait()

    def _begin(self) -> None:
        """Starts on the messages that wait, as far as they go together."""
        first = self._waiting.popleft()
        group, rows = [first], merging.rows(first.request) if first.key else 0
        while first.key and self._waiting and self._waiting[0].key == first.key:
            rows += merging.rows(self._waiting[0].request)
            if rows > self._most_rows:
                break
            group.append(self._waiting.popleft())
        task = asyncio.create_task(self._run(group))
        self._running.add(task)
        task.add_done_callback(self._stir)
        task.add_done_callback(self._running.discard)

    async def _run(self, group: Sequence[_Waiting]) -> None:
        answers = await self._answers([each.request for each in group])
        outcomes = [(each.sequence_id, answer) for each, answer in zip(group, answers, strict=True)]
        self._ready.append((outcomes, sum(each.nbytes for each in group)))

    async def _answers(self, requests: Sequence[Any]) -> Sequence[R | Exception]:
        half = len(requests) // 2
        # Each group has to be let in anew: a stream that runs must not fill the queue for ever.
        callers.announce(replace(callers.current(), admitted=False, counted=not half))
        try:
            if not half:
                return [await self._checked(requests[0])]
            whole: Any = await self._checked(merging.merged(requests))
            return merging.parted(whole, requests)
        except Exception as error:
            if not half or isinstance(error, OF_ALL):
                return [error] * len(requests)
        # Of one of them, perhaps: each is told of its own.
        return [*await self._answers(requests[:half]), *await self._answers(requests[half:])]

    async def _checked(self, request: Any) -> R:
        if self._merges and request.model_name != self._model:
            raise InvalidInput(
                "model_name", f"{request.model_name!r}; this stream asks {self._model!r}"
            )
        answer: R = await self._answer(request)
        return answer

    def _free(self, count: int, nbytes: int) -> None:
        self._count -= count
        self._nbytes -= nbytes
        self._room.set()

    def _stir(self, _: asyncio.Task[None]) -> None:
        self._stirred.set()
