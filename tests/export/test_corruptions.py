"""Corruptions: pictures of the same kind, changed, the same every time."""

import hashlib
import itertools

import numpy as np
import pytest

from likely.answers import Pixels
from likely.errors import InvalidInput
from likely_export.corruptions import (
    CHOOSING,
    HARD,
    PANEL,
    corrupt,
    corrupt_for_contrast,
    corrupt_for_report,
)

SETS = (PANEL, HARD, CHOOSING)
GREY = {"salt": "aaf158eae108119d", "independent_pixels": "1465089b8ef09068"}
EVERY = [name for names in SETS for name in names]


def shapes(levels: int, shape: tuple[int, int, int]) -> Pixels:
    """Discs off the middle, on a background of 0."""
    c, h, w = shape
    rng = np.random.default_rng(0)
    i, j = np.indices((h, w))
    out = np.zeros((12, c, h, w), np.uint8)
    for picture in out:
        middle = rng.uniform(0.3, 0.6, 2) * (h, w)
        disc = (i - middle[0]) ** 2 + 2 * (j - middle[1]) ** 2 < (h / 3) ** 2
        picture[:, disc] = rng.integers(1, levels, (c, int(disc.sum())))
    return out


def test_what_chooses_is_not_what_is_reported() -> None:
    for one, other in itertools.combinations(SETS, 2):
        assert not set(one) & set(other)
        assert not set(one.values()) & set(other.values())


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    ("levels", "shape"), [(256, (1, 28, 28)), (17, (1, 8, 8)), (4, (3, 16, 12))]
)
def test_pictures_stay_pictures(name: str, levels: int, shape: tuple[int, int, int]) -> None:
    x = shapes(levels, shape)
    kept = x.copy()
    found = corrupt(name, x, levels)
    assert found.shape == x.shape and found.dtype == np.uint8 and found.max() < levels
    assert np.array_equal(x, kept)
    assert np.array_equal(found, corrupt(name, x, levels))
    assert not np.array_equal(found, x)


@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 5), (3, 4, 2)])
def test_the_smallest_pictures_are_corrupted_too(name: str, shape: tuple[int, int, int]) -> None:
    for n in (0, 1, 3):
        x = np.full((n, *shape), 3, np.uint8)
        assert corrupt(name, x, 4).shape == x.shape


def test_some_do_exactly_this() -> None:
    x = shapes(256, (1, 28, 28))
    assert not corrupt("blank", x, 256).any()
    assert np.array_equal(255 - corrupt("inverted", x, 256), x)
    assert np.array_equal(corrupt("flipped_left_right", x, 256)[..., ::-1], x)
    assert np.all(corrupt("eroded", x, 256) <= x) and np.all(corrupt("dilated", x, 256) >= x)
    assert np.all(corrupt("overlay", x, 256) >= x)
    assert np.array_equal(np.sort(corrupt("patch_swap", x, 256), None), np.sort(x, None))
    shifted = corrupt("shifted_6", x, 256).astype(int)
    assert shifted.sum() <= x.astype(int).sum()


def test_pixels_are_chosen_once_for_all_channels() -> None:
    x = np.random.default_rng(0).integers(0, 255, (40, 3, 16, 12)).astype(np.uint8)
    salted = corrupt("salt", x, 256)
    white = (salted == 255).all(1)
    assert np.array_equal(np.any(salted != x, 1), white)
    assert white.mean() == pytest.approx(0.03, abs=0.005)
    mixed = corrupt("independent_pixels", x, 256)
    for at in np.ndindex(16, 12):
        colours = {tuple(colour) for colour in x[:, :, *at].tolist()}
        assert {tuple(colour) for colour in mixed[:, :, *at].tolist()} <= colours


def test_grey_pictures_are_corrupted_as_ever() -> None:
    x = np.random.default_rng(0).integers(0, 255, (4, 1, 8, 6)).astype(np.uint8)
    for name, before in GREY.items():
        assert hashlib.sha256(corrupt(name, x, 256).tobytes()).hexdigest()[:16] == before


def test_what_tells_nothing_on_two_levels_is_left_out() -> None:
    x = shapes(2, (1, 28, 28))
    many = np.concatenate([x] * 10)
    made, original_rows, left_out = corrupt_for_contrast(tuple(CHOOSING), many, 2)
    assert left_out == ("grainy", "sharpened")
    rows = np.arange(len(many)).reshape(len(CHOOSING), -1)
    kept = [index for index, name in enumerate(CHOOSING) if name not in left_out]
    assert np.array_equal(original_rows, rows[kept].ravel()) and len(made) == len(original_rows)
    rough = x ^ (np.random.default_rng(1).random(x.shape) < 0.03)
    assert set(corrupt_for_report(rough.astype(np.uint8), 2)) == {*PANEL, *HARD} - {"half_contrast"}
    with pytest.raises(InvalidInput, match=r"contrast: pictures of 2 levels .* grainy, sharpened"):
        corrupt_for_contrast(("grainy", "sharpened"), x, 2)
    with pytest.raises(InvalidInput, match="stay as they are"):  # of one picture one part is empty
        corrupt_for_contrast(("grainy", "sharpened"), x[:1], 2)


def test_on_many_levels_all_of_them_tell_something() -> None:
    x = np.concatenate([shapes(256, (1, 28, 28))] * 10)
    made, original_rows, left_out = corrupt_for_contrast(tuple(CHOOSING), x, 256)
    parts = np.array_split(x, len(CHOOSING))
    expected = [corrupt(name, part, 256) for name, part in zip(CHOOSING, parts, strict=True)]
    assert np.array_equal(made, np.concatenate(expected)) and left_out == ()
    assert np.array_equal(original_rows, np.arange(len(x)))
    assert list(corrupt_for_report(x, 256)) == [*PANEL, *HARD]
