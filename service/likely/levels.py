"""Reads the levels of pictures from files: of arrays as they are, of images by brightness."""

from __future__ import annotations

import errno
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from likely.answers import Pixels
from likely.errors import InvalidInput

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
KEYS = ("x", "images", "image")
NO_ARRAY = "no array can be read from it; it must be a complete .npy or .npz file of numbers"
_EIGHT_BIT_MODES = {"1", "L", "LA", "P", "RGB", "RGBA"}


def brightness(x: Pixels, levels: int) -> Pixels:
    """Converts levels in [0, levels) to brightness from 0 to 255."""
    bright: Pixels = np.rint(x * (255 / (levels - 1))).astype(np.uint8)
    return bright


def of_image(file: Path | IO[bytes], name: str, channels: int, levels: int) -> Pixels:
    """The levels of an image file, uint8 (c, h, w).

    Brightness b becomes level round(b * (levels - 1) / 255). The image is converted to grey for
    one channel, and to red, green, blue for three. Nothing is resized, cropped or inverted.

    Args:
        file: an image in any of Pillow's formats.
        name: the name of the file in errors.
        channels: 1 or 3.
        levels: the model's number of levels.

    Raises:
        InvalidInput: the file is no image, is broken, holds several pictures, does not have 8
            bits per channel, or is transparent in places.
    """
    try:
        with Image.open(file) as image:
            if image.mode not in _EIGHT_BIT_MODES:
                raise InvalidInput(name, f"mode {image.mode}; it must have 8 bits per channel")
            if (several := _count_pictures(image, name)) > 1:
                raise InvalidInput(name, f"holds {several} pictures: give each a file of its own")
            if _has_transparency(image):
                raise InvalidInput(name, "is transparent in places: lay it on a background first")
            converted = image.convert("L" if channels == 1 else "RGB")
    except UnidentifiedImageError as error:
        raise InvalidInput(name, "neither an image nor .npy nor .npz") from error
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        if isinstance(error, InvalidInput) or getattr(error, "errno", None) is not None:
            raise
        raise InvalidInput(name, f"a broken image: {error}") from error
    bright = np.atleast_3d(np.asarray(converted)).transpose(2, 0, 1)
    return np.rint(bright * ((levels - 1) / 255)).astype(np.uint8)


def _count_pictures(image: Image.Image, name: str) -> int:
    """The number of pictures in a file; what a camera adds to its picture does not count."""
    if image.format == "MPO":
        return 1
    try:
        return getattr(image, "n_frames", 1)
    except Exception as error:  # Pillow raises errors of many types for broken frames
        raise InvalidInput(name, f"a broken image: {error}") from error


def _has_transparency(image: Image.Image) -> bool:
    """Whether some pixel is not opaque, so that its brightness depends on the background."""
    if not {"A", "a"} & {*image.getbands()} and "transparency" not in image.info:
        return False
    return bool(np.asarray(image.convert("RGBA").getchannel("A")).min() < 255)


def of_array(
    file: Path | IO[bytes], name: str = "", mapped: Literal["r"] | None = None
) -> npt.NDArray[Any]:
    """The array of an `.npy` file; of an `.npz` file, one named by one of `KEYS`, else the first.

    Args:
        file: a path or an open file; pickles are refused.
        name: the name of the file in errors; by default, its path.
        mapped: "r" to memory-map an `.npy` file.

    Raises:
        InvalidInput: no array can be read from the file, or it does not fit in memory.
    """
    with _convert_read_errors(name or str(file)):
        loaded = np.load(file, mapped, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            array = loaded[_find_array_name(loaded)]
            if not isinstance(array, np.ndarray):
                raise ValueError("a member that is no array")
            return array


def header(path: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """The shape and type of the array that `of_array` would return, without reading the array.

    Raises:
        InvalidInput: no array can be read from the file.
    """
    with _convert_read_errors(str(path)):
        loaded = np.load(path, "r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded.shape, loaded.dtype
        with loaded:
            names = loaded.zip.namelist()
            key = _find_array_name(loaded)
            member = loaded.zip.getinfo(key if key in names else f"{key}.npy")
            with loaded.zip.open(member) as file:
                version = np.lib.format.read_magic(file)
                read = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, _, kind = read(file)
                if file.tell() + math.prod(shape) * kind.itemsize > member.file_size:
                    raise ValueError("less data than its header tells")
                if min(shape, default=0) < 0:
                    raise ValueError("a length below none")
                np.empty((0, *shape[1:]), kind)  # raises if there can be no such rows
                return shape, kind


@contextmanager
def _convert_read_errors(name: str) -> Iterator[None]:
    """Turns errors in reading an array into `InvalidInput`; lets errors of the disk pass."""
    try:
        yield
    except MemoryError as error:
        raise InvalidInput(name, f"its array does not fit in memory: {error}") from error
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # EINVAL: an offset in the file is wrong
            raise
        raise InvalidInput(name, NO_ARRAY) from error
    except Exception as error:  # about a dozen types: of headers, zips, each compression
        raise InvalidInput(name, NO_ARRAY) from error


def _find_array_name(archive: Any) -> str:
    return next((key for key in KEYS if key in archive), None) or str(archive.files[0])


def check_fit(name: str, actual: Sequence[int], expected: Sequence[int]) -> None:
    """Checks that the shape (c, h, w) of a picture is the one that the model takes.

    Args:
        name: the name of the picture's file in errors.
        actual: the shape of the picture.
        expected: the shape that the model takes.

    Raises:
        InvalidInput: the shapes differ.
    """
    if tuple(actual) != tuple(expected):
        sizes = (" x ".join(str(size) for size in shape) for shape in (actual, expected))
        last = tuple(actual) == (*expected[1:], expected[0])
        hint = ": move the channels, which are its last axis, to the front" if last else ""
        raise InvalidInput(
            name, "{} (channels x rows x columns); the model takes {}{}".format(*sizes, hint)
        )
