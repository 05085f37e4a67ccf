"""Runs exported graphs, or their modules, over any number of pictures, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from likely import machine, noise
from likely.answers import Pixels
from likely.bundle import Bundle, Graph, Role
from likely.graphs import Array, Device, Session
from likely_export.graphs import Exported
from likely_export.roles import GraphSource

BATCH = 16
SMALL_BATCH = 2  # batch of pictures that expand to a row per label, so that they fit a core's cache


def open_exported(folder: Path, exported: Exported) -> Session:
    """Opens a graph on the CPU."""
    return Session(folder / exported.graph.file, exported.graph, Device("cpu"))


def open_graph(bundle: Bundle, role: Role) -> Session:
    """Opens a bundle's graph of this role on the CPU."""
    return Session(bundle.graph(role), bundle.manifest.graphs[role], Device("cpu"))


def picture_feeds(graph: Graph, x: Pixels) -> dict[str, Array]:
    """The feeds of a graph of pictures, uint8 (n, c, h, w), with the common noise if it takes any.

    The noise is one picture's, and read-only.
    """
    feeds: dict[str, Array] = {"x": x}
    if (eps := graph.input("eps")) is not None:
        feeds["eps"] = noise.common(eps.array_shape(len(x)))
    return feeds


def run_graph(
    session: Session, feeds: Mapping[str, Array], outputs: Sequence[str], batch: int = BATCH
) -> list[Array]:
    """Returns these outputs for all rows of the feeds (n, ...); runs a batch on each core."""
    n = len(next(iter(feeds.values())))

    def run(at: int) -> list[Array]:
        batch_feeds = {
            name: np.ascontiguousarray(feed[at : at + batch]) for name, feed in feeds.items()
        }
        return session.run(batch_feeds, outputs)

    with ThreadPoolExecutor(machine.cores()) as pool:
        parts = list(pool.map(run, range(0, n, batch)))
    return [np.concatenate(columns) for columns in zip(*parts, strict=True)]


def run_module(
    source: GraphSource, feeds: Mapping[str, Array], outputs: Sequence[str], batch: int = BATCH
) -> list[Array]:
    """Returns what `run_graph` returns, from the module instead of its graph.

    The module is left in the channels_last layout, in which CPUs convolve faster.
    """
    places = [[spec.name for spec in source.outputs].index(name) for name in outputs]
    module = source.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    n = len(next(iter(feeds.values())))
    kept: list[Array] = []

    def run(at: int) -> None:
        arrays = (np.array(feeds[spec.name][at : at + batch]) for spec in source.inputs)
        made = module(*map(torch.from_numpy, arrays))
        tensors = made if isinstance(made, tuple) else (made,)
        parts = [tensors[place].numpy() for place in places]
        if not kept:
            kept.extend(np.empty((n, *part.shape[1:]), part.dtype) for part in parts)
        for whole, part in zip(kept, parts, strict=True):
            whole[at : at + batch] = part

    # Keep no array of a batch: a small one among freed large ones would pin their memory.
    with torch.no_grad():
        for at in range(0, n, batch):
            run(at)
    return kept


def run_graph_output(session: Session, feeds: Mapping[str, Array], output: str) -> Array:
    """Returns one output for all rows of the feeds (n, ...)."""
    (array,) = run_graph(session, feeds, [output])
    return array
