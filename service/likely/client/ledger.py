"""What a client has asked on a stream: what is to be sent, what has its answer, what is next."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Generic

import numpy.typing as npt

from likely import statuses
from likely.answers import A, Pixels
from likely.client import plans, values
from likely.errors import LikelyError, Overloaded, Unavailable

WINDOW = 128  # messages that have no answer yet
FIRST_DELAY, DELAY_GROWTH, LONGEST_DELAY = 0.2, 2.0, 5.0  # seconds before one more attempt


@dataclass(slots=True, eq=False)
class _Item:
    """One item of a feed; when it was sent for the first time, and for the last."""

    number: int
    message: Any = None
    shape: tuple[int, ...] = ()
    first: float = 0.0
    last: float = 0.0
    attempts: int = 0
    outcome: Any = None


class Ledger(Generic[A]):
    """The items of one feed, in their order; does no input or output, and takes no time.

    Times are seconds of one clock that only grows.
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
            questions: how an item is asked about.
            timeout: seconds that the next answer may take, counted from the one before.
            retries: whether an item that is refused for now is asked again.
            window: messages that may be without an answer.
        """
        self._questions: plans.Questions[A] = questions
        self._timeout = timeout
        self._retries = retries
        self._window = window
        self._count = 0
        self._open: dict[int, _Item] = {}  # in their order
        self._unsent: deque[_Item] = deque()
        self._sent: dict[int, _Item] = {}  # in the order in which they were sent
        self._quiet = 0.0  # until when the server wants to be left alone
        self._heard = 0.0  # when an item was answered last; a refusal for now is no answer

    def __len__(self) -> int:
        """How many items have been added and not been taken."""
        return len(self._open)

    @property
    def has_room(self) -> bool:
        """Whether one more may be added."""
        return len(self._open) < self._window

    def add(self, images: npt.ArrayLike) -> None:
        """Adds the next item; one that is no pictures, or too large, has its outcome already."""
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
        """The message that is to be sent now, or None."""
        if not self._unsent or now < self._quiet:
            return None
        item = self._unsent.popleft()
        item.first, item.last = item.first or now, now
        item.attempts += 1
        self._sent[item.number] = item
        return item.message

    def wait(self, now: float) -> float | None:
        """Seconds until a message is to be sent; None if there is none."""
        return max(0.0, self._quiet - now) if self._unsent else None

    def answered(self, response: Any, now: float) -> None:
        """Takes a message of answers; what is to be asked again has no outcome yet."""
        for outcome in response.outcomes:
            item = self._sent.pop(outcome.sequence_id, None)
            if item is None:
                continue  # not asked, or answered already: no server of ours says that
            if outcome.HasField("response"):
                self._heard = now
                item.outcome = self._questions.read(outcome.response, item.shape)
            else:
                self._failed(item, statuses.error_of(outcome.failure), now)

    def lost(self) -> None:
        """The stream is gone: what was sent and has no answer is to be sent again."""
        self._unsent.extendleft(reversed(self._sent.values()))
        self._sent.clear()

    def take(self) -> list[A | LikelyError]:
        """The outcomes that are next in the feed's order."""
        found: list[A | LikelyError] = []
        for number, item in list(self._open.items()):
            if item.outcome is None:
                break
            del self._open[number]
            found.append(item.outcome)
        return found

    def left(self, now: float) -> float:
        """Seconds in which there has to be an answer; all of them if none is waited for."""
        if not self._sent:
            return self._timeout
        return max(next(iter(self._sent.values())).last, self._heard) + self._timeout - now

    def _message(self, x: Pixels, number: int) -> Any:
        request = self._questions.ask(x, self._questions.version)
        message = self._questions.stream(sequence_id=number, request=request)
        return plans.within(message, self._questions.most)  # or the whole stream would end

    def _failed(self, item: _Item, error: LikelyError, now: float) -> None:
        """Keeps the error, unless the item is worth another attempt within its time.

        While others are answered there is time: it waits its turn.
        """
        if self._retries and isinstance(error, Overloaded | Unavailable):
            named = error.retry_after
            again = now + (delay(item.attempts) if named is None else named)
            if again < max(item.first, self._heard) + self._timeout:
                self._quiet = max(self._quiet, again)
                self._unsent.appendleft(item)
                return
        item.outcome = error


def delay(attempts: int) -> float:
    """Seconds before one more attempt, after so many."""
    return min(LONGEST_DELAY, FIRST_DELAY * DELAY_GROWTH ** (attempts - 1))
