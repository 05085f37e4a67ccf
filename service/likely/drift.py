"""Tests, at any time, whether served pictures still resemble the calibration pictures.

A picture's rank is the number of the n calibration scores that are at least as large as its
score. If calibration and served pictures are exchangeable, the ranks follow a Polya urn exactly:
after t served pictures, of which N(a) had rank a, the next one has rank a with probability

    (1 + N(a)) / (n + 1 + t),        a = 0, ..., n

(Gazin, Blanchard and Roquain, 2024, https://arxiv.org/abs/2310.18108). The bets below are fair
under this law, not under the uniform one. Given one calibration set, p-values are uniform only
up to an error of about 1 / sqrt(n), and a martingale that bets against uniformity sooner or later
wins from that error alone.

Ranks are grouped into bins. Each bettor j has its own law q_j of the next bin, and multiplies its
capital by q_j(bin) / urn(bin), whose mean under the urn is 1. Capital that is not staked yet is
kept in reserve: after t pictures, the reserve is 1 / (1 + ln(1 + t)) of the initial capital. The
rest has been paid to the bettors over time, in equal shares. The total capital M starts at 1 and
is a martingale. It never falls below the reserve, however long nothing changes (without a
reserve, it would tend to 0). A change is bet on whenever it comes (a mixture over the time of the
change, as in Vovk et al., 2021, https://arxiv.org/abs/2102.10439, with jumps that become rarer).
By Ville's inequality,

    P(M >= 1 / level at any time, ever) <= level,

over the draw of both the calibration pictures and all served pictures. For one given calibration
set, by Markov's inequality: with probability 1 - level / c over the draw of that set, served
pictures of the same distribution raise an alarm with a probability of at most c.

Nothing is assumed about the distribution of the scores; ties are broken at random. The assumption
is that in-distribution pictures are exchangeable: neither repeated nor sorted.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from likely.answers import Doubles

Bins = npt.NDArray[np.int64]

# Ends of the bins, as shares of the calibration scores beyond them; finest where outliers are.
ENDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98,
        0.99, 0.995, 0.998)  # fmt: skip
SHARES = (0.05, 0.2, 0.6)  # shares of changed pictures that bettors assume
POWERS = (0.05, 0.3)  # exponents a of the densities a p^(a - 1) that they assume for these
WINDOW = 256  # pictures in a window; learning bettors learn from the last complete window
PRIOR_WEIGHT = 32.0  # pictures that the prior law of a learning bettor counts as


class Reference:
    """Bins of the calibration scores, and the laws of the bettors that do not learn.

    Attributes:
        cells: float64 (bins,), how many of the n + 1 ranks lie in each bin, most unusual first.
        laws: float64 (bettors, bins), each such bettor's probabilities of the next bin.
    """

    def __init__(self, scores: Doubles) -> None:
        """Divides calibration scores into bins.

        Args:
            scores: float64 (n,), with n at least 1; large scores are unusual.
        """
        n = len(scores)
        # Scores are paired with random numbers, so that no two pairs are equal.
        ties = np.random.default_rng(0).random(n)
        order = np.lexsort((ties, scores))[::-1]
        ranks = np.unique(np.clip(np.round(np.array(ENDS) * (n + 1)).astype(int), 1, n))
        self._ends = scores[order][ranks - 1]
        self._end_ties = ties[order][ranks - 1]
        bounds = np.concatenate(([0], ranks, [n + 1]))
        self.cells = np.diff(bounds).astype(np.float64)
        self.laws = self._laws(bounds / (n + 1))

    @property
    def shares(self) -> Doubles:
        """The urn's probabilities of the first picture's bin, float64 (bins,)."""
        shares: Doubles = self.cells / self.cells.sum()
        return shares

    def bins(self, scores: Doubles, rng: np.random.Generator) -> Bins:
        """The bin of each score, int64 (n,); bin 0 has the most unusual scores."""
        ties = rng.random(len(scores))[:, None]
        column = scores[:, None]
        beyond = (column > self._ends) | ((column == self._ends) & (ties > self._end_ties))
        bins: Bins = len(self._ends) - beyond.sum(1)
        return bins

    def _laws(self, ends: Doubles) -> Doubles:
        unusual = [np.diff(ends**a) for a in POWERS]
        usual = [np.diff(-((1 - ends) ** a)) for a in POWERS]
        middle = [np.diff(np.clip((ends - low) / 0.2, 0, 1)) for low in (0.3, 0.5)]
        changed = np.stack([*unusual, *usual, *middle])
        mixed = [(1 - share) * self.shares + share * changed for share in SHARES]
        laws: Doubles = np.concatenate(mixed)
        return laws


class Martingale:
    """The capital won by betting that served pictures differ from the calibration pictures.

    Attributes:
        log: ln M after the last picture; about 0 or less while nothing changes.
        highest: the largest value that ln M has had.
        pictures: number of pictures that were bet on.
    """

    def __init__(self, reference: Reference, seed: int = 0) -> None:
        """Starts with a capital of 1.

        Args:
            reference: the calibration scores to compare with.
            seed: seed of the random numbers that break ties. With any seed, they differ from
                those of the calibration scores: the urn is the law of the ranks only if both
                are independent.
        """
        self.log = 0.0
        self.highest = 0.0
        self.pictures = 0
        self._reference = reference
        self._rng = np.random.default_rng(np.random.SeedSequence(seed).spawn(1)[0])
        bins = len(reference.cells)
        self._urn = reference.cells.copy()
        self._recent = np.zeros((2, bins))  # counts of the last whole window, and of this one
        self._laws = self._current_laws()
        self._capital = np.full(len(self._laws), -np.inf)  # logarithms

    def bet(self, scores: Doubles) -> None:
        """Bets on pictures, in the order in which they were served.

        Args:
            scores: float64 (m,), finite; computed in the same way as the calibration scores.
        """
        bins = self._reference.bins(scores, self._rng)
        while len(bins):
            room = WINDOW - self.pictures % WINDOW
            self._bet_in_window(bins[:room])
            bins = bins[room:]
            if self.pictures % WINDOW == 0:
                self._recent = np.stack((self._recent[1], np.zeros_like(self._recent[1])))
                self._laws = self._current_laws()

    def _bet_in_window(self, bins: Bins) -> None:
        steps = np.arange(len(bins))
        seen = np.zeros((len(bins) + 1, len(self._urn)))
        seen[steps + 1, bins] = 1
        seen = seen.cumsum(0)
        fair = (self._urn[bins] + seen[steps, bins]) / (self._urn.sum() + steps)
        won = np.log(self._laws[:, bins] / fair).cumsum(1)
        # C_t = (C_(t-1) + stake_t) * won_t / won_(t-1), accumulated in logarithms.
        times = np.arange(len(bins), dtype=np.float64) + (self.pictures + 1)
        stakes = np.log(_reserve(times - 1) * _reserve(times) * np.log1p(1 / times))
        before = np.concatenate((np.zeros((len(won), 1)), won[:, :-1]), 1)
        paid = stakes - np.log(len(won)) - before
        gathered = np.logaddexp.accumulate(np.concatenate((self._capital[:, None], paid), 1), 1)
        capital = gathered[:, 1:] + won
        logs = np.logaddexp(np.logaddexp.reduce(capital, 0), np.log(_reserve(times)))
        self._capital = capital[:, -1]
        self._urn += seen[-1]
        self._recent[1] += seen[-1]
        self.pictures += len(bins)
        self.log = float(logs[-1])
        self.highest = max(self.highest, float(logs.max()))

    def _current_laws(self) -> Doubles:
        """The laws of all bettors (bettors, bins); those that learn come last."""
        counts, shares = self._recent[0], self._reference.shares
        recent = (PRIOR_WEIGHT * shares + counts) / (PRIOR_WEIGHT + counts.sum())
        mixed = [(1 - share) * shares + share * recent for share in (0.3, 1.0)]
        laws: Doubles = np.concatenate((self._reference.laws, mixed))
        return laws


def _reserve(times: Doubles) -> Doubles:
    """The share of the initial capital that is still in reserve after t pictures, for each t."""
    reserve: Doubles = 1 / (1 + np.log1p(times))
    return reserve
