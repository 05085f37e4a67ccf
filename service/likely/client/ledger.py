"""The state of a feed's items: which are to be sent, which are sent, which have an outcome."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Generic

import numpy.typing as npt

from likely import statuses
from likely.answers import A, Pixels
from likely.client import plans, values
from likely.errors import LikelyError, Overloaded, Unavailable

WINDOW = 128  # most items whose outcome has not been taken yet
FIRST_DELAY, DELAY_GROWTH, LONGEST_DELAY = 0.2, 2.0, 5.0  # backoff: seconds, factor, seconds


@dataclass(slots=True, eq=False)
class _Item:
    """One item of a feed; `first` and `last` are the times of its first and last sending."""

    number: int
    message: Any = None
    shape: tuple[int, ...] = ()
    first: float = 0.0
    last: float = 0.0
    attempts: int = 0
    outcome: Any = None


class Ledger(Generic[A]):
    """The items of one feed, in order; does no input or output and never waits.

    All times are seconds of the same monotonic clock.
    """

    def __init__(
        self,
        questions: plans.Questions[A],
        timeout: float,
        *,
        retries: bool = True,
        window: int = WINDOW,
    ) -> None:
        """An empty ledger.

        Args:
            questions: how to build the request for an item and read its answer.
            timeout: maximum seconds between two answers.
            retries: whether to resend an item that the server refuses for now.
            window: maximum number of items whose outcome has not been taken.
        """
        self._questions: plans.Questions[A] = questions
        self._timeout = timeout
        self._retries = retries
        self._window = window
        self._count = 0
        self._open: dict[int, _Item] = {}  # items not taken yet, in the feed's order
        self._unsent: deque[_Item] = deque()
        self._sent: dict[int, _Item] = {}  # sent, without an outcome, in the order of sending
        self._paused_until = 0.0  # time before which nothing is sent: the server asked for a pause
        self._last_answer = 0.0  # time of the last answer; refusals do not count

    def __len__(self) -> int:
        """Number of items that have been added and not been taken."""
        return len(self._open)

    @property
    def has_sent(self) -> bool:
        """Whether an item has been sent and has no outcome yet."""
        return bool(self._sent)

    @property
    def has_room(self) -> bool:
        """Whether one more item may be added."""
        return len(self._open) < self._window

    def add(self, images: npt.ArrayLike) -> None:
        """Adds the next item; an invalid or too large one gets its error as outcome at once."""
        item = _Item(self._count)
        self._count += 1
        self._open[item.number] = item
        try:
            x = values.pixels(images)
            item.message = self._message(x, item.number)
        except LikelyError as error:
            item.outcome = error
            return
        item.shape = x.shape
        self._unsent.append(item)

    def next(self, now: float) -> Any:
        """The message to send now, or None."""
        if not self._unsent or now < self._paused_until:
            return None
        item = self._unsent.popleft()
        item.first, item.last = item.first or now, now
        item.attempts += 1
        self._sent[item.number] = item
        return item.message

    def send_delay(self, now: float) -> float | None:
        """Seconds until a message can be sent; None if none is waiting."""
        return max(0.0, self._paused_until - now) if self._unsent else None

    def record(self, response: Any, now: float) -> None:
        """Records the outcomes in a response; items to be resent stay without an outcome."""
        for outcome in response.outcomes:
            item = self._sent.pop(outcome.sequence_id, None)
            if item is None:
                continue  # never sent, or answered before: our servers do not do that
            if outcome.HasField("response"):
                self._last_answer = now
                item.outcome = self._questions.read(outcome.response, item.shape)
            else:
                self._record_failure(item, statuses.error_of(outcome.failure), now)

    def unsend_all(self) -> None:
        """The stream is lost: all sent items without an outcome become unsent again."""
        self._unsent.extendleft(reversed(self._sent.values()))
        self._sent.clear()

    def take(self) -> list[A | LikelyError]:
        """Takes the outcomes that are next in the feed's order."""
        outcomes: list[A | LikelyError] = []
        for number, item in list(self._open.items()):
            if item.outcome is None:
                break
            del self._open[number]
            outcomes.append(item.outcome)
        return outcomes

    def time_left(self, now: float) -> float:
        """Seconds until the timeout for the next answer; the whole timeout if none is due."""
        if not self._sent:
            return self._timeout
        return max(next(iter(self._sent.values())).last, self._last_answer) + self._timeout - now

    def _message(self, x: Pixels, number: int) -> Any:
        request = self._questions.ask(x, self._questions.version)
        message = self._questions.stream(sequence_id=number, request=request)
        # A larger one would end the stream.
        return plans.require_size(message, self._questions.max_bytes)

    def _record_failure(self, item: _Item, error: LikelyError, now: float) -> None:
        """Records the error as outcome, unless the item can be resent within its timeout.

        The timeout starts again with each answer: as long as other items are answered, this one
        can be resent.
        """
        if self._retries and isinstance(error, Overloaded | Unavailable):
            named = error.retry_after
            again = now + (delay(item.attempts) if named is None else named)
            if again < max(item.first, self._last_answer) + self._timeout:
                self._paused_until = max(self._paused_until, again)
                self._unsent.appendleft(item)
                return
        item.outcome = error


def delay(attempts: int) -> float:
    """Backoff in seconds before the next attempt, after this number of attempts."""
    return min(LONGEST_DELAY, FIRST_DELAY * DELAY_GROWTH ** (attempts - 1))
