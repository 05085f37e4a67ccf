"""Files of pictures, and the levels that they hold: arrays as they are, images by brightness."""

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
NO_ARRAY = "no array can be read from it; .npy, or .npz, of numbers is asked, and whole"
_EIGHT_BIT = {"1", "L", "LA", "P", "RGB", "RGBA"}


def brightness(x: Pixels, levels: int) -> Pixels:
    """Levels in [0, levels) as brightness from 0 to 255."""
    bright: Pixels = np.rint(x * (255 / (levels - 1))).astype(np.uint8)
    return bright


def of_image(file: Path | IO[bytes], name: str, channels: int, levels: int) -> Pixels:
    """The levels (c, h, w) of an image file: brightness b is level round(b * (levels - 1) / 255).

    It becomes grey for one channel, and red, green, blue for three; nothing is resized,
    cropped or inverted.

    Args:
        file: an image in any of Pillow's formats.
        name: what to call it.
        channels: 1 or 3.
        levels: of the model.

    Raises:
        InvalidInput: it is no image, a broken one, one of several pictures, has not 8 bits a
            channel, or lets some background show through.
    """
    try:
        with Image.open(file) as image:
            if image.mode not in _EIGHT_BIT:
                raise InvalidInput(name, f"mode {image.mode}; 8 bits a channel are asked")
            if (several := _pictures(image, name)) > 1:
                raise InvalidInput(name, f"holds {several} pictures: give each a file of its own")
            if _shows_through(image):
                raise InvalidInput(name, "is transparent in places: lay it on a background first")
            turned = image.convert("L" if channels == 1 else "RGB")
    except UnidentifiedImageError as error:
        raise InvalidInput(name, "neither an image nor .npy nor .npz") from error
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        if isinstance(error, InvalidInput) or getattr(error, "errno", None) is not None:
            raise
        raise InvalidInput(name, f"a broken image: {error}") from error
    bright = np.atleast_3d(np.asarray(turned)).transpose(2, 0, 1)
    return np.rint(bright * ((levels - 1) / 255)).astype(np.uint8)


def _pictures(image: Image.Image, name: str) -> int:
    """How many pictures the file holds; what a camera adds to its own is none."""
    if image.format == "MPO":
        return 1
    try:
        return getattr(image, "n_frames", 1)
    except Exception as error:  # Pillow raises what it meets with in frames that are broken
        raise InvalidInput(name, f"a broken image: {error}") from error


def _shows_through(image: Image.Image) -> bool:
    """Whether a pixel is not opaque, so that its brightness depends on what lies behind it."""
    if not {"A", "a"} & {*image.getbands()} and "transparency" not in image.info:
        return False
    return bool(np.asarray(image.convert("RGBA").getchannel("A")).min() < 255)


def of_array(
    file: Path | IO[bytes], name: str = "", mapped: Literal["r"] | None = None
) -> npt.NDArray[Any]:
    """The array of an `.npy`; of an `.npz` the one called by one of `KEYS`, else the first.

    Args:
        file: where it is; pickles are refused.
        name: what to call it; its path, where none is given.
        mapped: "r" to leave what an `.npy` holds in the file until it is looked at.

    Raises:
        InvalidInput: no array can be read from it, or it does not fit in memory.
    """
    with _reading(name or str(file)):
        loaded = np.load(file, mapped, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            array = loaded[_chosen(loaded)]
            if not isinstance(array, np.ndarray):
                raise ValueError("a member that is no array")
            return array


def header(path: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """The shape and the type of the array that `of_array` gives; it is not read.

    Raises:
        InvalidInput: no array can be read from it.
    """
    with _reading(str(path)):
        loaded = np.load(path, "r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded.shape, loaded.dtype
        with loaded:
            names = loaded.zip.namelist()
            key = _chosen(loaded)
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
                np.empty((0, *shape[1:]), kind)  # raises where there can be no such rows
                return shape, kind


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Whatever goes wrong in reading an array, as what is said of its file."""
    try:
        yield
    except MemoryError as error:
        raise InvalidInput(name, f"its array does not fit in memory: {error}") from error
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # of the file, not of what it tells of places
            raise
        raise InvalidInput(name, NO_ARRAY) from error
    except Exception as error:  # a dozen kinds, by what is broken: headers, zips, each compression
        raise InvalidInput(name, NO_ARRAY) from error


def _chosen(archive: Any) -> str:
    return next((key for key in KEYS if key in archive), None) or str(archive.files[0])


def check_fit(name: str, given: Sequence[int], asked: Sequence[int]) -> None:
    """Returns if a picture's shape (c, h, w) is the model's.

    Raises:
        InvalidInput: it is not; named by what it was read from.
    """
    if tuple(given) != tuple(asked):
        sizes = (" x ".join(str(size) for size in shape) for shape in (given, asked))
        last = tuple(given) == (*asked[1:], asked[0])
        how = ": move the channels, which are its last axis, to the front" if last else ""
        raise InvalidInput(
            name, "{} (channels x rows x columns); the model takes {}{}".format(*sizes, how)
        )
