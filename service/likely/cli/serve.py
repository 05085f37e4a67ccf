"""`likely serve`, with every setting as a flag."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from likely import machine
from likely.errors import RuntimeMissing

if TYPE_CHECKING:
    from likely.settings import Settings

F = TypeVar("F", bound=Callable[..., Any])

# The names are those of `likely.settings.Settings`, which only a server's installation can
# import. It checks the types and the values, for all sources alike.
FLAGS = {
    "config": "TOML file with settings.",
    "watch": "Folder of further bundles, polled while serving.",
    "watch_seconds": "Seconds between two polls of that folder. [5]",
    "labels": "Labels of versions, such as digits:stable=1.0,digits:canary=1.1.",
    "default_version": "Which version answers if none is named or stable: newest or oldest.",
    "host": "Address to listen on. [127.0.0.1]",
    "port": "Port of the gRPC server; 0 takes any free one. [50051]",
    "admin_host": "Address of the admin RPCs. [127.0.0.1]",
    "admin_port": "Port of the admin RPCs; 0 takes any free one, off is no port. [off]",
    "metrics_host": "Address of the Prometheus metrics. [127.0.0.1]",
    "metrics_port": "Port of the metrics; 0 takes any free one, off is no port. [9464]",
    "tls_certificate": "PEM file of the server's certificate chain.",
    "tls_key": "PEM file of its key.",
    "tls_client_ca": "PEM file of authorities; clients then need a certificate of one of them.",
    "tokens": "TOML file of bearer tokens.",
    "jwt_keys": "JWKS file of the issuer of signed tokens.",
    "jwt_issuer": "Claim iss that a signed token must have.",
    "jwt_audience": "Claim aud that a signed token must have.",
    "jwt_algorithms": "Algorithms that may sign tokens. [ES256,EdDSA,RS256,PS256]",
    "jwt_leeway": "Seconds that the issuer's clock may differ. [30]",
    "plaintext_tokens": "true if a proxy terminates TLS and passes tokens on. [false]",
    "require_signature": "PEM files of keys or authorities: one must have signed each bundle.",
    "device": "auto, cpu, cuda or cuda:N. [auto]",
    "gpu_memory": "MiB of a card for each graph, besides its inputs; 0 is no limit. [0]",
    "workers": "Processes that serve on one port; 0 is one per core, or one on a card. [1]",
    "threads": "Threads of the runtime in each process; 0 divides the cores. [0]",
    "lanes": "Runs of a model at once; 0 finds the best number. [0]",
    "max_batch": "Most pictures of one run of a graph; 0 finds the best number. [0]",
    "queued_images": "Pictures that may wait for a graph. [4096]",
    "queued_bytes": "Bytes that may wait for a graph. [64 MiB]",
    "client_images_per_second": "Pictures a second that a client may ask for; 0 is no limit. [0]",
    "client_images_at_once": "Pictures that a client may ask for after a pause. [1024]",
    "withheld_answers": "Non-finite answers in a row that end a version; 0 is no limit. [10]",
    "images_per_request": "Most pictures in a request. [1024]",
    "images_per_generation": "Most pictures that a request may have drawn. [4096]",
    "images_per_chunk": "Pictures in a chunk of a stream of draws. [64]",
    "request_bytes": "Bytes of the largest request. [16 MiB]",
    "response_bytes": "Most bytes of pictures in an answer. [64 MiB]",
    "default_alpha": "Rate of false rejections where a request names none. [0.05]",
    "drift_level": "Probability that a version ever raises a false drift alarm; 0 is off. [0.001]",
    "drain_delay": "Seconds after SIGTERM in which requests are still accepted. [1]",
    "drain_seconds": "Seconds after that in which accepted requests may finish. [30]",
    "connection_seconds": "Seconds after which clients renew a connection; 0 is no limit. [0]",
    "streams_per_connection": "Requests that one connection may have at once. [100]",
    "slow_reader_seconds": "Seconds that a stream waits for a caller that does not read. [60]",
    "log_level": "debug, info, warning or error. [info]",
    "log_format": "json, console, or auto: console on a terminal. [auto]",
}


# Variables of commands that ask a server or sign a bundle. A server's environment may have them.
CLIENT_VARIABLES = (
    "LIKELY_ADDRESS",
    "LIKELY_ADMIN_ADDRESS",
    "LIKELY_TOKEN",
    "LIKELY_TOKEN_FILE",
    "LIKELY_CA",
    "LIKELY_CERTIFICATE",
    "LIKELY_KEY",
    "LIKELY_SERVER_NAME",
    "LIKELY_KEY_PASSWORD",
)


# Variables that Kubernetes sets in every container for a Service named `likely` or `likely-...`.
SERVICE_LINK = re.compile(r"(\w+_)?(SERVICE_(HOST|PORT)|PORT_\d+_)")


def flags(command: F) -> F:
    """Adds a flag for each setting."""
    for name, text in reversed(FLAGS.items()):
        command = click.option(f"--{name.replace('_', '-')}", help=text)(command)
    return command


@click.command()
@click.option(
    "--bundle",
    "bundles",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Folder of a bundle; may be repeated (LIKELY_BUNDLES). "
    "[the package's own, unless a folder is watched]",
)
@flags
@click.option("--tracing/--no-tracing", default=None, help="Send traces by OTLP. [off]")
@click.option("--reflection/--no-reflection", default=None, help="Serve gRPC reflection. [on]")
@click.option("--print-config", is_flag=True, help="Print the settings in force, and exit.")
def serve(print_config: bool, **given: Any) -> None:
    """Serve models over gRPC until SIGTERM or Ctrl-C.

    Each flag is also an environment variable (--max-batch is LIKELY_MAX_BATCH) and a
    key of the TOML file (max_batch). Flags win over the environment, which wins over
    the file. The variable of --bundle is LIKELY_BUNDLES, with colons between folders;
    its key is bundles.
    """
    try:
        from likely import settings
    except ModuleNotFoundError as error:
        raise RuntimeMissing(_missing(error)) from error
    chosen = settings.load({key: v for key, v in given.items() if v is not None and v != ()})
    if print_config:
        click.echo(chosen.toml(), nl=False)
        return
    _warn_of_unknown(chosen)
    try:
        from likely.processes.supervisor import serve as run
    except ModuleNotFoundError as error:
        raise RuntimeMissing(_missing(error)) from error
    run(chosen)


def _warn_of_unknown(chosen: Settings) -> None:
    """Logs every variable that looks like a setting but is none."""
    from likely import logs, settings

    known = [name.upper() for name in settings.Settings.model_fields]
    log = logs.logger(chosen.log_level, chosen.log_format)
    links = {name for name, value in os.environ.items() if settings.is_link(name, value)}
    if ignored := sorted(links & {f"{settings.PREFIX}{name}" for name in known}):
        log.warning("links of Services ignored", variables=ignored)
    for variable in sorted(set(os.environ) - {*CLIENT_VARIABLES} - links):
        name = variable.removeprefix(settings.PREFIX)
        if name != variable and name not in known and not SERVICE_LINK.match(name):
            near = [f"{settings.PREFIX}{match}" for match in get_close_matches(name, known, 1)]
            log.warning("unknown variable", variable=variable, nearest=near[0] if near else None)


def _missing(error: ModuleNotFoundError) -> str:
    return f"{error.name} is missing, which a server needs besides a runtime; {machine.INSTALL}"
