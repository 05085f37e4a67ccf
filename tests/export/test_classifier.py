"""The discriminative model: what it learns, what it exports, and what it knows nothing of."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from autoregressive import Opener

from demo.serving import served
from likely.answers import LabelRule, Verdict
from likely.bundle import Bundle, Role, write_manifest
from likely.engine import Engine
from likely.errors import InvalidInput
from likely.graphs import Device
from likely_export import composition, recipes, roles, runs
from likely_export.build import extend
from likely_export.classifier import Classifier, ClassifierConfig, fit_temperature
from likely_export.data import Split
from likely_export.judge import train_judge
from likely_export.moves import Moves
from likely_export.recipes import Recipe

pytestmark = pytest.mark.timeout(900)  # they train, on whatever is left of the machine
PAGE = (Path(__file__).parents[2] / "docs" / "labels.md").read_text()
SHIPPED = Path(__file__).parents[2] / "bundles" / "digits"


def small(seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(ClassifierConfig((1, 5, 6), 9, 3, (4, 8), 16, moves=Moves(shift=1))).eval()


def pictures(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 9, (n, 1, 5, 6), generator=generator, dtype=torch.uint8)


def test_labels_of_a_picture_sum_to_1_whatever_the_batch() -> None:
    model, x = small(), pictures(7)
    log_pyx = model(x)
    assert torch.allclose(log_pyx.exp().sum(1), torch.ones(7))
    assert torch.allclose(log_pyx, torch.cat([model(row[None]) for row in x]), atol=1e-5)


def test_the_gradient_reaches_every_parameter() -> None:
    model, y = small().train(), torch.arange(32) % 3
    loss = model.objective(pictures(32), y)
    assert loss.shape == (32,) and bool((loss > 0).all())
    loss.mean().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and bool(weight.grad.abs().sum() > 0), name


def test_the_temperature_is_the_likeliest_and_moves_no_label() -> None:
    model, x = small(), pictures(400, 1)
    with torch.no_grad():
        model.out.weight *= 300
        # Labels that follow the model at temperature 4, so that it is too sure as it is.
        p = torch.softmax(model.logits(x) / 4, 1)
    y = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(0))[:, 0]
    before = model(x).argmax(1)
    found = fit_temperature(model, Split(x.numpy(), y.numpy()))
    assert found == pytest.approx(4, rel=0.5)
    assert torch.equal(model(x).argmax(1), before)

    def nll(temperature: float) -> float:
        model.temperature.fill_(temperature)
        return -float(model(x).detach()[torch.arange(400), y].mean())

    assert nll(found) <= min(nll(found * 1.1), nll(found / 1.1)) + 1e-6


def test_the_graph_holds_temperature_and_softmax(opened: Opener) -> None:
    model, x = small(), pictures(5)
    model.temperature.fill_(2.5)
    expected = model(x).detach().numpy()
    (log_pyx,) = opened(roles.discriminate(model), 9, 3).run({"x": x.numpy()}, ["log_pyx"])
    assert log_pyx == pytest.approx(expected, abs=1e-5)
    with pytest.raises(InvalidInput, match="no such graph"):
        roles.graph_source(Role.SAMPLE, [model], ())


@pytest.mark.parametrize("options", [{"labels": 1}, {"channels": ()}])
def test_what_is_no_classifier_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        ClassifierConfig(**{"shape": (1, 4, 4), "levels": 2, "labels": 2, **options})  # type: ignore[arg-type]


def shortened(steps: int) -> Recipe:
    """The recipe that adds p(y|x) to the bundle of digits, for so many steps."""
    recipe = recipes.load("digits", size="labels")
    model = recipe.models["classifier"]
    training = dataclasses.replace(model.training, steps=steps, validations=1)
    model = model.model_copy(update={"training": training})
    return recipe.model_copy(update={"models": {**recipe.models, "classifier": model}})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped bundle of digits with a model of p(y|x), trained for a few seconds."""
    folder = tmp_path_factory.mktemp("labels")
    runs.train_all(shortened(150), folder / "run", only=["classifier"])
    extend(SHIPPED, folder / "run", folder / "bundle", lambda _: None, "1.1")
    return folder / "bundle"


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Iterator[Engine]:
    made = Engine.load(Bundle.open(bundle), device=Device("cpu"), threads=1, max_batch=64)
    yield made
    made.close()


def test_an_extended_bundle_is_the_old_one_and_more(bundle: Path, tmp_path: Path) -> None:
    old, new = Bundle.open(SHIPPED).manifest, Bundle.open(bundle).manifest
    assert set(new.graphs) == {*old.graphs, Role.DISCRIMINATE}
    assert (new.name, new.version) == (old.name, "1.1")
    changed = {name for name, record in new.files.items() if old.files.get(name) != record}
    assert changed == {"discriminate.onnx", old.golden}
    assert set(old.files) - set(new.files) == {"evaluation.json", "report.html"}  # of old.version
    assert new.recipe["roles"] == {**old.recipe["roles"], "discriminate": "classifier"}
    assert recipes.from_table(new.recipe).models_of(Role.DISCRIMINATE) == ("classifier",)
    other = shortened(1)
    fewer = other.model_copy(update={"data": other.data.model_copy(update={"seed": 1})})
    runs.train_all(fewer, tmp_path / "run", only=["classifier"])
    with pytest.raises(InvalidInput, match="is not the data that the bundle was made with"):
        extend(SHIPPED, tmp_path / "run", tmp_path / "out")
    recipes.load("digits").write(tmp_path / "run" / "recipe.toml")
    with pytest.raises(InvalidInput, match="no model of the role discriminate"):
        extend(SHIPPED, tmp_path / "run", tmp_path / "out")


def test_what_describes_a_model_goes_with_it(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "old")
    (tmp_path / "old" / "evaluation.json").write_text('{"discriminative": {"accuracy": 0.9}}')
    fields = Bundle.open(bundle).manifest.model_dump(exclude={"files"})
    recipe = fields["recipe"]
    recipe["models"]["earlier"] = recipe["models"].pop("classifier")
    recipe["roles"]["discriminate"] = ["earlier"]
    write_manifest(tmp_path / "old", fields)
    runs.train_all(shortened(1), tmp_path / "run", only=["classifier"])
    extend(tmp_path / "old", tmp_path / "run", tmp_path / "new", lambda _: None)
    new = Bundle.open(tmp_path / "new").manifest
    assert not {"evaluation.json", "report.html"} & set(new.files)
    assert "earlier" not in new.recipe["models"] and "classifier" in new.recipe["models"]


def test_either_rule_labels_digits_and_both_agree_on_likelihoods(engine: Engine) -> None:
    test = shortened(1).data.load().test
    figures = asyncio.run(composition.likelihoods(engine, test.take(np.arange(150))))
    for rule in figures["by"].values():
        assert rule["accuracy"]["mean"] > 0.9
    assert figures["spearman_of_pictures"] > 0.5 and figures["spearman_of_labels"]["mean"] > 0.5
    assert figures["agree"]["mean"] > 0.9


def test_noise_gets_a_label_with_confidence_unless_it_is_rejected(engine: Engine) -> None:
    """The discriminative model has no p(x): nothing but rejection keeps noise from a label."""
    noise = composition.noise_pictures((1, 8, 8), 17, 100)
    for name in ("uniform", "binary"):
        answer = asyncio.run(engine.classify(noise[name], 0.05, rule=LabelRule.DISCRIMINATIVE))
        sure = answer.posterior.max(1)
        assert sure.mean() > 0.5 and np.mean(sure > 0.9) > 0.1
        assert np.mean(answer.verdict == Verdict.OUTLIER) > 0.95
        assert np.all(answer.label >= 0) and answer.composed.shape == (100, 10)


def test_accepted_draws_show_their_label(engine: Engine) -> None:
    data = shortened(1).data.load()
    judge = train_judge(data.train.x, data.train.y, data.levels, 10, steps=150, seed=5)
    figures = asyncio.run(composition.drawings(engine, judge, 6))["acceptance"]
    assert figures["kept"] == 60
    assert figures["faithfulness"]["mean"] > 0.6
    assert 5 < figures["draws_a_picture"]["mean"] < 20


def test_the_page_on_labels_does_what_it_shows(tmp_path: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    (printed,) = re.findall(r"^```text\n(.*?)^```$", PAGE, re.M | re.S)
    (ask, draw), _ = (
        block.splitlines() for block in re.findall(r"^```console\n(.*?)^```$", PAGE, re.M | re.S)
    )
    np.savez(tmp_path / "digits.npz", x=np.zeros((2, 28, 28), np.uint8))
    with served(tmp_path / "server.log") as server:
        words = [sys.executable, "-c", code.replace("127.0.0.1:50051", server.address)]
        assert output_of(words, tmp_path) == printed
        for line in (ask, draw):
            _, *rest = line.split()
            output_of(
                [sys.executable, "-m", "likely", *rest, "--address", server.address], tmp_path
            )
    assert (tmp_path / "threes.png").is_file()


def output_of(words: list[str], folder: Path) -> str:
    """What a program prints; it has to end well."""
    ran = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=folder)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout
