"""The labels assigned, their confidence, and the most frequent confusions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from likely_export.material import Labelled
from likely_export.report import charts
from likely_export.report.subject import Subject, View
from likely_export.report.text import format_figure, measured, words

MOST_LABELS = 30  # labels of a table that is still readable
MOST_MISTAKES = 8
MIXED = {
    "aurc": "this bundle: AURC",
    "cnn_max_softmax_aurc": "network: AURC",
    "oscr": "this bundle: OSCR",
    "cnn_max_softmax_oscr": "network: OSCR",
    "cnn_max_softmax_auroc": "network: AUROC",
}
RULES = {
    "generative": "Bayes' rule, p(y|x) ∝ p(x|y) p(y),",
    "discriminative": "The discriminative model, p(y|x) itself,",
}
MISTAKE, HIT = "213,94,0", "0,114,178"


def classification(subject: Subject) -> View:
    """The confusion matrix, reliability diagram and accuracy against rejection of each rule."""
    material = subject.material
    rules = {"generative": material.labelled, "discriminative": material.discriminated}
    views = [
        _rule(name, labelled, material.labels)
        for name, labelled in rules.items()
        if labelled is not None and len(labelled.y)
    ]
    if not views:
        return None
    mixed = subject.table("mixed").values()
    columns = {key: title for key, title in MIXED.items() if any(key in one for one in mixed)}
    return {
        "rules": views,
        "labels": material.labels,
        "mixed": _mixed(subject, columns),
        "columns": columns.values(),
    }


def _rule(name: str, labelled: Labelled, labels: Sequence[str]) -> dict[str, Any]:
    """The labels of the test part by one rule."""
    k = len(labels)
    counts = np.zeros((k, k), np.int64)
    np.add.at(counts, (labelled.y, labelled.posterior.argmax(1)), 1)
    wrong = counts * (1 - np.eye(k, dtype=np.int64))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_MISTAKES]
    mistakes = [(int(at) // k, int(at) % k) for at in order if wrong.flat[at]]
    return {
        "title": RULES[name],
        "matrix": _matrix(counts) if k <= MOST_LABELS else None,
        "mistakes": [
            (labels[true], labels[assigned], int(counts[true, assigned]))
            for true, assigned in mistakes
        ],
        "reliability": charts.reliability(labelled, name),
        "kept": charts.accuracy_of_kept(labelled, name),
        "n": len(labelled.y),
        "right": int(np.trace(counts)),
    }


def _mixed(subject: Subject, columns: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Sets of outliers mixed in, and the figures of this bundle and of a plain classifier."""
    return [
        (words(name), [format_figure(measured(one, key)) if key in one else "" for key in columns])
        for name, one in subject.table("mixed").items()
    ]


def _matrix(counts: np.ndarray[Any, np.dtype[np.int64]]) -> list[list[dict[str, Any]]]:
    """Cells with counts and colours; a stronger colour is a larger share of the row."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    largest = max(float((shares * (1 - np.eye(len(counts)))).max()), 1e-9)
    rows = []
    for true, line in enumerate(counts):
        cells = []
        for assigned, n in enumerate(line):
            hit = true == assigned
            share = (
                shares[true, assigned] * 0.45 if hit else shares[true, assigned] / largest * 0.75
            )
            colour = f"rgba({HIT if hit else MISTAKE},{share:.2f})" if n else ""
            cells.append({"n": int(n), "colour": colour})
        rows.append(cells)
    return rows
