"""The commands that ask a server: score, classify, generate, models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from likely.answers import Classifications, Draws, LabelRule, Scores, Verdict, joined
from likely.cli import options, pictures, show
from likely.cli.connection import Connection, server_options

_FILES = click.argument(
    "files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path)
)


@click.command(epilog=show.FOLDERS_HELP)
@_FILES
@options.server_and_model
@options.ALPHA
@click.option(
    "--surprise",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write -log p of every pixel: .npz for arrays, .png to look at.",
)
@options.as_json()
def score(
    files: tuple[Path, ...],
    server: Connection,
    model: str | None,
    version: str | None,
    alpha: float | None,
    surprise: Path | None,
    as_json: bool,
) -> None:
    """How plausible are these pictures; which are outliers?"""
    if surprise is not None:
        pictures.require_writable(surprise)
    with server.client() as client:
        info = client.model(model, version)
        x, names = pictures.read(files, info)

        def ask(part: slice) -> Scores:
            return client.score(
                x[part],
                alpha=alpha,
                surprise=surprise is not None,
                model=info.name,
                version=info.version,
            )

        parts = pictures.slices(len(x), info.limits.images_per_request)
        answer = joined([ask(part) for part in show.progress(parts, len(x), "scoring")])
    if surprise is not None and answer.surprise is not None:
        pictures.write_surprise(surprise, x, answer.surprise, info)
    rows = [
        {
            "picture": names[i],
            "log_likelihood": float(answer.log_px[i]),
            "bits_per_dim": float(answer.bits_per_dim[i]),
            "p_value": float(answer.p_value[i]),
            "verdict": Verdict(answer.verdict[i]).name.lower(),
        }
        for i in range(len(x))
    ]
    show.rows(rows, as_json, _about(info.name, answer))


@click.command(epilog=show.FOLDERS_HELP)
@_FILES
@options.server_and_model
@options.ALPHA
@options.PRIORS
@options.MIN_POSTERIOR
@options.RULE
@click.option("--both", is_flag=True, help="Add log p(x|y) by the other rule; needs --json.")
@options.as_json()
def classify(
    files: tuple[Path, ...],
    server: Connection,
    model: str | None,
    version: str | None,
    alpha: float | None,
    priors: str | None,
    min_posterior: float,
    rule: str,
    both: bool,
    as_json: bool,
) -> None:
    """Which label is assigned, if any?"""
    if both and not as_json:
        raise click.UsageError("--both needs --json")
    prior_values = options.numbers(priors)
    with server.client() as client:
        info = client.model(model, version)
        x, names = pictures.read(files, info)

        def ask(part: slice) -> Classifications:
            return client.classify(
                x[part],
                alpha=alpha,
                priors=prior_values,
                min_posterior=min_posterior,
                rule=LabelRule[rule.upper()],
                both=both,
                model=info.name,
                version=info.version,
            )

        parts = pictures.slices(len(x), info.limits.images_per_request)
        answer = joined([ask(part) for part in show.progress(parts, len(x), "classifying")])
    accepted = answer.verdict == Verdict.ACCEPTED
    rows = [
        {
            "picture": names[i],
            "label": info.labels[answer.label[i]] if as_json or accepted[i] else show.NONE,
            "posterior": float(answer.posterior[i, answer.label[i]]),
            "p_value": float(answer.p_value[i]),
            "verdict": Verdict(answer.verdict[i]).name.lower(),
        }
        for i in range(len(x))
    ]
    if as_json:
        columns = {
            "posteriors": answer.posterior,
            "log_likelihoods": answer.log_pxy,
            "composed_log_likelihoods": answer.composed,
        }
        for name, column in columns.items():
            if column.shape[1]:
                for row, values in zip(rows, column.tolist(), strict=True):
                    row[name] = dict(zip(info.labels, values, strict=True))
    show.rows(rows, as_json, _about(info.name, answer))


@click.command()
@options.server_and_model
@click.option("--label", help="The label's name or index. [each drawn from the priors]")
@click.option("--count", type=int, default=64, show_default=True, help="How many pictures.")
@click.option("--seed", type=int, help="The same seed gives the same pictures. [a fresh one]")
@click.option("--first-index", type=int, default=0, help="The index of the first picture.")
@click.option("--temperature", type=float, help="Multiplies the noise, from 0 to 2. [1]")
@options.SELF_CHECK
@click.option("--acceptance", is_flag=True, help="Draw from p(x) and keep with probability p(y|x).")
@options.ALPHA
@click.option(
    "--max-draws", type=int, help="Of one picture, with --self-check [16] or --acceptance [100]."
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="A grid (.png), arrays x and y (.npz), or an empty folder for pictures (no ending).",
)
@options.as_json()
def generate(
    server: Connection,
    model: str | None,
    version: str | None,
    label: str | None,
    count: int,
    seed: int | None,
    first_index: int,
    temperature: float | None,
    self_check: bool,
    acceptance: bool,
    alpha: float | None,
    max_draws: int | None,
    out: Path,
    as_json: bool,
) -> None:
    """Draw pictures, with a label if you like; for very many see `likely batch generate`."""
    if alpha is not None and not self_check:
        raise click.UsageError("--alpha needs --self-check")
    if max_draws is not None and not (self_check or acceptance):
        raise click.UsageError("--max-draws needs --self-check or --acceptance")
    pictures.require_writable(out, folder=True)
    with server.client() as client:
        info = client.model(model, version)
        stream = client.generate_stream(
            count,
            label=label,
            seed=seed,
            first_index=first_index,
            temperature=temperature,
            self_check=self_check,
            acceptance=acceptance,
            alpha=alpha,
            max_draws=max_draws,
            model=info.name,
            version=info.version,
        )
        chunks: list[Draws] = []
        with show.bar(count, "drawing") as advance:
            for chunk in stream:
                chunks.append(chunk)
                advance(len(chunk.images))
    drawn = joined(chunks)
    pictures.write_draws(out, drawn, info)
    row = {
        "out": str(out),
        "pictures": len(drawn.images),
        "seed": drawn.seed,
        "draws": int(drawn.draws.sum()),
        "accepted": int(drawn.accepted.sum()),
    }
    show.rows([row], as_json, {"model": info.name, "version": drawn.model_version})


@click.command()
@server_options()
@options.as_json()
def models(server: Connection, as_json: bool) -> None:
    """List the models of a server, and what really runs them."""
    with server.client() as client:
        infos = client.models()
    if as_json:
        show.rows([asdict(info) for info in infos], True, {})
        return
    rows = [
        {
            "model": info.name,
            "version": info.version,
            "picture": "x".join(str(size) for size in info.shape),
            "levels": info.levels,
            "labels": len(info.labels),
            "answers": " ".join(_short(info.methods)),
            "alpha ≥": info.finest_alpha if info.calibration_size else show.NONE,
            "runs on": ", ".join(
                name.removesuffix("ExecutionProvider") for name in info.execution_providers
            ),
        }
        for info in infos
    ]
    show.rows(rows, False, {})


def _short(methods: Sequence[str]) -> list[str]:
    """The methods' names without their services, and without streams of listed methods."""
    names = [method.rpartition("/")[2] for method in methods]
    streams = {f"{name}Stream" for name in names}
    return [name for name in names if name not in streams]


def _about(name: str, answer: Scores | Classifications) -> dict[str, Any]:
    return {"model": name, "version": answer.model_version, "alpha": answer.alpha}
