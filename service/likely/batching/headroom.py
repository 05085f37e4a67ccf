"""How far a deadline must lie beyond the estimate of an answer, so that few answers miss it."""

from __future__ import annotations

LEAST, MOST = 1.25, 2.0  # times the estimate
MISSED = 0.005  # of the answers, those that may take longer
TELLS = 0.01  # seconds: of a shorter estimate, the error is mostly the clock's noise
_STEP = 0.1


class Headroom:
    """A multiple of the estimate, which one answer in two hundred exceeds in the long run.

    How good an estimate is depends on what else wants the cores, and that changes. So each answer
    that exceeds the multiple raises it by much, and each that does not lowers it by little:
    between its bounds, the share that exceeds it settles at `MISSED`, whatever the distribution,
    as in adaptive conformal inference (Gibbs and Candès, 2021, https://arxiv.org/abs/2106.00170).

    Attributes:
        times: the multiple, from `LEAST` to `MOST`, where it begins.
    """

    def __init__(self) -> None:
        self.times = MOST

    def answered(self, estimate: float, seconds: float) -> None:
        """Learns from an answer that took so many seconds; without an estimate, nothing."""
        if estimate >= TELLS:
            self._seen(missed=seconds > self.times * estimate)

    def missed(self, estimate: float) -> None:
        """Learns that a deadline, once thought far enough, came before the answer."""
        if estimate >= TELLS:
            self._seen(missed=True)

    def _seen(self, *, missed: bool) -> None:
        self.times = min(MOST, max(LEAST, self.times + _STEP * (missed - MISSED)))
