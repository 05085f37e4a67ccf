from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from autoregressive import Opener

from likely.bundle import Bundle
from likely.engine import Engine
from likely.graphs import Device, Session
from likely_export import graphs, recipes
from likely_export.data import Dataset
from likely_export.roles import GraphSource


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """Of the bundle of 8x8 digits, for modules without one of their own."""
    digits = Bundle.open(Path("bundles/digits"))
    engine = Engine.load(digits, device=Device("cpu"), threads=1, max_batch=16)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def data() -> Dataset:
    """What that bundle was made with."""
    return recipes.load("digits").data.load()


@pytest.fixture
def opened(tmp_path: Path) -> Opener:
    """Exports a graph, with the parity gate, and opens it as a server would."""

    def export(source: GraphSource, levels: int, labels: int) -> Session:
        path = tmp_path / "graph.onnx"
        return Session(path, graphs.export(source, path, levels, labels).graph, Device("cpu"))

    return export
