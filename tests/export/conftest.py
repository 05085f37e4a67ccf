import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from likely.graphs import Device, Session  # noqa: E402
from likely_export import graphs  # noqa: E402
from likely_export.roles import GraphSource  # noqa: E402

Opener = Callable[[GraphSource, int, int], Session]


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
