"""The command line: `likely` serves, asks a server, and says how it and a bundle are.

Exit codes: 0 done, 1 an error (one sentence on standard error), 2 wrong usage.
"""

from __future__ import annotations

from typing import Any

import click

from likely.cli.ask import classify, generate, models, score
from likely.cli.batch import batch
from likely.cli.doctor import doctor
from likely.cli.health import health
from likely.cli.redraw import interpolate, traverse
from likely.cli.serve import serve
from likely.cli.verify import verify
from likely.errors import LikelyError


class Sentences(click.Group):
    """Commands whose expected errors end in one sentence, not in a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except (LikelyError, OSError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=Sentences, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="likely")
def main() -> None:
    """Explicit-density models: draw pictures, judge how plausible they are, label them."""


COMMANDS = (
    serve, score, classify, generate, traverse, interpolate, batch, models, health, doctor, verify,
)  # fmt: skip
for command in COMMANDS:
    main.add_command(command)
