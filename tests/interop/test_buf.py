"""`buf curl`, which knows nothing of likely, asks through reflection."""

import base64
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demo.serving import Served
from likely import Client

BUF = str(Path(shutil.which("buf") or "buf").absolute())

pytestmark = pytest.mark.skipif(not Path(BUF).exists(), reason="buf is not installed")


def curl(server: Served, method: str, request: dict[str, Any], tmp_path: Path) -> Any:
    """The answer's messages, or the error."""
    ran = subprocess.run(
        [BUF, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--data", "@-",
         f"http://{server.address}/{method}"],
        input=json.dumps(request), capture_output=True, text=True, timeout=60,
        cwd=tmp_path,  # away from the protos: only reflection can tell it the schema
    )  # fmt: skip
    if ran.returncode:
        return json.loads(ran.stderr)
    decoder, text, found = json.JSONDecoder(), ran.stdout.strip(), []
    while text:
        message, end = decoder.raw_decode(text)
        found.append(message)
        text = text[end:].lstrip()
    return found


@pytest.fixture
def images() -> dict[str, Any]:
    """A blank picture, as JSON gives bytes."""
    return {"data": base64.b64encode(bytes(64)).decode(), "shape": [1, 1, 8, 8]}


def test_models_are_listed(server: Served, client: Client, tmp_path: Path) -> None:
    (answer,) = curl(server, "likely.v1.ModelService/ListModels", {}, tmp_path)
    assert [model["name"] for model in answer["models"]] == [m.name for m in client.models()]


def test_a_picture_is_scored(
    server: Served, client: Client, images: dict[str, Any], tmp_path: Path
) -> None:
    request = {"modelName": client.model().name, "images": images, "alpha": 0.1}
    (answer,) = curl(server, "likely.v1.ScoringService/Score", request, tmp_path)
    ours = client.score(np.zeros((1, 1, 8, 8), np.uint8), alpha=0.1)
    assert answer["scores"][0]["logLikelihood"] == ours.log_px[0]


def test_drawn_pictures_are_streamed(server: Served, client: Client, tmp_path: Path) -> None:
    request = {"modelName": client.model().name, "count": 70, "seed": 1}
    chunks = curl(server, "likely.v1.GenerationService/Generate", request, tmp_path)
    assert len(chunks) > 1
    assert sum(int(chunk["images"]["shape"][0]) for chunk in chunks) == 70


def test_an_error_tells_the_field(server: Served, client: Client, tmp_path: Path) -> None:
    request = {"modelName": client.model().name, "count": 0}
    error = curl(server, "likely.v1.GenerationService/Generate", request, tmp_path)
    assert error["code"] == "invalid_argument"
    assert "count" in error["message"]
