"""Feeds: streams of self-contained requests, which are merged for runs but answered singly."""

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

MAX_UNANSWERED = 256  # unanswered messages per stream, at which the server stops reading it
CONCURRENT_GROUPS = 2  # concurrent groups per stream: one is collected while another runs
# Errors that apply to a group as a whole.
GROUP_ERRORS = (DeadlineExceeded, DeviceLost, Unavailable)
MAX_GROUP_ROWS = 63  # pictures per group, the largest size that does not count as bulk

R = TypeVar("R")


class FeedMessage(Protocol):
    """A message of a feed."""

    @property
    def sequence_id(self) -> int:
        """The caller's number for the message."""

    @property
    def request(self) -> Any:
        """The request that the message contains."""

    def ByteSize(self) -> int:  # noqa: N802
        """Size of the message on the wire, in bytes."""


Outcome = tuple[int, R | Exception]


@dataclass(slots=True)
class _Waiting:
    """A message that was read; `key` is equal for messages that may be answered together."""

    sequence_id: int
    request: Any
    nbytes: int
    key: Hashable


class Feed(Generic[R]):
    """Answers the messages of one stream."""

    def __init__(
        self,
        answer: Callable[[Any], Awaitable[Any]],
        door: Door,
        limits: Limits,
        *,
        concurrent_groups: int = CONCURRENT_GROUPS,
        merges: bool = True,
    ) -> None:
        """Creates a feed.

        Args:
            answer: answers one request, or raises the error with which it is refused.
            door: cancels reading when the server shuts down.
            limits: limits of one request; all unanswered messages together may have at most the
                bytes of one request.
            concurrent_groups: number of groups that are answered concurrently, or whose answers
                wait until the caller reads them.
            merges: whether messages are merged into groups, as those of ScoreStream and
                ClassifyStream, which must all ask the same model. If not, each is a group.
        """
        self._answer = answer
        self._concurrent_groups = concurrent_groups
        self._merges = merges
        self._door = door
        self._most_bytes = limits.request_bytes
        self._most_rows = min(MAX_GROUP_ROWS, limits.images_per_request)
        self._waiting: deque[_Waiting] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._ready: deque[tuple[list[Outcome[R]], int]] = deque()
        self._count = self._nbytes = 0
        self._model = ""
        self._changed = asyncio.Event()
        self._room = asyncio.Event()

    async def outcomes(
        self, messages: AsyncIterator[FeedMessage]
    ) -> AsyncGenerator[list[Outcome[R]], None]:
        """Yields the outcomes of the messages, several at a time, as they become ready.

        An outcome is a message's sequence id with its answer or error.

        Raises:
            Unavailable: the server is shutting down; all messages that were read are answered.
        """
        reader = asyncio.create_task(self._read(messages))
        reader.add_done_callback(self._wake)
        try:
            with self._door.cancelled_on_close(reader):
                while self._ready or self._waiting or self._running or not reader.done():
                    ready = self._ready.popleft() if self._ready else None
                    # Answers that the caller has not read count, or they would pile up.
                    while self._waiting and self._unread_groups < self._concurrent_groups:
                        self._start_group()
                    if ready:
                        outcomes, nbytes = ready
                        yield outcomes
                        self._make_room(len(outcomes), nbytes)
                    else:
                        self._changed.clear()
                        await self._changed.wait()
            if reader.cancelled():
                raise Unavailable("the server is shutting down: ask elsewhere for missing answers")
            reader.result()
        finally:
            tasks = (reader, *self._running)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def _unread_groups(self) -> int:
        """Number of groups that run, or whose outcomes wait to be read."""
        return len(self._running) + len(self._ready)

    async def _read(self, messages: AsyncIterator[FeedMessage]) -> None:
        async for message in messages:
            request, nbytes = message.request, message.ByteSize()
            key = merging.key(request) if self._merges else None
            self._model = self._model or request.model_name
            self._waiting.append(_Waiting(message.sequence_id, request, nbytes, key))
            self._count += 1
            self._nbytes += nbytes
            self._changed.set()
            while self._count >= MAX_UNANSWERED or self._nbytes >= self._most_bytes:
                self._room.clear()
                await self._room.wait()

    def _start_group(self) -> None:
        """Starts to answer a group: the first waiting messages, as far as they may be merged."""
        first = self._waiting.popleft()
        group, rows = [first], merging.rows(first.request) if first.key else 0
        while first.key and self._waiting and self._waiting[0].key == first.key:
            rows += merging.rows(self._waiting[0].request)
            if rows > self._most_rows:
                break
            group.append(self._waiting.popleft())
        task = asyncio.create_task(self._answer_group(group))
        self._running.add(task)
        task.add_done_callback(self._wake)
        task.add_done_callback(self._running.discard)

    async def _answer_group(self, group: Sequence[_Waiting]) -> None:
        answers = await self._answer_requests([waiting.request for waiting in group])
        outcomes = [
            (waiting.sequence_id, answer) for waiting, answer in zip(group, answers, strict=True)
        ]
        self._ready.append((outcomes, sum(waiting.nbytes for waiting in group)))

    async def _answer_requests(self, requests: Sequence[Any]) -> Sequence[R | Exception]:
        half = len(requests) // 2
        # Each group is admitted anew, so that a running stream takes no room that others need.
        callers.announce(replace(callers.current(), admitted=False, counted=not half))
        try:
            if not half:
                return [await self._answer_request(requests[0])]
            whole: Any = await self._answer_request(merging.merge(requests))
            return merging.split(whole, requests)
        except Exception as error:
            if not half or isinstance(error, GROUP_ERRORS):
                return [error] * len(requests)
        # A single request may be the cause, so each half is asked again by itself.
        return [
            *await self._answer_requests(requests[:half]),
            *await self._answer_requests(requests[half:]),
        ]

    async def _answer_request(self, request: Any) -> R:
        if self._merges and request.model_name != self._model:
            raise InvalidInput(
                "model_name", f"{request.model_name!r}; this stream asks {self._model!r}"
            )
        answer: R = await self._answer(request)
        return answer

    def _make_room(self, count: int, nbytes: int) -> None:
        self._count -= count
        self._nbytes -= nbytes
        self._room.set()

    def _wake(self, _: asyncio.Task[None]) -> None:
        self._changed.set()
