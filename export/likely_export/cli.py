"""`likely-export`: trains recipes, builds bundles, and computes their figures."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from likely import signals
from likely.errors import InvalidInput, LikelyError

_OUT = click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="The new bundle's folder; an older bundle there is replaced.",
)

_DATA = click.option("--data", "source", help="Where the run's data are now, if they were moved.")

if TYPE_CHECKING:
    from likely.bundle import Manifest
    from likely_export.recipes import Recipe

# Commands import what they need when they run: `--help` should not wait for torch.


class _Sentences(click.Group):
    """Turns errors into a sentence on stderr and exit code 1; SIGTERM ends like Ctrl-C."""

    def main(self, *args: Any, **more: Any) -> Any:
        """Runs the command that the arguments name, and ends the process."""
        try:
            return super().main(*args, **more)
        finally:
            signals.drop_unwritable()

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _sigterm_as_interrupt():
                return super().invoke(ctx)
        except LikelyError as error:
            raise click.ClickException(str(error)) from error
        except BrokenPipeError:
            raise
        except OSError as error:
            raise click.ClickException(str(error)) from error
        except ModuleNotFoundError as error:
            if (name := (error.name or "").partition(".")[0]).startswith("likely"):
                raise
            raise click.ClickException(
                f"{name} is missing; pip install 'likely[cpu,export]'"
            ) from error


@click.group(cls=_Sentences, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="likely")
def main() -> None:
    """Train explicit-density models and export them as bundles to serve."""


@main.command()
@click.option("--recipe", default="digits", show_default=True, help="Name or .toml file.")
@click.option("--data", help="Where the pictures are, if not where the recipe says.")
@click.option("--size", default="", help="Another size that the recipe names, such as paper.")
@click.option("--seed", type=click.IntRange(min=0), help="Of every model  [default: the recipe's]")
@click.option("--without", multiple=True, help="Hold this label out, too; repeatable.")
@click.option("--out", type=click.Path(path_type=Path), help="Run folder  [default: runs/RECIPE]")
@click.option("--model", "models", multiple=True, help="Train only this model; repeatable.")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)
@click.option("--devices", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--precision",
    type=click.Choice(["32-true", "bf16-mixed"]),
    help="Precision of the arithmetic  [default: the recipe's, bfloat16 only in hardware]",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Threads of each model's process; models are trained side by side.",
)
@click.option(
    "--resume/--fresh",
    default=True,
    show_default=True,
    help="Resume from checkpoints, or discard them.",
)
def train(
    recipe: str,
    data: str | None,
    size: str,
    seed: int | None,
    without: tuple[str, ...],
    out: Path | None,
    models: tuple[str, ...],
    device: Any,
    devices: int,
    precision: Any,
    threads: int,
    resume: bool,
) -> None:
    """Train a recipe's models side by side."""
    from likely_export import recipes, runs
    from likely_export.progress import Display
    from likely_export.train import Hardware

    chosen = recipes.load(recipe, data, size)
    if without:
        chosen = chosen.without(without)
    if seed is not None:
        chosen = chosen.reseeded(seed)
    folder = out or Path("runs") / chosen.name
    # With several devices, Fabric runs this command once for each; only the first prints.
    quiet = os.environ.get("LOCAL_RANK", "0") != "0"
    try:
        with Display(models or chosen.models, Console(stderr=True, quiet=quiet)) as display:
            trained = runs.train_all(
                chosen,
                folder,
                only=models,
                resume=resume,
                hardware=Hardware(device, devices, precision),
                threads=threads,
                report=display.update,
                warn=display.warn,
            )
    except KeyboardInterrupt:
        without_fresh = "" if resume else " without --fresh"
        raise click.ClickException(
            f"interrupted; the same command{without_fresh} resumes from the last checkpoint"
        ) from None
    if quiet:
        return
    table = Table("model", "steps", "seconds", "validation, nats a picture")
    for name, result in trained.items():
        numbers = (f"{result.steps}", f"{result.seconds:.0f}", f"{result.validation:.2f}")
        table.add_row(name, *numbers)
    Console().print(table)
    click.echo(_what_next(chosen, folder))


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Handles SIGTERM like Ctrl-C, so that child processes end and half a bundle is removed."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _what_next(recipe: Recipe, folder: Path) -> str:
    """The next command for a run: build it, extend a bundle with it, or train what is missing."""
    from likely.bundle import Role
    from likely_export.train import WEIGHTS

    missing = {name for name in recipe.models if not (folder / name / WEIGHTS).is_file()}
    if not missing:
        return f"Now: likely-export build {folder} --out BUNDLE"
    if Role.DISCRIMINATE in recipe.roles and not missing & {*recipe.models_of(Role.DISCRIMINATE)}:
        return f"Now: likely-export extend BUNDLE --run {folder} --out NEW --version VERSION"
    return f"Now: train {', '.join(sorted(missing))} too; then likely-export build {folder}"


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@_DATA
@_OUT
@click.option(
    "--evaluate/--no-evaluate",
    "evaluated",
    default=True,
    show_default=True,
    help="Put figures and a report into the bundle.",
)
def build(run: Path, source: str | None, out: Path, evaluated: bool) -> None:
    """Export a trained RUN, calibrate it, write the bundle and show its figures."""
    from likely.bundle import Role
    from likely_export.build import build as build_bundle
    from likely_export.features import can_encode_unlabelled
    from likely_export.runs import Run

    with _steps() as report:
        manifest = build_bundle(run, out, report, source=source)
        evaluated = evaluated and Role.DENSITY in manifest.graphs
        click.echo(_contents(out, manifest))
        if evaluated:
            report("evaluate; the bundle can be served meanwhile")
            figures, _ = _evaluated(out, Run.open(run, source).recipe)
    if evaluated:
        _show(figures)
    encodes = Role.DENSITY not in manifest.graphs and can_encode_unlabelled(manifest)
    if encodes and Run.open(run, source).recipe.data.load().labels:
        click.echo(f"It has no density. Now: likely-export features {out}")


def _contents(out: Path, manifest: Manifest) -> str:
    """A line that says what the folder contains now."""
    size = sum(record.size for record in manifest.files.values())
    return f"{out}: {manifest.name} {manifest.version}, {size / 1e6:.2f} MB"


def _named_version(_: click.Context, __: click.Parameter, version: str | None) -> str | None:
    """Returns the version, if a manifest may have it."""
    from pydantic import TypeAdapter, ValidationError

    from likely.bundle import Name

    try:
        return version and TypeAdapter(Name).validate_python(version)
    except ValidationError:
        raise click.BadParameter(
            f"{version!r}; small letters, digits, dots, dashes and underscores are allowed"
        ) from None


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--run", type=click.Path(path_type=Path), required=True, help="Folder of the model's training."
)
@_DATA
@_OUT
@click.option(
    "--version",
    callback=_named_version,
    help="Version of the new bundle, to serve it beside the old one  [default: the old one's]",
)
def extend(bundle: Path, run: Path, source: str | None, out: Path, version: str | None) -> None:
    """Add a run's discriminative model to a BUNDLE of the same data; all else stays the same.

    Figures and report belong to one version, and are not copied to another.
    """
    from likely.bundle import Role
    from likely_export.build import extend as extend_bundle
    from likely_export.material import EVALUATION

    if out.exists() and out.resolve() == bundle.resolve():
        raise click.UsageError("--out is BUNDLE itself; name another folder")
    with _steps() as report:
        manifest = extend_bundle(bundle, run, out, report, version, source=source)
    click.echo(_contents(out, manifest))
    if Role.DENSITY in manifest.graphs and EVALUATION not in manifest.files:
        click.echo(f"It has no figures. Now: likely-export evaluate {out} --write")


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", "source", help="Where the data are, if not where the recipe says.")
@click.option("--write", is_flag=True, help="Put figures and report into the bundle.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def evaluate(bundle: Path, source: str | None, write: bool, as_json: bool) -> None:
    """Compute a BUNDLE's figures on the test part, beside simple baselines."""
    from likely.bundle import Bundle
    from likely_export import recipes

    recipe = recipes.from_table(dict(Bundle.open(bundle).manifest.recipe), source)
    with _steps() as report:
        report("evaluate")
        figures, _ = _evaluated(bundle, recipe, write=write)
    if as_json:
        click.echo(json.dumps(figures, allow_nan=False))
        return
    _show(figures)


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", "source", help="Where the data are, if not where the recipe says.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def features(bundle: Path, source: str | None, as_json: bool) -> None:
    """Judge a BUNDLE's features by linear probes and by traversals of attributes."""
    from likely.bundle import Bundle
    from likely_export import features as feature_figures
    from likely_export import recipes

    manifest = Bundle.open(bundle).manifest
    recipe = recipes.from_table(dict(manifest.recipe), source)
    data = recipe.data.load()
    if data.identity != (manifest.data_digest, manifest.levels):
        raise InvalidInput(recipe.data.source, "is not the data that this bundle was made with")
    if not data.labels:
        raise InvalidInput(recipe.data.source, "has no labels, by which features are judged")
    with _steps() as report:
        report("evaluate")
        figures = feature_figures.evaluate(bundle, data)
    if as_json:
        click.echo(json.dumps(figures, allow_nan=False))
        return
    _show(figures)


@main.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--data", "source", help="Where the data are, if not where the recipe says.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("compare.html"),
    show_default=True,
    help="The report; the figures are written beside it as .json.",
)
def compare(bundles: tuple[Path, ...], source: str | None, out: Path) -> None:
    """Compare BUNDLES of the same data: who answers what, how well, at what cost."""
    from likely.bundle import Bundle
    from likely_export import compare, recipes
    from likely_export.report import family

    if out.suffix == ".json":
        raise click.UsageError(
            "--out is the report, and the figures are written beside it as .json; name it .html"
        )
    recipe = recipes.from_table(dict(Bundle.open(bundles[0]).manifest.recipe), source)
    with _steps() as report:
        report("compare")
        data = recipe.data.load()
        _tell_absent(recipe)
        comparison = compare.compare(bundles, data, recipe.others(data.levels))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(
        json.dumps(comparison.figures, indent=1, allow_nan=False) + "\n"
    )
    family.write(out, comparison.figures, comparison.drawn, comparison.outside, comparison.levels)
    click.echo(f"{out} and {out.with_suffix('.json')}")


def _evaluated(
    bundle: Path, recipe: Recipe, *, write: bool = True
) -> tuple[dict[str, Any], Manifest]:
    """Computes the figures of a bundle; returns them, and the manifest once they are in it."""
    from likely.bundle import Bundle
    from likely_export import evaluate
    from likely_export.replacing import check_unsigned, rewriting
    from likely_export.report.text import find

    manifest = Bundle.open(bundle).manifest
    if write:
        check_unsigned(bundle)  # before spending minutes
    data = recipe.data.load()
    if data.identity != (manifest.data_digest, manifest.levels):
        raise InvalidInput(recipe.data.source, "is not the data that this bundle was made with")
    _tell_absent(recipe)
    others = recipe.others(data.levels)
    figures, material = evaluate.evaluate(bundle, data, recipe.calibration.alphas, others)
    anchors = recipe.evaluation.anchors
    for name in dict.fromkeys(a.figure for a in anchors if find(figures, a.figure) is None):
        click.echo(f"warning: anchors: this evaluation has no figure {name}", err=True)
    figures["anchors"] = [anchor.model_dump() for anchor in anchors]
    if not write:
        return figures, manifest
    with rewriting(bundle) as folder:
        return figures, evaluate.attach(folder, figures, material)


def _tell_absent(recipe: Recipe) -> None:
    """Warns about other data sets that the recipe names and that do not exist."""
    for name, path in recipe.other_paths().items():
        if not path.exists():
            warning = f"warning: evaluation.others.{name} is left out: {path} is not there"
            click.echo(warning, err=True)


@contextmanager
def _steps() -> Iterator[Callable[[str], None]]:
    """Shows the current step, in place on a terminal and line by line elsewhere."""
    console = Console(stderr=True)
    with console.status("") as status:

        def report(step: str) -> None:
            status.update(step)
            if not console.is_terminal:
                console.print(step, highlight=False)

        yield report


@main.command("recipes")
def list_recipes() -> None:
    """List the recipes that come with likely."""
    from likely_export import recipes

    table = Table("recipe", "what it makes")
    for name, description in recipes.shipped().items():
        table.add_row(name, description)
    Console().print(table)


def _show(figures: Mapping[str, Any]) -> None:
    from likely_export.report.text import flat, format_figure

    table = Table("figure", "value")
    for path, figure in flat(figures):
        table.add_row(".".join(path), format_figure(figure))
    Console().print(table)


@main.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--private-key",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="PEM file of an elliptic curve's key.",
)
@click.option(
    "--password",
    envvar="LIKELY_KEY_PASSWORD",
    show_envvar=True,
    help="Password of an encrypted key.",
)
@click.option(
    "--certificate",
    type=click.Path(dir_okay=False, path_type=Path),
    help="PEM file of the key's certificate, to be verified by its authority.",
)
@click.option(
    "--chain",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="PEM file of an intermediate authority; repeatable.",
)
def sign(
    bundle: Path,
    private_key: Path,
    password: str | None,
    certificate: Path | None,
    chain: tuple[Path, ...],
) -> None:
    """Sign a BUNDLE by OpenSSF model signing; the signature is its file model.sig."""
    from likely.bundle import Bundle, signing

    Bundle.open(bundle)  # raises unless the bundle is whole
    path = signing.sign(
        bundle, private_key, password=password, certificate=certificate, chain=chain
    )
    click.echo(f"{path} signs all of {bundle}; likely serve --require-signature asks for it")
