"""What docs/latent.md tells people to type works."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from demo.serving import Served, served

pytestmark = pytest.mark.timeout(900)  # they train, on whatever is left of the machine
PAGE = Path("docs/latent.md").read_text()
DECODE, TRAVERSE, INTERPOLATE = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
SHEETS = re.findall(r"^likely (?:traverse|interpolate) .*$", PAGE, re.M)
RECIPE = """
name = "digits_vae"
version = "1"
[data]
source = "digits"
splits = { fit = 200, calibrate = 60, validate = 60, test = 100 }
[models.vae]
family = "vae"
width = 16
latent = 4
training = { steps = 20, batch = 32, validations = 1 }
[roles]
encode = "vae"
decode = "vae"
generate = "vae"
[latent]
attributes = ["slant"]
"""


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Path]]:
    """A server with a small VAE, and a folder with pictures for it."""
    pytest.importorskip("torch")
    from likely_export import recipes, runs
    from likely_export.build import build

    folder = tmp_path_factory.mktemp("latent")
    recipe = recipes.parse(RECIPE)
    runs.train_all(recipe, folder / "run")
    build(folder / "run", folder / "bundle", lambda _: None)
    x = recipe.data.load().test.x[:2]
    for name, part in (("x", x), ("a", x[:1]), ("b", x[1:])):
        np.save(folder / f"{name}.npy", part)
    with served(folder / "server.log", folder / "bundle") as server:
        yield server, folder


def run(words: list[str], folder: Path) -> list[str]:
    ran = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=folder)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def python(code: str, features: tuple[Served, Path]) -> list[str]:
    server, folder = features
    assert "127.0.0.1:50051" in code
    return run([sys.executable, "-c", code.replace("127.0.0.1:50051", server.address)], folder)


def test_the_client_does_what_is_shown(features: tuple[Served, Path]) -> None:
    assert python(DECODE, features) == ["(2, 4) (2, 1, 8, 8) (2, 3, 1, 8, 8)"]
    names, *places, shapes = python(TRAVERSE, features)
    assert names.startswith("['slant', 'label 0'")
    assert all(re.fullmatch(r"-?\d+\.\d\d ± \d+\.\d\d", place) for place in places)
    assert len(places) == 2 and shapes == "(2, 5, 1, 8, 8) (2, 5, 3, 1, 8, 8)"
    assert python(INTERPOLATE, features) == ["(1, 7, 1, 8, 8)"]


def test_the_commands_write_what_is_shown(features: tuple[Served, Path]) -> None:
    server, folder = features
    assert len(SHEETS) == 2
    for line in SHEETS:
        words = [sys.executable, "-m", *line.split(), "--address", server.address]
        run(words, folder)
        assert (folder / words[words.index("--out") + 1]).stat().st_size > 100
