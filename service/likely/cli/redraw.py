"""The commands that redraw pictures from their features: traverse, interpolate."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from likely.answers import Redrawings
from likely.cli import options, pictures, show
from likely.cli.connection import Connection
from likely.errors import InvalidInput

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_DRAWS = click.option(
    "--draws", type=int, default=0, show_default=True, help="Draws at each point, below the mean."
)
_SEED = click.option("--seed", type=int, help="The same seed gives the same draws. [a fresh one]")
_OUT = click.option(
    "--out",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="A contact sheet (.png), or arrays mean, deviation and drawn (.npz).",
)


@click.command(epilog=show.FILES_HELP)
@click.argument("files", nargs=-1, required=True, type=_FILE)
@options.server_and_model
@click.option("--direction", required=True, help="One of the model's, such as slant.")
@click.option(
    "--points", default="-2,-1,0,1,2", show_default=True, help="Points, separated by commas."
)
@_DRAWS
@_SEED
@_OUT
@options.as_json()
def traverse(
    files: tuple[Path, ...],
    server: Connection,
    model: str | None,
    version: str | None,
    direction: str,
    points: str,
    draws: int,
    seed: int | None,
    out: Path,
    as_json: bool,
) -> None:
    """Redraw pictures along a direction of their features.

    Each row of the sheet shows a picture as it is, then redrawn at each point.
    """
    pictures.require_writable(out)
    places = options.numbers(points, "points") or []
    with server.client() as client:
        info = client.model(model, version)
        x, names = pictures.read(files, info)
        traversal = client.traverse(
            x, direction, places, draws=draws, seed=seed, model=info.name, version=info.version
        )
    pictures.write_redrawn(out, x[:, None], traversal, info)
    rows = [
        {
            "picture": name,
            "position": float(traversal.position[i]),
            **({} if traversal.spread is None else {"deviation": float(traversal.spread[i])}),
        }
        for i, name in enumerate(names)
    ]
    show.rows(rows, as_json, {"direction": direction, **_about(info.name, traversal, out)})


@click.command(epilog=show.FILES_HELP)
@click.argument("first", type=_FILE)
@click.argument("last", type=_FILE)
@options.server_and_model
@click.option("--steps", type=click.IntRange(min=2), default=7, show_default=True)
@_DRAWS
@_SEED
@_OUT
@options.as_json()
def interpolate(
    first: Path,
    last: Path,
    server: Connection,
    model: str | None,
    version: str | None,
    steps: int,
    draws: int,
    seed: int | None,
    out: Path,
    as_json: bool,
) -> None:
    """Redraw pictures between those of two files.

    Each row of the sheet shows a pair as it is, then the way from one to the other.
    """
    pictures.require_writable(out)
    with server.client() as client:
        info = client.model(model, version)
        x, names = pictures.read((first,), info)
        others, other_names = pictures.read((last,), info)
        if len(x) != len(others):
            raise InvalidInput("last", f"{len(others)} pictures; {first} has {len(x)}")
        redrawings = client.interpolate(
            x,
            others,
            np.linspace(0, 1, steps),
            draws=draws,
            seed=seed,
            model=info.name,
            version=info.version,
        )
    pictures.write_redrawn(out, np.stack([x, others], 1), redrawings, info)
    rows = [{"from": a, "to": b} for a, b in zip(names, other_names, strict=True)]
    show.rows(rows, as_json, _about(info.name, redrawings, out))


def _about(name: str, redrawings: Redrawings, out: Path) -> dict[str, object]:
    return {
        "model": name,
        "version": redrawings.model_version,
        "seed": redrawings.seed,
        "out": str(out),
    }
