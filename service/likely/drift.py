"""Whether served pictures are still like those of the calibration: a test that may always be read.

A picture's score is ranked against n calibration scores: r of them are at least as large. If
calibration and served pictures are exchangeable, the ranks follow a Polya urn exactly: having
served t pictures of which N(a) had rank a, the next one has rank a with probability

    (1 + N(a)) / (n + 1 + t),        a = 0, ..., n

(Gazin, Blanchard and Roquain, 2024, https://arxiv.org/abs/2310.18108). That is the law which the
bets below are fair under, and not the uniform one: given one calibration set, its p-values are
uniform but for an error of about 1 / sqrt(n), and a martingale that bets against uniformity
wins from that error alone, sooner or later.

Ranks are gathered into bins. Each bettor j has its own law q_j of the next bin, and multiplies
its capital by q_j(bin) / urn(bin): on average, as the urn has it, by 1. Capital that is not
staked yet is kept in reserve: after t pictures 1 / (1 + ln(1 + t)) of it, the rest having gone
to the bettors in equal shares as time went by. So the capital M begins with 1, is a martingale,
never falls below the reserve however long all is well (the usual way would be down to nothing),
and a change is bet on from whenever it comes (a mixture over the time of the change, as
in Vovk et al., 2021, https://arxiv.org/abs/2102.10439, with jumps that become rarer). By
Ville's inequality,

    P(M >= 1 / level at any time, ever) <= level,

over both the drawing of the calibration pictures and all served ones. For the calibration set
that there is, by Markov's inequality: with probability 1 - level / c over its drawing, what is
served of the same distribution raises an alarm with a probability of at most c.

Nothing is assumed of the scores' distribution; ties are broken at random. What is assumed is that
well-behaved pictures are exchangeable: neither repeated nor sorted.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from likely.answers import Doubles

Bins = npt.NDArray[np.int64]

# Shares of the calibration that are more unusual than a bin's end; finest where outliers are.
ENDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98,
        0.99, 0.995, 0.998)  # fmt: skip
SHARES = (0.05, 0.2, 0.6)  # of pictures that a bettor takes for changed
POWERS = (0.05, 0.3)  # a of the densities a p^(a - 1) that they are taken to have
MEMORY = 256  # pictures that the learning bettors learn from at a time
BELIEF = 32.0  # pictures that what they believe beforehand counts as


class Reference:
    """The calibration that is compared with: its bins, and what bettors think of them.

    Attributes:
        cells: float64 (bins,), how many of the n + 1 ranks each bin has, the most unusual first.
        laws: float64 (bettors, bins), of the next bin, of the bettors that learn nothing.
    """

    def __init__(self, scores: Doubles) -> None:
        """Bins of calibration scores.

        Args:
            scores: float64 (n,), large is unusual, n at least 1.
        """
        n = len(scores)
        # As a pair with a random number no score equals another one.
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
        """The urn's law of the first bin (bins,)."""
        shares: Doubles = self.cells / self.cells.sum()
        return shares

    def bins(self, scores: Doubles, rng: np.random.Generator) -> Bins:
        """The bin of each score (n,); 0 has the most unusual ones."""
        ties = rng.random(len(scores))[:, None]
        column = scores[:, None]
        beyond = (column > self._ends) | ((column == self._ends) & (ties > self._end_ties))
        found: Bins = len(self._ends) - beyond.sum(1)
        return found

    def _laws(self, ends: Doubles) -> Doubles:
        unusual = [np.diff(ends**a) for a in POWERS]
        usual = [np.diff(-((1 - ends) ** a)) for a in POWERS]
        middle = [np.diff(np.clip((ends - low) / 0.2, 0, 1)) for low in (0.3, 0.5)]
        changed = np.stack([*unusual, *usual, *middle])
        mixed = [(1 - share) * self.shares + share * changed for share in SHARES]
        laws: Doubles = np.concatenate(mixed)
        return laws


class Martingale:
    """The capital won by betting that served pictures are unlike the calibration's.

    Attributes:
        log: ln M after the last picture; at most 0 or thereabouts while all is well.
        highest: the largest that ln M has ever been.
        pictures: how many have been bet on.
    """

    def __init__(self, reference: Reference, seed: int = 0) -> None:
        """A martingale that begins with 1.

        Args:
            reference: what is compared with.
            seed: of the numbers that break ties. They are others than the calibration's,
                whatever the seed: the urn is the law of ranks only where both are independent.
        """
        self.log = 0.0
        self.highest = 0.0
        self.pictures = 0
        self._reference = reference
        self._rng = np.random.default_rng(np.random.SeedSequence(seed).spawn(1)[0])
        bins = len(reference.cells)
        self._urn = reference.cells.copy()
        self._recent = np.zeros((2, bins))  # counts of the last whole memory, and of this one
        self._laws = self._learnt()
        self._capital = np.full(len(self._laws), -np.inf)  # logarithms

    def bet(self, scores: Doubles) -> None:
        """Bets on pictures in the order that they were served in.

        Args:
            scores: float64 (m,), finite; the same score as the calibration's.
        """
        bins = self._reference.bins(scores, self._rng)
        while len(bins):
            room = MEMORY - self.pictures % MEMORY
            self._bet(bins[:room])
            bins = bins[room:]
            if self.pictures % MEMORY == 0:
                self._recent = np.stack((self._recent[1], np.zeros_like(self._recent[1])))
                self._laws = self._learnt()

    def _bet(self, bins: Bins) -> None:
        steps = np.arange(len(bins))
        seen = np.zeros((len(bins) + 1, len(self._urn)))
        seen[steps + 1, bins] = 1
        seen = seen.cumsum(0)
        fair = (self._urn[bins] + seen[steps, bins]) / (self._urn.sum() + steps)
        won = np.log(self._laws[:, bins] / fair).cumsum(1)
        # C_t = (C_(t-1) + stake_t) * won_t / won_(t-1), summed up in logarithms.
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

    def _learnt(self) -> Doubles:
        """All bettors' laws, those that learn from the last pictures behind the others."""
        counts, shares = self._recent[0], self._reference.shares
        recent = (BELIEF * shares + counts) / (BELIEF + counts.sum())
        mixed = [(1 - share) * shares + share * recent for share in (0.3, 1.0)]
        laws: Doubles = np.concatenate((self._reference.laws, mixed))
        return laws


def _reserve(times: Doubles) -> Doubles:
    """The share of the first capital that is not staked yet after so many pictures."""
    reserve: Doubles = 1 / (1 + np.log1p(times))
    return reserve
