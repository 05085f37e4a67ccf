"""Random numbers keyed by (seed, picture), so that they depend on no batch, chunk or worker.

Philox is a counter-based generator (Salmon et al., 2011). The key (seed, index) gives
every picture a stream of its own, and the counter's two highest words divide it by use
and by attempt. A graph names its noise inputs by their distribution: `eps` is standard
normal, `gumbel` standard Gumbel. Adding Gumbel noise to log-probabilities and taking
the largest sum draws from the distribution (Gumbel, 1954). If that noise is multiplied
by t, the draw is from the probabilities to the power 1/t. Where a level is drawn digit
by digit, these are the probabilities of the digits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum

import numpy as np

from likely.answers import Doubles, Floats

SEED_LIMIT = 1 << 63


class Use(IntEnum):
    """The purpose of a stream's numbers; each has a counter range of its own."""

    LABEL = 0
    LATENT = 1
    PIXELS = 2
    CHOICE = 3
    ACCEPTANCE = 4


def stream(seed: int, index: int, use: Use, attempt: int = 0) -> np.random.Generator:
    """The generator of one picture for one use.

    Args:
        seed: in [-2**63, 2**63).
        index: the picture's index, in [0, 2**63).
        use: the purpose of the numbers.
        attempt: how often the picture has been drawn before.
    """
    key = np.array([seed % (1 << 64), index], dtype=np.uint64)
    counter = np.array([0, 0, attempt, use], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def normal(
    seed: int, indices: Sequence[int], shape: tuple[int, ...], attempts: Sequence[int] | None = None
) -> Floats:
    """Standard normal noise, float32 (n, *shape), for the pictures of these n indices."""
    noise = np.empty((len(indices), *shape), dtype=np.float32)
    for row, generator in zip(noise, _streams(seed, indices, Use.LATENT, attempts), strict=True):
        generator.standard_normal(out=row, dtype=np.float32)
    return noise


def gumbel(
    seed: int, indices: Sequence[int], shape: tuple[int, ...], attempts: Sequence[int] | None = None
) -> Floats:
    """Standard Gumbel noise, float32 (n, *shape), for the pictures of these n indices."""
    noise = np.empty((len(indices), *shape), dtype=np.float32)
    for row, generator in zip(noise, _streams(seed, indices, Use.PIXELS, attempts), strict=True):
        # -log(E) with E exponential is Gumbel; the ziggurat draws E without a logarithm.
        generator.standard_exponential(out=row, dtype=np.float32)
    np.maximum(noise, np.finfo(np.float32).tiny, out=noise)
    np.log(noise, out=noise)
    return np.negative(noise, out=noise)


def common(shape: tuple[int, ...]) -> Floats:
    """The same standard normal noise for every picture, float32 (n, ...), to estimate bounds.

    An answer then depends on its picture alone, and the labels that it compares share the
    error of the estimate.
    """
    return np.broadcast_to(normal(0, [0], shape[1:]), shape)


def uniform(
    seed: int,
    indices: Sequence[int],
    use: Use = Use.LABEL,
    attempts: Sequence[int] | None = None,
) -> Doubles:
    """A uniform number in [0, 1) for each picture, float64 (n,), for its label or acceptance."""
    return np.array([generator.random() for generator in _streams(seed, indices, use, attempts)])


def _streams(
    seed: int, indices: Sequence[int], use: Use, attempts: Sequence[int] | None
) -> Iterator[np.random.Generator]:
    for index, attempt in zip(indices, attempts or [0] * len(indices), strict=True):
        yield stream(seed, index, use, attempt)
