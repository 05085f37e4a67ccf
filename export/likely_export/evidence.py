"""Which pixels speak for which of two labels."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import numpy as np

from likely import noise
from likely.answers import Doubles, Floats, Labels, Pixels
from likely.graphs import Array, Session

PATCH, STRIDE = 4, 2


def log_odds(log_pxy: Doubles, pair: Labels) -> Doubles:
    """log p(x|first) - log p(x|second) in nats (n,), of log_pxy (n, labels) and pair (n, 2)."""
    found: Doubles = np.subtract(*np.take_along_axis(log_pxy, pair, 1).T)
    return found


def by_pixel(session: Session, x: Pixels, pair: Labels) -> Floats:
    """What every pixel given those before it adds to the log-odds, float32 (n, c, h, w), nats.

    Args:
        session: of a conditional graph that gives `surprise` under every label.
        x: uint8 (n, c, h, w).
        pair: int64 (n, 2).
    """
    feeds: dict[str, Array] = {"x": x}
    if (eps := session.spec.input("eps")) is not None:
        feeds["eps"] = np.ascontiguousarray(noise.common(eps.array_shape(len(x))))
    maps = session.run(feeds, ["surprise"])[0]
    each = np.arange(len(x))
    found: Floats = maps[each, pair[:, 1]] - maps[each, pair[:, 0]]
    return found


async def by_absence(
    likelihoods: Callable[[Pixels], Awaitable[Doubles]], x: Pixels, pair: Labels, instead: Pixels
) -> Floats:
    """What patches add to the log-odds by being there, float32 (n, c, h, w), nats.

    Each patch is replaced, and what the log-odds lose is laid to its pixels (Zeiler and Fergus,
    2014, https://arxiv.org/abs/1311.2901); a pixel gets the mean over the patches that hold it.
    The maps do not add up: patches say the same twice, or only together.

    Args:
        likelihoods: log p(x|y) (n, labels) of pictures.
        x: uint8 (n, c, h, w).
        pair: int64 (n, 2).
        instead: uint8 (c, h, w), what stands where a patch is taken away.
    """
    whole = log_odds(await likelihoods(x), pair)
    total, times = np.zeros(x.shape), np.zeros(x.shape[2:])
    for top in range(0, max(1, x.shape[2] - PATCH + STRIDE), STRIDE):
        for left in range(0, max(1, x.shape[3] - PATCH + STRIDE), STRIDE):
            patch = slice(top, top + PATCH), slice(left, left + PATCH)
            without = x.copy()
            without[:, :, *patch] = instead[:, *patch]
            lost = whole - log_odds(await likelihoods(without), pair)
            total[:, :, *patch] += lost[:, None, None, None]
            times[patch] += 1
    found: Floats = (total / np.maximum(times, 1)).astype(np.float32)
    return found
