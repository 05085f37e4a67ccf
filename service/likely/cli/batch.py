"""`likely batch generate|score|classify`: resumable jobs over many pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from likely.answers import DEFAULT_MAX_DRAWS, Guarantee, LabelRule, ModelInfo
from likely.cli import options
from likely.cli.job import Job, job

if TYPE_CHECKING:
    from likely.jobs.requests import Task
    from likely.jobs.sources import Pictures

F = TypeVar("F", bound=Callable[..., Any])

INPUT_HELP = (
    "INPUTS are Parquet files, arrays (.npy, .npz), WebDataset shards (.tar), image files, and "
    "folders of these. The job's folder holds shards and a manifest. The same command resumes "
    "an interrupted job; the folder of another job is refused."
)


@click.group()
def batch() -> None:
    """Draw, score or classify many pictures, resumably.

    The pictures are processed in shards. The same command resumes an interrupted job.
    """


@batch.command()
@click.option("--labels", help="Counts by label, such as 3=100,5=200 (names or indices).")
@click.option("--each", type=click.IntRange(1), help="Number of pictures of every label.")
@click.option("--count", type=click.IntRange(1), help="Number of pictures, labels by the priors.")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="The same seed gives the same pictures."
)
@click.option(
    "--temperature", type=float, default=1.0, show_default=True,
    help="Multiplies the noise, from 0 to 2.",
)  # fmt: skip
@options.SELF_CHECK
@click.option("--alpha", type=float, help="Of --self-check. [0.05, or the server's default_alpha]")
@click.option("--max-draws", type=int, help="Of one picture, with --self-check. [16]")
@job
def generate(
    job: Job,
    labels: str | None,
    each: int | None,
    count: int | None,
    seed: int,
    temperature: float,
    self_check: bool,
    alpha: float | None,
    max_draws: int | None,
) -> None:
    """Draw very many pictures.

    However often the job is interrupted, they are the same pictures.
    """
    if sum(option is not None for option in (labels, each, count)) != 1:
        raise click.UsageError("give one of --labels, --each and --count")
    if alpha is not None and not self_check:
        raise click.UsageError("--alpha needs --self-check")
    if max_draws is not None and not self_check:
        raise click.UsageError("--max-draws needs --self-check")

    def make_task(info: ModelInfo, _: Pictures | None) -> Task:
        from likely.jobs.requests import Generation, parse_runs

        wanted: tuple[tuple[int | None, int], ...] = ((None, count or 0),)
        if labels is not None:
            wanted = parse_runs(labels, info.labels)
        elif each is not None:
            wanted = tuple((label, each) for label in range(len(info.labels)))
        if not self_check:
            return Generation(wanted, seed, temperature)
        asked = info.default_alpha if alpha is None else alpha
        most = DEFAULT_MAX_DRAWS if max_draws is None else max_draws
        return Generation(wanted, seed, temperature, asked, most)

    job.run(make_task, "drawing")


def _judgement_options(command: F) -> F:
    """Adds the options of jobs that score or classify pictures."""
    for option in (
        job,
        click.option(
            "--fdr", type=float,
            help="Also decide which pictures to reject so that at most this share of the job's "
            "rejections is false (Benjamini-Hochberg).",
        ),
        click.option(
            "--guarantee", type=click.Choice(["marginal", "pac"]), default="marginal",
            show_default=True, help="Whether alpha holds on average, or with 95 % confidence.",
        ),
        options.ALPHA,
        click.option(
            "--key-column", help="Parquet's column of the pictures' names. [key, if there]"
        ),
        click.option("--column", help="Parquet's column of pictures. [image, images, x, …]"),
        click.argument(
            "inputs", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path)
        ),
    ):  # fmt: skip
        command = option(command)
    return command


@batch.command(epilog=INPUT_HELP)
@_judgement_options
def score(job: Job, **given: Any) -> None:
    """How plausible are these pictures; which are outliers?"""
    _run_judgement(job, "score", **given)


@batch.command(epilog=INPUT_HELP)
@options.PRIORS
@click.option(
    "--estimate-priors", is_flag=True,
    help="Estimate p(y) from the pictures, and use it in the posteriors.",
)  # fmt: skip
@options.MIN_POSTERIOR
@options.RULE
@_judgement_options
def classify(job: Job, priors: str | None, rule: str, **given: Any) -> None:
    """Which label is assigned, if any?"""
    asked = options.numbers(priors)
    by = LabelRule[rule.upper()]
    _run_judgement(job, "classify", priors=asked and tuple(asked), rule=by, **given)


def _run_judgement(
    job: Job,
    kind: Literal["score", "classify"],
    *,
    inputs: tuple[Path, ...],
    column: str | None,
    key_column: str | None,
    alpha: float | None,
    guarantee: str,
    **more: Any,
) -> None:
    def make_task(info: ModelInfo, pictures: Pictures | None) -> Task:
        from likely.jobs.requests import Judgement

        assert pictures is not None
        asked = info.default_alpha if alpha is None else alpha
        held = Guarantee[guarantee.upper()]
        return Judgement(kind, len(pictures), pictures.digest, asked, held, **more)

    from likely.jobs.sources import Input

    paths = tuple(path.absolute() for path in inputs)
    job.run(
        make_task,
        {"score": "scoring", "classify": "classifying"}[kind],
        Input(paths, column, key_column),
    )
