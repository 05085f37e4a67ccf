"""Pictures of a source, labelled or not, each dealt to one of five parts.

    train      what the weights see
    fit        where outlier statistics are normalised and combined
    calibrate  what scores are ranked against
    validate   what training is watched on
    test       what is reported, and nothing else

Pictures are dealt to the parts at random by a seed, since files are rarely in random
order; or by stretches of the file, where what lies together there belongs together. A
picture that a source holds twice may come to two parts: `Dataset.copies` counts those.
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
HELD_BACK = 1 << 32  # streams of the training part, far from the draws of the test part


def spread(n: int, most: int) -> npt.NDArray[np.int64]:
    """The places of at most so many of n, evenly far apart, int64 (min(n, most),).

    The first ones would be no sample: files need not be in random order.
    """
    size = min(n, most)
    return np.arange(size) * n // max(1, size)


@dataclass(frozen=True, slots=True)
class Split:
    """One part of a data set.

    Attributes:
        x: uint8 (n, c, h, w), levels.
        y: int64 (n,), labels; zeros where no labels are known.
        grey: uint8 (n, c, h, w), what `x` was drawn from by Bernoulli(grey / peak);
            None where `x` is the data itself.
        peak: the largest value of `grey`.
    """

    x: Pixels
    y: Labels
    grey: Pixels | None = None
    peak: int = 0

    def __len__(self) -> int:
        return len(self.x)

    @property
    def given(self) -> Pixels:
        """The pictures before any was drawn, uint8 (n, c, h, w)."""
        return self.x if self.grey is None else self.grey

    def take(self, rows: npt.NDArray[np.integer]) -> Split:
        """The pictures of those rows, in that order."""
        grey = None if self.grey is None else self.grey[rows]
        return Split(self.x[rows], self.y[rows], grey, self.peak)

    def some(self, most: int) -> Split:
        """At most so many pictures, from all over this part."""
        return self.take(spread(len(self), most))

    def redraw(self, rows: npt.NDArray[np.integer], generator: np.random.Generator) -> Pixels:
        """Pictures uint8 (len(rows), c, h, w), binarised afresh where `x` is a draw."""
        if self.grey is None:
            return self.x[rows]
        return bernoulli(self.grey[rows], self.peak, generator)


@dataclass(frozen=True, slots=True)
class Dataset:
    """The five parts of one source.

    Attributes:
        name: what the source calls itself.
        levels: every pixel is in [0, levels).
        labels: the labels' names in the order of their numbers; none where none are known.
        train: what the weights see.
        fit: where statistics are combined.
        calibrate: what scores are ranked against.
        validate: what training is watched on.
        test: what is reported.
        digest: SHA-256 over all pictures, before `binarise` draws them, and labels in their parts.
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
        """What tells these data from any others: the digest, and the levels made of them."""
        return self.digest, self.levels

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        c, h, w = self.train.x.shape[1:]
        return c, h, w

    @property
    def priors(self) -> Doubles:
        """How often each label stands in the training part, (labels,)."""
        if not self.labels:
            return np.zeros(0)
        counts = np.bincount(self.train.y, minlength=len(self.labels))
        return np.asarray(counts / counts.sum())

    def copies(self, of: str = "train", among: Sequence[str] = PARTS[1:]) -> dict[str, int]:
        """How many pictures of each held-out part are in the training part, too, to the byte.

        Args:
            of: another part to look for them in.
            among: the parts whose pictures are looked for.
        """
        seen = set(map(_print, getattr(self, of).given))
        return {
            part: sum(_print(picture) in seen for picture in getattr(self, part).given)
            for part in among
        }


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many pictures each part takes; training takes what is left.

    Attributes:
        fit: pictures that statistics are combined on.
        calibrate: pictures to rank against; the finest alpha is 1 / (calibrate + 1).
        validate: pictures that training is watched on.
        test: pictures to report on; 0 where the source brings a test part.
        stretches: every part is a stretch of the source's order, from a place that the seed
            chooses and round its end, so that what lies together there, as a writer's digits
            do, stays in one part; else pictures are dealt singly.
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
    """The data set of a source, divided by a seed.

    Args:
        source: `digits` (scikit-learn's, 8x8, 17 levels), an `.npz` file, an idx
            file or a folder of them, or a folder of pictures, with one subfolder a label where
            labels are known.
        sizes: how many pictures each part takes.
        levels: quantise to so many levels what does not have so few already; 0 keeps
            the source's, which its pixels must span.
        binarise: two levels, 1 with probability x / (levels - 1): held-out parts
            are drawn once by Philox(key=(20261122, k)), training afresh each time. Zeros and
            ones stay.
        labels: names to use in place of the source's.
        without: labels whose pictures are left out everywhere.
        seed: of the division.

    Raises:
        InvalidInput: the source cannot be read or cannot be divided or quantised so, or of a label
            no picture falls to what is trained, fitted or calibrated on; the field names the file.
    """
    if binarise and levels:
        raise InvalidInput("levels", f"{levels} do not go with binarise, which makes two")
    whole = sources.named(sources.read(source), labels)
    if levels and not 2 <= levels <= whole.levels:
        raise InvalidInput(
            "levels", f"{levels} is not in [2, {whole.levels}], those of {whole.name}"
        )
    raw = sources.kept(whole, without)
    train, test = Split(raw.x, raw.y), None if raw.test is None else Split(*raw.test)
    if binarise:
        train = binarised(train, whole, HELD_BACK)
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
    """Zeros and ones uint8 (...) with P(1) = grey / peak: u * peak < grey."""
    return (generator.random(grey.shape) * peak < grey).astype(np.uint8)


def binarised(split: Split, whole: Source, draw: int) -> Split:
    """The split drawn once by Philox(key=(20261122, draw)), ready to be redrawn.

    Zeros and ones stay as they are.

    Raises:
        InvalidInput: the source that it is of does not span its levels.
    """
    if whole.peak <= 1:
        return split
    _require_span(whole)
    peak = whole.levels - 1
    generator = np.random.Generator(np.random.Philox(key=[BINARISATION, draw]))
    return Split(bernoulli(split.x, peak, generator), split.y, split.x, peak)


def quantised(x: Pixels, whole: Source, levels: int) -> Pixels:
    """Pictures of a source in so many levels, as image files are read; as they are if it has none.

    Value v of a source of L levels is level round(v * (levels - 1) / (L - 1)), so that black stays
    black, white white, and a picture is the same from an image file (`likely.levels.of_image`).

    Raises:
        InvalidInput: the source does not span its levels.
    """
    if whole.peak < levels:
        return x
    _require_span(whole)
    fewer: Pixels = np.rint(x * ((levels - 1) / (whole.levels - 1))).astype(np.uint8)
    return fewer


def _require_span(whole: Source) -> None:
    if whole.dark:
        raise InvalidInput(
            whole.name,
            f"its pixels reach {whole.peak} where white is {whole.levels - 1}: stretch them, or "
            f"give levels = {max(2, whole.peak + 1)} to take them as levels, or levels = "
            f"{whole.levels} if the pictures are as dark as that",
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
        raise InvalidInput(name, "brings a test part of its own: leave splits.test out")
    if test is None and not sizes.test:
        raise InvalidInput(name, "brings no test part: splits.test must say how many to keep")
    if test is not None and not len(test):
        raise InvalidInput(name, "of the labels that are not held out its test part has no picture")
    wanted = {part: getattr(sizes, part) for part in PARTS[1:]}
    left = len(train) - sum(wanted.values())
    if left < 1:
        raise InvalidInput(
            name, f"{len(train)} pictures cannot give {sum(wanted.values())} and leave training one"
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
    """Returns if every label is learnt and ranked: one without ranks would be in every label set.

    Raises:
        InvalidInput: there is a label without a picture to train on, or a part has none of it.
    """
    for label in np.setdiff1d(np.arange(len(labels)), y):
        raise InvalidInput(
            name,
            f"of label {labels[label]} there is no picture to train on: number labels from 0 "
            "without a gap, or hold that one out (data.without)",
        )
    for part in ("train", "fit", "calibrate"):
        for label in np.setdiff1d(y, parts[part].y):
            way = (
                "what is sorted by label cannot be divided by stretches"
                if sizes.stretches
                else "make that part larger, or hold the label out (data.without)"
            )
            raise InvalidInput(name, f"of label {labels[label]} no picture falls to {part}: {way}")


def _digest(parts: dict[str, Split]) -> str:
    digest = hashlib.sha256()
    for part in PARTS:
        split = parts[part]
        for array in (split.given, split.y.astype("<i8")):
            digest.update(f"{part} {array.dtype.str} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _print(picture: Pixels) -> bytes:
    """What tells the content of a picture from any other's."""
    return hashlib.blake2b(picture.tobytes(), digest_size=16).digest()
