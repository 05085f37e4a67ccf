"""Exported graphs, run over as many pictures as there are, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from likely.graphs import Array, Device, Session
from likely_export.graphs import Exported

BATCH = 16


def session(folder: Path, exported: Exported) -> Session:
    """The graph, opened on the processor."""
    return Session(folder / exported.graph.file, exported.graph, Device("cpu"))


def rows(session: Session, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
    """These outputs, each of all rows of the feeds (n, ...)."""
    n = len(next(iter(feeds.values())))
    parts = [
        session.run(
            {name: np.ascontiguousarray(feed[at : at + BATCH]) for name, feed in feeds.items()},
            outputs,
        )
        for at in range(0, n, BATCH)
    ]
    return [np.concatenate(columns) for columns in zip(*parts, strict=True)]


def column(session: Session, feeds: Mapping[str, Array], output: str) -> Array:
    """One output of all rows of the feeds (n, ...)."""
    (found,) = rows(session, feeds, [output])
    return found
