"""A bounded run of the coverage-guided fuzzer over every reader of foreign bytes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from likely.v1.images_pb2 import Images

if TYPE_CHECKING:
    from tests.conftest import Toy

pytest.importorskip("atheris")
RUNS = 20_000
SECONDS = 20


@pytest.mark.slow
@pytest.mark.parametrize("target", ["images", "graph", "arrays", "manifest"])
def test_no_bytes_harm_a_reader(toy: Toy, tmp_path: Path, target: str) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    match target:
        case "images":
            good = Images(data=bytes(9), shape=(1, 1, 3, 3)).SerializeToString()
            (corpus / "good").write_bytes(good)
        case "graph":
            for path in toy.path.glob("*.onnx"):
                shutil.copy(path, corpus)
        case "arrays":
            for path in toy.path.glob("*.npz"):
                shutil.copy(path, corpus)
        case "manifest":
            shutil.copy(toy.path / "manifest.json", corpus)
    script = str(Path(__file__).with_name("decoders.py"))
    options = [f"-runs={RUNS}", f"-max_total_time={SECONDS}", "-seed=1", "-max_len=20000"]
    ran = subprocess.run(
        [sys.executable, script, target, *options, f"-artifact_prefix={tmp_path}/", str(corpus)],
        capture_output=True, text=True, timeout=10 * SECONDS, cwd=tmp_path,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "Done" in ran.stderr
