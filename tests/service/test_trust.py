"""How long a version is believed whose answers are not finite."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from likely.answers import Acceptance
from likely.batching.traffic import Traffic
from likely.bundle import Bundle
from likely.engine import Engine
from likely.errors import ServerFault, Unavailable
from likely.graphs import Array, Device
from likely.latent import Drawing
from likely.trust import Trust

if TYPE_CHECKING:
    from tests.conftest import Toy

FINITE, NOT_FINITE = np.zeros(2), np.array([0, np.nan])


def withheld(trust: Trust, graph: str, *arrays: Array) -> bool:
    try:
        trust.check(graph, *arrays)
    except ServerFault:
        return True
    return False


def test_so_many_in_a_row_end_it() -> None:
    trust, lost = Trust("m", 3, Traffic()), list[bool]()
    trust.on_unhealthy = lambda: lost.append(trust.healthy)
    for values in (NOT_FINITE, NOT_FINITE, FINITE, NOT_FINITE, NOT_FINITE):
        assert withheld(trust, "density", FINITE, values) == (values is NOT_FINITE)
        trust.require()
    assert withheld(trust, "density", NOT_FINITE) and withheld(trust, "density", NOT_FINITE)
    assert lost == [False]
    with pytest.raises(Unavailable, match="3 answers in a row"):
        trust.require()


def test_one_graph_that_is_well_does_not_excuse_another() -> None:
    trust = Trust("m", 3, Traffic())
    for _ in range(3):
        assert trust.healthy
        assert not withheld(trust, "density", FINITE)
        assert withheld(trust, "conditional", NOT_FINITE)
    assert not trust.healthy


def test_without_patience_any_number_is_withheld() -> None:
    trust = Trust("m", 0, Traffic())
    assert all(withheld(trust, "density", NOT_FINITE) for _ in range(100))
    trust.require()


X, MASK = np.zeros((1, 1, 3, 3), np.uint8), np.zeros((1, 1, 3, 3), np.bool_)
ASKS: dict[str, Callable[[Engine], Any]] = {
    "score": lambda engine: engine.score(X, 0.1),
    "classify": lambda engine: engine.classify(X, 0.1),
    "encode": lambda engine: engine.encode(X),
    "decode": lambda engine: engine.decode(
        np.zeros((1, 2), np.float32), np.zeros(1, np.int64), Drawing()
    ),
    "traverse": lambda engine: engine.traverse(X, "brightness", np.zeros(1), Drawing()),
    "interpolate": lambda engine: engine.interpolate(X, X, np.zeros(1), Drawing()),
    "generate": lambda engine: anext(engine.generate(None, 1, 0)),
    "accept": lambda engine: anext(engine.generate(0, 1, 0, acceptance=Acceptance(9))),
    "complete": lambda engine: anext(engine.complete(X, MASK, None, 1, 0)),
}


@pytest.fixture(scope="module")
def engine(toy: Toy) -> Iterator[Engine]:
    opened = Engine.load(Bundle.open(toy.path), device=Device("cpu"), threads=1, max_batch=3)
    yield opened
    opened.close()


@pytest.mark.parametrize("name", ASKS)
def test_a_version_that_is_not_trusted_answers_nothing(engine: Engine, name: str) -> None:
    async def ask() -> Any:
        return await ASKS[name](engine)

    asyncio.run(ask())
    engine._trust.healthy = False
    try:
        with pytest.raises(Unavailable, match="no longer answers"):
            asyncio.run(ask())
    finally:
        engine._trust.healthy = True
