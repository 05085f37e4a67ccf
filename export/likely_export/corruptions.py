"""What is done to pictures so that they are none of the data any more.

Three sets. PANEL is reported and HARD is reported beside it, for what is nearly in
distribution; neither may decide anything. CHOOSING is what statistics and their combination
are chosen on, with pictures held back from training; the detector's contrast part is fitted
to it, too. No corruption is in two of them, but `shifted_6` of PANEL is `shifted_3` of
CHOOSING at twice the strength: what is told of it is the less of a surprise.
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
    """The pictures uint8 (n, c, h, w) after the corruption of that name; a function of its inputs.

    Args:
        name: a key of PANEL, HARD or CHOOSING.
        x: pictures, background 0.
        levels: of a pixel.
    """
    known = {**PANEL, **HARD, **CHOOSING}
    key = [SEED, list(known).index(name)]
    return known[name](x, levels, np.random.Generator(np.random.Philox(key=key)))


def tells(before: Pixels, after: Pixels) -> bool:
    """Whether a corruption changed most pictures, and left more than background of them.

    On few levels some change nothing, as weak noise does that is rounded away, or darken all.

    Args:
        before: uint8 (n, c, h, w).
        after: likewise, corrupted.
    """
    axes = (1, 2, 3)
    changed = np.any(after != before, axes) & np.any(after, axes)
    return 0 < len(before) <= 2 * int(changed.sum())


def reported(x: Pixels, levels: int) -> dict[str, Pixels]:
    """The pictures uint8 (n, c, h, w) after each of PANEL and of HARD that tells something."""
    every = {name: corrupt(name, x, levels) for name in (*PANEL, *HARD)}
    return {name: made for name, made in every.items() if name == BLANK or tells(x, made)}


def contrasting(
    names: Sequence[str], x: Pixels, levels: int
) -> tuple[Pixels, npt.NDArray[np.int64], tuple[str, ...]]:
    """Pictures corrupted in one of these ways each, their rows, and the ways that are left out.

    Args:
        names: keys of CHOOSING; each takes an equal part of the pictures.
        x: uint8 (n, c, h, w).
        levels: of a pixel.

    Raises:
        InvalidInput: none of them tells anything.
    """
    rows = np.array_split(np.arange(len(x)), len(names))
    made = [corrupt(name, x[part], levels) for name, part in zip(names, rows, strict=True)]
    kept = [tells(x[part], one) for part, one in zip(rows, made, strict=True)]
    if not any(kept):
        raise InvalidInput(
            "calibration.contrast",
            f"pictures of {levels} levels stay as they are under {', '.join(names)}: name others",
        )
    left_out = tuple(name for name, keep in zip(names, kept, strict=True) if not keep)
    pictures, made_of = (
        np.concatenate([part for part, keep in zip(parts, kept, strict=True) if keep])
        for parts in (made, rows)
    )
    return pictures, made_of, left_out


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
    """Half as large, in the middle."""
    return _mapped(x, levels, np.eye(2) * 2)


def eroded(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """The smallest level of each 3 x 3 neighbourhood."""
    return ndimage.minimum_filter(x, (1, 1, 3, 3), mode="constant")


def dilated(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """The largest level of each 3 x 3 neighbourhood."""
    return ndimage.maximum_filter(x, (1, 1, 3, 3), mode="constant")


def rotated(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """Turned by 90 degrees; pictures that are not square are turned within their frame."""
    if x.shape[2] == x.shape[3]:
        return np.ascontiguousarray(np.rot90(x, axes=(2, 3)))
    return _mapped(x, levels, np.array([[0.0, -1.0], [1.0, 0.0]]))


def inverted(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """Bright for dark."""
    return (levels - 1 - x).astype(np.uint8)


def salt(x: Pixels, levels: int, generator: Generator) -> Pixels:
    """Three pixels in a hundred at the highest level."""
    return np.where(generator.random(x.shape) < 0.03, levels - 1, x).astype(np.uint8)


def overlay(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """The brighter of two pictures, pixel by pixel."""
    return np.maximum(x, x[_others(len(x), generator)])


def swapped(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """The four quarters in another order."""
    h, w = x.shape[2] // 2, x.shape[3] // 2
    out = x.copy()
    corners = [(0, 0), (0, w), (h, 0), (h, w)]
    for (a, b), (i, j) in zip(reversed(corners), corners, strict=True):
        out[:, :, i : i + h, j : j + w] = x[:, :, a : a + h, b : b + w]
    return out


def independent(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """Every pixel from another picture: the right levels at the right places, nothing else."""
    n = len(x)
    flat = x.reshape(n, -1)
    rows = generator.integers(0, n, flat.shape)
    return np.take_along_axis(flat, rows, 0).reshape(x.shape)


def stripes(x: Pixels, levels: int, generator: Generator) -> Pixels:
    """Bars of two rows or columns at a random phase and level."""
    n, c, h, w = x.shape
    i, j = np.indices((h, w))
    each = (n, 1, 1)
    level, phase = generator.integers(levels // 2, levels, each), generator.integers(0, 4, each)
    place = np.where(generator.integers(0, 2, each), i, j) + phase
    bars = np.where(place // 2 % 2, level, 0)
    return np.repeat(bars[:, None], c, 1).astype(np.uint8)


def shifted(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """Moved by six pixels up, down, left or right; what leaves is lost."""
    return _shifted(x, generator, 6)


def flipped_left_right(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """Left for right."""
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
    """Slanted by half a pixel a row, to either side."""
    sign = generator.choice([-1.0, 1.0], len(x))
    return _each(x, levels, [np.array([[1.0, 0.0], [0.5 * s, 1.0]]) for s in sign])


def turned(x: Pixels, levels: int, generator: Generator) -> Pixels:
    """Turned by 45 degrees to either side."""
    signs = generator.choice([-1.0, 1.0], len(x))
    root = np.sqrt(0.5)
    return _each(x, levels, [root * np.array([[1.0, -s], [s, 1.0]]) for s in signs])


def enlarged(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """A third larger, cut at the frame."""
    return _mapped(x, levels, np.eye(2) * 0.75)


def chimera(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """The upper half of one picture over the lower half of another."""
    out = x.copy()
    middle = x.shape[2] // 2
    out[:, :, middle:] = x[_others(len(x), generator), :, middle:]
    return out


def blended(x: Pixels, levels: int, generator: Generator) -> Pixels:
    """The mean of two pictures."""
    return _levels((x.astype(np.float64) + x[_others(len(x), generator)]) / 2, levels)


def grainy(x: Pixels, levels: int, generator: Generator) -> Pixels:
    """Normal noise of a twentieth of the range."""
    return _levels(x + generator.normal(0, 0.05 * (levels - 1), x.shape), levels)


def wavy(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """Rows moved to either side by a sine of two pixels."""
    phase = generator.uniform(0, 2 * np.pi, len(x))
    out = np.zeros_like(x)
    for picture, into, start in zip(x, out, phase, strict=True):
        for row in range(x.shape[2]):
            by = round(2 * np.sin(start + row * 0.9))
            moved = np.roll(picture[:, row], by, -1)
            into[:, row] = moved
    return out


def nudged(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """Moved by three pixels."""
    return _shifted(x, generator, 3)


def sharpened(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """Twice the picture less its blurred self."""
    mean = ndimage.uniform_filter(x.astype(np.float64), (1, 1, 3, 3), mode="constant")
    return _levels(2.0 * x - mean, levels)


def occluded(x: Pixels, levels: int, generator: Generator) -> Pixels:  # noqa: ARG001
    """A square of a third of the frame erased, somewhere near the middle."""
    out = x.copy()
    h, w = (max(1, side // 3) for side in x.shape[2:])
    for picture in out:
        i, j = generator.integers(h // 2, 2 * h), generator.integers(w // 2, 2 * w)
        picture[:, i : i + h, j : j + w] = 0
    return out


def _others(n: int, generator: Generator) -> npt.NDArray[np.int64]:
    """For each of n pictures another one, none of them itself."""
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


def _mapped(x: Pixels, levels: int, matrix: npt.NDArray[np.float64]) -> Pixels:
    return _each(x, levels, [matrix] * len(x))


def _each(x: Pixels, levels: int, matrices: list[npt.NDArray[np.float64]]) -> Pixels:
    """Each picture under its linear map of output to input places, about the middle."""
    middle = (np.array(x.shape[2:]) - 1) / 2
    out = np.empty(x.shape)
    for picture, into, matrix in zip(x.astype(np.float64), out, matrices, strict=True):
        offset = middle - matrix @ middle
        for channel, target in zip(picture, into, strict=True):
            ndimage.affine_transform(channel, matrix, offset, output=target, order=1)
    return _levels(out, levels)


def _levels(values: npt.NDArray[np.floating], levels: int) -> Pixels:
    return np.rint(values).clip(0, levels - 1).astype(np.uint8)


INLIERS = "test"  # the pictures that these are made of, as they are
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
