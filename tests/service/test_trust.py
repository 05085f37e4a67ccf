"""How long a version is believed whose answers are not finite."""

import numpy as np
import pytest

from likely.batching.traffic import Traffic
from likely.errors import ServerFault, Unavailable
from likely.graphs import Array
from likely.trust import Trust

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
