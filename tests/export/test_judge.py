"""The independent judge: pictures of any size have one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from likely_export.judge import train_judge


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 9), (3, 2, 5)])
def test_small_pictures_are_judged_too(shape: tuple[int, int, int]) -> None:
    x = np.random.default_rng(0).integers(0, 9, (20, *shape)).astype(np.uint8)
    judge = train_judge(x, np.arange(20) % 2, 9, 2, steps=2)
    assert judge.posterior(x).sum(1) == pytest.approx(np.ones(20), abs=1e-6)


@pytest.mark.parametrize("side", [8, 28, 32])
def test_of_sides_that_halve_twice_all_is_seen(side: int) -> None:
    x = np.random.default_rng(1).integers(0, 9, (10, 1, side, side)).astype(np.uint8)
    judge = train_judge(x, np.arange(10) % 2, 9, 2, steps=1)
    with torch.no_grad():
        assert judge.features[:-4](torch.zeros(1, 1, side, side)).shape[2:] == (
            side // 4,
            side // 4,
        )
