"""The demo runs, tells, draws and ends; its digits are those that training held back."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo import pictures
from likely.bundle import Bundle, Manifest
from likely_export import data


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return Bundle.open(Path("bundles/digits")).manifest


def test_held_out_digits_are_the_test_part_of_the_training_data(manifest: Manifest) -> None:
    recipe = manifest.recipe["data"]
    test = data.load("digits", data.Sizes(**recipe["splits"]), seed=recipe["seed"]).test
    x, y = pictures.held_out(manifest)
    np.testing.assert_array_equal(x, test.x)
    np.testing.assert_array_equal(y, test.y)


def test_digits_divided_in_another_way_are_refused(manifest: Manifest) -> None:
    other = manifest.model_copy(update={"data_digest": "0" * 64})
    with pytest.raises(ValueError, match="not those that the bundle was trained on"):
        pictures.held_out(other)


@pytest.mark.parametrize("name", pictures.NO_DIGITS)
def test_what_is_no_digit_still_has_the_form_of_one(name: str) -> None:
    digits = np.random.default_rng(0).integers(0, 17, (20, 1, 8, 8)).astype(np.uint8)
    x = pictures.NO_DIGITS[name](digits, np.random.default_rng(1))
    assert x.shape == digits.shape
    assert x.dtype == np.uint8
    assert x.max() < pictures.LEVELS


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_tour(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "demo", "--out", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr
    assert "How plausible is it?" in ran.stdout
    printed = " ".join(ran.stdout.split())
    for label in ("7", "sneaker"):
        assert f"3 to 5 of label {label}, drawn again alone: the same." in printed
    assert "1.3 % to 10.7 % of 300 digits are rejected at 0.05" in printed
    assert "The server has ended well." in ran.stdout
    for name in ("mnist.png", "fashion_mnist.png", "surprise.png", "likelihoods.png"):
        with Image.open(tmp_path / name) as figure:
            figure.verify()
        assert name in ran.stdout.replace("\n", "")
