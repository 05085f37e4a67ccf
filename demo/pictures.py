"""Digits that were held out of training, and pictures that are not digits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from likely.answers import Labels, Pixels
from likely.bundle import Manifest

LEVELS = 17
PARTS = ("train", "fit", "calibrate", "validate", "test")


def held_out(manifest: Manifest) -> tuple[Pixels, Labels]:
    """The test split of the bundle's recipe: pictures uint8 (n, 1, 8, 8) and labels int64 (n,).

    Raises:
        ValueError: the splits are not those that the bundle was trained on.
    """
    bunch = load_digits()
    x, y = bunch.images.astype(np.uint8)[:, None], bunch.target.astype("<i8")
    recipe = manifest.recipe["data"]
    sizes = [recipe["splits"][part] for part in PARTS[1:]]
    # The same random order as in likely_export.data; the digest below verifies it.
    seeded = np.random.Generator(np.random.Philox(key=[recipe["seed"] % (1 << 64), 0]))
    cuts = np.cumsum([len(x) - sum(sizes), *sizes])[:-1]
    rows = dict(zip(PARTS, np.split(seeded.permutation(len(x)), cuts), strict=True))
    if _digest({part: (x[i], y[i]) for part, i in rows.items()}) != manifest.data_digest:
        raise ValueError("scikit-learn's digits are not those that the bundle was trained on")
    return x[rows["test"]], y[rows["test"]]


def _digest(parts: dict[str, tuple[Pixels, Labels]]) -> str:
    digest = hashlib.sha256()
    for part, arrays in parts.items():
        for array in arrays:
            digest.update(f"{part} {array.dtype.str} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def noise(digits: Pixels, rng: np.random.Generator) -> Pixels:
    """Independent pixels with uniformly distributed levels."""
    return rng.integers(0, LEVELS, digits.shape, dtype=np.uint8)


def blank(digits: Pixels, rng: np.random.Generator) -> Pixels:
    """Empty pictures: level 0 everywhere."""
    return np.zeros_like(digits)


def flat(digits: Pixels, rng: np.random.Generator) -> Pixels:
    """One grey level everywhere, by turns from the faintest to black."""
    greys = 1 + np.arange(len(digits)) % (LEVELS - 1)
    return np.broadcast_to(greys[:, None, None, None], digits.shape).astype(np.uint8)


def inverted(digits: Pixels, rng: np.random.Generator) -> Pixels:
    """Digits with inverted levels: white ink on black paper."""
    return (LEVELS - 1 - digits).astype(np.uint8)


def shuffled(digits: Pixels, rng: np.random.Generator) -> Pixels:
    """Digits with their pixels in random order."""
    flattened = digits.reshape(len(digits), -1)
    return rng.permuted(flattened, axis=1).reshape(digits.shape)


def photographs(digits: Pixels, rng: np.random.Generator) -> Pixels:
    """Patches of scikit-learn's sample photographs, in 17 levels of grey."""
    photos = [Image.fromarray(array).convert("L") for array in load_sample_images().images]
    patches: list[Pixels] = []
    while len(patches) < len(digits):
        patch = _patch(photos[rng.integers(len(photos))], rng)
        if patch.std() >= 2:  # skips patches without structure, such as clear sky
            patches.append(patch)
    return np.stack(patches)[:, None]


def _patch(photo: Image.Image, rng: np.random.Generator) -> Pixels:
    side = int(rng.integers(16, 129))
    left, top = int(rng.integers(photo.width - side)), int(rng.integers(photo.height - side))
    patch = photo.crop((left, top, left + side, top + side)).resize((8, 8), Image.Resampling.BOX)
    return (np.asarray(patch).astype(np.int64) * LEVELS // 256).astype(np.uint8)


NO_DIGITS: dict[str, Callable[[Pixels, np.random.Generator], Pixels]] = {
    "noise": noise,
    "blank": blank,
    "flat grey": flat,
    "inverted digit": inverted,
    "shuffled digit": shuffled,
    "photograph": photographs,
}
