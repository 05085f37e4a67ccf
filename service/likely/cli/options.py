"""The options that several commands have, and how their texts are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from likely.answers import LabelRule
from likely.cli.connection import server_options
from likely.errors import InvalidInput

F = TypeVar("F", bound=Callable[..., Any])

ALPHA = click.option(
    "--alpha",
    type=float,
    help="Accepted rate of false rejections. [0.05, or the server's default_alpha]",
)
PRIORS = click.option(
    "--priors", help="p(y) in the model's order, separated by commas. [the model's]"
)
MIN_POSTERIOR = click.option(
    "--min-posterior", type=float, default=0.0, help="Smallest posterior that assigns a label."
)
RULE = click.option(
    "--rule",
    type=click.Choice([rule.name.lower() for rule in LabelRule]),
    default=LabelRule.GENERATIVE.name.lower(),
    show_default=True,
    help="Bayes' rule over p(x|y), or the discriminative model's own p(y|x).",
)
SELF_CHECK = click.option(
    "--self-check", is_flag=True, help="Redraw what would be rejected or get another label."
)


def as_json(text: str = "One JSON object a line.") -> Callable[[F], F]:
    """The option `--json`, with its help text."""
    return click.option("--json", "as_json", is_flag=True, help=text)


def server_and_model(command: F) -> F:
    """Adds the options that name a server and a model."""
    for option in (
        click.option("--model-version", "version", help="The model's version. [the default one]"),
        click.option("--model", help="The model's name. [the server's only one]"),
        server_options(),
    ):
        command = option(command)
    return command


def numbers(text: str | None, field: str = "priors") -> list[float] | None:
    """Parses a text such as `0.2,0.8`.

    Raises:
        InvalidInput: the text is not a list of numbers separated by commas.
    """
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InvalidInput(field, f"{text!r} is no list of numbers separated by commas") from error
