"""Limits of a queue and quotas of clients; requests beyond them are refused at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from likely.batching import callers
from likely.batching.traffic import Traffic
from likely.errors import Overloaded, Unavailable

MIN_DELAY, MAX_DELAY = 0.05, 30.0  # bounds of the delay that refused callers are told, in seconds
_NO_CHARGE = nullcontext()


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits of one graph's queue. A request of any size may wait if it is the only one.

    Attributes:
        rows: rows of all waiting requests together.
        nbytes: bytes of these rows.
    """

    rows: int = 4096
    nbytes: int = 64 << 20


class Quota:
    """A limit on the pictures per second that each client may ask for; a token bucket each."""

    def __init__(
        self,
        rate: float = 0.0,
        burst: int = 1,
        clock: Callable[[], float] = time.monotonic,
        *,
        traffic: Traffic | None = None,
    ) -> None:
        """Creates a quota that applies to each client separately.

        Args:
            rate: pictures per second; 0 for no limit.
            burst: capacity of a bucket: pictures that may come at once after a pause. A larger
                request is accepted only if the bucket is full, and leaves it in debt.
            clock: returns monotonic time in seconds.
            traffic: metrics in which refusals are counted.
        """
        self._traffic = traffic or Traffic()
        self._rate = rate
        self._burst = burst
        self._clock = clock
        # Per client: how many pictures its bucket lacked to be full, and when that was.
        self._owed: dict[str, tuple[float, float]] = {}
        self._swept = clock()

    def take(self, client: str, rows: int) -> None:
        """Charges pictures to the client's quota.

        Raises:
            Overloaded: the quota is used up; the error says after how many seconds to retry.
        """
        if not self._rate or not rows:
            return
        now = self._clock()
        owed = self._owing(client, now)
        excess = owed + min(rows, self._burst) - self._burst
        if excess > 1e-9:  # allows for rounding
            raise Overloaded(
                f"{rows} pictures are more than is left of the quota of {self._rate:g} a second, "
                f"{self._burst} at once",
                max(MIN_DELAY, excess / self._rate),
            )
        self._forget_full_buckets(now)
        self._owed[client] = owed + rows, now

    def charged(self, rows: int, model: str) -> AbstractContextManager[None]:
        """Charges the current caller as `take` does; gives back what a refused request cost.

        The pictures are given back if the body of the context raises `Overloaded` or
        `Unavailable`. They are also given back if it fails in any way and the caller is not
        `counted`: the request is then retried in halves, which are charged themselves.

        Args:
            rows: number of pictures.
            model: name of the model, for the metric of refusals.

        Raises:
            Overloaded: the quota is used up.
        """
        if not self._rate:
            return _NO_CHARGE
        caller = callers.current()
        try:
            self.take(caller.client, rows)
        except Overloaded:
            if caller.counted:
                self._traffic.shed.labels(model, "quota").inc()
            raise
        return self._refund_if_refused(caller.client, rows)

    @contextmanager
    def _refund_if_refused(self, client: str, rows: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if isinstance(error, Overloaded | Unavailable) or not callers.current().counted:
                now = self._clock()
                self._owed[client] = max(0.0, self._owing(client, now) - rows), now
            raise

    @property
    def remembered(self) -> int:
        """Number of clients remembered: those whose bucket may not be full."""
        return len(self._owed)

    def _owing(self, client: str, now: float) -> float:
        owed, since = self._owed.get(client, (0.0, now))
        return max(0.0, owed - (now - since) * self._rate)

    def _forget_full_buckets(self, now: float) -> None:
        """Forgets the clients whose buckets are full again, from time to time."""
        if now - self._swept < max(1.0, self._burst / self._rate):
            return
        self._swept = now
        self._owed = {c: entry for c, entry in self._owed.items() if self._owing(c, now) > 0}


def retry_delay(seconds: float) -> float:
    """Seconds after which a refused caller should retry.

    Args:
        seconds: estimated time until the queue has been worked off.
    """
    return min(MAX_DELAY, max(MIN_DELAY, seconds))
