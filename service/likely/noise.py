"""Random numbers keyed by (seed, picture): the same in whatever batch, chunk or worker.

Philox is a counter-based generator (Salmon et al., 2011): the key (seed, index)
opens a stream of its own for every picture, and the counter's highest word
divides it by use. A graph names its noise inputs by their distribution:
`eps` is standard normal, `gumbel` standard Gumbel. Adding Gumbel noise to
log-probabilities and taking the largest draws from them (Gumbel, 1954), and
multiplying that noise by t draws from the probabilities to the power 1/t.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from likely.answers import Doubles, Floats

SEED_LIMIT = 1 << 63


class Use(IntEnum):
    """What a stream's numbers are for; each use has a counter range of its own."""

    LABEL = 0
    LATENT = 1
    PIXELS = 2


def stream(seed: int, index: int, use: Use) -> np.random.Generator:
    """The generator of one picture for one use.

    Args:
        seed: in [-2**63, 2**63).
        index: of the picture, in [0, 2**63).
        use: the part of the picture's stream.
    """
    key = np.array([seed % (1 << 64), index], dtype=np.uint64)
    counter = np.array([0, 0, 0, use], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def normal(seed: int, first: int, n: int, shape: tuple[int, ...]) -> Floats:
    """Standard normal noise, float32 (n, *shape), for pictures first..first+n-1."""
    noise = np.empty((n, *shape), dtype=np.float32)
    for i in range(n):
        stream(seed, first + i, Use.LATENT).standard_normal(out=noise[i], dtype=np.float32)
    return noise


def gumbel(seed: int, first: int, n: int, shape: tuple[int, ...]) -> Floats:
    """Standard Gumbel noise, float32 (n, *shape), for pictures first..first+n-1."""
    noise = np.empty((n, *shape), dtype=np.float32)
    for i in range(n):
        # -log(E) with E exponential is Gumbel; the ziggurat draws E without a logarithm.
        stream(seed, first + i, Use.PIXELS).standard_exponential(out=noise[i], dtype=np.float32)
    np.maximum(noise, np.finfo(np.float32).tiny, out=noise)
    np.log(noise, out=noise)
    return np.negative(noise, out=noise)


def uniform(seed: int, first: int, n: int) -> Doubles:
    """One uniform number in [0, 1) a picture, float64 (n,), to draw its label with."""
    return np.array([stream(seed, first + i, Use.LABEL).random() for i in range(n)])
