"""tritonclient, made for another server, gets the answers that our own client gets."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from demo.serving import Served
from likely import Client
from likely.answers import Pixels
from tests.interop.others import PYTHON, SCRIPTS, installed, output_of

pytestmark = installed("tritonclient")


@pytest.fixture(scope="module")
def x() -> Pixels:
    """Digits and a noise picture."""
    noise = np.random.default_rng(0).integers(0, 17, (1, 8, 8))
    return np.concatenate([load_digits().images[:9], noise]).astype(np.uint8)[:, None]


@pytest.fixture(scope="module")
def answers(server: Served, x: Pixels) -> dict[str, Any]:
    """What tritonclient was told."""
    given = json.dumps(x.tolist())
    found: dict[str, Any] = json.loads(
        output_of([PYTHON, SCRIPTS / "triton.py", server.address], given)
    )
    return found


def test_the_server_and_its_models_are_ready(answers: dict[str, Any]) -> None:
    assert answers["ready"] == [True, True]
    assert answers["models"]["digits"]
    assert all(answers["models"].values())
    assert answers["aio"]["ready"]


def test_metadata_and_configuration_name_the_same_tensors(answers: dict[str, Any]) -> None:
    meta, config = answers["metadata"], answers["config"]
    (images,) = meta["inputs"]
    assert images == {"name": "images", "datatype": "UINT8", "shape": ["-1", "1", "8", "8"]}
    assert [t["name"] for t in meta["outputs"]] == [t["name"] for t in config["output"]]
    assert config["max_batch_size"] == 1024


def test_pictures_get_our_own_answers(answers: dict[str, Any], client: Client, x: Pixels) -> None:
    found = answers["everything"]
    scores, labelled = client.score(x, alpha=0.05), client.classify(x, alpha=0.05)
    assert found["log_likelihood"] == scores.log_px.tolist()
    assert found["p_value"] == scores.p_value.tolist()
    assert found["outlier"] == (scores.p_value <= 0.05).tolist()
    assert found["outlier"][9]
    assert found["posterior"] == labelled.posterior.tolist()
    assert answers["p_value"] == {"p_value": scores.p_value.tolist()}
    assert answers["aio"]["label"] == labelled.label.tolist()
    assert answers["aio"]["posterior"] == labelled.posterior.tolist()


def test_a_stream_gives_the_same(answers: dict[str, Any], client: Client, x: Pixels) -> None:
    expected = {str(row): value for row, value in enumerate(client.score(x).log_px.tolist())}
    assert answers["streamed"] == expected


def test_drawn_pictures_are_our_own(answers: dict[str, Any], client: Client) -> None:
    ours = client.generate(5, label=3, seed=7)
    assert answers["generate"]["images"] == ours.images.tolist()
    assert answers["generate"]["labels"] == [3] * 5


def test_a_bad_request_is_refused_as_by_our_own_services(answers: dict[str, Any]) -> None:
    status, message = answers["refused"]
    assert status == "StatusCode.INVALID_ARGUMENT"
    assert message.startswith("alpha: 7 is not in")


def test_what_was_asked_is_counted(answers: dict[str, Any], x: Pixels) -> None:
    (statistics,) = answers["statistics"]["model_stats"]
    assert int(statistics["inference_count"]) >= len(x)
    assert int(statistics["inference_stats"]["success"]["count"]) >= len(x)
