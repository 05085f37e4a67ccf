from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.serving import Served, served
from likely import Client

DIGITS = Path(__file__).parents[2] / "bundles" / "digits"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A real `likely serve` with the small bundle of digits."""
    with served(tmp_path_factory.mktemp("server") / "server.log", DIGITS) as running:
        yield running


@pytest.fixture(scope="session")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A real `likely serve` with what the package ships."""
    with served(tmp_path_factory.mktemp("stocked") / "server.log") as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Served) -> Iterator[Client]:
    """Our own client, to compare with."""
    with Client(server.address) as ours:
        yield ours
