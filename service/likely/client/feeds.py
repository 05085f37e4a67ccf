"""Client side of feeds: items are sent ahead, outcomes kept in order, broken streams reopened."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
    Iterator,
)
from contextlib import aclosing, suppress
from typing import Any, Generic

import grpc
import numpy.typing as npt

from likely import statuses
from likely.answers import A
from likely.client import plans
from likely.client.ledger import LONGEST_DELAY, Ledger, delay
from likely.errors import DeadlineExceeded, LikelyError, Overloaded, Unavailable

MAX_BREAKS = 8  # breaks of the stream between two answers until the feed gives up: about 16 seconds
# After the timeout, an event loop that was blocked may still have answers to read: it gets TURNS
# pauses of GRACE seconds.
GRACE, TURNS = 0.01, 20
END_SECONDS = 5.0  # seconds for the stream to end by itself once all items are answered


class _Backoff:
    """Counts the breaks of a stream between two answers, and computes the backoff.

    If a stream that had nothing to answer lasted for more than `LONGEST_DELAY` seconds, its break
    counts as the first: it has worked.
    """

    def __init__(self, retries: bool) -> None:
        self._most = MAX_BREAKS if retries else 1
        self._breaks = 0
        self._opened = time.monotonic()

    def reset(self) -> None:
        """An answer has arrived: starts counting again."""
        self._breaks = 0

    def delay(self, failure: Exception, *, idle: bool) -> float:
        """Seconds to wait before a new stream is opened.

        Args:
            failure: why the stream broke.
            idle: whether it had nothing to answer.

        Raises:
            Exception: the failure, if it is not temporary or the stream has broken too often.
        """
        if idle and time.monotonic() - self._opened > LONGEST_DELAY:
            self._breaks = 0
        self._breaks += 1
        if self._breaks >= self._most or not isinstance(failure, Unavailable | Overloaded):
            raise failure
        seconds = delay(self._breaks) * random.uniform(0.8, 1.2)  # noqa: S311
        seconds = max(seconds, min(failure.retry_after or 0.0, LONGEST_DELAY))
        self._opened = time.monotonic() + seconds
        return seconds


def _timeout_error(timeout: float) -> DeadlineExceeded:
    return DeadlineExceeded(f"no answer on the stream for {timeout:g} seconds")


def _cut_off_error() -> Unavailable:
    return Unavailable("the stream ended before all was answered")


class BlockingFeed(Generic[A]):
    """One feed of a `Client`: one thread reads the items, another one the answers."""

    def __init__(
        self,
        begin: Callable[[Iterator[Any]], Any],
        questions: plans.Questions[A],
        timeout: float,
        retries: bool = True,
        error: Callable[[Any], Exception] = statuses.error,
    ) -> None:
        """A feed.

        Args:
            begin: opens a stream that sends these messages; returns the call, which iterates over
                the responses.
            questions: how to build the request for an item and read its answer.
            timeout: maximum seconds between two answers.
            retries: whether to resend items that the server refuses for now, and to reopen a
                broken stream.
            error: maps a failed call to the error to raise.
        """
        self._begin = begin
        self._ledger: Ledger[A] = Ledger(questions, timeout, retries=retries)
        self._timeout = timeout
        self._retries = retries
        self._error = error
        self._changed = threading.Condition()  # guards the ledger and all fields below
        self._call: Any = None
        self._stream = 0  # number of the current stream
        self._failure: Exception | None = None  # why the current stream ended
        self._source_error: BaseException | None = None  # raised by the source of items
        self._drained = False  # the source has no more items
        self._is_abandoned = False  # the caller takes no more outcomes

    def outcomes(self, items: Iterable[npt.ArrayLike]) -> Generator[A | LikelyError, None, None]:
        """Yields the outcome of each item, in the order of the items."""
        backoff = _Backoff(self._retries)
        reader = self._open()
        threading.Thread(target=self._pull, args=(items,), daemon=True, name="feed").start()
        try:
            while True:
                outcomes, failure = self._wait()
                if failure:
                    time.sleep(backoff.delay(failure, idle=not self._ledger.has_sent))
                    reader = self._open()
                elif not outcomes:
                    break
                for outcome in outcomes:
                    backoff.reset()
                    yield outcome
            reader.join(END_SECONDS)  # all items are answered: the stream ends by itself
            if self._source_error:
                raise self._source_error
        finally:
            with self._changed:
                self._is_abandoned = True
                self._changed.notify_all()
            self._call.cancel()

    def _wait(self) -> tuple[list[A | LikelyError], Exception | None]:
        """The next outcomes, or the failure of the stream; neither if all items are answered."""
        with self._changed:
            while True:
                if outcomes := self._ledger.take():
                    self._changed.notify_all()  # the ledger has room again
                    return outcomes, None
                if self._drained and not self._ledger:
                    self._changed.notify_all()
                    return [], None
                if self._failure:
                    return [], self._failure
                left = self._ledger.time_left(time.monotonic())
                if left <= 0:
                    raise _timeout_error(self._timeout)
                self._changed.wait(left)

    def _open(self) -> threading.Thread:
        with self._changed:
            self._stream += 1
            self._failure = None
            self._ledger.unsend_all()
            stream = self._stream
        self._call = self._begin(self._messages(stream))
        args = (self._call, stream)
        reader = threading.Thread(target=self._read, args=args, daemon=True, name="feed")
        reader.start()
        return reader

    def _pull(self, items: Iterable[npt.ArrayLike]) -> None:
        try:
            for item in items:
                with self._changed:
                    self._changed.wait_for(lambda: self._is_abandoned or self._ledger.has_room)
                    if self._is_abandoned:
                        return
                    self._ledger.add(item)
                    self._changed.notify_all()
        except BaseException as error:
            self._source_error = error
        with self._changed:
            self._drained = True
            self._changed.notify_all()

    def _messages(self, stream: int) -> Iterator[Any]:
        while (message := self._message(stream)) is not None:
            yield message

    def _message(self, stream: int) -> Any:
        """Waits for the next message that this stream shall send; None if there are no more."""
        with self._changed:
            # gRPC may still ask on behalf of a broken stream, which must take no more messages:
            # they belong to the new stream.
            while not (self._is_abandoned or stream != self._stream or self._failure):
                if (message := self._ledger.next(time.monotonic())) is not None:
                    return message
                if self._drained and not self._ledger:
                    return None
                self._changed.wait(self._ledger.send_delay(time.monotonic()))
        return None

    def _read(self, call: Any, stream: int) -> None:
        failure: Exception = _cut_off_error()
        try:
            for response in call:
                with self._changed:
                    self._ledger.record(response, time.monotonic())
                    self._changed.notify_all()
        except grpc.RpcError as error:
            failure = self._error(error)
        except Exception as error:  # an answer that cannot be read
            failure = error
        with self._changed:
            if stream == self._stream:
                self._failure = failure
            self._changed.notify_all()


class AsyncFeed(Generic[A]):
    """One feed of an `AsyncClient`, as tasks of the event loop."""

    def __init__(
        self,
        begin: Callable[[AsyncIterator[Any]], Any],
        questions: plans.Questions[A],
        timeout: float,
        retries: bool = True,
        error: Callable[[Any], Exception] = statuses.error,
    ) -> None:
        """A feed; the arguments are those of `BlockingFeed`."""
        self._begin = begin
        self._ledger: Ledger[A] = Ledger(questions, timeout, retries=retries)
        self._timeout = timeout
        self._retries = retries
        self._error = error
        self._outcomes_changed = asyncio.Event()  # wakes the consumer: new outcomes, or the end
        self._room = asyncio.Event()  # wakes the reader of items: the ledger has room
        self._work = asyncio.Event()  # wakes the sender: new messages, or the end
        self._call: Any = None
        self._stream = 0  # number of the current stream
        self._failure: Exception | None = None  # why the current stream ended
        self._source_error: BaseException | None = None  # raised by the source of items
        self._drained = False  # the source has no more items

    async def outcomes(
        self, items: AsyncIterable[npt.ArrayLike] | Iterable[npt.ArrayLike]
    ) -> AsyncGenerator[A | LikelyError, None]:
        """Yields the outcome of each item, in the order of the items."""
        backoff = _Backoff(self._retries)
        reader = self._open()
        puller = asyncio.create_task(self._pull(items))
        try:
            while True:
                outcomes, failure = await self._wait()
                if failure:
                    idle = not self._ledger.has_sent
                    await asyncio.sleep(backoff.delay(failure, idle=idle))
                    reader = self._open()
                elif not outcomes:
                    break
                for outcome in outcomes:
                    backoff.reset()
                    yield outcome
            with suppress(TimeoutError):
                async with asyncio.timeout(END_SECONDS):
                    await reader
            if self._source_error:
                raise self._source_error
        finally:
            self._call.cancel()
            for task in (puller, reader):
                task.cancel()
            await asyncio.gather(puller, reader, return_exceptions=True)

    async def _wait(self) -> tuple[list[A | LikelyError], Exception | None]:
        late = 0
        while True:
            self._outcomes_changed.clear()
            if outcomes := self._ledger.take():
                self._room.set()
                return outcomes, None
            if self._drained and not self._ledger:
                self._work.set()
                return [], None
            if self._failure:
                return [], self._failure
            left = self._ledger.time_left(time.monotonic())
            if left <= 0:
                late += 1
                if late > TURNS:
                    raise _timeout_error(self._timeout)
                await asyncio.sleep(GRACE)
                continue
            late = 0
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._outcomes_changed.wait()

    def _open(self) -> asyncio.Task[None]:
        self._stream += 1
        self._failure = None
        self._ledger.unsend_all()
        self._work.set()  # lets the sender of the previous stream end
        self._call = self._begin(self._messages(self._stream))
        return asyncio.create_task(self._read(self._call))

    async def _pull(self, items: AsyncIterable[npt.ArrayLike] | Iterable[npt.ArrayLike]) -> None:
        try:
            async with aclosing(_each(items)) as source:
                async for item in source:
                    while not self._ledger.has_room:
                        self._room.clear()
                        await self._room.wait()
                    self._ledger.add(item)
                    self._work.set()
                    self._outcomes_changed.set()
        except Exception as error:
            self._source_error = error
        except asyncio.CancelledError as error:
            if _cancelling():
                raise
            self._source_error = error  # raised by the source itself
        self._drained = True
        self._work.set()
        self._outcomes_changed.set()

    async def _messages(self, stream: int) -> AsyncIterator[Any]:
        while stream == self._stream and not self._failure:
            if (message := self._ledger.next(time.monotonic())) is not None:
                yield message
                continue
            if self._drained and not self._ledger:
                return
            self._work.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._ledger.send_delay(time.monotonic())):
                    await self._work.wait()

    async def _read(self, call: Any) -> None:
        failure: Exception = _cut_off_error()
        try:
            async for response in call:
                self._ledger.record(response, time.monotonic())
                self._work.set()
                self._outcomes_changed.set()
        except grpc.RpcError as error:
            failure = self._error(error)
        except Exception as error:  # an answer that cannot be read
            failure = error
        except asyncio.CancelledError:
            if _cancelling():
                raise
            failure = LikelyError("this client was closed before all was answered")
        self._failure = failure
        self._outcomes_changed.set()


def _cancelling() -> bool:
    """Whether the running task itself is being cancelled, not what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _each(
    items: AsyncIterable[npt.ArrayLike] | Iterable[npt.ArrayLike],
) -> AsyncGenerator[npt.ArrayLike, None]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
            await asyncio.sleep(0)  # lets other tasks run; else they would wait for a full window
