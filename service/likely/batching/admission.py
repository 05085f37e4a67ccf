"""How much may wait, and how much one client may ask for: the rest is refused at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from likely.batching import callers
from likely.batching.traffic import Traffic
from likely.errors import Overloaded, Unavailable

SOONEST, LATEST = 0.05, 30.0  # seconds after which refused callers are told to come again
_FREE = nullcontext()


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much may wait for one graph.

    Attributes:
        rows: of all requests together; one request may always wait alone.
        nbytes: of these rows.
    """

    rows: int = 4096
    nbytes: int = 64 << 20


class Quota:
    """How many pictures a second each client may ask for: a token bucket a client."""

    def __init__(
        self,
        rate: float = 0.0,
        burst: int = 1,
        clock: Callable[[], float] = time.monotonic,
        *,
        traffic: Traffic | None = None,
    ) -> None:
        """A quota for every client alike.

        Args:
            rate: pictures a second; 0 is no limit.
            burst: pictures that may come at once after a pause. A request of more waits for
                a full bucket, and leaves it in debt.
            clock: seconds that only grow.
            traffic: is told of what is refused.
        """
        self._traffic = traffic or Traffic()
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._owed: dict[str, tuple[float, float]] = {}  # pictures below a full bucket, and when
        self._swept = clock()

    def take(self, client: str, rows: int) -> None:
        """Counts pictures against the client's quota.

        Raises:
            Overloaded: the quota is spent; it says after how many seconds there is room.
        """
        if not self._rate or not rows:
            return
        now = self._clock()
        owed = self._owing(client, now)
        excess = owed + min(rows, self._burst) - self._burst
        if excess > 1e-9:  # sums of floats
            raise Overloaded(
                f"{rows} pictures are more than is left of the quota of {self._rate:g} a second, "
                f"{self._burst} at once",
                max(SOONEST, excess / self._rate),
            )
        self._sweep(now)
        self._owed[client] = owed + rows, now

    def charged(self, rows: int, model: str) -> AbstractContextManager[None]:
        """As `take`, for the block that this context encloses.

        If the block raises Overloaded or Unavailable, the pictures are given back. So they are
        if a merged request fails: its parts are asked, and counted, one by one.

        Args:
            rows: pictures that the caller of this task asks for.
            model: by whose name a refusal is told.

        Raises:
            Overloaded: the quota is spent.
        """
        if not self._rate:
            return _FREE
        caller = callers.current()
        try:
            self.take(caller.client, rows)
        except Overloaded:
            if caller.counted:
                self._traffic.shed.labels(model, "quota").inc()
            raise
        return self._unless_refused(caller.client, rows)

    @contextmanager
    def _unless_refused(self, client: str, rows: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if isinstance(error, Overloaded | Unavailable) or not callers.current().counted:
                now = self._clock()
                self._owed[client] = max(0.0, self._owing(client, now) - rows), now
            raise

    @property
    def remembered(self) -> int:
        """How many clients are remembered: those whose bucket is not full."""
        return len(self._owed)

    def _owing(self, client: str, now: float) -> float:
        owed, since = self._owed.get(client, (0.0, now))
        return max(0.0, owed - (now - since) * self._rate)

    def _sweep(self, now: float) -> None:
        """Forgets, once in a while, the clients whose buckets are full again."""
        if now - self._swept < max(1.0, self._burst / self._rate):
            return
        self._swept = now
        self._owed = {c: entry for c, entry in self._owed.items() if self._owing(c, now) > 0}


def patience(seconds: float) -> float:
    """After how many seconds a refused caller shall come again, from how long the queue is."""
    return min(LATEST, max(SOONEST, seconds))
