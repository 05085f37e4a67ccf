"""The wheel, in an empty environment with `[cpu]` alone: no torch, and it serves."""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from demo.serving import served
from likely import Client, Verdict

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


PATIENT = ["--retries", "10", "--timeout", "60"]


@pytest.fixture(autouse=True)
def nothing_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is installed may be found."""
    monkeypatch.delenv("PYTHONPATH", raising=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree."""
    out = tmp_path_factory.mktemp("wheel")
    build = ["pip", "wheel", "--quiet", *PATIENT, "--no-deps", "--wheel-dir", str(out), "."]
    subprocess.run([sys.executable, "-m", *build], check=True)
    return next(out.glob("likely-*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the wheel, `[cpu]` and nothing else."""
    environment = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    install = ["pip", "install", "--quiet", *PATIENT, "--no-compile", "-c", "constraints.txt"]
    subprocess.run([str(python), "-m", *install, f"{wheel}[cpu]"], check=True)
    return python


def test_the_wheel_holds_what_users_need_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "likely/py.typed",
        "likely/v1/scoring_pb2.py",
        "likely/v1/scoring_pb2.pyi",
        "likely/v1/scoring_pb2_grpc.pyi",
        "likely/bundles/mnist/manifest.json",
        "likely/bundles/mnist/density.onnx",
        "likely_export/py.typed",
        "likely_export/recipes/digits.toml",
        "likely_export/report/templates/page.html",
    ):
        assert needed in names
    tops = {name.partition("/")[0] for name in names}
    assert {top.partition("-")[0] for top in tops} == {"likely", "likely_export"}
    assert not [name for name in names if "test" in name or "__pycache__" in name]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_shipped_bundle_is_light(wheel: Path) -> None:
    entries = zipfile.ZipFile(wheel).infolist()
    assert sum(e.file_size for e in entries if "/bundles/" in e.filename) < 10_000_000


@pytest.mark.parametrize("absent", ["torch", "onnx", "sklearn"])
def test_what_training_needs_is_not_there(python: Path, absent: str) -> None:
    ran = subprocess.run([str(python), "-c", f"import {absent}"], capture_output=True, text=True)
    assert f"No module named '{absent}'" in ran.stderr


def test_the_doctor_finds_nothing_broken(python: Path) -> None:
    subprocess.run([str(python.with_name("likely")), "doctor"], check=True, capture_output=True)


def test_it_serves_the_shipped_bundle(python: Path, tmp_path: Path) -> None:
    command = [str(python.with_name("likely")), "serve"]
    noise = np.random.default_rng(0).integers(0, 256, (4, 1, 28, 28)).astype(np.uint8)
    with served(tmp_path / "log", command=command) as server, Client(server.address) as client:
        scores = client.score(noise, alpha=0.01)
        assert client.model().name == "mnist"
    assert (scores.verdict == Verdict.OUTLIER).all()
