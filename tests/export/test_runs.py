import fcntl
import io
import math
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from likely.errors import InvalidInput, LikelyError
from likely_export import recipes, runs, train
from likely_export.build import build
from likely_export.progress import Display
from likely_export.recipes import Recipe
from likely_export.train import Hardware, Progress

RECIPE = """
name = "tiny"
version = "1"
[data]
source = "set.npz"
[data.splits]
fit = 5
calibrate = 5
validate = 10
test = 10
[models.a]
family = "cvae"
latent = 2
width = 8
logistics = 1
training.steps = 6
training.validations = 3
[models.b]
family = "pixelcnn"
channels = 4
layers = 1
head = 4
training.steps = 4
training.validations = 2
[roles]
density = "b"
conditional = "a"
[calibration]
alphas = [0.2]
"""


# A model that starts from another one, and is named before it.
STARTED = """
[models.c]
family = "detail"
start_from = "b"
channels = 4
layers = 1
head = 4
training.steps = 2
training.validations = 1
training.learning_rate = 1e-30
[models.s]
family = "sketch"
channels = 4
layers = 1
head = 4
training.steps = 2
training.validations = 1
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    x = np.random.default_rng(0).integers(0, 256, (60, 4, 3)).astype(np.uint8)
    np.savez(tmp_path / "set.npz", x=x, y=np.arange(60) % 2)
    (tmp_path / "tiny.toml").write_text(RECIPE)
    return recipes.load(tmp_path / "tiny.toml")


def test_models_trained_side_by_side_are_those_trained_alone(
    recipe: Recipe, tmp_path: Path
) -> None:
    reports: list[tuple[str, Progress]] = []
    both = runs.train_all(
        recipe, tmp_path / "both", report=lambda name, now: reports.append((name, now))
    )
    assert list(both) == ["a", "b"] and [both[name].steps for name in both] == [6, 4]
    assert {name for name, now in reports if now.done == 1} == {"a", "b"}
    run = runs.Run.open(tmp_path / "both")
    assert run.recipe == recipe
    for name in both:
        alone = runs.train_all(recipe, tmp_path / "alone", only=[name])[name]
        assert alone.validation == both[name].validation
        again = runs.Run.open(tmp_path / "alone").model(name).state_dict()
        for key, weight in run.model(name).state_dict().items():
            assert torch.equal(weight, again[key])


def test_a_finished_run_is_not_trained_again_unless_afresh(recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    runs.train_all(recipe, folder, only=["a"])
    steps: list[int] = []
    runs.train_all(recipe, folder, only=["a"], report=lambda _, now: steps.append(now.step))
    assert steps == []
    runs.train_all(
        recipe, folder, only=["a"], resume=False, report=lambda _, now: steps.append(now.step)
    )
    assert steps[-1] == 6


def test_a_folder_belongs_to_one_recipe(recipe: Recipe, tmp_path: Path) -> None:
    runs.train_all(recipe, tmp_path / "run", only=["a"])
    other = recipe.model_copy(update={"version": "2"})
    with pytest.raises(InvalidInput, match="another recipe"):
        runs.train_all(other, tmp_path / "run", only=["a"])
    with pytest.raises(InvalidInput, match="c is none of a, b"):
        runs.train_all(recipe, tmp_path / "run", only=["c"])
    with pytest.raises(InvalidInput, match="no training run"):
        runs.Run.open(tmp_path)


def test_what_does_not_go_with_the_data_is_refused_before_anything_is_trained(
    recipe: Recipe, tmp_path: Path
) -> None:
    b = recipe.models["b"].model_copy(update={"options": {"digits": 3}})
    with pytest.raises(InvalidInput, match="256 levels cannot be written with 3 equal digits"):
        runs.train_all(recipe.model_copy(update={"models": {"b": b}}), tmp_path / "run")
    np.savez(tmp_path / "odd.npz", x=np.zeros((2, 5, 5), np.uint8), y=[0, 1])
    others = recipes.Evaluation(others={"odd": "odd.npz"})
    with pytest.raises(InvalidInput, match=r"evaluation\.others\.odd"):
        runs.train_all(recipe.model_copy(update={"evaluation": others}), tmp_path / "run")
    own = recipe.calibration.model_dump() | {"parts": [{"kind": "contrast"}]}
    idle = recipes.Calibration.model_validate(own | {"contrast": ["grainy"]})
    two = {"data": recipe.data.model_copy(update={"levels": 2}), "calibration": idle}
    with pytest.raises(InvalidInput, match="levels stay as they are, or turn blank, under g"):
        runs.train_all(recipe.model_copy(update=two), tmp_path / "run")
    a = recipe.models["a"].model_copy(update={"options": {"contrast": 1.0}})
    with pytest.raises(InvalidInput, match=r"models\.a\.training\.keep_best: .* set it to false"):
        runs.train_all(recipe.model_copy(update={"models": {**recipe.models, "a": a}}), tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("places", "says"),
    [(("near/set",), "p: .* set.npz .* as the data would"), (("p/x", "q/x"), "q: .* as p would")],
)
def test_sets_of_one_file_name_are_refused_as_a_manifest_could_not_tell_them_apart(
    recipe: Recipe, tmp_path: Path, places: tuple[str, ...], says: str
) -> None:
    for place in places:
        (tmp_path / place).parent.mkdir()
        np.savez(tmp_path / place, x=np.full((2, 4, 3), 255, np.uint8), y=[0, 1])

    def with_others(folder: str) -> Recipe:
        others = {name: f"{folder}{place}.npz" for name, place in zip("pq", places, strict=False)}
        return recipe.model_copy(update={"evaluation": recipes.Evaluation(others=others)})

    with pytest.raises(InvalidInput, match=rf"evaluation\.others\.{says}"):
        runs.train_all(with_others(f"{tmp_path}/"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    runs._load_checked_data(with_others(""))


OTHERS = """
[models.wide]
family = "cvae"
latent = 3
training.steps = 1
[models.vae]
family = "vae"
latent = 2
training.steps = 1
[models.near]
family = "local"
training.steps = 1
[models.far]
family = "local"
training.steps = 1
"""


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('density = "b"', 'density = "a"', r"roles\.density: a CVAE has no such graph"),
        ('density = "b"', 'density = "b"\nencode = "b"', r"roles\.encode: a PixelCNN has no such"),
        ('density = "b"', 'density = ["b", "vae"]', "a VAE cannot stand beside a density"),
        ('density = "b"', 'density = ["b", "near", "far"]', "two companions of one family"),
        (
            'density = "b"',
            'density = "b"\nencode = "wide"\ndecode = "a"',
            r"roles\.decode: takes 2 features where encode gives 3",
        ),
        ('density = "b"', 'density = "b"\nencode = "vae"\ndecode = "a"', "encodes under them"),
        ("layers = 1", "layers = 1\nlabel_dropout = 1.5", r"models\.b: label_dropout: 1\.5 is not"),
        ("layers = 1", "layers = 1\nlabel_dropout = 0.0", r"density: label_dropout = 0 trains no"),
        (
            'conditional = "a"\n',
            'conditional = "free"\n[models.free]\nfamily = "pixelcnn"\nlabel_dropout = 1.0\n'
            "training.steps = 1\n",
            r"conditional: label_dropout = 1 trains no p\(x\|y\)",
        ),
        ("[data]", f'[data]\nlabels = ["a", "{65 * "b"}"]', r"labels\.1\.name: .* at most 64"),
        (
            "[roles]",
            '[[evaluation.anchors]]\nfigure = "nll"\nvalue = inf\nsource = "x"\n[roles]',
            r"anchors\.0\.value",
        ),
        ("[data]", '[data]\nlabels = ["a", "a"]', "two labels of set are named a"),
        ("[roles]", "[roles]", r"models\.wide: has no role"),
    ],
)
def test_what_no_bundle_can_be_built_of_is_refused_before_anything_is_trained(
    recipe: Recipe, tmp_path: Path, old: str, new: str, says: str
) -> None:
    assert old in RECIPE and recipe.roles
    (tmp_path / "tiny.toml").write_text(RECIPE.replace(old, new, 1) + OTHERS)
    with pytest.raises(InvalidInput, match=says):
        runs.train_all(recipes.load(tmp_path / "tiny.toml"), tmp_path / "run", only=["b"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("family", "roles", "says"),
    [
        ("cvae", 'density = "b"', r"models\.a: family: a cvae needs labels, and the"),
        ("classifier", 'density = "b"', r"models\.a: .*a classifier needs labels"),
        (
            "vae",
            'density = "b"\nconditional = "b"',
            r"roles\.conditional: needs labels",
        ),
    ],
)
def test_what_needs_labels_is_refused_where_there_are_none(
    tmp_path: Path, family: str, roles: str, says: str
) -> None:
    np.savez(tmp_path / "set.npz", x=np.arange(60 * 12).reshape(60, 4, 3).astype(np.uint8))
    text = RECIPE.replace('family = "cvae"\nlatent = 2\nwidth = 8\nlogistics = 1', "%s")
    text = text.replace('density = "b"\nconditional = "a"', roles) % f'family = "{family}"'
    (tmp_path / "tiny.toml").write_text(text)
    with pytest.raises(InvalidInput, match=says):
        runs.train_all(recipes.load(tmp_path / "tiny.toml"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_budget_of_seconds_is_one_devices(recipe: Recipe, tmp_path: Path) -> None:
    timed = recipe._with_training(lambda own: replace(own, steps=0, budget_seconds=9.5))
    with pytest.raises(InvalidInput, match=r"budget_seconds: 9\.5 .* on each of 2 devices"):
        runs.train_all(timed, tmp_path / "run", hardware=Hardware("cpu", devices=2))
    assert not (tmp_path / "run").exists()


def test_a_folder_of_a_shorter_training_is_gone_on_with(recipe: Recipe, tmp_path: Path) -> None:
    runs.train_all(recipe, tmp_path / "run", only=["b"])
    longer = recipe._with_training(lambda own: replace(own, more_epochs=(1,)))
    longer = longer.model_copy(update={"version": "2"})
    steps: list[int] = []
    runs.train_all(
        longer, tmp_path / "run", only=["b"], report=lambda _, now: steps.append(now.step)
    )
    assert min(steps) > 4 and runs.Run.open(tmp_path / "run").recipe == longer
    assert runs.Run.open(tmp_path / "run").model("b") is not None
    longer._with_training(lambda own: replace(own, more_epochs=(1, 1))).write(
        tmp_path / "run" / runs.RECIPE
    )
    with pytest.raises(InvalidInput, match="other stretches"):
        runs.Run.open(tmp_path / "run").model("b")
    longer.write(tmp_path / "run" / runs.RECIPE)
    with pytest.raises(InvalidInput, match="another recipe"):
        runs.train_all(recipe, tmp_path / "run", only=["b"])


@pytest.fixture
def started(recipe: Recipe, tmp_path: Path) -> Recipe:
    """A recipe in whose run c starts with the weights of b."""
    text = RECIPE.replace("[models.b]", STARTED + "[models.b]")
    text = text.replace('density = "b"', 'density = ["s", "c"]')
    (tmp_path / "started.toml").write_text(text)
    return recipes.load(tmp_path / "started.toml")


@pytest.mark.parametrize("at_once", [False, True])
def test_a_model_starts_with_the_trained_weights_of_another(
    started: Recipe, tmp_path: Path, at_once: bool
) -> None:
    run = tmp_path / "run"
    if not at_once:
        with pytest.raises(InvalidInput, match="was this model trained to the end"):
            runs.train_all(started, run, only=["c"])
    for only in ([], ["c"]) if at_once else (["b"], ["c"]):
        runs.train_all(started, run, only=only)
    earlier = runs.Run.open(run).model("b").state_dict()
    state = runs.Run.open(run).model("c").state_dict()  # which was hardly trained
    assert earlier.keys() < state.keys()
    for name, weight in earlier.items():
        torch.testing.assert_close(state[name], weight, rtol=0, atol=1e-20)
    assert earlier["stem_vertical.weight"].abs().sum() > 0


def test_a_model_trained_afresh_takes_what_started_from_it_along(
    started: Recipe, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    runs.train_all(started, run)
    (run / "b" / train.WEIGHTS).rename(run / "weights.pt")
    runs.train_all(started, run, only=["c"])  # resumed, from its own checkpoint
    with pytest.raises(InvalidInput, match="was this model trained to the end"):
        runs.train_all(started, run, only=["c"], resume=False)
    assert (run / "c" / train.WEIGHTS).is_file()
    runs.train_all(started, run, only=["b"], resume=False)
    assert not (run / "c").exists() and (run / "s").exists()


def test_a_model_that_others_started_from_is_not_trained_for_longer(
    started: Recipe, tmp_path: Path
) -> None:
    runs.train_all(started, tmp_path / "run", only=["b"])
    for name in ("b", "c"):
        trainings = {key: model.training for key, model in started.models.items()}
        trainings[name] = replace(trainings[name], more_epochs=(1,))
        longer = started._with_trainings(trainings)
        assert longer.continues(started) == (name == "c")
    with pytest.raises(InvalidInput, match="another recipe"):
        longer = started._with_training(lambda own: replace(own, more_epochs=(1,)))
        runs.train_all(longer, tmp_path / "run", only=["b"])


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('start_from = "b"', 'start_from = "x"', r"models\.c\.start_from: x is none of a, c, s, b"),
        ('start_from = "b"', 'start_from = "c"', "c does not start from nothing itself"),
        ('start_from = "b"', 'start_from = "a"', r"models\.c: start_from: .* of the CVAE has no"),
        ("layers = 1", "layers = 2\nrow_layers = 1", ""),  # c has more weights than b: fine
        ('"detail"\nstart_from = "b"\nchannels = 4', '"detail"\nstart_from = "b"\nchannels = 8',
         r"models\.c: start_from: .* of the PixelCNN has no counterpart"),
    ],
)  # fmt: skip
def test_what_no_model_can_start_from_is_refused(
    started: Recipe, tmp_path: Path, old: str, new: str, says: str
) -> None:
    text = (tmp_path / "started.toml").read_text()
    assert old in text
    (tmp_path / "started.toml").write_text(text.replace(old, new, 1))
    if not says:
        runs.train_all(recipes.load(tmp_path / "started.toml"), tmp_path / "run", only=["s"])
        return
    with pytest.raises(InvalidInput, match=says):
        runs.train_all(recipes.load(tmp_path / "started.toml"), tmp_path / "run", only=["s"])
    assert not (tmp_path / "run").exists()


def test_a_run_is_gone_on_with_where_its_data_are_now(recipe: Recipe, tmp_path: Path) -> None:
    folder, moved = tmp_path / "run", str(tmp_path / "moved" / "pictures.npz")
    runs.train_all(recipe, folder, only=["b"])
    (tmp_path / "moved").mkdir()
    (tmp_path / "set.npz").rename(moved)
    there = recipes.load(tmp_path / "tiny.toml", moved)
    assert there.continues(recipe)
    opened = runs.Run.open(folder, moved)
    assert opened.recipe == there
    assert opened.model("b", opened.recipe.data.load()) is not None
    names: list[str] = []
    runs.train_all(there, folder, report=lambda name, _: names.append(name))
    assert set(names) == {"a"} and runs.Run.open(folder).recipe == there

    x = np.random.default_rng(1).integers(0, 256, (60, 4, 3)).astype(np.uint8)
    np.savez(moved, x=x, y=np.arange(60) % 2)
    with pytest.raises(InvalidInput, match=r"a/weights\.pt: was trained on other data"):
        runs.train_all(there, folder, only=["b"])


def precisions(folder: Path) -> dict[str, str]:
    """What a run says its models are computed in."""
    models = runs.Run.open(folder).recipe.models
    return {name: model.training.precision for name, model in models.items()}


def test_a_run_that_moves_to_another_machine_keeps_the_precision_of_what_has_begun(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    recipe = recipe._with_training(lambda own: replace(own, precision="bf16-mixed"))
    monkeypatch.setattr(runs, "_throttle", lambda report: report)

    def stop(_: str, now: Progress) -> None:
        if now.step == 3:  # after a checkpoint
            raise KeyboardInterrupt

    for has, only, rest in ((True, "b", "bf16-mixed"), (False, "a", "32-true")):
        monkeypatch.setattr(train, "_has_bfloat16", lambda _, has=has: has)
        with pytest.raises(KeyboardInterrupt):
            runs.train_all(recipe, folder, only=[only], report=stop)
        assert precisions(folder) == {"a": rest, "b": "bf16-mixed"}
    for has in (True, False):  # wherever they are gone on with
        monkeypatch.setattr(train, "_has_bfloat16", lambda _, has=has: has)
        for name in recipe.models:
            runs.train_all(recipe, folder, only=[name])
        assert precisions(folder) == {"a": "32-true", "b": "bf16-mixed"}
    for name, its in precisions(folder).items():
        checkpoint = torch.load(folder / name / train.CHECKPOINT, weights_only=True)
        assert checkpoint["training"]["precision"] == its and checkpoint["step"] > 3

    chosen = Hardware("cpu", precision="32-true")
    with pytest.raises(InvalidInput, match=r"models\.b: .* --precision bf16-mixed, or train it af"):
        runs.train_all(recipe, folder, only=["b"], hardware=chosen)
    runs.train_all(recipe, folder, only=["a"], hardware=chosen)
    assert precisions(folder)["b"] == "bf16-mixed"
    runs.train_all(recipe, folder, only=["b"], resume=False, hardware=chosen)
    assert precisions(folder)["b"] == "32-true"

    # What the model's files say holds, whatever the recipe beside them does.
    recipe.with_precisions(lambda own: own).write(folder / runs.RECIPE)
    assert recipes.load(folder / runs.RECIPE).models["b"].training.precision == "bf16-mixed"
    assert precisions(folder)["b"] == "32-true"
    runs.train_all(recipe, folder, only=["b"])
    assert precisions(folder)["b"] == "32-true"


def test_weights_of_other_data_or_another_division_are_not_built(
    recipe: Recipe, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    runs.train_all(recipe, folder, only=["b"])
    divided = recipe.model_copy(update={"data": recipe.data.model_copy(update={"seed": 1})})
    data, other = (each.data.load() for each in (recipe, divided))
    assert runs.Run.open(folder).model("b", data) is not None
    divided.write(folder / runs.RECIPE)
    with pytest.raises(InvalidInput, match=r"b/weights\.pt: was trained on other data"):
        build(folder, tmp_path / "bundle", print)
    assert not (tmp_path / "bundle").exists()

    weights = folder / "b" / train.WEIGHTS
    content = torch.load(weights, weights_only=True)
    older = {key: content[key] for key in ("model", "config", "more_epochs", "state")}
    torch.save(older, weights)  # which leaves it to the checkpoint
    with pytest.raises(InvalidInput, match="other data"):
        runs.Run.open(folder).model("b", other)
    assert runs.Run.open(folder).model("b", data) is not None
    (folder / "b" / train.CHECKPOINT).unlink()
    assert runs.Run.open(folder).model("b", other) is not None


def test_weights_of_other_levels_are_not_built(recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    runs.train_all(recipe, folder, only=["b"])
    update = {"data": recipe.data.model_copy(update={"binarise": True})}
    coins = recipe.model_copy(update=update)
    drawn = coins.data.load()
    assert drawn.digest == recipe.data.load().digest and drawn.levels == 2
    coins.write(folder / runs.RECIPE)
    with pytest.raises(InvalidInput, match=r"b/weights\.pt: was trained on 256 levels .* have 2"):
        runs.Run.open(folder).model("b", drawn)


@pytest.mark.parametrize("resume", [True, False])
def test_one_process_trains_a_model(recipe: Recipe, tmp_path: Path, resume: bool) -> None:
    folder = tmp_path / "run"
    runs.train_all(recipe, folder, only=["b"])
    before = (folder / "b" / train.WEIGHTS).read_bytes()
    with (folder / ".b.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InvalidInput, match="b: is being trained by another process"):
            runs.train_all(recipe, folder, resume=resume)
        assert not (folder / "a").exists()
        runs.train_all(recipe, folder, only=["a"])
    assert (folder / "b" / train.WEIGHTS).read_bytes() == before


def test_one_device_is_the_first_whatever_a_launcher_has_set(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    runs.train_all(recipe, tmp_path / "run", only=["b"])
    assert runs.Run.open(tmp_path / "run").model("b") is not None


def test_a_run_needs_a_folder(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InvalidInput, match="is a file: a run needs a folder"):
            runs.train_all(recipe, folder)


def test_weights_of_another_training_are_not_those_of_the_recipe(
    recipe: Recipe, tmp_path: Path
) -> None:
    folder, b = tmp_path / "run", recipe.models["b"]
    runs.train_all(recipe, folder, only=["b"])
    other_precision = replace(b.training, precision="bf16-mixed")
    recipe._with_training(lambda _: other_precision).write(folder / runs.RECIPE)
    assert runs.Run.open(folder).model("b") is not None
    for change, says in (
        ({"training": replace(b.training, seed=1)}, "trained with seed 0 where the recipe says 1"),
        ({"options": {**b.options, "channels": 8}}, "trained with channels 4 where"),
        ({"options": {"channels": 4, "layers": 1}}, "head 4 where the recipe says, by default, 64"),
        (
            {"family": "local", "options": {"layers": 1}},
            "holds a PixelCNN where the recipe says local",
        ),
    ):
        models = {**recipe.models, "b": b.model_copy(update=change)}
        recipe.model_copy(update={"models": models}).write(folder / runs.RECIPE)
        with pytest.raises(InvalidInput, match=says):
            runs.Run.open(folder).model("b")


def test_a_failure_in_one_process_ends_all_with_its_sentence(
    recipe: Recipe, tmp_path: Path
) -> None:
    wild = recipe.models["a"].model_copy(
        update={"training": replace(recipe.models["a"].training, learning_rate=1e30)}
    )
    broken = recipe.model_copy(update={"models": {**recipe.models, "a": wild}})
    with pytest.raises(LikelyError, match=r"training of a failed: .*diverged"):
        runs.train_all(broken, tmp_path / "run")
    assert not (tmp_path / "run" / "a" / train.WEIGHTS).exists()


def test_a_fault_in_one_process_is_told_by_its_name_and_where_it_was(
    recipe: Recipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").touch()
    with pytest.raises(LikelyError, match=r"training of a failed: FileExistsError: .*run/a"):
        runs.train_all(recipe, tmp_path / "run")
    assert "Traceback" in capfd.readouterr().err


def running(pid: int) -> bool:
    """Whether there is such a process, and not only its exit code that nobody asked for."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are listed in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_process_that_began_them(
    recipe: Recipe, tmp_path: Path, number: signal.Signals
) -> None:
    long = recipe._with_training(lambda own: replace(own, steps=10**5, validations=10**4))
    long.write(tmp_path / "long.toml")
    program = Path(sys.executable).with_name("likely-export")
    words = ("train", "--recipe", tmp_path / "long.toml", "--out", tmp_path / "run")
    checkpoints = [tmp_path / "run" / name / train.CHECKPOINT for name in recipe.models]
    with subprocess.Popen([program, *words, "--device", "cpu"], stderr=subprocess.PIPE) as process:
        try:
            wait_until(lambda: all(path.is_file() for path in checkpoints))
            listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            workers = [int(pid) for pid in listed.split()]
            assert len(workers) >= 2
        finally:
            process.send_signal(number)
        assert process.stderr is not None
        stderr = process.stderr.read().decode()  # whose other ends the workers hold
    wait_until(lambda: not any(map(running, workers)))
    if number == signal.SIGTERM:
        assert process.returncode == 1 and "resumes from the last checkpoint" in stderr
    for path in checkpoints:
        assert torch.load(path, weights_only=True)["step"] > 0


def wait_until(true: Callable[[], bool], seconds: float = 120.0) -> None:
    """Returns as soon as that is true, and fails where it is not in time."""
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.1)


class Ended:
    def __init__(self, exitcode: int | None) -> None:
        self.exitcode = exitcode


class Messages:
    """A queue of what has arrived, to which one that talks on adds when it is waited for."""

    def __init__(self, *arrived: Any, talking: Any = None) -> None:
        self.arrived, self.talking = list(arrived), talking

    def get(self, timeout: float) -> Any:
        if self.arrived:
            return self.arrived.pop(0)
        if self.talking is None or not timeout:
            raise queue.Empty
        return self.talking


def test_a_worker_that_dies_without_a_word_is_news(recipe: Recipe, tmp_path: Path) -> None:
    assert runs._receive(Messages(), {"a": Ended(-9)}) == ("a", "its process ended with code -9")  # type: ignore[dict-item]


def test_a_worker_that_dies_is_noticed_though_another_reports() -> None:
    running: Any = {"a": Ended(None), "b": Ended(None)}
    now = Progress(1, 0.5, 0.1, 3.0, 3.0)
    assert runs._receive(Messages(talking=("b", now)), running) == ("b", now)
    running["a"] = Ended(1)
    last = Messages(("b", now), ("a", "diverged"), talking=("b", now))
    assert [runs._receive(last, running) for _ in range(2)] == [("b", now), ("a", "diverged")]
    assert runs._receive(last, running) == ("a", "its process ended with code 1")


def test_progress_is_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    with Display(["a", "b"], Console(file=out)) as display:
        for step in range(1, 101):
            valid = 12.5 if step > 50 else math.nan
            display.update("a", Progress(step, step / 100, step / 10, valid, valid))
    lines = out.getvalue().splitlines()
    assert len(lines) == 2 and lines[0].startswith("a:   1%  step 1")
    assert lines[1] == "a: 100%  step 100  validation 12.50 nats  kept 12.50  10 s"


def test_a_training_that_goes_on_says_so() -> None:
    out = io.StringIO()
    with Display(["a", "b"], Console(file=out)) as display:
        display.update("a", Progress(8, 0.08, 1.0, math.nan, math.nan))
        display.update("a", Progress(9, 0.09, 1.0, math.nan, math.nan))
        display.update("b", Progress(1, 0.01, 0.1, math.nan, math.nan))
    assert out.getvalue().count("resumes") == 1
    assert out.getvalue().startswith("a: resumes from step 7\n")


def test_progress_is_bars_on_a_terminal() -> None:
    out = io.StringIO()
    with Display(["a", "b"], Console(file=out, force_terminal=True, width=100)) as display:
        display.update("b", Progress(5, 1.0, 0.5, 3.0, 2.0))
    assert "step 5" in out.getvalue() and "kept 2.00" in out.getvalue()
