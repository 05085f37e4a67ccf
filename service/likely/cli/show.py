"""Answers on a terminal as tables and progress bars, and for programs as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

FILES_HELP = (
    "FILES are images, whose brightness becomes levels, or arrays of levels: .npy, or .npz "
    "with the key x, images, or else its first one; (n, c, h, w), or (n, h, w) for one "
    "channel. Nothing is resized, cropped or inverted."
)
_COLOURS = {"accepted": "green", "outlier": "red", "ambiguous": "yellow"}


def rows(entries: Sequence[Mapping[str, Any]], as_json: bool, about: Mapping[str, Any]) -> None:
    """Prints rows: as a table under a caption, or as one JSON object a line.

    Args:
        entries: the rows, all with the same keys.
        as_json: for programs; what holds for all rows is then in each.
        about: what holds for all rows.
    """
    if as_json:
        for entry in entries:
            click.echo(json.dumps({**entry, **about}))
        return
    table = Table(caption=", ".join(f"{key} {value}" for key, value in about.items()) or None)
    for key, value in (entries[0] if entries else {}).items():
        side: Literal["left", "right"] = "left" if isinstance(value, str) else "right"
        table.add_column(key.replace("_", " "), justify=side, overflow="fold")
    for entry in entries:
        table.add_row(*(_cell(value) for value in entry.values()))
    Console().print(table)


@contextmanager
def bar(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error, on a terminal only; gives what advances it."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as shown:
        task = shown.add_task(what, total=total)
        yield lambda n: shown.advance(task, n)


def progress(parts: Iterable[slice], total: int, what: str) -> Iterator[slice]:
    """The same slices, under a progress bar."""
    with bar(total, what) as advance:
        for part in parts:
            yield part
            advance(part.stop - part.start)


def _cell(value: Any) -> Text:
    if isinstance(value, float):
        return Text(f"{value:.4g}")
    return Text(str(value), style=_COLOURS.get(str(value), ""))
