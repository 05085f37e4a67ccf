"""Shows the progress of trainings: bars on a terminal, otherwise a line every few seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from rich import progress
from rich.console import Console

from likely_export.train import Progress

SECONDS_BETWEEN_LINES = 10.0


class Display:
    """Shows the progress of several models at once.

    Args:
        names: names of the models, in the order of their bars.
        console: console to print to; standard error by default.
    """

    def __init__(self, names: Iterable[str], console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.bars = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TextColumn("{task.fields[status]}"),
            progress.TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.tasks = {name: self.bars.add_task(name, total=1.0, status="") for name in names}
        self.begun: set[str] = set()
        self.written: dict[str, tuple[float, float]] = {}

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bars.stop()

    def update(self, name: str, now: Progress) -> None:
        """Shows a model's progress, and at the start whether it resumes from a checkpoint."""
        if name not in self.begun and now.step > 1:
            self.console.print(f"{name}: resumes from step {now.step - 1}", highlight=False)
        self.begun.add(name)
        if self.console.is_terminal:
            self.bars.update(self.tasks[name], completed=now.done, status=_status(now))
        elif self._is_due(name, now):
            self.written[name] = (time.monotonic(), now.done)
            self.console.print(
                f"{name}: {now.done:4.0%}  {_status(now)}  {now.seconds:.0f} s",
                highlight=False,
                soft_wrap=True,
            )

    def warn(self, sentence: str) -> None:
        """Prints a sentence above the bars."""
        self.console.print(f"warning: {sentence}", highlight=False, soft_wrap=True)

    def _is_due(self, name: str, now: Progress) -> bool:
        when, done = self.written.get(name, (-math.inf, -1.0))
        ended = now.done >= 1 > done
        return ended or time.monotonic() - when >= SECONDS_BETWEEN_LINES


def _status(now: Progress) -> str:
    if math.isnan(now.validation):
        return f"step {now.step}"
    return f"step {now.step}  validation {now.validation:.2f} nats  kept {now.kept:.2f}"
