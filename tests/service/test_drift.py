"""The test for drift: fair to what it is fair to, never too sure, quick where there is a change."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from likely.answers import Doubles
from likely.drift import Martingale, Reference

LEVEL = 1e-3
THRESHOLD = math.log(2 / LEVEL)  # two methods share a level
REPEATS, SERVED = 200, 10_000


def scores(rng: np.random.Generator, n: int, outliers: float = 0.0) -> Doubles:
    """Scores of so many pictures, a share of them outliers."""
    found = rng.normal(size=n)
    unlike = rng.random(n) < outliers
    found[unlike] = rng.normal(4, 1, unlike.sum())
    return found


def until_alarm(test: Martingale, served: Doubles) -> int:
    """How many pictures it takes until there is an alarm."""
    for count, score in enumerate(served, start=1):
        test.bet(np.array([score]))
        if test.highest >= THRESHOLD:
            return count
    return len(served) + 1


@pytest.mark.parametrize("calibration", [260, 5000])
def test_false_alarms_are_as_rare_as_stated_at_any_time(calibration: int) -> None:
    highest = []
    for repeat in range(REPEATS):
        rng = np.random.default_rng([repeat, calibration])
        test = Martingale(Reference(rng.normal(size=calibration)))
        test.bet(rng.normal(size=SERVED))
        highest.append(test.highest)
    # The level itself would be seen once in 1 / LEVEL repeats; coarser ones are held, too.
    for level in (LEVEL, 0.01, 0.05, 0.2):
        alarms = np.mean(np.array(highest) >= -math.log(level))
        assert alarms <= level + 2.5 * math.sqrt(level * (1 - level) / REPEATS), level
    assert np.mean(np.array(highest) >= THRESHOLD) <= LEVEL


def test_betting_against_uniform_p_values_would_alarm_falsely() -> None:
    # What the urn is for: the same bets against the uniform law win from the calibration's error.
    rng = np.random.default_rng(1)
    reference = Reference(rng.normal(size=260))
    bins = reference.bins(rng.normal(size=100_000), rng)
    frequent = np.bincount(bins, minlength=len(reference.cells)) / len(bins)
    law = (frequent + reference.shares) / 2
    assert np.log(law / reference.shares)[bins].sum() > 10 * THRESHOLD
    test = Martingale(reference)
    test.bet(rng.normal(size=100_000))
    assert test.highest < THRESHOLD


@pytest.mark.parametrize("before", [0, 2000])
@pytest.mark.parametrize("calibration", [260, 5000])
def test_a_shift_to_a_fifth_of_outliers_is_caught_within_200(before: int, calibration: int) -> None:
    delays = []
    for repeat in range(31):
        rng = np.random.default_rng([repeat, before, calibration])
        test = Martingale(Reference(rng.normal(size=calibration)))
        test.bet(scores(rng, before))
        delays.append(until_alarm(test, scores(rng, 1000, outliers=0.2)))
    assert np.median(delays) <= 100


@pytest.mark.parametrize("mean", [-3.0, 1.0])
def test_other_changes_are_caught_too(mean: float) -> None:
    rng = np.random.default_rng(3)
    test = Martingale(Reference(rng.normal(size=5000)))
    test.bet(rng.normal(size=3000))
    assert until_alarm(test, rng.normal(mean, 1, 1000)) <= 200


def test_capital_is_never_all_lost() -> None:
    rng = np.random.default_rng(4)
    test = Martingale(Reference(rng.normal(size=1000)))
    test.bet(rng.normal(size=200_000))
    assert test.log >= -math.log(1 + math.log1p(200_000))


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.integers(0, 2**32))
def test_it_does_not_matter_how_pictures_are_gathered(parts: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    reference = Reference(rng.normal(size=300))
    served = rng.normal(0.3, 1.2, sum(parts))
    whole, divided = Martingale(reference), Martingale(reference)
    whole.bet(served)
    for part in np.split(served, np.cumsum(parts)[:-1]):
        divided.bet(part)
    assert divided.log == pytest.approx(whole.log, abs=1e-9)
    assert divided.highest == pytest.approx(whole.highest, abs=1e-9)
    assert divided.pictures == whole.pictures


@pytest.mark.parametrize("n", [1, 3, 19])
def test_every_bet_is_fair(n: int) -> None:
    # Over every rank that the next picture may have, as the urn has it, the capital's mean is
    # what it was; so it is after any pictures, here drawn from another law.
    rng = np.random.default_rng(n)
    calibration = rng.normal(size=n)
    reference = Reference(calibration)
    between = np.concatenate(([-9.0], np.sort(calibration), [9.0]))
    ranks = ((between[1:] + between[:-1]) / 2)[::-1]  # a score of each rank
    past: list[float] = []
    for _ in range(30):
        counts = 1 + np.array([np.sum(np.array(past) == score) for score in ranks])
        mean = 0.0
        for score, share in zip(ranks, counts / counts.sum(), strict=True):
            test = Martingale(reference)
            test.bet(np.array([*past, score]))
            mean += share * math.exp(test.log)
        before = Martingale(reference)
        before.bet(np.array(past, np.float64))
        assert mean == pytest.approx(math.exp(before.log), rel=1e-9)
        past.append(float(ranks[rng.integers(min(3, n + 1))]))


def test_ties_are_fair() -> None:
    highest = []
    for repeat in range(100):
        rng = np.random.default_rng([repeat, 5])
        test = Martingale(Reference(rng.integers(0, 4, 300).astype(float)), seed=repeat)
        test.bet(rng.integers(0, 4, 5000).astype(float))
        highest.append(test.highest)
    assert np.mean(np.array(highest) >= -math.log(0.05)) <= 0.12


@pytest.mark.parametrize("n", [200, 300, 500])
def test_ties_of_served_pictures_are_broken_by_other_numbers_than_the_calibrations(n: int) -> None:
    # All scores are one: broken by the same numbers, the served ranks would be the calibration's.
    test = Martingale(Reference(np.zeros(n)))
    test.bet(np.zeros(2 * n))
    assert test.highest < math.log(3)


def test_bins_hold_the_ranks_that_they_say() -> None:
    rng = np.random.default_rng(6)
    calibration = rng.normal(size=999)
    reference = Reference(calibration)
    served = rng.normal(size=500)
    ranks = (calibration >= served[:, None]).sum(1)
    ends = np.cumsum(reference.cells)
    assert np.array_equal(reference.bins(served, rng), np.searchsorted(ends, ranks, side="right"))
    assert ends[-1] == 1000
    assert np.allclose(reference.laws.sum(1), 1)
    assert (reference.laws > 0).all()
