"""Feeds over a stream: asked ahead, answered in order, begun anew where the stream breaks."""

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

BREAKS = 8  # of a stream between two answers, until it is given up: after some 16 seconds
GRACE, TURNS = 0.01, 20  # a loop that was held has so many pauses of so long to read what came
ENDING = 5.0  # seconds in which a stream may end by itself when all is answered


class _Patience:
    """How often a stream may break between two answers."""

    def __init__(self, retries: bool) -> None:
        self._most = BREAKS if retries else 1
        self._breaks = 0

    def reset(self) -> None:
        """There was an answer."""
        self._breaks = 0

    def delay(self, failure: Exception) -> float:
        """Seconds before a new stream is begun.

        Raises:
            Exception: the failure, if another attempt is not worth it.
        """
        self._breaks += 1
        if self._breaks >= self._most or not isinstance(failure, Unavailable | Overloaded):
            raise failure
        seconds = delay(self._breaks) * random.uniform(0.8, 1.2)  # noqa: S311
        return max(seconds, min(failure.retry_after or 0.0, LONGEST_DELAY))


def _late(timeout: float) -> DeadlineExceeded:
    return DeadlineExceeded(f"no answer on the stream for {timeout:g} seconds")


def _cut() -> Unavailable:
    return Unavailable("the stream ended before all was answered")


class BlockingFeed(Generic[A]):
    """One feed of a `Client`: the items come in by one thread, the answers by another."""

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
            begin: begins a stream with these messages, and gives its answers.
            questions: how an item is asked about.
            timeout: seconds that an answer may take.
            retries: whether what is refused for now, and what a broken stream leaves, is asked
                again.
            error: that a failed stream tells of.
        """
        self._begin = begin
        self._ledger: Ledger[A] = Ledger(questions, timeout, retries=retries)
        self._timeout = timeout
        self._retries = retries
        self._error = error
        self._changed = threading.Condition()  # guards all that follows, and the ledger
        self._call: Any = None
        self._stream = 0  # counts them
        self._failure: Exception | None = None
        self._fault: BaseException | None = None  # of the items' source
        self._drained = False  # the source has no more
        self._over = False

    def outcomes(self, items: Iterable[npt.ArrayLike]) -> Generator[A | LikelyError, None, None]:
        """What came of each item, in the items' order."""
        patience = _Patience(self._retries)
        reader = self._open()
        threading.Thread(target=self._pull, args=(items,), daemon=True, name="feed").start()
        try:
            while True:
                found, failure = self._wait()
                if failure:
                    time.sleep(patience.delay(failure))
                    reader = self._open()
                elif not found:
                    break
                for outcome in found:
                    patience.reset()
                    yield outcome
            reader.join(ENDING)  # no answer is missing: the stream ends by itself
            if self._fault:
                raise self._fault
        finally:
            with self._changed:
                self._over = True
                self._changed.notify_all()
            self._call.cancel()

    def _wait(self) -> tuple[list[A | LikelyError], Exception | None]:
        """The next outcomes, or why the stream broke, or neither when all is over."""
        with self._changed:
            while True:
                if found := self._ledger.take():
                    self._changed.notify_all()  # there is room
                    return found, None
                if self._drained and not self._ledger:
                    self._changed.notify_all()
                    return [], None
                if self._failure:
                    return [], self._failure
                left = self._ledger.left(time.monotonic())
                if left <= 0:
                    raise _late(self._timeout)
                self._changed.wait(left)

    def _open(self) -> threading.Thread:
        with self._changed:
            self._stream += 1
            self._failure = None
            self._ledger.lost()
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
                    self._changed.wait_for(lambda: self._over or self._ledger.has_room)
                    if self._over:
                        return
                    self._ledger.add(item)
                    self._changed.notify_all()
        except BaseException as error:
            self._fault = error
        with self._changed:
            self._drained = True
            self._changed.notify_all()

    def _messages(self, stream: int) -> Iterator[Any]:
        while (message := self._message(stream)) is not None:
            yield message

    def _message(self, stream: int) -> Any:
        """What that stream is to send next, waited for; None where that is nothing any more."""
        with self._changed:
            # gRPC may ask late, for a stream that is gone: what it took, the new one would miss.
            while not (self._over or stream != self._stream or self._failure):
                if (message := self._ledger.next(time.monotonic())) is not None:
                    return message
                if self._drained and not self._ledger:
                    return None
                self._changed.wait(self._ledger.wait(time.monotonic()))
        return None

    def _read(self, call: Any, stream: int) -> None:
        failure: Exception = _cut()
        try:
            for response in call:
                with self._changed:
                    self._ledger.answered(response, time.monotonic())
                    self._changed.notify_all()
        except grpc.RpcError as error:
            failure = self._error(error)
        except Exception as error:  # of an answer that cannot be read
            failure = error
        with self._changed:
            if stream == self._stream:
                self._failure = failure
            self._changed.notify_all()


class AsyncFeed(Generic[A]):
    """One feed of an `AsyncClient`, in tasks of its event loop."""

    def __init__(
        self,
        begin: Callable[[AsyncIterator[Any]], Any],
        questions: plans.Questions[A],
        timeout: float,
        retries: bool = True,
        error: Callable[[Any], Exception] = statuses.error,
    ) -> None:
        """A feed, as `BlockingFeed`."""
        self._begin = begin
        self._ledger: Ledger[A] = Ledger(questions, timeout, retries=retries)
        self._timeout = timeout
        self._retries = retries
        self._error = error
        self._stirred = asyncio.Event()  # there may be an outcome, or none any more
        self._room = asyncio.Event()
        self._work = asyncio.Event()  # there may be something to send, or nothing any more
        self._call: Any = None
        self._stream = 0  # counts them
        self._failure: Exception | None = None
        self._fault: BaseException | None = None
        self._drained = False

    async def outcomes(
        self, items: AsyncIterable[npt.ArrayLike] | Iterable[npt.ArrayLike]
    ) -> AsyncGenerator[A | LikelyError, None]:
        """What came of each item, in the items' order."""
        patience = _Patience(self._retries)
        reader = self._open()
        puller = asyncio.create_task(self._pull(items))
        try:
            while True:
                found, failure = await self._wait()
                if failure:
                    await asyncio.sleep(patience.delay(failure))
                    reader = self._open()
                elif not found:
                    break
                for outcome in found:
                    patience.reset()
                    yield outcome
            with suppress(TimeoutError):
                async with asyncio.timeout(ENDING):
                    await reader
            if self._fault:
                raise self._fault
        finally:
            self._call.cancel()
            for task in (puller, reader):
                task.cancel()
            await asyncio.gather(puller, reader, return_exceptions=True)

    async def _wait(self) -> tuple[list[A | LikelyError], Exception | None]:
        late = 0
        while True:
            self._stirred.clear()
            if found := self._ledger.take():
                self._room.set()
                return found, None
            if self._drained and not self._ledger:
                self._work.set()
                return [], None
            if self._failure:
                return [], self._failure
            left = self._ledger.left(time.monotonic())
            if left <= 0:
                late += 1
                if late > TURNS:
                    raise _late(self._timeout)
                await asyncio.sleep(GRACE)
                continue
            late = 0
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._stirred.wait()

    def _open(self) -> asyncio.Task[None]:
        self._stream += 1
        self._failure = None
        self._ledger.lost()
        self._work.set()  # an earlier stream's messages end, if they have not
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
                    self._stirred.set()
        except Exception as error:
            self._fault = error
        except asyncio.CancelledError as error:
            if _cancelling():
                raise
            self._fault = error  # of the source, which raised it
        self._drained = True
        self._work.set()
        self._stirred.set()

    async def _messages(self, stream: int) -> AsyncIterator[Any]:
        while stream == self._stream and not self._failure:
            if (message := self._ledger.next(time.monotonic())) is not None:
                yield message
                continue
            if self._drained and not self._ledger:
                return
            self._work.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._ledger.wait(time.monotonic())):
                    await self._work.wait()

    async def _read(self, call: Any) -> None:
        failure: Exception = _cut()
        try:
            async for response in call:
                self._ledger.answered(response, time.monotonic())
                self._work.set()
                self._stirred.set()
        except grpc.RpcError as error:
            failure = self._error(error)
        except Exception as error:  # of an answer that cannot be read
            failure = error
        except asyncio.CancelledError:
            if _cancelling():
                raise
            failure = LikelyError("this client was closed before all was answered")
        self._failure = failure
        self._stirred.set()


def _cancelling() -> bool:
    """Whether it is the running task that is cancelled, and not what it waits for."""
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
            await asyncio.sleep(0)  # or nothing else would run until no more is taken
