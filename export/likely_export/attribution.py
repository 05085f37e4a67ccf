"""How much each pixel favours one of two labels: parts of log p(x|first) - log p(x|second)."""

from __future__ import annotations

import numpy as np

from likely.answers import Doubles, Floats, Labels, Pixels
from likely.graphs import Session
from likely_export import passes

PATCH, STRIDE = 4, 2


def by_pixel(session: Session, x: Pixels, pair: Labels) -> Floats:
    """Each pixel's term of the log-ratio, by the chain rule, nats, float32 (n, c, h, w).

    Args:
        session: session of a conditional graph that outputs `surprise` under every label.
        x: uint8 (n, c, h, w).
        pair: first and second label, int64 (n, 2).
    """
    maps = passes.run_graph_output(session, passes.picture_feeds(session.spec, x), "surprise")
    rows = np.arange(len(x))
    terms: Floats = maps[rows, pair[:, 1]] - maps[rows, pair[:, 0]]
    return terms


def by_occlusion(
    session: Session, x: Pixels, pair: Labels, instead: Pixels
) -> tuple[Doubles, Floats]:
    """The log-ratios, and how much each loses where a patch of the picture is replaced.

    A pixel's value is the mean loss over the patches that contain it (Zeiler and Fergus, 2014,
    https://arxiv.org/abs/1311.2901). Such maps do not sum to the log-ratio: patches may carry the
    same evidence, or evidence only together, and a patch that equals its replacement loses nothing.

    Args:
        session: session of a conditional graph whose log-likelihoods are finite.
        x: uint8 (n, c, h, w).
        pair: first and second label, int64 (n, 2).
        instead: replacement for the patches, uint8 (c, h, w).

    Returns:
        Log-ratios, float64 (n,), and maps, float32 (n, 1, h, w), in nats. A patch spans all
        channels.
    """
    n, _, h, w = x.shape
    whole = _log_ratio(session, x, pair)
    lost, times = np.zeros((n, 1, h, w)), np.zeros((h, w))
    lefts = range(0, max(1, w - PATCH + STRIDE), STRIDE)
    for top in range(0, max(1, h - PATCH + STRIDE), STRIDE):
        patches = [(slice(top, top + PATCH), slice(left, left + PATCH)) for left in lefts]
        occluded = np.stack([x] * len(patches))
        for pictures, patch in zip(occluded, patches, strict=True):
            pictures[:, :, *patch] = instead[:, *patch]
        left_over = _log_ratio(
            session, occluded.reshape(-1, *x.shape[1:]), np.tile(pair, (len(patches), 1))
        )
        for patch, ratios in zip(patches, left_over.reshape(-1, n), strict=True):
            lost[:, :, *patch] += (whole - ratios)[:, None, None, None]
            times[patch] += 1
    return whole, (lost / times).astype(np.float32)


def _log_ratio(session: Session, x: Pixels, pair: Labels) -> Doubles:
    log_pxy = passes.run_graph_output(session, passes.picture_feeds(session.spec, x), "log_pxy")
    log_ratios: Doubles = np.subtract(*np.take_along_axis(log_pxy.astype(np.float64), pair, 1).T)
    return log_ratios
