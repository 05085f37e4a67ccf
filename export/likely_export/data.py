"""Splits the pictures of a source, labelled or not, into five parts.

    train      the models are trained on it
    fit        outlier statistics are normalised and combined on it
    calibrate  scores are ranked against it
    validate   training is monitored on it
    test       figures are reported on it; it is used for nothing else

By default, pictures are dealt to the parts at random by a seed, since files are rarely
in random order. With `stretches`, each part is a contiguous stretch of the file instead,
which keeps neighbours that belong together in one part. A picture that a source contains
twice may fall into two parts: `Dataset.count_copies` counts these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from likely.answers import Doubles, Labels, Pixels
from likely.errors import InvalidInput
from likely_export import sources
from likely_export.sources import Source

PARTS = ("train", "fit", "calibrate", "validate", "test")
BINARISATION = 20261122
TRAIN_DRAW = 1 << 32  # draw number of the source's training part; its test part uses 0, 1, 2, ...


def evenly_spaced(n: int, most: int) -> npt.NDArray[np.int64]:
    """Returns up to `most` evenly spaced indices into n items, int64 (min(n, most),).

    The first `most` items would be no fair sample, because files need not be in random order.
    """
    size = min(n, most)
    return np.arange(size) * n // max(1, size)


@dataclass(frozen=True, slots=True)
class Split:
    """One part of a data set.

    Attributes:
        x: levels, uint8 (n, c, h, w).
        y: labels, int64 (n,); zeros if the labels are unknown.
        grey: brightnesses, uint8 (n, c, h, w), from which `x` was drawn by
            Bernoulli(grey / peak); None if `x` is the data itself.
        peak: the value of `grey` that is white.
    """

    x: Pixels
    y: Labels
    grey: Pixels | None = None
    peak: int = 0

    def __len__(self) -> int:
        return len(self.x)

    @property
    def unbinarised(self) -> Pixels:
        """The pictures before binarisation, uint8 (n, c, h, w)."""
        return self.x if self.grey is None else self.grey

    def take(self, rows: npt.NDArray[np.integer]) -> Split:
        """Returns the pictures of these rows, in this order."""
        grey = None if self.grey is None else self.grey[rows]
        return Split(self.x[rows], self.y[rows], grey, self.peak)

    def subsample(self, most: int) -> Split:
        """Returns at most `most` pictures, evenly spaced over this part."""
        return self.take(evenly_spaced(len(self), most))

    def redraw(self, rows: npt.NDArray[np.integer], generator: np.random.Generator) -> Pixels:
        """Returns pictures, uint8 (len(rows), c, h, w), drawn afresh if `x` was binarised."""
        if self.grey is None:
            return self.x[rows]
        return bernoulli(self.grey[rows], self.peak, generator)


@dataclass(frozen=True, slots=True)
class Dataset:
    """The five parts of one source.

    Attributes:
        name: the source's own name.
        levels: number of levels; every pixel is in [0, levels).
        labels: names of the labels, by number; empty if the labels are unknown.
        train: the models are trained on it.
        fit: statistics are combined on it.
        calibrate: scores are ranked against it.
        validate: training is monitored on it.
        test: figures are reported on it.
        digest: SHA-256 of the labels and of the pictures before binarisation, part by part.
    """

    name: str
    levels: int
    labels: tuple[str, ...]
    train: Split
    fit: Split
    calibrate: Split
    validate: Split
    test: Split
    digest: str

    @property
    def identity(self) -> tuple[str, int]:
        """What identifies the data: the digest, and the number of levels."""
        return self.digest, self.levels

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        c, h, w = self.train.x.shape[1:]
        return c, h, w

    @property
    def priors(self) -> Doubles:
        """Relative frequency of each label in the training part, (labels,)."""
        if not self.labels:
            return np.zeros(0)
        counts = np.bincount(self.train.y, minlength=len(self.labels))
        return np.asarray(counts / counts.sum())

    def count_copies(self, of: str = "train", among: Sequence[str] = PARTS[1:]) -> dict[str, int]:
        """Counts the pictures of each held-out part that also occur in the training part.

        Pictures count as equal if they agree in every byte.

        Args:
            of: the part to search in; the training part by default.
            among: the parts whose pictures are searched for.
        """
        seen = set(map(_fingerprint, getattr(self, of).unbinarised))
        return {
            part: sum(_fingerprint(picture) in seen for picture in getattr(self, part).unbinarised)
            for part in among
        }


@dataclass(frozen=True, slots=True)
class Sizes:
    """Number of pictures in each part; training takes the rest.

    Attributes:
        fit: pictures on which statistics are combined.
        calibrate: pictures to rank against; the smallest alpha is 1 / (calibrate + 1).
        validate: pictures on which training is monitored.
        test: pictures to report on; 0 if the source has its own test part.
        stretches: whether every part is a stretch of the source's order instead of pictures
            dealt singly. The seed chooses where the first stretch begins, and the order wraps
            around at its end. This keeps in one part what lies together, such as the digits
            of one writer.
    """

    fit: int
    calibrate: int
    validate: int
    test: int = 0
    stretches: bool = False

    def __post_init__(self) -> None:
        for part in PARTS[1:]:
            least = 0 if part == "test" else 1
            if getattr(self, part) < least:
                raise InvalidInput(
                    f"splits.{part}", f"{getattr(self, part)} pictures; at least {least} is needed"
                )


def load(
    source: str | Path,
    sizes: Sizes,
    *,
    levels: int = 0,
    binarise: bool = False,
    labels: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
    seed: int = 0,
) -> Dataset:
    """Loads a source and splits it into a data set by a seed.

    Args:
        source: `digits` (scikit-learn's, 8x8, 17 levels), an `.npz` file, an idx file, a
            folder of idx files, or a folder of pictures with one subfolder per label (or none,
            if the labels are unknown).
        sizes: number of pictures in each part.
        levels: number of levels to quantise to; a source whose pixels are all below it is
            left unchanged. 0 keeps the source's own levels, which its pixels must span.
        binarise: whether to draw each pixel as 0 or 1, with P(1) = x / (levels - 1). Held-out
            parts are drawn once, by Philox(key=(20261122, k)); training pictures are drawn
            afresh each time. Sources of zeros and ones stay unchanged.
        labels: names to use in place of the source's.
        without: labels whose pictures are left out of every part.
        seed: of the split.

    Raises:
        InvalidInput: the source cannot be read, split or quantised as asked, or train, fit or
            calibrate gets no picture of some label; the field names the file.
    """
    if binarise and levels:
        raise InvalidInput("levels", f"{levels} do not go with binarise, which makes two")
    whole = sources.with_label_names(sources.read(source), labels)
    if levels and not 2 <= levels <= whole.levels:
        raise InvalidInput(
            "levels", f"{levels} is not in [2, {whole.levels}], those of {whole.name}"
        )
    raw = sources.without_labels(whole, without)
    train, test = Split(raw.x, raw.y), None if raw.test is None else Split(*raw.test)
    if binarise:
        train = binarised(train, whole, TRAIN_DRAW)
        test = None if test is None else binarised(test, whole, 0)
    elif not levels:
        _require_span(whole)
    else:
        train = Split(quantised(train.x, whole, levels), train.y)
        test = None if test is None else Split(quantised(test.x, whole, levels), test.y)
    parts = _divide(raw.name, raw.labels, train, test, sizes, seed)
    count = 2 if binarise else levels or raw.levels
    return Dataset(raw.name, count, raw.labels, **parts, digest=_digest(parts))


def bernoulli(grey: Pixels, peak: int, generator: np.random.Generator) -> Pixels:
    """Draws zeros and ones, uint8 (...), with P(1) = grey / peak: u * peak < grey."""
    return (generator.random(grey.shape) * peak < grey).astype(np.uint8)


def binarised(split: Split, whole: Source, draw: int) -> Split:
    """Returns the split drawn once by Philox(key=(20261122, draw)); `redraw` draws it again.

    A source of zeros and ones stays unchanged.

    Raises:
        InvalidInput: the pixels of the source do not span its levels.
    """
    if whole.peak <= 1:
        return split
    _require_span(whole)
    peak = whole.levels - 1
    generator = np.random.Generator(np.random.Philox(key=[BINARISATION, draw]))
    return Split(bernoulli(split.x, peak, generator), split.y, split.x, peak)


def quantised(x: Pixels, whole: Source, levels: int) -> Pixels:
    """Returns a source's pictures quantised to `levels`; unchanged if all pixels are below it.

    Value v of a source with L levels becomes level round(v * (levels - 1) / (L - 1)). Black stays
    black, white stays white, and image files are read alike (`likely.levels.of_image`).

    Raises:
        InvalidInput: the pixels of the source do not span its levels.
    """
    if whole.peak < levels:
        return x
    _require_span(whole)
    fewer: Pixels = np.rint(x * ((levels - 1) / (whole.levels - 1))).astype(np.uint8)
    return fewer


def _require_span(whole: Source) -> None:
    if whole.is_dark:
        raise InvalidInput(
            whole.name,
            f"its pixels reach {whole.peak} where white is {whole.levels - 1}: stretch them, or "
            f"set levels = {max(2, whole.peak + 1)} if they are levels already, or levels = "
            f"{whole.levels} if the pictures really are that dark",
        )


def _divide(
    name: str,
    labels: tuple[str, ...],
    train: Split,
    test: Split | None,
    sizes: Sizes,
    seed: int,
) -> dict[str, Split]:
    if test is not None and sizes.test:
        raise InvalidInput(name, "has a test part of its own: leave splits.test out")
    if test is None and not sizes.test:
        raise InvalidInput(name, "has no test part: splits.test must say how many to keep")
    if test is not None and not len(test):
        raise InvalidInput(name, "its test part has no picture of the labels that are not held out")
    wanted = {part: getattr(sizes, part) for part in PARTS[1:]}
    left = len(train) - sum(wanted.values())
    if left < 1:
        raise InvalidInput(
            name,
            f"{len(train)} pictures cannot give the {sum(wanted.values())} of the splits and leave "
            "one to train on",
        )
    generator = np.random.Generator(np.random.Philox(key=[seed % (1 << 64), 0]))
    cuts = np.cumsum([left, *wanted.values()])[:-1]
    if sizes.stretches:
        start = generator.integers(len(train))
        stretches = np.split(np.roll(np.arange(len(train)), -start), cuts)
        chosen = [generator.permutation(stretch) for stretch in stretches]
    else:
        chosen = np.split(generator.permutation(len(train)), cuts)
    parts = dict(zip(PARTS, map(train.take, chosen), strict=True))
    _require_all_labels(name, labels, parts, train.y, sizes)
    return parts if test is None else {**parts, "test": test}


def _require_all_labels(
    name: str, labels: tuple[str, ...], parts: dict[str, Split], y: Labels, sizes: Sizes
) -> None:
    """Raises unless every label can be learnt and ranked; an unranked one is in every label set.

    Raises:
        InvalidInput: a label has no picture to train on, or train, fit or calibrate lacks it.
    """
    for label in np.setdiff1d(np.arange(len(labels)), y):
        raise InvalidInput(
            name,
            f"label {labels[label]} has no picture to train on: number labels from 0 "
            "without a gap, or hold that one out (data.without)",
        )
    for part in ("train", "fit", "calibrate"):
        for label in np.setdiff1d(y, parts[part].y):
            way = (
                "a source that is sorted by label cannot be split by stretches"
                if sizes.stretches
                else "make that part larger, or hold the label out (data.without)"
            )
            raise InvalidInput(name, f"no picture of label {labels[label]} falls to {part}: {way}")


def _digest(parts: dict[str, Split]) -> str:
    digest = hashlib.sha256()
    for part in PARTS:
        split = parts[part]
        for array in (split.unbinarised, split.y.astype("<i8")):
            digest.update(f"{part} {array.dtype.str} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _fingerprint(picture: Pixels) -> bytes:
    """Returns a hash that identifies a picture by its content."""
    return hashlib.blake2b(picture.tobytes(), digest_size=16).digest()
