"""`likely admin`: lists and changes the versions that a server has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from likely.answers import VERSION_LABELS, ModelVersion, VersionState
from likely.cli import options, show
from likely.cli.connection import Connection, server_options
from likely.client.admin import ADDRESS, TIMEOUT

ADMIN_SERVER = server_options(TIMEOUT, address=ADDRESS, variable="LIKELY_ADMIN_ADDRESS")
AS_JSON = options.as_json("For programs.")


@click.group()
def admin() -> None:
    """Load, unload, label and roll back the versions that a server has.

    The server needs --admin-port. If it requires tokens, yours must have the scope admin.
    """


@admin.command()
@ADMIN_SERVER
@AS_JSON
def versions(server: Connection, as_json: bool) -> None:
    """List versions that are served, loading or draining, and bundles that were refused."""
    with server.admin() as client:
        entries = client.versions()
    show.rows([_row(version, as_json) for version in entries], as_json, {})


@admin.command()
@click.argument("folder", type=click.Path(path_type=Path))
@ADMIN_SERVER
@AS_JSON
def load(server: Connection, folder: Path, as_json: bool) -> None:
    """Serve the bundle in FOLDER, an absolute path as the server sees it."""
    with server.admin() as client:
        loaded = client.load(folder)
    show.rows([_row(loaded, as_json)], as_json, {})


@admin.command()
@click.argument("model")
@click.argument("version")
@ADMIN_SERVER
def unload(server: Connection, model: str, version: str) -> None:
    """Stop serving a VERSION of MODEL; ends when its requests have ended and it is freed."""
    with server.admin() as client:
        client.unload(model, version)
    click.echo(f"{model} {version} is served no more")


@admin.command()
@click.argument("model")
@click.argument("label", type=click.Choice(VERSION_LABELS))
@click.argument("version", required=False)
@ADMIN_SERVER
def label(server: Connection, model: str, label: str, version: str | None) -> None:
    """Let LABEL name a VERSION of MODEL; without VERSION, take the label away."""
    with server.admin() as client:
        client.set_label(model, label, version)
    click.echo(f"{model} {version} is {label}" if version else f"no version of {model} is {label}")


@admin.command()
@click.argument("model")
@ADMIN_SERVER
@AS_JSON
def rollback(server: Connection, model: str, as_json: bool) -> None:
    """Label as stable the version of MODEL that was the default before the last change."""
    with server.admin() as client:
        back = client.rollback(model)
    show.rows([_row(back, as_json)], as_json, {})


@admin.command("reset-drift")
@click.argument("model")
@click.argument("version", required=False)
@ADMIN_SERVER
def reset_drift(server: Connection, model: str, version: str | None) -> None:
    """Restart the drift test of MODEL: of a VERSION, or of the default version."""
    with server.admin() as client:
        resolved_version = client.reset_drift(model, version)
    click.echo(f"the test for drift of {model} {resolved_version} begins anew")


def _row(version: ModelVersion, as_json: bool) -> dict[str, Any]:
    """A row of the output: every field for programs, the relevant ones for people."""
    row: dict[str, Any] = {
        "model": version.name,
        "version": version.version,
        "state": version.state.value,
        "labels": list(version.labels),
        "default": version.is_default,
        "folder": str(version.folder),
    }
    if as_json:
        details = {"reason": version.reason, "message": version.message}
        return row | {"digest": version.digest} | details
    refused = version.state is VersionState.FAILED
    return row | {
        "labels": " ".join(version.labels) or show.NONE,
        "default": "yes" if version.is_default else show.NONE,
        "refused": f"{version.reason}: {version.message}" if refused else show.NONE,
    }
