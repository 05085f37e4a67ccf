"""Reads pictures from files and writes them: images, .npy, .npz."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from likely import levels
from likely.answers import Draws, Floats, ModelInfo, Pixels, Redrawings
from likely.client.values import pixels
from likely.codec import check_levels
from likely.errors import InvalidInput
from likely.levels import brightness

ARRAYS = (".npy", ".npz")
FORMS = (".png", ".npz")
_GAP = 1


def read(paths: Sequence[Path], info: ModelInfo) -> tuple[Pixels, list[str]]:
    """Reads all pictures: their levels, uint8 (n, c, h, w), and a name for each picture.

    A folder stands for its images and arrays, in the order of their names.
    Arrays contain levels: (n, c, h, w), or (n, h, w) for one channel. In an `.npz`, the
    array is the one named by one of `levels.KEYS`, else the first. Image files contain
    brightness from 0 to 255. They are converted to grey for a model of one channel, and to
    red, green, blue for one of three; brightness b becomes level
    round(b * (levels - 1) / 255). Nothing is resized, cropped or inverted.

    Raises:
        InvalidInput: a file cannot be read as such a file, or its pictures do not fit the model.
    """
    parts, names = [], []
    for path in chain.from_iterable(map(_files, paths)):
        if path.suffix.lower() in ARRAYS:
            x = pixels(levels.of_array(path), str(path))
            part_names = [f"{path}[{i}]" for i in range(len(x))]
        else:
            x = levels.of_image(path, str(path), info.shape[0], info.levels)[None]
            part_names = [str(path)]
        levels.check_fit(str(path), x.shape[1:], info.shape)
        check_levels(x, info.levels, part_names)
        names += part_names
        parts.append(x)
    return np.concatenate(parts), names


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    known = (*levels.IMAGES, *ARRAYS)
    shown = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    if broken := next((file for file in shown if not file.exists()), None):
        raise InvalidInput(str(broken), "a link that leads nowhere")
    files = [file for file in shown if file.suffix.lower() in known and file.is_file()]
    if not files:
        raise InvalidInput(
            str(path),
            f"a folder without pictures: none ends in {', '.join(known)}; "
            "folders within it are not looked at",
        )
    return files


def require_writable(out: Path, *, folder: bool = False) -> None:
    """Checks that pictures can be written to a path without loss.

    Call it before the pictures are made, which may take long.

    Args:
        out: a file, .png or .npz.
        folder: whether `out` may also be a folder, which must be empty or not exist yet.

    Raises:
        InvalidInput: `out` is neither, the folder is not empty, or the file's folder does not
            exist.
    """
    if out.suffix.lower() in FORMS and not out.is_dir():
        if not out.parent.is_dir():
            raise InvalidInput("out", f"{out} cannot be written: there is no folder {out.parent}")
        return
    if not folder or (out.suffix and not out.is_dir()):
        more = ", nor is it a folder" if folder else ""
        raise InvalidInput("out", f"{out} ends neither in {' nor in '.join(FORMS)}{more}")
    if out.is_dir() and any(out.iterdir()):
        raise InvalidInput("out", f"the folder {out} is not empty; name another")


def write_draws(out: Path, drawn: Draws, info: ModelInfo) -> None:
    """Writes drawn pictures as a grid (.png), arrays (.npz) or a folder of images.

    The arrays are `x` uint8 (n, c, h, w), `y` int64 (n,), `seed` and `first_index`.
    """
    if out.suffix.lower() == ".npz":
        arrays = {"x": drawn.images, "y": drawn.label, "seed": drawn.seed}
        _write_arrays(out, arrays | {"first_index": drawn.first_index})
    elif out.suffix.lower() in FORMS:
        with _written_atomically(out) as part:
            Image.fromarray(grid(brightness(drawn.images, info.levels))).save(part)
    else:
        out.mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(brightness(drawn.images, info.levels)):
            name = f"{drawn.first_index + i:06d}-label{drawn.label[i]}.png"
            with _written_atomically(out / name) as part:
                Image.fromarray(grid(picture[None])).save(part)


def write_surprise(out: Path, x: Pixels, surprise: Floats, info: ModelInfo) -> None:
    """Writes surprise maps: `.npz` with `x` and `surprise` in nats, or an image of both.

    In an image, each picture is followed by its map, summed over channels, which is white
    at the largest surprise of the file.
    """
    if out.suffix.lower() == ".npz":
        _write_arrays(out, {"x": x, "surprise": surprise})
        return
    maps = surprise.sum(1, keepdims=True)
    scaled = np.rint(255 * maps / max(float(maps.max(initial=0)), 1e-9)).astype(np.uint8)
    shown = np.stack([brightness(x, info.levels), np.broadcast_to(scaled, x.shape)], 1)
    with _written_atomically(out) as part:
        Image.fromarray(grid(shown.reshape(-1, *x.shape[1:]), even=True)).save(part)


def write_redrawn(out: Path, given: Pixels, found: Redrawings, info: ModelInfo) -> None:
    """Writes decoded features: `.npz` with all arrays, or a contact sheet.

    For each entry, the sheet has a row of the given pictures and the means at all points,
    followed by one row for each draw.

    Args:
        out: the file.
        given: the given pictures, uint8 (n, k, c, h, w), levels.
        found: the decoded features, (n, points, ...).
        info: the model's description.
    """
    if out.suffix.lower() == ".npz":
        arrays = {"x": given, "seed": found.seed, "mean": found.mean, "drawn": found.drawn}
        if found.deviation is not None:
            arrays["deviation"] = found.deviation
        _write_arrays(out, arrays)
        return
    means = np.rint(255 * found.mean).astype(np.uint8)[:, None]
    draws = brightness(found.drawn.swapaxes(1, 2), info.levels)
    rows = np.concatenate([means, draws], 1)  # (n, 1 + draws, points, c, h, w)
    margin = np.zeros((*rows.shape[:2], given.shape[1], *rows.shape[3:]), np.uint8)
    margin[:, 0] = brightness(given, info.levels)
    sheet = np.concatenate([margin, rows], 2)
    with _written_atomically(out) as part:
        flat = sheet.reshape(-1, *sheet.shape[3:])
        Image.fromarray(grid(flat, across=sheet.shape[2])).save(part)


def grid(x: Pixels, *, even: bool = False, across: int = 0) -> Pixels:
    """Arranges pictures (n, c, h, w) in a square grid, or in one of `across` columns.

    Args:
        x: the pictures, uint8.
        even: whether the number of columns must be even.
        across: the number of columns; 0 for about as many as rows.

    Returns:
        The image, (rows, columns) if grey or (rows, columns, 3) if coloured.
    """
    n, c, h, w = x.shape
    across = across or max(1, math.ceil(math.sqrt(n)))
    across += even and across % 2
    down = max(1, math.ceil(n / across))
    sheet = np.full((down * (h + _GAP) - _GAP, across * (w + _GAP) - _GAP, c), 96, dtype=np.uint8)
    for i, picture in enumerate(x):
        top, left = i // across * (h + _GAP), i % across * (w + _GAP)
        sheet[top : top + h, left : left + w] = picture.transpose(1, 2, 0)
    return sheet[:, :, :3] if c >= 3 else sheet[:, :, 0]


def slices(n: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most `step` of n; one empty slice where n is 0."""
    return (slice(at, min(at + step, n)) for at in range(0, max(n, 1), step))


def _write_arrays(out: Path, arrays: Mapping[str, Any]) -> None:
    # To a file object, as numpy would append .npz to a name that ends in .NPZ.
    with _written_atomically(out) as part, part.open("wb") as file:
        np.savez_compressed(file, **arrays)


@contextmanager
def _written_atomically(out: Path) -> Iterator[Path]:
    """Yields a temporary path, which is renamed to `out` if all goes well, else removed."""
    part = out.with_name(f".{out.stem}.part{out.suffix}")
    try:
        yield part
        part.replace(out)
    except OSError as error:
        raise OSError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            part.unlink()
