"""The options of every batch job, and how they run it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from likely.answers import VERSION_LABELS, ModelInfo
from likely.cli import options, show
from likely.cli.connection import Connection, on_the_command_line, server_options
from likely.errors import JobError

if TYPE_CHECKING:
    from likely.jobs.backends import Opener
    from likely.jobs.ledger import JobModel
    from likely.jobs.requests import Request, Task
    from likely.jobs.sources import Input, Pictures

F = TypeVar("F", bound=Callable[..., Any])
MakeTask = Callable[[ModelInfo, "Pictures | None"], "Task"]
_JOB_PACKAGES = ("pyarrow", "ray")


@dataclass(frozen=True, slots=True)
class Job:
    """The values of the options."""

    bundle: Path | None
    device: str
    keys: tuple[Path, ...]
    server: Connection | None
    model: str | None
    version: str | None
    patience: float
    out: Path
    form: str
    shard: int
    threads: int
    workers: int
    batch: int
    engine: str
    as_json: bool

    def run(self, make_task: MakeTask, what: str, inputs: Input | None = None) -> None:
        """Does the job, or what is left of it, and prints its result.

        Args:
            make_task: makes the task from the model and the pictures.
            what: the text beside the progress.
            inputs: where the pictures are; None if the job draws pictures.

        Raises:
            LikelyError: the job cannot be done as requested, or not now.
            OSError: something cannot be read or written.
        """
        from likely.jobs import ledger
        from likely.jobs.making import Maker, Plan
        from likely.jobs.ray_workers import ray_workers
        from likely.jobs.running import WORKERS, run, threads
        from likely.jobs.sources import require_outside_inputs

        opener, out = self._opener(), self.out.absolute()
        if inputs:
            require_outside_inputs(inputs, out)
        begun = ledger.job_model(out)
        if begun and self._may_refer_to(begun):
            opener = opener.pinned(begun.model, begun.version)
            if finished := begun.finished_info and opener.info_without_opening(begun.finished_info):
                request, _ = self._request(make_task, finished, inputs)
                with ledger.Ledger(out, request) as folder:
                    again = folder.summary
                if again is not None:
                    self._print_summary(again, finished)
                    return
        backend = opener.open()
        try:
            info = backend.info
            request, pictures = self._request(make_task, info, inputs)
            backend.require(request.task)
            plan = Plan(request, out, opener.pinned(info.name, info.version), inputs, self.batch)
            maker = Maker(plan, backend, pictures)
            if self.engine == "ray":
                cards = 1 if self.device == "cuda" and not opener.is_remote else 0
                workers = ray_workers(plan, self.workers, max(1, self.threads), cards)
            else:
                workers = threads(maker, self.workers or WORKERS)
            label = self.version if self.version in VERSION_LABELS else None
            summary = run(plan, maker, workers, functools.partial(show.long_bar, what=what), label)
        finally:
            backend.close()
        self._print_summary(summary, info)

    def _request(
        self, make_task: MakeTask, info: ModelInfo, inputs: Input | None
    ) -> tuple[Request, Pictures | None]:
        from likely.jobs.columns import Geometry
        from likely.jobs.requests import Format, Request
        from likely.jobs.sources import Pictures

        pictures = Pictures(inputs, Geometry(info.shape, info.levels)) if inputs else None
        task = make_task(info, pictures)
        return Request.of(task, info, Format(self.form), self.shard), pictures

    def _print_summary(self, summary: dict[str, Any], info: ModelInfo) -> None:
        row = {"out": str(self.out), **_flat(summary)}
        lines = [row] if self.as_json else [{"of": k, "found": row[k]} for k in row]
        show.rows(lines, self.as_json, {"model": info.name, "version": info.version})

    def _may_refer_to(self, begun: JobModel) -> bool:
        """Whether the options can mean the version that the job began with.

        The label by which the job asked for it counts, though it may name another version by
        now. What another label names is up to the server.
        """
        versions = (None, begun.version, begun.label)
        return self.model in (None, begun.model) and self.version in versions

    def _opener(self) -> Opener:
        from likely.jobs.backends import Bundled, Served

        server = self.server
        if self.bundle and server and not on_the_command_line("address"):
            server = None  # a bundle on the command line overrides the environment
        if server is None:
            if self.model or self.version:
                raise click.UsageError("--model and --model-version need --address")
            if self.engine == "ray" and self.device.startswith("cuda:"):
                raise click.UsageError(
                    "with --engine ray, use --device cuda: Ray reserves one card for each actor, "
                    "which sees no other"
                )
            bundle = self.bundle and self.bundle.absolute()
            # With Ray there are many engines: each gets the cores that Ray reserves for it.
            cores = max(1, self.threads) if self.engine == "ray" else self.threads
            keys = tuple(key.absolute() for key in self.keys)
            return Bundled(bundle, self.device, cores, keys)
        if self.bundle:
            raise click.UsageError("give either --bundle or --address")
        if self.keys:  # they would verify nothing
            raise click.UsageError("--public-key needs --bundle: a server verifies its own")
        return Served(
            address=server.address,
            model=self.model,
            version=self.version,
            timeout=server.timeout,
            patience=self.patience,
            token=server.token,
            plaintext_token=server.plaintext_token,
            tls=server.tls,
            ca=server.ca and server.ca.absolute(),
            certificate=server.certificate and server.certificate.absolute(),
            key=server.key and server.key.absolute(),
            server_name=server.server_name,
            token_file=server.token_file and server.token_file.absolute(),
        )


def job(command: F) -> F:
    """Adds the options to a command, and passes it `job: Job`."""

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        chosen = Job(**{name: arguments.pop(name) for name in Job.__dataclass_fields__})
        try:
            command(job=chosen, **arguments)
        except ModuleNotFoundError as error:
            name = (error.name or "").partition(".")[0]
            extra = "cpu" if name not in _JOB_PACKAGES else "ray" if name == "ray" else "jobs"
            raise JobError(f"{name} is missing; pip install 'likely[{extra}]'") from error

    decorated = cast("F", run)
    for option in _options():
        decorated = option(decorated)
    return decorated


def _options() -> tuple[Callable[[F], F], ...]:
    file = click.Path(dir_okay=False, path_type=Path)
    return (
        options.as_json("Print the result as a JSON object."),
        click.option(
            "--engine", type=click.Choice(["threads", "ray"]), default="threads",
            show_default=True, help="What makes the shards: threads here, or actors of Ray.",
        ),
        click.option(
            "--batch", type=click.IntRange(1), default=512, show_default=True,
            help="Pictures processed at once.",
        ),
        click.option(
            "--workers", type=click.IntRange(0), default=0,
            help="Shards in progress at once. [2; with Ray, as many as its cores, or cards, allow]",
        ),
        click.option(
            "--threads", type=click.IntRange(0), default=0,
            help="Cores of each engine. [all; with Ray, 1]",
        ),
        click.option(
            "--shard", type=int, default=4096, show_default=True, help="Pictures in one shard."
        ),
        click.option(
            "--format", "form", type=click.Choice(["parquet", "npz", "webdataset"]),
            default="parquet", show_default=True, help="Format of the shards.",
        ),
        click.option(
            "--out", required=True, type=click.Path(file_okay=False, path_type=Path),
            help="The job's folder.",
        ),
        click.option(
            "--patience", type=float, default=300.0, show_default=True,
            help="Seconds to keep asking a server that is busy or away.",
        ),
        server_options(optional=True),
        click.option("--model-version", "version", help="Of the server's. [the default one]"),
        click.option("--model", help="Of the server's, by name. [its only one]"),
        click.option(
            "--public-key", "keys", multiple=True, type=file,
            help="PEM file of a key or of an authority's certificates: one must have signed.",
        ),
        click.option(
            "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
        ),
        click.option(
            "--bundle", type=click.Path(path_type=Path),
            help="The bundle to run in this process. [the shipped one]",
        ),
    )  # fmt: skip


def _flat(summary: dict[str, Any]) -> dict[str, Any]:
    """The result without nesting: `fdr.rate`, not `fdr` with a `rate`."""
    flat: dict[str, Any] = {}
    for name, value in summary.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": entry for key, entry in value.items()}
        else:
            flat[name] = value
    return flat
