"""Draws beside test pictures: what is compared with what, and what is left out."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from likely.answers import LabelRule
from likely.bundle import Bundle
from likely.engine import Engine
from likely.graphs import Device
from likely_export import evaluate, generated, recipes, runs
from likely_export.build import build
from likely_export.data import Dataset
from likely_export.generated import Drawing, Sizes

FOLDER = Path("bundles/digits")
TRAINING = "training = { steps = 20, batch = 32, validations = 1 }"
DRAWN_WITHOUT_LABELS = f"""
name = "beside"
version = "1"
[data]
source = "digits"
splits = {{ fit = 160, calibrate = 99, validate = 60, test = 100 }}
[models.density]
family = "pixelcnn"
channels = 4
layers = 1
{TRAINING}
[models.vae]
family = "vae"
latent = 2
width = 8
importance_samples = 2
{TRAINING}
[models.labels]
family = "classifier"
channels = [4]
width = 8
{TRAINING}
[roles]
density = "density"
discriminate = "labels"
generate = "vae"
encode = "vae"
"""


def drawing(engine: Engine, data: Dataset) -> Drawing:
    return Drawing(Bundle.open(FOLDER), engine, data, data.test, Sizes(examples=3), None)


def test_draws_are_compared_with_as_many_test_pictures_of_each_label(
    engine: Engine, data: Dataset
) -> None:
    """Ones lie near each other: were there more of them in the test part, draws would seem new."""
    ones, others = (np.flatnonzero((data.test.y == 1) == same) for same in (True, False))
    mostly_ones = data.test.take(np.concatenate([ones, others[::4]]))
    made = drawing(engine, replace(data, test=mostly_ones))
    groups = [np.full((30, *data.shape), y, np.uint8) for y in range(10)]
    drawn, held = made._matched_pictures(groups)
    y_of = {x.tobytes(): y for x, y in zip(mostly_ones.x, mostly_ones.y, strict=True)}
    assert [int(x[0, 0, 0]) for x in drawn] == [y_of[x.tobytes()] for x in held]
    assert len({x.tobytes() for x in held}) == len(held)  # none of them twice
    assert np.bincount(drawn[:, 0, 0, 0]).max() == 30


def test_training_pictures_are_known_for_copies(engine: Engine, data: Dataset) -> None:
    made = drawing(engine, data)
    train, test = ([part.x[part.y == y] for y in range(10)] for part in (data.train, data.test))
    pairs, copied = made._memorised(train)
    assert copied["distance_of_draws"]["mean"] == 0
    assert copied["nearer_than_1_percent_of_test"] > 0.9
    assert np.array_equal(pairs[:, 0], pairs[:, 1]) and len(pairs) == 3
    _, fresh = made._memorised(test)
    assert fresh["distance_of_draws"] == fresh["distance_of_test"]
    assert fresh["nearer_than_1_percent_of_test"] <= 0.01 + 1 / fresh["draws"]


def test_copies_in_the_test_part_hide_no_copier(engine: Engine, data: Dataset) -> None:
    """If more than 1 % of the test pictures are copies, no distance is below their quantile."""
    few = data.test.take(np.arange(100))
    test = replace(few, x=np.concatenate([data.train.x[:3], few.x[3:]]))
    test = replace(test, y=np.concatenate([data.train.y[:3], few.y[3:]]))
    made = drawing(engine, replace(data, test=test))
    _, copied = made._memorised([data.train.x[data.train.y == y] for y in range(10)])
    assert copied["nearer_than_1_percent_of_test"] == 1
    assert copied["nearer_than_1_percent_of_test_standard_error"] == 0


def test_labels_are_drawn_in_turn_and_no_index_twice(engine: Engine) -> None:
    groups = asyncio.run(generated.draw_by_label(engine, 10, 2, 5))
    assert [group.label.tolist() for group in groups] == [[y, y] for y in range(10)]
    assert [group.first_index for group in groups] == list(range(0, 20, 2))
    assert all(len(group.images) == len(group.draws) == len(group.accepted) for group in groups)
    (alone,) = asyncio.run(generated.draw_by_label(engine, 0, 70, 5))
    assert len(alone.images) == 70  # of two chunks
    assert np.array_equal(
        asyncio.run(generated.draw_by_label(engine, 0, 1, 5))[0].images[0], alone.images[0]
    )


def test_draws_surprise_their_own_model_and_no_other(engine: Engine, data: Dataset) -> None:
    made = drawing(engine, data)
    assert made._self_entropy(3)["self_entropy"]["draws"] == 3
    roles = {"density": ["local", "pixelcnn"], "sample": "pixelcnn"}
    made.manifest = made.manifest.model_copy(update={"recipe": {"roles": roles}})
    assert made._self_entropy(3) == {}


@pytest.mark.timeout(900)  # it trains, on whatever is left of the machine
def test_a_bundle_that_draws_and_scores_without_labels_is_evaluated_beside_them(
    tmp_path: Path,
) -> None:
    recipe = recipes.parse(DRAWN_WITHOUT_LABELS)
    runs.train_all(recipe, tmp_path / "run")
    manifest = build(tmp_path / "run", tmp_path / "bundle")
    assert manifest.labels and generated.count_drawable_labels(manifest) == 0
    sizes = Sizes(test=60, outliers=20, drawn=40, bound=10, steps=5, examples=3)
    figures, material = evaluate.evaluate(
        tmp_path / "bundle", recipe.data.load(), recipe.calibration.alphas, {}, sizes
    )
    assert figures["memorisation"]["draws"] == 40 == figures["memorisation"]["test_size"]
    assert not {"faithfulness", "train_on_draws_accuracy", "self_checked"} & set(figures)
    assert material.drawn is not None and material.drawn.shape == (1, 3, 1, 8, 8)
    discriminative = figures["discriminative"]
    assert {"accuracy", "accuracy_of_accepted", "label_nll_nats", "ece", "aurc"} <= set(
        discriminative
    )
    assert "accuracy" not in figures and "accuracy" in figures["cnn"] and "mixed" not in figures
    bundle = Bundle.open(tmp_path / "bundle")
    engine = Engine.load(bundle, device=Device("cpu"), threads=1, max_batch=16)
    served = asyncio.run(
        engine.classify(recipe.data.load().test.subsample(60).x, 0.1, rule=LabelRule.DISCRIMINATIVE)
    )
    engine.close()
    assert material.discriminated is not None and material.labelled is None
    assert np.allclose(material.discriminated.posterior, served.posterior, atol=1e-6)
    assert np.allclose(material.discriminated.p_value, served.p_value, atol=0.02)
    evaluate.attach(tmp_path / "bundle", figures, material)
    page = (tmp_path / "bundle" / "report.html").read_text()
    assert "accuracy by p(y|x) itself" in page and "accuracy by Bayes" not in page
    assert "The discriminative model, p(y|x) itself, is right about" in page
