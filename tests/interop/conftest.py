from collections.abc import Iterator

import pytest

from demo.serving import Served, served
from likely import Client


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A real `likely serve` with what the package ships."""
    with served(tmp_path_factory.mktemp("server") / "server.log") as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Served) -> Iterator[Client]:
    """Our own client, to compare with."""
    with Client(server.address) as ours:
        yield ours
