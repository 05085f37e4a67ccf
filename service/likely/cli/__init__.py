"""The command line: `likely` serves models, asks a server, and checks servers and bundles.

Exit codes: 0 for success, 1 for an error (one sentence on standard error), 2 for wrong usage.
SIGTERM ends a command by that signal; as the first process of a container, with the code 143.
"""

from __future__ import annotations

import codecs
import signal
import sys
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module
from io import TextIOWrapper
from typing import Any, Final

import click

from likely import signals
from likely.errors import LikelyError

# Each command and the module of this package that defines it, imported only when the command is
# run: a server starts sooner without tables, progress bars and pictures.
MODULES: Final = {
    "serve": "serve",
    "score": "ask",
    "classify": "ask",
    "generate": "ask",
    "traverse": "redraw",
    "interpolate": "redraw",
    "batch": "batch",
    "models": "ask",
    "admin": "admin",
    "health": "health",
    "doctor": "doctor",
    "verify": "verify",
}


class Commands(click.Group):
    """Commands that are imported only when they are named.

    Expected errors are shown as one sentence, not as a traceback.
    """

    def main(self, *args: Any, **more: Any) -> Any:
        """Runs the command that the arguments name, and ends the process."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper) and _may_fail_to_encode(stream):
                stream.reconfigure(errors="replace")
        try:
            return super().main(*args, **more)
        finally:
            signals.drop_unwritable()

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's
        """The commands' names."""
        return sorted(MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The command with that name."""
        if cmd_name not in MODULES:
            return None
        command: click.Command = getattr(import_module(f"likely.cli.{MODULES[cmd_name]}"), cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the arguments name; an unknown one raises an error with a guess."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = get_close_matches(args[0], MODULES, 1)
            if not near:
                raise
            raise click.UsageError(f"{error.message} Did you mean {near[0]}?", ctx) from error

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        try:
            with signals.ending():
                return super().invoke(ctx)
        except signals.Terminated:
            with suppress(OSError):
                click.echo("ended by SIGTERM", err=True)
            signals.end(signal.SIGTERM)
        except BrokenPipeError:
            raise  # the reader ended, as `head` does: click exits silently
        except (LikelyError, OSError) as error:
            raise click.ClickException(str(error)) from error


def _may_fail_to_encode(stream: TextIOWrapper) -> bool:
    """Whether a stream may be unable to write table borders, or names that are not UTF-8."""
    return stream.errors == "strict" or codecs.lookup(stream.encoding).name != "utf-8"


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="likely")
def main() -> None:
    """Explicit-density models: draw pictures, judge how plausible they are, label them."""
