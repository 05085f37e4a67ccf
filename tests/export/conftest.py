from pathlib import Path

import pytest
import torch
from autoregressive import Opener

from likely.graphs import Device, Session
from likely_export import graphs
from likely_export.roles import GraphSource


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def opened(tmp_path: Path) -> Opener:
    """Exports a graph, with the parity gate, and opens it as a server would."""

    def export(source: GraphSource, levels: int, labels: int) -> Session:
        path = tmp_path / "graph.onnx"
        return Session(path, graphs.export(source, path, levels, labels).graph, Device("cpu"))

    return export
