"""Prints answers as tables for people or JSON lines for programs, and shows progress."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal

import click
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

FILES_HELP = (
    "FILES are images, whose brightness becomes levels, or arrays of levels: .npy, or .npz "
    "with the key x, images or image, or else its first one; (n, c, h, w), or (n, h, w) for one "
    "channel. Nothing is resized, cropped or inverted."
)
FOLDERS_HELP = FILES_HELP.replace("FILES are", "FILES are folders, or")
PROGRESS_SECONDS = 30.0  # seconds between two lines of progress if there is no terminal
# In a table, texts of more than _UNFOLDED_WIDTH characters may continue in the next line, in a
# column of at least _LEAST_FOLDED_WIDTH characters.
_UNFOLDED_WIDTH, _LEAST_FOLDED_WIDTH = 16, 11
NONE = "\N{EN DASH}"  # stands in a table for no value
_COLOURS = {"accepted": "green", "outlier": "red", "ambiguous": "yellow"}


def rows(entries: Sequence[Mapping[str, Any]], as_json: bool, about: Mapping[str, Any]) -> None:
    """Prints rows: as a table with a caption, or as one JSON object per line.

    Args:
        entries: the rows, all with the same keys.
        as_json: whether to print JSON, where every row also has the entries of `about`.
        about: what holds for all rows; the caption of the table.
    """
    if as_json:
        for entry in entries:
            click.echo(json.dumps({**entry, **about}))
        return
    text = ", ".join(f"{key} {value}" for key, value in about.items())
    caption = Text(text, "table.caption") if text else None  # a str would be read as markup
    table = Table(
        caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for key, value in (entries[0] if entries else {}).items():
        side: Literal["left", "right"] = "left" if isinstance(value, str) else "right"
        # If the terminal is narrow, only long texts are folded.
        widest = max((len(str(entry[key])) for entry in entries), default=0)
        table.add_column(
            key.replace("_", " "), justify=side, overflow="fold", no_wrap=widest <= _UNFOLDED_WIDTH,
            min_width=min(widest, _LEAST_FOLDED_WIDTH),
        )  # fmt: skip
    for entry in entries:
        table.add_row(*(_cell(value) for value in entry.values()))
    Console().print(table)


@contextmanager
def bar(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error, on a terminal only; yields a function that advances it."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as shown:
        task = shown.add_task(what, total=total)
        yield lambda n: shown.advance(task, n)


class Rate(ProgressColumn):
    """A column with the number of pictures per second."""

    def render(self, task: Task) -> Text:
        """The recent rate; empty before there is one."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f}/s" if speed else "")


@contextmanager
def long_bar(total: int, done: int, what: str) -> Iterator[Callable[[int], None]]:
    """Shows the progress of a long job on standard error: as a bar, or as lines in a log.

    If standard error cannot be written, the job continues without it.

    Args:
        total: number of pictures.
        done: number of pictures that were done before.
        what: what is done with them.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn(what), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn(),
    )  # fmt: skip
    began = last_printed = time.monotonic()
    shown = Progress(*columns, console=console, disable=not console.is_terminal)
    task = shown.add_task(what, total=total, completed=done)

    def advance(n: int) -> None:
        nonlocal last_printed
        shown.advance(task, n)
        now = time.monotonic()
        if not console.is_terminal and now - last_printed >= PROGRESS_SECONDS:
            last_printed = now
            at = int(shown.tasks[0].completed)
            rate = (at - done) / (now - began)
            with suppress(OSError):
                click.echo(
                    f"{what}: {at:,} of {total:,} pictures, {rate:,.0f} a second, "
                    f"{(total - at) / rate:,.0f} s left",
                    err=True,
                )

    with suppress(OSError):
        shown.start()
    try:
        yield advance
    finally:
        with suppress(OSError):
            shown.stop()


def progress(parts: Iterable[slice], total: int, what: str) -> Iterator[slice]:
    """Yields the same slices, and shows a progress bar."""
    with bar(total, what) as advance:
        for part in parts:
            yield part
            advance(part.stop - part.start)


def _cell(value: Any) -> Text:
    if isinstance(value, float):
        return Text(f"{value:.4g}")
    return Text(str(value), style=_COLOURS.get(str(value), ""))
