"""The cost of decisions relative to one pass of log p(x), in CPU time of one thread."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from likely.answers import Pixels
from likely.bundle import Bundle, Graph, Role
from likely.graphs import Array, Device, Session
from likely_export import passes
from likely_export.graphs import extract_outputs

PICTURES = 16
BATCHES = (1, 4, PICTURES)
ROUNDS = 7


def measure(bundle: Bundle, decide: Callable[..., object], x: Pixels) -> dict[str, float]:
    """Measures costs as multiples of the plain pass: minima over interleaved rounds.

    Each graph runs at its best batch size, as in a server.

    `statistics_cost` is the density graph with all its outlier statistics, and the p-values from
    these; `combination_cost` is the p-values alone; `classification_cost` is the graph of
    log p(x|y) for all labels.

    Args:
        bundle: verified bundle.
        decide: computes p-values from the density graph's statistics, and predicted labels if it
            outputs them.
        x: pictures to use, uint8 (n, c, h, w).
    """
    density = bundle.manifest.graphs[Role.DENSITY]
    part = {"x": np.ascontiguousarray(x[:PICTURES])}
    with tempfile.TemporaryDirectory() as folder:
        plain = _plain(bundle.graph(Role.DENSITY), density, Path(folder) / "plain.onnx")
    session = passes.open_graph(bundle, Role.DENSITY)
    names = [name for name in ("statistics", "label") if density.output(name) is not None]
    outputs = session.run(part, names)
    runs: dict[str, list[Callable[[], object]]] = {
        "plain": _passes(plain, part),
        "graph": _passes(session, part),
        "combination_cost": [partial(decide, *outputs)],
    }
    if (spec := bundle.manifest.graphs.get(Role.CONDITIONAL)) is not None:
        feeds = passes.picture_feeds(spec, part["x"])
        feeds = {name: np.ascontiguousarray(feed) for name, feed in feeds.items()}
        session = passes.open_graph(bundle, Role.CONDITIONAL)
        runs["classification_cost"] = _passes(session, feeds)
    least = dict.fromkeys(runs, np.inf)
    for _ in range(ROUNDS):
        for name, ways in runs.items():
            least[name] = min(least[name], *map(_seconds, ways))
    least["statistics_cost"] = least.pop("graph") + least["combination_cost"]
    plain_seconds = least.pop("plain")
    return {name: seconds / plain_seconds for name, seconds in least.items()}


def _plain(path: Path, density: Graph, into: Path) -> Session:
    """Opens the density graph, reduced to log p(x)."""
    extract_outputs(path, into, ["log_px"])
    only = tuple(spec for spec in density.outputs if spec.name == "log_px")
    return Session(into, density.model_copy(update={"outputs": only}), Device("cpu"))


def _passes(session: Session, feeds: Mapping[str, Array]) -> list[Callable[[], object]]:
    """Returns passes over all rows of the feeds, one for each batch size."""
    return [partial(_pass, session, feeds, batch) for batch in BATCHES]


def _pass(session: Session, feeds: Mapping[str, Array], batch: int) -> None:
    outputs = [spec.name for spec in session.spec.outputs]
    for at in range(0, len(next(iter(feeds.values()))), batch):
        session.run({name: feed[at : at + batch] for name, feed in feeds.items()}, outputs)


def _seconds(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began
