"""perf_analyzer, Triton's own load generator, measures this server."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from demo.serving import Served
from tests.interop.others import VENV

FOLDER = VENV / "perf-analyzer"
PROGRAM = FOLDER / "bin" / "perf_analyzer"
# It is linked to libb64, for JSON input, which is not used here; no wheel brings that library.
BASE64 = (
    "base64_init_encodestate",
    "base64_encode_block",
    "base64_encode_blockend",
    "base64_init_decodestate",
    "base64_decode_block",
)

pytestmark = pytest.mark.skipif(
    not (PROGRAM.exists() and shutil.which("cc")),
    reason="perf_analyzer, or a compiler for what it is linked to, is not installed",
)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the loader finds what perf_analyzer is linked to."""
    folder = tmp_path_factory.mktemp("libraries")
    source = folder / "b64.c"
    aborts = "".join(f"void {name}(void) {{ __builtin_trap(); }}\n" for name in BASE64)
    source.write_text(aborts)
    library = folder / "libb64.so.0d"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    return f"{folder}:{FOLDER / 'nvidia' / 'cuda_runtime' / 'lib'}"


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "digits/score", "--concurrency-range", "4"],
        ["-m", "digits", "-b", "8"],
        ["-m", "digits/classify", "--streaming", "--async"],
    ],
    ids=["one by one", "in batches", "on a stream"],
)
def test_it_measures(server: Served, libraries: str, words: list[str], tmp_path: Path) -> None:
    program = tmp_path / "perf_analyzer"
    shutil.copy(PROGRAM, program)
    program.chmod(0o755)  # pip --target leaves it as it is in the wheel
    # A pass of so few requests, as stable as may be: that there are figures is what is shown.
    few = ["--measurement-mode", "count_windows", "--measurement-request-count", "20"]
    few += ["-s", "100000", "-p", "1000", "-r", "10", "--input-data", "zero"]
    ran = subprocess.run(
        [program, "-i", "grpc", "-u", server.address, *few, *words],
        env={**os.environ, "LD_LIBRARY_PATH": libraries},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    names = "Throughput|Inference count|Successful request count"
    figures = re.findall(rf"({names}): ([\d.]+)", ran.stdout)
    assert {name for name, _ in figures} == {
        "Throughput", "Inference count", "Successful request count",
    }  # fmt: skip
    assert all(float(value) > 0 for _, value in figures)
