"""The documented list of reasons is the code's."""

from __future__ import annotations

import re
from pathlib import Path

from likely import statuses
from likely.errors import BundleError, Unauthenticated, Unavailable
from likely.serving import access

ROW = re.compile(r"^\| `([A-Z_]+)` \| `([A-Z_]+)` \| \S.* \|.*\|$", re.MULTILINE)
PAGE = Path("docs/errors.md")
SCOPES = Path("docs/security.md")


def test_every_reason_is_documented_and_no_other() -> None:
    listed = ROW.findall(PAGE.read_text())
    assert len(listed) == len(dict(listed))
    assert dict(listed) == {reason: code.name for reason, code in statuses.REASONS.items()}


def test_what_can_be_retried_says_so() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if "RetryInfo" in line]
    assert [ROW.match(row)[1] for row in rows if ROW.match(row)] == ["OVERLOADED", "UNAVAILABLE"]  # type: ignore[index]


def test_errors_survive_a_process_border() -> None:
    import pickle

    error = Unauthenticated("no token", "TOKEN_MISSING")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, Unauthenticated)
    assert (str(again), again.reason) == ("no token", "TOKEN_MISSING")
    refused = BundleError("a.onnx does not open", "graph", "truncated")
    again = pickle.loads(pickle.dumps(refused))
    assert isinstance(again, BundleError)
    assert (str(again), again.public_message) == (str(refused), "a.onnx does not open")
    busy = pickle.loads(pickle.dumps(Unavailable("draining", 2.5)))
    assert isinstance(busy, Unavailable) and busy.retry_after == 2.5


def test_the_table_of_scopes_is_the_codes() -> None:
    text = SCOPES.read_text()
    for service, scope in access.SCOPES.items():
        name = "reflection" if "reflection" in service else service.rpartition(".")[2]
        row = next(line for line in text.splitlines() if line.startswith("|") and name in line)
        assert (f"`{scope}`" if scope else "any valid token") in row
