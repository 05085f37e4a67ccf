"""How much later than an answer's estimate its deadline must be, so that few answers are late."""

from __future__ import annotations

LEAST, MOST = 1.25, 2.0  # bounds of the multiple of the estimate
MISSED = 0.005  # fraction of the answers that may take longer
MIN_ESTIMATE = 0.01  # seconds; shorter ones are ignored, as their errors are mostly the clock's
_STEP = 0.1


class Headroom:
    """A multiple of the estimate that one answer in two hundred exceeds in the long run.

    The accuracy of an estimate depends on what else uses the cores, and that changes. Each answer
    that exceeds the multiple therefore raises it by a large step, and each other answer lowers it
    by a small one. Between the bounds, the fraction of answers that exceed it converges to
    `MISSED`, whatever the distribution, as in adaptive conformal inference (Gibbs and Candès, 2021,
    https://arxiv.org/abs/2106.00170).

    Attributes:
        times: the multiple, between `LEAST` and `MOST`; it starts at `MOST`.
    """

    def __init__(self) -> None:
        self.times = MOST

    def answered(self, estimate: float, seconds: float) -> None:
        """Learns from an answer; ignores estimates below `MIN_ESTIMATE`, including 0 for none.

        Args:
            estimate: seconds that the answer was expected to take.
            seconds: seconds that it took.
        """
        if estimate >= MIN_ESTIMATE:
            self._seen(missed=seconds > self.times * estimate)

    def missed(self, estimate: float) -> None:
        """Learns that a request was admitted, but its deadline came before its answer."""
        if estimate >= MIN_ESTIMATE:
            self._seen(missed=True)

    def _seen(self, *, missed: bool) -> None:
        self.times = min(MOST, max(LEAST, self.times + _STEP * (missed - MISSED)))
