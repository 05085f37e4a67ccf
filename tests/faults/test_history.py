"""The history checker finds what it is there to find."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from likely import statuses
from likely.errors import Unavailable
from likely.serving.guard import REQUEST_ID
from tests.faults.history import History, Outcome, events, violations


def right(question: object, version: str, answer: object) -> bool:
    return version in ("1", "2") and answer == f"{question} by {version}"


def log_entry(name: str, code: str = "OK", **more: object) -> dict[str, object]:
    return {"event": "rpc", "request_id": name, "code": code, **more}


def well() -> tuple[History, list[dict[str, object]]]:
    """A run in which two were answered and one was refused."""
    history = History()
    first, second, third = (history.begin(f"question {i}") for i in range(3))
    history.end(second, Outcome("OK", "2", "question 1 by 2"))
    history.end(first, Outcome("OK", "1", "question 0 by 1"))
    _, _, trailing = statuses.status(Unavailable("ending"), third)
    history.end(third, Outcome("UNAVAILABLE", trailing=dict(trailing) | {REQUEST_ID: third}))
    return history, [
        log_entry(first),
        log_entry(second),
        log_entry(third, "UNAVAILABLE", accepted=False),
    ]


def test_a_run_that_went_well_has_no_violations() -> None:
    history, log = well()
    assert violations(history, right, log) == []
    assert history.codes() == {"OK": 2, "UNAVAILABLE": 1}
    assert history.versions() == {"1": 1, "2": 1}


def unanswered(history: History, log: list[dict[str, object]]) -> None:
    history.begin("question 3")


def twice(history: History, log: list[dict[str, object]]) -> None:
    history.end("request-0", Outcome("OK", "1", "question 0 by 1"))


def wrong(history: History, log: list[dict[str, object]]) -> None:
    log.append(log_entry(history.begin("question 3")))
    history.end("request-3", Outcome("OK", "1", "question 0 by 1"))


def misnamed(history: History, log: list[dict[str, object]]) -> None:
    log.append(log_entry(history.begin("question 3")))
    history.end("request-3", Outcome("OK", "1", "question 3 by 2"))


def final(history: History, log: list[dict[str, object]]) -> None:
    history.end(history.begin("question 3"), Outcome("INTERNAL"))


def untold(history: History, log: list[dict[str, object]]) -> None:
    name = history.begin("question 3")
    history.end(name, Outcome("UNAVAILABLE", trailing={REQUEST_ID: name}))


def headless(history: History, log: list[dict[str, object]]) -> None:
    name = history.begin("question 3")
    _, _, trailing = statuses.status(Unavailable("ending"), name)
    metadata = {REQUEST_ID: name, **dict(trailing)}
    del metadata[statuses.PUSHBACK_KEY]
    history.end(name, Outcome("UNAVAILABLE", trailing=metadata))


def lost(history: History, log: list[dict[str, object]]) -> None:
    log.append(log_entry(history.begin("question 3")))
    history.end("request-3", Outcome("UNAVAILABLE"))


def cut(history: History, log: list[dict[str, object]]) -> None:
    log.append(log_entry(history.begin("question 3"), "UNAVAILABLE"))
    history.end("request-3", Outcome("UNAVAILABLE"))


def repeated(history: History, log: list[dict[str, object]]) -> None:
    log.append(log_entry("request-0"))


def invented(history: History, log: list[dict[str, object]]) -> None:
    history.end(history.begin("question 3"), Outcome("OK", "1", "question 3 by 1"))


def early(history: History, log: list[dict[str, object]]) -> None:
    history.end(history.begin("question 3"), Outcome("UNAVAILABLE", at=-1.0))


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (unanswered, "request-3 has 0 outcomes"),
        (twice, "request-0 has 2 outcomes"),
        (wrong, "request-3: 1 does not answer so"),
        (misnamed, "request-3: 1 does not answer so"),
        (final, "request-3 failed with INTERNAL"),
        (untold, "request-3 failed and was not told when to come again"),
        (headless, "request-3 failed and was not told when to come again"),
        (lost, "request-3 was accepted and answered, and the client saw ['UNAVAILABLE']"),
        (cut, "request-3 was accepted and ended with UNAVAILABLE"),
        (repeated, "request-0 was answered 2 times"),
        (invented, "request-3 was answered, and the server knows nothing of it"),
        (early, "request-3 ended before it began"),
    ],
)
def test_each_violation_is_told(
    harm: Callable[[History, list[dict[str, object]]], None], sentence: str
) -> None:
    history, log = well()
    harm(history, log)
    assert sentence in violations(history, right, log)


def test_a_log_is_read_among_other_lines() -> None:
    assert events('warning\n{"event": "rpc"}\n') == [{"event": "rpc"}]
