"""k6 puts load on the server by reflection alone; its own checks judge the answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from demo.serving import Served
from tests.interop.others import SCRIPTS, VENV, output_of

K6 = VENV / "bin" / "k6"

pytestmark = pytest.mark.skipif(not K6.exists(), reason="k6 is not installed")


def test_every_answer_passes_its_checks(server: Served, tmp_path: Path) -> None:
    summary, address = tmp_path / "summary.json", f"ADDRESS={server.address}"
    words: list[str | Path] = ["--quiet", "--summary-export", summary, "-e", address]
    output_of([K6, "run", *words, SCRIPTS / "score.k6.js"])
    found = json.loads(summary.read_text())["metrics"]
    assert (found["checks"]["passes"], found["checks"]["fails"]) == (120, 0)
    assert found["grpc_req_duration"]["avg"] > 0
