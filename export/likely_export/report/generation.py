"""What a bundle draws and completes, and whether it has only memorised."""

from __future__ import annotations

import numpy as np

from likely_export.report.pictures import hidden, sheet, tiles, tinted
from likely_export.report.subject import Subject, View
from likely_export.report.text import format_figure, rows_of

COLUMNS = 12
MOST = 24  # draws per label
MOST_ROWS = 10


def draws(subject: Subject) -> View:
    """A contact sheet with one row per label."""
    drawn, labels = subject.material.drawn, subject.material.labels
    if drawn is None or not drawn.size:
        return None
    named = len(drawn) == len(labels) > 0
    rows = []
    for at, x in enumerate(drawn):
        most = MOST if named else COLUMNS * MOST_ROWS
        name = labels[at] if named else ""
        alt = f"{len(x[:most])} draws" + (f" of the label {name}" if named else "")
        shown = sheet(tiles(x[:most], subject.material.levels), alt, COLUMNS)
        rate, taught = (
            (subject.measured(f"{figure}_by_label") or {}).get(name)
            for figure in ("faithfulness", "train_on_draws_accuracy")
        )
        rows.append({"name": name, "sheet": shown, "rate": _share(rate), "taught": _share(taught)})
    return {
        "rows": rows,
        "named": named,
        "rated": any(row["rate"] for row in rows),
        "taught": any(row["taught"] for row in rows),
        "faithfulness": _share(subject.figure("faithfulness")),
        "checked": _share(subject.figure("self_checked.faithfulness")),
        "draws_a_picture": _plain(subject.figure("self_checked.draws_a_picture")),
        "passed": _share(subject.figure("self_checked.passed")),
        "on_draws": _share(subject.figure("train_on_draws_accuracy")),
        "self_entropy": rows_of(subject.table("self_entropy")),
    }


def completions(subject: Subject) -> View:
    """Originals, the part given to the model, and its completions."""
    completed, levels = subject.material.completed, subject.material.levels
    if completed is None or not len(completed.x):
        return None
    originals = tiles(completed.x, levels)
    known = np.asarray(completed.known.all(1))
    rows = []
    for at in range(min(len(originals), MOST_ROWS)):
        drawn = tiles(completed.drawn[at][: COLUMNS - 2], levels)
        one = originals[at : at + 1]
        number = f"{at + 1}"
        rows.append(
            (
                sheet(one, f"picture {number}, whole", 1),
                sheet(hidden(one, known[at : at + 1]), f"picture {number}, the part given", 1),
                sheet(
                    tinted(drawn, known[at : at + 1]),
                    f"{len(drawn)} completions of picture {number}",
                    COLUMNS,
                ),
            )
        )
    return {"rows": rows}


def copies(subject: Subject) -> View:
    """Draws above their nearest training pictures."""
    nearest, levels = subject.material.nearest, subject.material.levels
    blocks = []
    for start in range(0, min(len(nearest), 2 * COLUMNS) if nearest is not None else 0, COLUMNS):
        assert nearest is not None
        pairs = nearest[start : start + COLUMNS]
        n = len(pairs)
        drawn = sheet(tiles(pairs[:, 0], levels), f"{n} draws", COLUMNS)
        seen = sheet(tiles(pairs[:, 1], levels), f"the {n} nearest training pictures", COLUMNS)
        blocks.append((drawn, seen))
    rows = rows_of(subject.table("memorisation"))
    return {"blocks": blocks, "rows": rows} if blocks or rows else None


def _share(figure: object) -> str:
    return "" if figure is None else format_figure(figure, "share")


def _plain(figure: object) -> str:
    return "" if figure is None else format_figure(figure, "plain")
