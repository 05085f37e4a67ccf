"""grpc_requests knows no schema but what reflection tells it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from demo.serving import Served
from likely import Client
from tests.interop.others import PYTHON, SCRIPTS, installed, output_of

pytestmark = installed("grpc_requests")


def test_it_asks_by_both_protocols(server: Served, client: Client) -> None:
    found = json.loads(output_of([PYTHON, SCRIPTS / "reflecting.py", server.address]))
    assert {"likely.v1.ScoringService", "inference.GRPCInferenceService"} <= set(found["services"])
    ours = client.score(np.zeros((1, 8, 8), np.uint8))
    (score,) = found["score"]["scores"]
    assert score["log_likelihood"] == pytest.approx(ours.log_px[0])
    streamed = [outcome for answer in found["stream"] for outcome in answer["outcomes"]]
    assert len(streamed) == 3
    assert all(each["response"]["scores"][0] == score for each in streamed)
    outputs = {output["name"]: output["contents"] for output in found["infer"]["outputs"]}
    assert outputs["p_value"]["fp64_contents"] == pytest.approx(ours.p_value.tolist())
