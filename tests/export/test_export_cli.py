import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from likely.bundle import Bundle, Manifest, Role
from likely.bundle.manifest import FileRecord
from likely.errors import BundleError, InvalidInput
from likely_export import recipes, runs
from likely_export.cli import _Sentences, main
from likely_export.material import Material
from likely_export.recipes import Recipe
from likely_export.replacing import replacing
from likely_export.runs import Run


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    x = np.random.default_rng(0).integers(0, 256, (40, 4, 3)).astype(np.uint8)
    np.savez(tmp_path / "set.npz", x=x, y=np.arange(40) % 2)
    (tmp_path / "tiny.toml").write_text(
        """
        name = "tiny"
        version = "1"
        data = { source = "set.npz", splits = { fit = 5, calibrate = 5, validate = 5, test = 5 } }
        roles = { density = "a" }
        calibration = { alphas = [0.2] }
        [models.a]
        family = "pixelcnn"
        channels = 8
        training = { steps = 2, validations = 1 }
        """
    )
    return tmp_path / "tiny.toml"


def test_recipes_are_listed() -> None:
    result = call("recipes")
    assert result.exit_code == 0 and "digits" in result.output


def test_training_leaves_a_run_and_says_what_comes_next(recipe: Path, tmp_path: Path) -> None:
    result = call("train", "--recipe", recipe, "--out", tmp_path / "run", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "likely-export build" in result.stdout and "step 2" in result.stderr
    assert Run.open(tmp_path / "run").model("a") is not None


def test_training_warns_of_pictures_that_are_held_out_and_learnt(
    recipe: Path, tmp_path: Path
) -> None:
    words = ("train", "--recipe", recipe, "--out", tmp_path / "run", "--device", "cpu")
    assert "warning" not in call(*words).stderr
    x = np.random.default_rng(0).integers(0, 256, (20, 4, 3)).astype(np.uint8).repeat(2, 0)
    np.savez(tmp_path / "set.npz", x=x, y=np.arange(40) % 2)
    result = call(*words[:-4], "--out", tmp_path / "other", "--device", "cpu")
    assert result.exit_code == 0
    assert "warning: set holds pictures twice" in result.stderr and " of test" in result.stderr


def test_a_part_of_a_run_is_not_said_to_be_ready_to_build(recipe: Path, tmp_path: Path) -> None:
    text = recipe.read_text().replace('density = "a"', 'density = "a", discriminate = "b"')
    models = '[models.b]\nfamily = "classifier"\nchannels = [2]\nwidth = 4\n'
    recipe.write_text(f"{text}\n{models}training = {{ steps = 2, validations = 1 }}\n")
    words = ("train", "--recipe", recipe, "--device", "cpu")
    said = {
        name: call(*words, "--out", tmp_path / name, "--model", name).stdout for name in ("a", "b")
    }
    assert f"likely-export extend BUNDLE --run {tmp_path / 'b'}" in said["b"].replace("\n", " ")
    assert "Now: train b too" in said["a"]


def test_a_bundle_is_not_extended_onto_itself_nor_under_no_version(tmp_path: Path) -> None:
    words = ("extend", tmp_path, "--run", tmp_path)
    assert "is BUNDLE itself" in call(*words, "--out", tmp_path).stderr
    assert "'A B'" in call(*words, "--out", tmp_path / "new", "--version", "A B").stderr


@pytest.mark.parametrize("files", [{}, {"evaluation.json": FileRecord(size=9, sha256=64 * "0")}])
def test_a_bundle_extended_without_its_figures_says_how_to_make_them(
    files: dict[str, FileRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from likely_export import build

    fields = {"name": "tiny", "version": "2", "files": files, "graphs": {Role.DENSITY: None}}
    made = Manifest.model_construct(**fields)  # type: ignore[arg-type]
    monkeypatch.setattr(build, "extend", lambda *_, **__: made)
    words = ("extend", tmp_path / "old", "--run", tmp_path, "--out", tmp_path / "new")
    result = call(*words, "--version", "2")
    assert result.exit_code == 0 and "tiny 2" in result.stdout
    assert ("evaluate" in result.stdout) != bool(files)


def test_two_devices_train_what_one_does_on_half_of_every_batch_each(
    recipe: Path, tmp_path: Path
) -> None:
    recipe.write_text(recipe.read_text().replace("steps = 2", "batch = 8, steps = 3"))
    with np.load(tmp_path / "set.npz") as file:
        np.savez(tmp_path / "set.npz", x=file["x"])  # no labels, which would be withheld at random
    program = Path(sys.executable).with_name("likely-export")
    command = [str(program), "train", "--recipe", str(recipe)]
    for devices in (1, 2):
        out = ["--out", str(tmp_path / str(devices)), "--device", "cpu", "--devices", str(devices)]
        done = subprocess.run([*command, *out], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, two = (
        torch.load(tmp_path / each / "a" / "weights.pt", weights_only=True)["state"]
        for each in ("1", "2")
    )
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert torch.allclose(weight, two[name], atol=1e-4), name


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--recipe", "letters"], "letters is neither"),
        (["train", "--model", "gan", "--out", "RUN"], "gan is none of"),
        (["build", "absent", "--out", "bundle"], "no training run"),
        (["evaluate", "absent"], "no bundle"),
    ],
)
def test_a_mistake_is_one_sentence_on_stderr(
    arguments: list[str], says: str, tmp_path: Path
) -> None:
    result = call(*[str(tmp_path / "run") if a == "RUN" else a for a in arguments])
    assert result.exit_code == 1 and result.stdout == ""
    assert says in result.stderr and len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("more", "says"),
    [((), "the same command resumes"), (("--fresh",), "the same command without --fresh resumes")],
)
def test_an_interruption_says_how_to_go_on(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: tuple[str, ...],
    says: str,
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "train_all", interrupted)
    result = call("train", "--recipe", recipe, "--out", tmp_path / "run", *more)
    assert result.exit_code == 1 and f"{says} from the last checkpoint" in result.stderr


def test_figures_may_be_written_into_a_bundle_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from likely_export import evaluate

    bundle = shutil.copytree("bundles/digits", tmp_path / "digits")
    returned: list[float] = []

    def evaluated(*arguments: object) -> tuple[dict[str, float], Material]:
        returned.append(77.0 + len(returned))
        return {"nll_nats": returned[-1]}, Material(17, (), {})

    monkeypatch.setattr(evaluate, "evaluate", evaluated)
    for nats in (77.0, 78.0):
        result = call("evaluate", bundle, "--write")
        assert result.exit_code == 0, result.output
        Bundle.open(bundle)
        assert json.loads((bundle / "evaluation.json").read_text())["nll_nats"] == nats
    (bundle / "model.sig").touch()
    result = call("evaluate", bundle, "--write")
    assert result.exit_code == 1 and "is signed" in result.stderr and len(returned) == 2


def test_an_anchor_beside_no_figure_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from likely_export import cli, evaluate

    monkeypatch.setattr(evaluate, "evaluate", lambda *_: ({"aurc": 0.1}, Material(17, (), {})))
    anchors = tuple(recipes.Anchor(figure=f, value=1, source="x") for f in ("aurc", "auroc"))
    digits = recipes.load("digits")
    anchored = digits.model_copy(update={"evaluation": recipes.Evaluation(anchors=anchors)})
    figures, _ = cli._evaluated(Path("bundles/digits"), anchored, write=False)
    assert capsys.readouterr().err == "warning: anchors: this evaluation has no figure auroc\n"
    assert len(figures["anchors"]) == 2


def test_other_sets_that_are_not_there_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from likely_export import compare, evaluate

    table = recipes.load("digits").as_table() | {"evaluation": {"others": {"near": "near.npz"}}}
    monkeypatch.setattr(recipes, "from_table", lambda *_: recipes.Recipe.model_validate(table))
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: ({"aurc": 0.1}, Material(17, (), {})))

    def ended(*_: object) -> None:
        raise InvalidInput("compare", "ends here")

    monkeypatch.setattr(compare, "compare", ended)
    warning = "warning: evaluation.others.near is left out: near.npz is not there\n"
    assert warning in call("evaluate", "bundles/digits").stderr
    assert warning in call("compare", "bundles/digits", "--out", tmp_path / "family.html").stderr


@pytest.mark.parametrize("evaluated", [True, False])
def test_build_reports_its_steps_and_its_bundle(
    evaluated: bool, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from likely_export import build, cli

    moved = str(tmp_path / "moved.npz")
    fields = {"name": "tiny", "version": "3", "files": {}, "graphs": {Role.DENSITY: None}}
    manifest = Manifest.model_construct(**fields)  # type: ignore[arg-type]

    def built(run: Path, out: Path, report: object, source: str | None) -> Manifest:
        assert source == moved
        report("export density")  # type: ignore[operator]
        return manifest

    monkeypatch.setattr(build, "build", built)
    figures = {"nll_nats": {"mean": 77.5}}

    def figured(bundle: Path, recipe: Recipe) -> tuple[dict[str, Any], Manifest]:
        assert recipe.data.source == moved
        return figures, manifest

    monkeypatch.setattr(cli, "_evaluated", figured)
    (tmp_path / "run").mkdir()
    recipes.load(recipe).write(tmp_path / "run" / "recipe.toml")
    more = [] if evaluated else ["--no-evaluate"]
    words = ("build", tmp_path / "run", "--data", moved, "--out", tmp_path / "bundle")
    result = call(*words, *more)
    assert result.exit_code == 0 and "export density" in result.stderr
    assert "tiny 3" in result.stdout
    assert ("evaluate" in result.stderr) == ("nll_nats.mean" in result.stdout) == evaluated


@pytest.mark.parametrize(
    ("name", "says"),
    [("figures.json", "figures are written beside it as .json"), ("folder", "is a directory")],
)
def test_a_comparison_that_could_not_be_written_is_not_begun(
    name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from likely_export import compare

    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(compare, "compare", lambda *_: pytest.fail("has begun"))
    result = call("compare", "bundles/digits", "--out", tmp_path / name)
    assert result.exit_code == 2 and says in " ".join(result.stderr.split())
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_a_file_is_not_replaced_by_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with (
        pytest.raises(BundleError, match=r"notes\.txt exists and is no bundle"),
        replacing(tmp_path / "notes.txt"),
    ):
        pytest.fail("has begun")
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "manifest", ['{"name": "My web app", "icons": []}', "[]", "{", "[" * 100_000, None]
)
def test_a_folder_that_is_no_bundle_is_not_replaced(tmp_path: Path, manifest: str | None) -> None:
    folder = tmp_path / "app"
    folder.mkdir()
    if manifest is None:
        (folder / "manifest.json").mkdir()
    else:
        (folder / "manifest.json").write_text(manifest)
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(BundleError, match="exists and is no bundle"), replacing(folder):
        pytest.fail("has begun")
    assert (folder / "thesis.tex").read_text() == "mine"


def test_a_damaged_or_older_bundle_is_replaced(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "manifest.json").write_text('{"format": 0, "graphs": {}, "files": {"a.onnx": 1}}')
    with replacing(old) as folder:
        (folder / "new").touch()
    assert [entry.name for entry in old.iterdir()] == ["new"]


def test_sigterm_leaves_no_half_of_a_bundle(tmp_path: Path) -> None:
    @click.command()
    def wait() -> None:
        with replacing(tmp_path / "bundle") as folder:
            (folder / "half").touch()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    ended = CliRunner().invoke(_Sentences(commands={"wait": wait}), ["wait"])
    assert ended.exit_code == 1
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_what_is_not_installed_is_named() -> None:
    code = "import sys; sys.modules['scipy'] = None; from likely_export.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "recipes"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        1,
        "Error: scipy is missing; pip install 'likely[cpu,export]'\n",
    )


def test_what_cannot_be_written_is_one_sentence() -> None:
    code = "from likely_export.cli import main; main()"
    command = [sys.executable, "-c", code, "recipes"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=buffered)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: [Errno 28]") and done.stderr.count("\n") == 1
