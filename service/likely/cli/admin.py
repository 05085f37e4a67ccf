"""`likely admin`: which versions a server has, and what it shall do with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from likely.answers import VERSION_LABELS, ModelVersion, VersionState
from likely.cli import show
from likely.cli.connection import Connection, connected
from likely.client.admin import ADDRESS, TIMEOUT

ASKED = connected(TIMEOUT, address=ADDRESS, variable="LIKELY_ADMIN_ADDRESS")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="For programs.")


@click.group()
def admin() -> None:
    """Load, unload, label and roll back the versions that a server has.

    The server opens its admin port by --admin-port; where tokens are asked for, the token's scope
    has to be admin.
    """


@admin.command()
@ASKED
@AS_JSON
def versions(server: Connection, as_json: bool) -> None:
    """List what is served, what comes and goes, and which bundles were refused."""
    with server.admin() as client:
        found = client.versions()
    show.rows([_told(version, as_json) for version in found], as_json, {})


@admin.command()
@click.argument("folder", type=click.Path(path_type=Path))
@ASKED
@AS_JSON
def load(server: Connection, folder: Path, as_json: bool) -> None:
    """Serve the bundle in FOLDER, an absolute path as the server sees it."""
    with server.admin() as client:
        loaded = client.load(folder)
    show.rows([_told(loaded, as_json)], as_json, {})


@admin.command()
@click.argument("model")
@click.argument("version")
@ASKED
def unload(server: Connection, model: str, version: str) -> None:
    """Serve a VERSION of MODEL no more; ends when its requests have ended and it is freed."""
    with server.admin() as client:
        client.unload(model, version)
    click.echo(f"{model} {version} is served no more")


@admin.command()
@click.argument("model")
@click.argument("label", type=click.Choice(VERSION_LABELS))
@click.argument("version", required=False)
@ASKED
def label(server: Connection, model: str, label: str, version: str | None) -> None:
    """Let a LABEL name a VERSION of MODEL; without VERSION, none."""
    with server.admin() as client:
        client.set_label(model, label, version)
    click.echo(f"{model} {version} is {label}" if version else f"no version of {model} is {label}")


@admin.command()
@click.argument("model")
@ASKED
@AS_JSON
def rollback(server: Connection, model: str, as_json: bool) -> None:
    """Make the version of MODEL stable that answered by default before the last change."""
    with server.admin() as client:
        back = client.rollback(model)
    show.rows([_told(back, as_json)], as_json, {})


@admin.command("reset-drift")
@click.argument("model")
@click.argument("version", required=False)
@ASKED
def reset_drift(server: Connection, model: str, version: str | None) -> None:
    """Begin the test for drift of MODEL anew: of a VERSION, or of the one that answers."""
    with server.admin() as client:
        found = client.reset_drift(model, version)
    click.echo(f"the test for drift of {model} {found} begins anew")


def _told(version: ModelVersion, as_json: bool) -> dict[str, Any]:
    """A row: everything for programs, what there is to say for people."""
    found: dict[str, Any] = {
        "model": version.name,
        "version": version.version,
        "state": version.state.value,
        "labels": list(version.labels),
        "default": version.is_default,
        "folder": str(version.folder),
    }
    if as_json:
        told = {"reason": version.reason, "message": version.message}
        return found | {"digest": version.digest} | told
    refused = version.state is VersionState.FAILED
    return found | {
        "labels": " ".join(version.labels) or show.NONE,
        "default": "yes" if version.is_default else show.NONE,
        "refused": f"{version.reason}: {version.message}" if refused else show.NONE,
    }
