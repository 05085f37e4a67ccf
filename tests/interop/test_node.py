"""A client in JavaScript, from the protos alone, gets the answers that ours gets."""

import base64
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from demo.serving import Served
from likely import Client, Verdict
from likely.answers import Pixels

NODE = Path(__file__).parent / "node"
INSTALLED = NODE / "node_modules" / ".package-lock.json"  # npm writes it last

pytestmark = pytest.mark.skipif(
    not (shutil.which("node") and shutil.which("npm")), reason="node and npm are not installed"
)


@pytest.fixture(scope="module")
def x() -> Pixels:
    """Three digits and a noise picture."""
    noise = np.random.default_rng(0).integers(0, 17, (1, 8, 8))
    return np.concatenate([load_digits().images[:3], noise]).astype(np.uint8)[:, None]


@pytest.fixture(scope="module")
def answers(server: Served, x: Pixels) -> dict[str, Any]:
    """What the JavaScript client was told."""
    lock = NODE / "package-lock.json"
    if not INSTALLED.exists() or INSTALLED.stat().st_mtime < lock.stat().st_mtime:
        install = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        install += ["--fetch-retries", "5"]
        subprocess.run(install, cwd=NODE, check=True, capture_output=True, timeout=240)
    given = {"data": base64.b64encode(x.tobytes()).decode(), "shape": x.shape}
    ran = subprocess.run(
        ["node", "ask.js", server.address, str(Path("protos").resolve())],
        cwd=NODE,
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def unpacked(text: str, dtype: str) -> np.ndarray[Any, Any]:
    return np.frombuffer(base64.b64decode(text), dtype)


def test_the_model_is_described(answers: dict[str, Any], client: Client) -> None:
    info = client.model()
    model = answers["model"]
    assert (model["name"], model["version"]) == (info.name, info.version)
    assert (model["channels"], model["height"], model["width"]) == info.shape
    assert [label["name"] for label in model["labels"]] == list(info.labels)
    assert model["digest"] == info.digest


def test_scores_are_those_of_our_client(answers: dict[str, Any], client: Client, x: Pixels) -> None:
    ours = client.score(x, alpha=0.05, surprise=True)
    theirs = answers["score"]
    assert theirs["model_version"] == ours.model_version
    assert theirs["alpha"] == 0.05
    assert [each["log_likelihood"] for each in theirs["scores"]] == ours.log_px.tolist()
    assert [each["p_value"] for each in theirs["scores"]] == ours.p_value.tolist()
    verdicts = [f"VERDICT_{Verdict(verdict).name}" for verdict in ours.verdict]
    assert [each["verdict"] for each in theirs["scores"]] == verdicts
    assert verdicts[3] == "VERDICT_OUTLIER"
    assert ours.surprise is not None
    np.testing.assert_array_equal(
        unpacked(theirs["surprise"], "<f4"), ours.surprise.ravel(), strict=True
    )


def test_labels_are_those_of_our_client(answers: dict[str, Any], client: Client, x: Pixels) -> None:
    ours = client.classify(x)
    theirs = answers["classify"]["classifications"]
    assert [each["label"] for each in theirs] == ours.label.tolist()
    np.testing.assert_array_equal([each["posterior"] for each in theirs], ours.posterior)


def test_drawn_pictures_are_those_of_our_client(answers: dict[str, Any], client: Client) -> None:
    ours = client.generate(5, label=3, seed=7)
    theirs = answers["generate"]
    assert sum(shape[0] for shape in theirs["shapes"]) == 5
    assert theirs["labels"] == [3] * 5
    np.testing.assert_array_equal(unpacked(theirs["data"], "u1"), ours.images.ravel())


def test_a_bad_request_is_refused_with_its_field(answers: dict[str, Any]) -> None:
    assert answers["refused"]["code"] == "INVALID_ARGUMENT"
    assert "alpha" in answers["refused"]["details"]
