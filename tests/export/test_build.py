"""From a recipe to a bundle that serves, with nothing faked, on very small models."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from likely.answers import Classifications, Pixels
from likely.bundle import Bundle, Role
from likely.engine import Engine
from likely.errors import BundleError
from likely.graphs import Device
from likely_export import evaluate, recipes, runs
from likely_export.build import _with_starts, build
from likely_export.corruptions import HARD, PANEL
from likely_export.decisions import _assigned_labels
from likely_export.generated import Sizes
from likely_export.material import Material
from likely_export.replacing import rewriting

UNLABELLED = """
name = "tiny"
version = "1"
[data]
source = "set.npz"
levels = 4
splits = { fit = 20, calibrate = 29, validate = 10, test = 20 }
[models.density]
family = "pixelcnn"
channels = 4
layers = 1
training = { steps = 2, validations = 1 }
[roles]
density = "density"
sample = "density"
[calibration]
alphas = [0.1]
"""
RECIPE = """
name = "tiny"
version = "3"
[data]
source = "digits"
splits = { fit = 160, calibrate = 99, validate = 60, test = 100 }
[models.density]
family = "pixelcnn"
channels = 4
layers = 1
training = { steps = 40, batch = 32, validations = 2 }
[models.texture]
family = "local"
channels = 4
layers = 1
training = { steps = 20, batch = 32, validations = 1 }
[models.latent]
family = "cvae"
convolutions = [4]
contrast = 10.0
moves = { shift = 1, zoom = 0.1 }
label_prior = true
width = 16
latent = 2
importance_samples = 2
training = { steps = 40, batch = 32, validations = 2, keep_best = false }
[models.labels]
family = "classifier"
channels = [4]
width = 8
training = { steps = 40, batch = 32, validations = 2 }
[roles]
density = ["density", "texture", "latent"]
conditional = ["density", "latent"]
sample = "density"
encode = "latent"
discriminate = "labels"
[calibration]
statistics = ["surprise", "entropy", "gain_shares", "margin", "error", "latent"]
[[calibration.parts]]
statistics = ["surprise", "entropy", "gain_shares"]
[[calibration.parts]]
kind = "mixture"
dimensions = 3
components = 2
[[calibration.parts]]
kind = "neighbours"
[[calibration.parts]]
kind = "contrast"
weight = 3.0
"""
SIZES = Sizes(test=100, outliers=20, drawn=20, bound=10, steps=20, examples=2)


async def classified(bundle: Path, x: Pixels) -> Classifications:
    engine = Engine.load(Bundle.open(bundle), device=Device("cpu"), threads=1, max_batch=8)
    try:
        return await engine.classify(x, 0.05)
    finally:
        engine.close()


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """A copy of the digits' bundle, which has figures and a report."""
    return shutil.copytree("bundles/digits", tmp_path / "digits")


def test_figures_are_replaced_as_often_as_they_are_made(digits: Path) -> None:
    before = Bundle.open(digits).manifest
    for nats in (77.0, 78.0):
        with rewriting(digits) as folder:
            evaluate.attach(folder, {"nll_nats": nats}, Material(17, (), {}))
        assert json.loads((digits / "evaluation.json").read_text()) == {"nll_nats": nats}
        after = Bundle.open(digits).manifest
        assert after.files.keys() == before.files.keys()
        assert after.model_dump(exclude={"files"}) == before.model_dump(exclude={"files"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        evaluate.attach(digits, {"nll_nats": np.nan}, Material(17, (), {}))
    assert Bundle.open(digits).manifest == after
    assert list(digits.parent.iterdir()) == [digits]


def test_what_is_signed_is_not_written_to(digits: Path) -> None:
    (digits / "model.sig").touch()
    with pytest.raises(BundleError, match="is signed"), rewriting(digits):
        pass


def test_the_old_bundle_stays_until_the_new_one_stands(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[str] = []
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        moved.append(self.name)
        if len(moved) == 2:  # the new one, in the place of the old
            raise OSError("no space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no space"), rewriting(digits):
        pass
    assert moved[0] == "digits" and Bundle.open(digits)
    assert list(digits.parent.iterdir()) == [digits]


def test_the_labels_compared_are_those_that_are_served() -> None:
    evidence = np.array([[[-10.0, -11.0]], [[-10.0, -30.0]]])
    priors = np.array([0.2, 0.8])
    # Flattened by the temperature, the first picture's evidence weighs less than the prior.
    assert _assigned_labels(evidence, (), priors, 5.0).tolist() == [1, 0]
    assert _assigned_labels(evidence, (), priors, 0.1).tolist() == [0, 0]


@pytest.mark.timeout(900)
def test_pictures_without_labels_become_a_bundle_that_scores_and_draws(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 4, (120, 4, 4)).astype(np.uint8)
    np.savez(tmp_path / "set.npz", x=x)
    (tmp_path / "tiny.toml").write_text(UNLABELLED)
    recipe = recipes.load(tmp_path / "tiny.toml")
    runs.train_all(recipe, tmp_path / "run")
    manifest = build(tmp_path / "run", tmp_path / "bundle", lambda _: None)
    assert manifest.labels == () and manifest.graphs[Role.SAMPLE].input("y") is None
    data, sizes = recipe.data.load(), Sizes(outliers=10, drawn=10, examples=2)
    figures, material = evaluate.evaluate(
        tmp_path / "bundle", data, recipe.calibration.alphas, {}, sizes
    )
    assert 0 < figures["nll_nats"]["mean"] < 30 and "accuracy" not in figures
    assert "independent_pixels_accuracy" not in figures["baselines"]
    assert figures["test_copies_of"] == {"fit": 0, "calibrate": 0}
    assert material.drawn is not None and len(material.drawn) == 1
    evaluate.attach(tmp_path / "bundle", figures, material)


@pytest.mark.slow
@pytest.mark.timeout(900)  # some minutes on a machine that does other things, too
def test_a_recipe_becomes_a_bundle_that_serves(tmp_path: Path) -> None:
    steps: list[str] = []
    x = np.random.default_rng(0).integers(0, 17, (20, 1, 8, 8)).astype(np.uint8)
    runs.train_all(recipes.parse(RECIPE), tmp_path / "run")
    manifest = build(tmp_path / "run", tmp_path / "bundle", steps.append)
    roles = ("density", "conditional", "sample", "encode", "discriminate")
    assert steps == [*(f"export {role}" for role in roles), "calibrate", "compare decisions"]
    assert set(manifest.graphs) == {Role(role) for role in roles}
    assert manifest.calibrated.statistics["latent"] == 2
    assert len(manifest.calibrated.weights) == 2
    assert (manifest.decisions_compared, manifest.decisions_changed) == (100, 0)
    assert manifest.calibrated.finest_alpha == pytest.approx(0.01)
    assert manifest.parity_nats <= 1e-3 and "weights.bin" in manifest.files
    assert manifest.test_parity_nats is not None and manifest.test_parity_nats <= 1e-3
    recipe = recipes.parse(RECIPE)
    data, others = recipe.data.load(), {"upside": x[:, :, ::-1].copy()}
    figures, material = evaluate.evaluate(
        tmp_path / "bundle", data, recipe.calibration.alphas, others, SIZES
    )
    evaluate.attach(tmp_path / "bundle", figures, material)
    stored = json.loads((tmp_path / "bundle" / "evaluation.json").read_text())
    assert 0 < stored["nll_nats"]["mean"] < 64 * np.log(17)
    assert stored["marginal_nll_nats"]["mean"] < 64 * np.log(17)
    assert set(stored["outliers"]) == {"upside", *PANEL, *HARD} == set(stored["likelihood_only"])
    assert stored["statistics_cost"] > 0.5 and stored["classification_cost"] > 1
    wanted = {"accuracy", "ece", "aurc", "false_rejection", "faithfulness", "self_entropy"}
    assert {*wanted, "train_on_draws_accuracy", "label_set", "memorisation"} <= set(stored)
    assert set(stored["discriminative"]) < set(stored) and set(stored["cnn"]) < set(stored)
    assert stored["test_parity_nats"] == manifest.test_parity_nats
    assert stored["statistics_cost"] > stored["combination_cost"] > 0
    mixed = stored["mixed"]["upside"]
    assert {"oscr", "oscr_standard_error", "cnn_max_softmax_oscr"} <= set(mixed)
    assert set(stored["train_on_draws_accuracy_by_label"]) == set("0123456789")
    assert {"auroc_standard_error", "aupr"} <= set(stored["outliers"]["upside"])
    assert stored["self_checked"]["draws_a_picture"]["mean"] >= 1
    assert (tmp_path / "bundle" / "report.html").stat().st_size > 10_000
    assert material.explained is not None
    compared = material.explained.compared
    assert compared is not None and compared.patch is None
    ratio, rows = compared.maps.sum((1, 2, 3)), np.arange(2)
    given = asyncio.run(classified(tmp_path / "bundle", material.explained.x)).log_pxy
    first, second = compared.pair.T
    assert ratio == pytest.approx(given[rows, first] - given[rows, second], abs=1e-2)
    assert ratio == pytest.approx(compared.log_ratio, abs=1e-2)

    engine = Engine.load(
        Bundle.open(tmp_path / "bundle"), device=Device("cpu"), threads=1, max_batch=8
    )
    scores = asyncio.run(engine.score(x, 0.05, surprise=True))
    assert scores.surprise is not None
    assert -scores.log_px == pytest.approx(scores.surprise.sum((1, 2, 3)), abs=1e-2)
    assert np.all(scores.p_value <= 0.05)
    engine.close()

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(BundleError, match="not replaced"):
        build(tmp_path / "run", tmp_path / "other", steps.append)


def test_what_a_model_starts_from_stays_with_it_in_a_recipe() -> None:
    published = recipes.load("mnist").published()
    kept = _with_starts(published["models"], ["sketch", "detail", "gone"])
    assert kept.keys() == {"sketch", "plain_sketch", "detail", "pixelcnn"}
    assert _with_starts(published["models"], ["cvae"]).keys() == {"cvae"}
