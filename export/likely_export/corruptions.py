"""Corruptions that take pictures out of distribution.

There are three sets. PANEL is reported; HARD, of pictures that are nearly in distribution, is
reported beside it. Neither may influence any choice. On CHOOSING, statistics and their
combination are chosen, with pictures held back from training; the detector's contrast part is
fitted to it too. No corruption is in two sets, but `shifted_6` of PANEL is `shifted_3` of
CHOOSING at twice the strength, so its figures show less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from likely.answers import Pixels
from likely.errors import InvalidInput

SEED = 20261122
Generator = np.random.Generator
Corruption = Callable[[Pixels, int, Generator], Pixels]


def corrupt(name: str, x: Pixels, levels: int) -> Pixels:
    """Returns pictures, uint8 (n, c, h, w), after a corruption; a function of its arguments alone.

    Args:
        name: a key of PANEL, HARD or CHOOSING.
        x: pictures with a background of 0, uint8 (n, c, h, w).
        levels: number of levels.
    """
    known = {**PANEL, **HARD, **CHOOSING}
    key = [SEED, list(known).index(name)]
    return known[name](x, levels, np.random.Generator(np.random.Philox(key=key)))


def is_informative(before: Pixels, after: Pixels) -> bool:
    """Whether a corruption changed at least half of the pictures without turning them blank.

    With few levels, some corruptions change nothing, such as weak noise that is rounded away, or
    darken everything.

    Args:
        before: pictures, uint8 (n, c, h, w).
        after: the same pictures, corrupted.
    """
    axes = (1, 2, 3)
    changed = np.any(after != before, axes) & np.any(after, axes)
    return 0 < len(before) <= 2 * int(changed.sum())


def corrupt_for_report(x: Pixels, levels: int) -> dict[str, Pixels]:
    """Returns pictures, uint8 (n, c, h, w), after each informative corruption of PANEL and HARD."""
    every = {name: corrupt(name, x, levels) for name in (*PANEL, *HARD)}
    return {name: made for name, made in every.items() if name == BLANK or is_informative(x, made)}


def corrupt_for_contrast(
    names: Sequence[str], x: Pixels, levels: int
) -> tuple[Pixels, npt.NDArray[np.int64], tuple[str, ...]]:
    """Returns corrupted pictures, the rows they were made from, and the corruptions left out.

    Each picture is corrupted in one way. Corruptions that change too little are left out
    (`is_informative`).

    Args:
        names: keys of CHOOSING; each is applied to an equal part of the pictures.
        x: uint8 (n, c, h, w).
        levels: number of levels.

    Raises:
        InvalidInput: all corruptions are left out.
    """
    rows = np.array_split(np.arange(len(x)), len(names))
    made = [corrupt(name, x[part], levels) for name, part in zip(names, rows, strict=True)]
    kept = [is_informative(x[part], one) for part, one in zip(rows, made, strict=True)]
    if not any(kept):
        raise InvalidInput(
            "calibration.contrast",
            f"pictures of {levels} levels stay as they are, or turn blank, under "
            f"{', '.join(names)}: name others",
        )
    left_out = tuple(name for name, keep in zip(names, kept, strict=True) if not keep)
    pictures, original_rows = (
        np.concatenate([part for part, keep in zip(parts, kept, strict=True) if keep])
        for parts in (made, rows)
    )
    return pictures, original_rows, left_out


def blank(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """Nothing but background."""
    return np.zeros_like(x)


def half(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """One half erased: the upper, lower, left or right one."""
    out, side = x.copy(), generator.integers(0, 4, len(x))
    h, w = x.shape[2] // 2, x.shape[3] // 2
    for picture, k in zip(out, side, strict=True):
        part = (np.s_[:, :h], np.s_[:, h:], np.s_[:, :, :w], np.s_[:, :, w:])[int(k)]
        picture[part] = 0
    return out


def shrunk(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """Shrunk to half its size, in the middle."""
    return _transform(x, levels, np.eye(2) * 2)


def eroded(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """The smallest level of each 3 x 3 neighbourhood."""
    return ndimage.minimum_filter(x, (1, 1, 3, 3), mode="constant")


def dilated(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """The largest level of each 3 x 3 neighbourhood."""
    return ndimage.maximum_filter(x, (1, 1, 3, 3), mode="constant")


def rotated(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """Rotated by 90 degrees; pictures that are not square are rotated within their frame."""
    if x.shape[2] == x.shape[3]:
        return np.ascontiguousarray(np.rot90(x, axes=(2, 3)))
    return _transform(x, levels, np.array([[0.0, -1.0], [1.0, 0.0]]))


def inverted(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """Dark and bright exchanged."""
    return (levels - 1 - x).astype(np.uint8)


def salt(x: Pixels, levels: int, generator: Generator) -> Pixels:
    """3 % of the pixels set to the highest level."""
    chosen = generator.random((len(x), 1, *x.shape[2:])) < 0.03  # with all of its channels
    return np.where(chosen, levels - 1, x).astype(np.uint8)


def overlay(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """The brighter of two pictures, pixel by pixel."""
    return np.maximum(x, x[_random_partners(len(x), generator)])


def swapped(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """The quarters exchanged diagonally."""
    h, w = x.shape[2] // 2, x.shape[3] // 2
    out = x.copy()
    corners = [(0, 0), (0, w), (h, 0), (h, w)]
    for (a, b), (i, j) in zip(reversed(corners), corners, strict=True):
        out[:, :, i : i + h, j : j + w] = x[:, :, a : a + h, b : b + w]
    return out


def independent(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """Every pixel from another picture: the right levels at the right places, nothing else."""
    n, _, h, w = x.shape
    rows = generator.integers(0, n, (n, 1, h, w))  # one for all channels: colours stay together
    return np.take_along_axis(x, rows, 0)


def stripes(x: Pixels, levels: int, generator: Generator) -> Pixels:
    """Bars two rows or columns wide, at a random phase and level."""
    n, c, h, w = x.shape
    i, j = np.indices((h, w))
    shape = (n, 1, 1)
    level, phase = generator.integers(levels // 2, levels, shape), generator.integers(0, 4, shape)
    place = np.where(generator.integers(0, 2, shape), i, j) + phase
    bars = np.where(place // 2 % 2, level, 0)
    return np.repeat(bars[:, None], c, 1).astype(np.uint8)


def shifted(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """Shifted by six pixels up, down, left or right; what leaves the frame is lost."""
    return _shifted(x, generator, 6)


def flipped_left_right(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """Mirrored left to right."""
    return np.ascontiguousarray(x[..., ::-1])


def flipped_upside_down(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """Upside down."""
    return np.ascontiguousarray(x[..., ::-1, :])


def blurred(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """The mean of each 3 x 3 neighbourhood."""
    mean = ndimage.uniform_filter(x.astype(np.float64), (1, 1, 3, 3), mode="constant")
    return _levels(mean, levels)


def dimmed(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """Half the contrast."""
    return (x // 2).astype(np.uint8)


def sheared(x: Pixels, levels: int, generator: Generator) -> Pixels:
    """Sheared by half a pixel per row, to either side."""
    sign = generator.choice([-1.0, 1.0], len(x))
    return _transform_each(x, levels, [np.array([[1.0, 0.0], [0.5 * s, 1.0]]) for s in sign])


def turned(x: Pixels, levels: int, generator: Generator) -> Pixels:
    """Rotated by 45 degrees to either side."""
    signs = generator.choice([-1.0, 1.0], len(x))
    root = np.sqrt(0.5)
    return _transform_each(x, levels, [root * np.array([[1.0, -s], [s, 1.0]]) for s in signs])


def enlarged(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """Enlarged by a third, cropped at the frame."""
    return _transform(x, levels, np.eye(2) * 0.75)


def chimera(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """The upper half of one picture over the lower half of another."""
    out = x.copy()
    middle = x.shape[2] // 2
    out[:, :, middle:] = x[_random_partners(len(x), generator), :, middle:]
    return out


def blended(x: Pixels, levels: int, generator: Generator) -> Pixels:
    """The mean of two pictures."""
    return _levels((x.astype(np.float64) + x[_random_partners(len(x), generator)]) / 2, levels)


def grainy(x: Pixels, levels: int, generator: Generator) -> Pixels:
    """Normal noise, with a standard deviation of a twentieth of the range."""
    return _levels(x + generator.normal(0, 0.05 * (levels - 1), x.shape), levels)


def wavy(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """Rows shifted to either side along a sine wave with an amplitude of two pixels."""
    phase = generator.uniform(0, 2 * np.pi, len(x))
    out = np.zeros_like(x)
    for picture, into, start in zip(x, out, phase, strict=True):
        for row in range(x.shape[2]):
            by = round(2 * np.sin(start + row * 0.9))
            moved = np.roll(picture[:, row], by, -1)
            into[:, row] = moved
    return out


def nudged(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """Shifted by three pixels up, down, left or right; what leaves the frame is lost."""
    return _shifted(x, generator, 3)


def sharpened(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """Twice the picture minus its blurred version."""
    mean = ndimage.uniform_filter(x.astype(np.float64), (1, 1, 3, 3), mode="constant")
    return _levels(2.0 * x - mean, levels)


def occluded(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """A rectangle of a third of each side erased, somewhere near the middle."""
    out = x.copy()
    h, w = (max(1, side // 3) for side in x.shape[2:])
    for picture in out:
        i, j = generator.integers(h // 2, 2 * h), generator.integers(w // 2, 2 * w)
        picture[:, i : i + h, j : j + w] = 0
    return out


def _random_partners(n: int, generator: Generator) -> npt.NDArray[np.int64]:
    """Returns another picture's index for each of n pictures, (n,), never its own."""
    order = generator.permutation(n)
    partner = np.empty(n, np.int64)
    partner[order] = np.roll(order, 1)
    return partner


def _shifted(x: Pixels, generator: Generator, by: int) -> Pixels:
    out, side = np.zeros_like(x), generator.integers(0, 4, len(x))
    for picture, into, k in zip(x, out, side, strict=True):
        match k:
            case 0:
                into[:, by:] = picture[:, :-by]
            case 1:
                into[:, :-by] = picture[:, by:]
            case 2:
                into[:, :, by:] = picture[:, :, :-by]
            case _:
                into[:, :, :-by] = picture[:, :, by:]
    return out


def _transform(x: Pixels, levels: int, matrix: npt.NDArray[np.float64]) -> Pixels:
    return _transform_each(x, levels, [matrix] * len(x))


def _transform_each(x: Pixels, levels: int, matrices: list[npt.NDArray[np.float64]]) -> Pixels:
    """Applies to each picture its linear map from output to input coordinates, from the centre."""
    middle = (np.array(x.shape[2:]) - 1) / 2
    out = np.empty(x.shape)
    for picture, into, matrix in zip(x.astype(np.float64), out, matrices, strict=True):
        offset = middle - matrix @ middle
        for channel, target in zip(picture, into, strict=True):
            ndimage.affine_transform(channel, matrix, offset, output=target, order=1)
    return _levels(out, levels)


def _levels(values: npt.NDArray[np.floating], levels: int) -> Pixels:
    return np.rint(values).clip(0, levels - 1).astype(np.uint8)


INLIERS = "test"  # the uncorrupted pictures
BLANK = "blank"
PANEL: Mapping[str, Corruption] = MappingProxyType(
    {
        BLANK: blank,
        "half_erased": half,
        "shrunk": shrunk,
        "eroded": eroded,
        "dilated": dilated,
        "rotated_90": rotated,
        "inverted": inverted,
        "salt": salt,
        "overlay": overlay,
        "patch_swap": swapped,
        "independent_pixels": independent,
        "stripes": stripes,
        "shifted_6": shifted,
    }
)
HARD: Mapping[str, Corruption] = MappingProxyType(
    {
        "flipped_left_right": flipped_left_right,
        "flipped_upside_down": flipped_upside_down,
        "blurred": blurred,
        "half_contrast": dimmed,
    }
)
CHOOSING: Mapping[str, Corruption] = MappingProxyType(
    {
        "sheared": sheared,
        "turned_45": turned,
        "enlarged": enlarged,
        "chimera": chimera,
        "blended": blended,
        "grainy": grainy,
        "wavy": wavy,
        "shifted_3": nudged,
        "sharpened": sharpened,
        "occluded": occluded,
    }
)
