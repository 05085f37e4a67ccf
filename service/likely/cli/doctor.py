"""`likely doctor`: what is installed, what really runs, and what is broken."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import click

from likely import machine
from likely.cli import options, show
from likely.errors import LikelyError

SERVER_NEEDS = (
    "grpc_health", "grpc_reflection", "prometheus_client", "pydantic_settings", "structlog",
    "tomli_w",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    what: str
    found: str
    ok: bool = True


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), help="A bundle to open. [shipped]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@options.as_json()
def doctor(bundle: Path | None, device: str, as_json: bool) -> None:
    """Say what is installed, what really runs, and what is broken.

    A bare install is enough for a client. If a server's packages are installed, a runtime
    must also open a graph and reproduce its recorded answers.
    """
    findings = [*_installed(), *_runtime(bundle, device, asked=bool(bundle) or device != "auto")]
    rows = [
        {"what": f.what, "found": f.found, "state": "ok" if f.ok else "broken"} for f in findings
    ]
    show.rows(rows, as_json, {})
    if not all(finding.ok for finding in findings):
        raise click.exceptions.Exit(1)


def _installed() -> list[Finding]:
    versions = [Finding(what, number) for what, number in machine.versions().items()]
    return [*versions, Finding("CPU cores", str(machine.cores()))]


def _runtime(bundle: Path | None, device: str, *, asked: bool) -> list[Finding]:
    installed = machine.runtimes()
    missing = [name for name in SERVER_NEEDS if importlib.util.find_spec(name) is None]
    if not installed:
        client_only = len(missing) == len(SERVER_NEEDS) and not asked
        return [Finding("ONNX Runtime", f"none; to serve, {machine.INSTALL}", client_only)]
    named = " and ".join(f"{name} {number}" for name, number in installed.items())
    if len(installed) > 1:
        conflict = f"{named}: they overwrite each other; uninstall both, then install one"
        return [Finding("ONNX Runtime", conflict, False)]
    findings = [Finding("ONNX Runtime", named)]
    if missing:
        return [*findings, Finding("server", f"{', '.join(missing)} missing", False)]
    return [*findings, *_providers(), _try_engine(bundle, device)]


def _providers() -> list[Finding]:
    from likely.graphs import runtime

    try:
        built_in = runtime().get_available_providers()
    except ImportError as error:
        return [Finding("providers built in", f"onnxruntime cannot be imported: {error}", False)]
    return [Finding("providers built in", ", ".join(built_in))]


def _try_engine(path: Path | None, device: str) -> Finding:
    from likely.bundle import Bundle
    from likely.engine import Engine
    from likely.graphs import Device
    from likely.versions.loading import refusing, shipped

    what = f"what runs with device {device}"
    try:
        bundle = Bundle.open(path or shipped()[0])
        with refusing(bundle.path):
            engine = Engine.load(
                bundle, device=Device.parse(device), threads=machine.cores(), max_batch=16
            )
    except LikelyError as error:
        return Finding(what, str(error), False)
    engine.close()
    name = f"{engine.manifest.name}@{engine.manifest.version}"
    return Finding(what, f"{name} on {', '.join(engine.providers)}; its recorded answers hold")
