"""From a recipe to a bundle that serves, with nothing faked, on very small models."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from likely.bundle import Bundle, Role
from likely.engine import Engine
from likely.errors import BundleError
from likely.graphs import Device
from likely_export import recipes, runs
from likely_export.build import build

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
[models.latent]
family = "cvae"
width = 16
latent = 2
importance_samples = 2
training = { steps = 40, batch = 32, validations = 2 }
[roles]
density = "density"
conditional = "density"
encode = "latent"
"""


@pytest.mark.slow
def test_a_recipe_becomes_a_bundle_that_serves(tmp_path: Path) -> None:
    steps: list[str] = []
    runs.train_all(recipes.parse(RECIPE), tmp_path / "run")
    manifest = build(tmp_path / "run", tmp_path / "bundle", steps.append)
    assert steps == [
        "export density",
        "export conditional",
        "export encode",
        "calibrate",
        "evaluate",
    ]
    assert set(manifest.graphs) == {Role.DENSITY, Role.CONDITIONAL, Role.ENCODE}
    assert manifest.calibration.finest_alpha == pytest.approx(0.01)
    assert manifest.parity_nats <= 1e-3
    told = json.loads((tmp_path / "bundle" / "evaluation.json").read_text())
    assert 0 < told["nll_nats"]["mean"] < 64 * np.log(17)
    assert {"accuracy", "outliers", "false_rejection", "baselines"} <= set(told)

    engine = Engine.load(
        Bundle.open(tmp_path / "bundle"), device=Device("cpu"), threads=1, max_batch=8
    )
    x = np.random.default_rng(0).integers(0, 17, (20, 1, 8, 8)).astype(np.uint8)
    scores = asyncio.run(engine.score(x, 0.05, surprise=True))
    assert scores.surprise is not None
    assert -scores.log_px == pytest.approx(scores.surprise.sum((1, 2, 3)), abs=1e-2)
    assert np.all(scores.p_value <= 0.05)
    engine.close()

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(BundleError, match="not replaced"):
        build(tmp_path / "run", tmp_path / "other", steps.append)
