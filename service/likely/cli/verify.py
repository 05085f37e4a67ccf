"""`likely verify`: checks that a bundle is complete, allowed, and signed by a trusted key."""

from __future__ import annotations

from pathlib import Path

import click

from likely import machine
from likely.errors import RuntimeMissing


@click.command()
@click.argument("bundle", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--public-key",
    "keys",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="PEM file of a key, or of an authority's certificates; one of them must have signed.",
)
def verify(bundle: Path, keys: tuple[Path, ...]) -> None:
    """Check every byte of a BUNDLE.

    A server does the same before it opens one. With --public-key, the bundle must also be signed
    (likely-export sign).
    """
    try:
        from likely.bundle import Bundle
    except ModuleNotFoundError as error:
        raise RuntimeMissing(f"{error.name} is missing; {machine.INSTALL}") from error
    verified = Bundle.open(bundle, keys)
    signed = "signed" if keys else "signature not asked for"
    name = f"{verified.manifest.name}@{verified.manifest.version}"
    click.echo(f"{name} is whole and allowed; {signed}; digest {verified.digest}")
