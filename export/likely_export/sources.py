"""Reads pictures, with or without labels, from `.npz`, idx, folders or scikit-learn's digits."""

from __future__ import annotations

import gzip
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from likely.answers import Labels, Pixels
from likely.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Source:
    """The pictures and labels of a source, before they are split into parts.

    Attributes:
        name: the source's own name.
        x: pictures, uint8 (n, c, h, w).
        y: labels, int64 (n,); zeros if the labels are unknown.
        levels: number of levels; every pixel is in [0, levels).
        labels: names of the labels; empty if the labels are unknown.
        test: x and y of the source's own test part; None if it has none.
    """

    name: str
    x: Pixels
    y: Labels
    levels: int
    labels: tuple[str, ...]
    test: tuple[Pixels, Labels] | None = None

    @property
    def peak(self) -> int:
        """The largest pixel value, test part included."""
        return max(int(x.max()) for x in (self.x, *(self.test or ())[:1]))

    @property
    def is_dark(self) -> bool:
        """Whether all pixels stay below half of white, as when 0 and 1 are the only levels."""
        return self.peak < self.levels // 2


def read(source: str | Path) -> Source:
    """Reads all pictures and labels of a source.

    Raises:
        InvalidInput: the source cannot be read; the field names the file.
    """
    if str(source) == "digits":
        return _digits()
    path = Path(source)
    if path.is_dir():
        return _idx_folder(path) if any(path.glob("*images*idx3*")) else _image_folder(path)
    if not path.is_file():
        raise InvalidInput(
            str(source), "neither `digits` nor a file or folder that exists; --data names another"
        )
    if path.suffix == ".npz":
        return _npz(path)
    if "idx" in path.name:
        return _idx(path)
    raise InvalidInput(str(source), "not an .npz file, an idx file or a folder")


def with_label_names(raw: Source, labels: tuple[str, ...]) -> Source:
    """Returns the source with these names for its labels; without names, the source unchanged.

    Raises:
        InvalidInput: the number of names differs from the number of labels, or a name occurs twice.
    """
    names = labels or raw.labels
    if twice := [name for name in names if names.count(name) > 1]:
        raise InvalidInput("labels", f"two labels of {raw.name} are named {twice[0]}")
    if not labels:
        return raw
    if len(labels) != len(raw.labels):
        raise InvalidInput(
            "labels", f"{len(labels)} names for the {len(raw.labels)} labels of {raw.name}"
        )
    return Source(raw.name, raw.x, raw.y, raw.levels, labels, raw.test)


def held_out(raw: Source, without: tuple[str, ...]) -> Pixels:
    """Returns the pictures of these labels, uint8 (n, c, h, w), from the test part if any."""
    x, y = (raw.x, raw.y) if raw.test is None else raw.test
    return x[np.isin(y, [raw.labels.index(name) for name in without])]


def without_labels(raw: Source, without: tuple[str, ...]) -> Source:
    """Returns the source without these labels; the remaining labels are renumbered from 0.

    Raises:
        InvalidInput: the source has no such label.
    """
    if not without:
        return raw
    if unknown := [name for name in without if name not in raw.labels]:
        known = ", ".join(raw.labels) or "no labels"
        raise InvalidInput("without", f"{unknown[0]} is none of {known}")
    names = tuple(name for name in raw.labels if name not in without)
    moved = np.array([names.index(name) if name in names else -1 for name in raw.labels])

    def rest(x: Pixels, y: Labels) -> tuple[Pixels, Labels]:
        rows = moved[y] >= 0
        return x[rows], moved[y][rows]

    test = None if raw.test is None else rest(*raw.test)
    return Source(raw.name, *rest(raw.x, raw.y), raw.levels, names, test)


def _digits() -> Source:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = bunch.images.astype(np.uint8)[:, None]
    return Source("digits", x, bunch.target.astype(np.int64), 17, tuple("0123456789"))


def _npz(path: Path) -> Source:
    arrays = _arrays(path)
    tests = ("x_test", "y_test")
    keys = ("x_train", "y_train") if arrays.keys() & {"x_train", "y_train"} else ("x", "y")
    has_test = bool(arrays.keys() & {*tests})
    if unlabelled := not arrays.keys() & {"y", "y_train", "y_test", "class_names"}:
        pictures = arrays.keys() & {"x", "x_train", "x_test"}
        _require_no_labels(path, arrays, {arrays[key].shape[:1] for key in pictures})
        arrays |= {f"y{key[1:]}": np.zeros(arrays[key].shape[:1], np.int64) for key in pictures}
    if missing := [key for key in (*keys, *(tests if has_test else ())) if key not in arrays]:
        raise InvalidInput(
            str(path),
            f"has no array {missing[0]}: expected x_train, y_train, x_test, y_test or x, y; if the "
            "labels are unknown, the same without any y",
        )
    x, y = _checked(path, *(arrays[key] for key in keys))
    test = _checked(path, *(arrays[key] for key in tests)) if has_test else None
    names = arrays.get("class_names", np.array(()))
    known = tuple(map(str, names)) or None
    return _source(path, x, y, test, () if unlabelled else known)


def _arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Reads the arrays of an .npz file by name."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.ndarray):
            with loaded as file:
                return dict(file)
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise InvalidInput(str(path), f"not a readable .npz file: {error}") from error
    raise InvalidInput(str(path), "is an .npy file of one array; np.savez writes an .npz file")


def _require_no_labels(
    path: Path, arrays: Mapping[str, npt.NDArray[Any]], shapes: set[tuple[int, ...]]
) -> None:
    """Raises if a 1-d integer array has one of these shapes, as labels under another name would."""
    like = [
        name
        for name, array in arrays.items()
        if array.ndim == 1 and array.shape in shapes and np.issubdtype(array.dtype, np.integer)
    ]
    if like:
        raise InvalidInput(
            str(path),
            f"has no labels named y, y_train or y_test, but {', '.join(like)}: name them so, or "
            "leave them out",
        )


def _idx(path: Path, test: Path | None = None) -> Source:
    x, y = _idx_pair(path)
    return _source(path, x, y, None if test is None else _idx_pair(test))


def _idx_folder(folder: Path) -> Source:
    """Reads a folder's training and test files, which are named as MNIST's files are."""
    shown = (file for file in folder.glob("*images*idx3*") if not file.name.startswith("."))
    # torchvision keeps the packed files beside the unpacked ones.
    files = sorted(f for f in shown if f.suffix != ".gz" or not f.with_suffix("").is_file())
    tests = [file for file in files if "t10k" in file.name or "test" in file.name]
    trains = [file for file in files if file not in tests]
    if len(trains) != 1 or len(tests) > 1:
        raise InvalidInput(
            str(folder), f"has {len(trains)} training and {len(tests)} test idx files of images"
        )
    return _idx(trains[0], *tests)


def _idx_pair(images: Path) -> tuple[Pixels, Labels]:
    labels = images.with_name(images.name.replace("images", "labels").replace("idx3", "idx1"))
    if labels == images or not labels.is_file():
        raise InvalidInput(str(images), f"its labels are expected in {labels.name} beside it")
    return _checked(images, read_idx(images), read_idx(labels))


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Reads an idx file of uint8, plain or gzipped (LeCun et al., 1998).

    Raises:
        InvalidInput: the file is truncated or not an idx file of unsigned bytes.
    """
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidInput(str(path), f"cannot be read: {error}") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise InvalidInput(str(path), "is not an idx file of unsigned bytes")
    axes = content[3]
    start = 4 + 4 * axes
    if len(content) < start:
        raise InvalidInput(str(path), f"ends within its header of {axes} axes")
    shape = struct.unpack(f">{axes}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise InvalidInput(str(path), f"has {len(content) - start} bytes for the shape {shape}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _image_folder(folder: Path) -> Source:
    """Reads pictures from one subfolder per label, or unlabelled ones from the folder itself."""
    names = tuple(entry.name for entry in _entries(folder) if entry.is_dir())
    if names and (loose := next(filter(_is_picture, _entries(folder)), None)):
        raise InvalidInput(
            str(folder),
            f"holds pictures, such as {loose.name}, beside subfolders, such as {names[0]}, which "
            "name labels: put all pictures into subfolders, or none",
        )
    pictures: list[Pixels] = []
    labels: list[int] = []
    for label, inner in enumerate([folder / name for name in names] or [folder]):
        files = _entries(inner)
        if not files:
            raise InvalidInput(
                str(inner),
                "holds no pictures, though it names a label"
                if names
                else "has neither idx files, nor one subfolder per label, nor pictures",
            )
        for file in files:
            picture = _picture(file)
            if pictures and picture.shape != pictures[0].shape:
                raise InvalidInput(
                    str(file),
                    f"is {_size(picture)} where the pictures before it are {_size(pictures[0])}",
                )
            pictures.append(picture)
            labels.append(label)
    return _source(folder, np.stack(pictures), np.array(labels, np.int64), None, names)


def _entries(folder: Path) -> list[Path]:
    """Lists a folder by name, without hidden entries such as macOS's .DS_Store."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _is_picture(file: Path) -> bool:
    """Whether Pillow recognises the file as a picture, of whatever mode."""
    try:
        with Image.open(file):
            return True
    except OSError:
        return False


def _picture(file: Path) -> Pixels:
    """Reads one grey or RGB picture, uint8 (c, h, w); other modes are rejected, not converted."""
    try:
        with Image.open(file) as image:
            if image.mode not in ("L", "RGB"):
                raise InvalidInput(
                    str(file), f"has mode {image.mode}; only L (grey) and RGB are read"
                )
            pixels = np.asarray(image)
    except (OSError, UnidentifiedImageError) as error:
        raise InvalidInput(str(file), f"is not a readable picture: {error}") from error
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _size(picture: Pixels) -> str:
    c, h, w = picture.shape
    return f"{h}x{w} with {c} channel{'s' if c > 1 else ''}"


def _checked(path: Path, x: npt.NDArray[Any], y: npt.NDArray[Any]) -> tuple[Pixels, Labels]:
    """Returns pictures as uint8 (n, c, h, w) and labels as int64 (n,), or raises."""
    if x.dtype != np.uint8 or x.ndim not in (3, 4):
        raise InvalidInput(
            str(path), f"pictures are {x.dtype} {x.shape}; expected uint8 (n, h, w) or (n, c, h, w)"
        )
    if y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer):
        raise InvalidInput(
            str(path), f"labels are {y.dtype} {y.shape}; expected integers ({len(x)},)"
        )
    if x.ndim == 3:
        x = x[:, None]
    elif x.shape[1] > 4 and x.shape[3] <= 4:
        x = x.transpose(0, 3, 1, 2)
    if not x.size or y.min() < 0:
        raise InvalidInput(str(path), "holds no pictures" if not x.size else "a label is negative")
    return np.ascontiguousarray(x), y.astype(np.int64)


def _source(
    path: Path,
    x: Pixels,
    y: Labels,
    test: tuple[Pixels, Labels] | None,
    names: tuple[str, ...] | None = None,
) -> Source:
    """Builds the source of a file; names None stands for numbers, () for unknown labels."""
    count = 1 + int(max(y.max(), -1 if test is None else test[1].max()))
    names = tuple(map(str, range(count))) if names is None else names
    if names and len(names) < count:
        raise InvalidInput(str(path), f"{len(names)} class names for labels up to {count - 1}")
    if test is not None and test[0].shape[1:] != x.shape[1:]:
        raise InvalidInput(
            str(path), f"test pictures are {test[0].shape[1:]}, training's {x.shape[1:]}"
        )
    return Source(path.name.split(".")[0], x, y, 256, names, test)
