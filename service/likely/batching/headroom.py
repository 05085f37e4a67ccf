"""How much later than an answer's estimate its deadline must be, so that few answers are late."""

from __future__ import annotations

MIN_MULTIPLE, MAX_MULTIPLE = 1.25, 2.0  # bounds of the multiple of the estimate
MISS_RATE = 0.005  # fraction of the answers that may take longer
MIN_ESTIMATE = 0.01  # seconds; shorter ones are ignored, as their errors are mostly the clock's
_STEP = 0.1


class Headroom:
    """A multiple of the estimate that one answer in two hundred exceeds in the long run.

    The accuracy of an estimate depends on what else uses the cores, and that changes. Each answer
    that exceeds the multiple therefore raises it by a large step, and each other answer lowers it
    by a small one. Between the bounds, the fraction of answers that exceed it converges to
    `MISS_RATE`, whatever the distribution, as in adaptive conformal inference (Gibbs and Candès,
    2021, https://arxiv.org/abs/2106.00170).

    Attributes:
        multiple: the multiple, between `MIN_MULTIPLE` and `MAX_MULTIPLE`; it starts at
            `MAX_MULTIPLE`.
    """

    def __init__(self) -> None:
        self.multiple = MAX_MULTIPLE

    def record_answer(self, estimate: float, seconds: float) -> None:
        """Learns from an answer; ignores estimates below `MIN_ESTIMATE`, including 0 for none.

        Args:
            estimate: seconds that the answer was expected to take.
            seconds: seconds that it took.
        """
        if estimate >= MIN_ESTIMATE:
            self._update(missed=seconds > self.multiple * estimate)

    def record_miss(self, estimate: float) -> None:
        """Learns that a request was admitted, but its deadline came before its answer."""
        if estimate >= MIN_ESTIMATE:
            self._update(missed=True)

    def _update(self, *, missed: bool) -> None:
        self.multiple = min(
            MAX_MULTIPLE, max(MIN_MULTIPLE, self.multiple + _STEP * (missed - MISS_RATE))
        )
