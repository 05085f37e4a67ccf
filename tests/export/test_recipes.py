import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from likely.bundle import Role
from likely.errors import InvalidInput
from likely_export import data, families, recipes, sources
from likely_export.statistics import STATISTICS

TINY = """
name = "tiny"
version = "1"

[data]
source = "set.npz"
levels = 4
[data.splits]
fit = 10
calibrate = 20
validate = 10

[models.a]
family = "cvae"
latent = 2
width = 8
[models.a.training]
steps = 3
betas = [0.8, 0.9]

[roles]
density = "a"
conditional = "a"
"""


def test_the_page_on_recipes_shows_a_recipe_and_data_that_are_read(tmp_path: Path) -> None:
    page = Path("docs/recipes.md").read_text()
    code, text = (
        re.findall(rf"^```{kind}\n(.*?)^```$", page, re.M | re.S)[0] for kind in ("python", "toml")
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    recipe = recipes.parse(text, tmp_path)
    source = sources.read(recipe.data.source)
    assert (source.x.shape, source.levels, len(source.labels)) == ((50, 1, 28, 28), 256, 10)
    for role in recipe.roles:
        assert f"`{role}`" in page
    tables = {*recipes.Recipe.model_fields} - {"name", "version", "description"}
    assert not [name for name in tables if f"`{name}" not in page]


def test_the_shipped_recipes_are_whole() -> None:
    assert "digits" in recipes.shipped()
    for name, description in recipes.shipped().items():
        recipe = recipes.load(name)
        assert recipe.name == name and recipe.description == description != ""
        for model in recipe.models.values():
            config = families.family(model.family).config
            assert set(model.options) <= {field.name for field in dataclasses.fields(config)}
    assert recipes.load("digits").calibration.statistics


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(TINY)
    recipe = recipes.load(tmp_path / "mine.toml")
    assert recipe.data.source == str(tmp_path / "set.npz")
    assert recipe.models["a"].options == {"latent": 2, "width": 8}
    assert recipe.models["a"].training.betas == (0.8, 0.9)
    assert recipe.roles == {Role.DENSITY: "a", Role.CONDITIONAL: "a"}
    assert recipe.calibration.statistics == tuple(
        name for name, each in STATISTICS.items() if each.needs is None
    )


@pytest.mark.parametrize(
    "name", ["mnist", "fashion_mnist", "mnist_binary", "cifar10", "cifar10_mixture"]
)
def test_at_paper_size_a_recipe_makes_the_same_bundle_of_larger_models(name: str) -> None:
    small, large = recipes.load(name), recipes.load(name, size="paper")
    assert small.models["pixelcnn"].options["layers"] < large.models["pixelcnn"].options["layers"]
    same = {"models": small.models}
    assert large != small and large.model_copy(update=same) == small
    assert small.models.keys() == large.models.keys()
    for model in large.models.values():
        families.family(model.family).config(
            shape=(1, 28, 28), levels=256, labels=10, **model.options
        )


def test_a_size_that_a_recipe_does_not_name() -> None:
    with pytest.raises(InvalidInput, match="huge is none of paper"):
        recipes.load("mnist", size="huge")
    with pytest.raises(InvalidInput, match="no sizes"):
        recipes.load("digits_vae", size="huge")


def test_another_seed_is_every_models_and_no_splits(tmp_path: Path) -> None:
    recipe = recipes.load("digits").reseeded(7)
    assert {model.training.seed for model in recipe.models.values()} == {7}
    assert recipe.data == recipes.load("digits").data
    assert recipe.reseeded(0) == recipes.load("digits")


def test_a_recipe_says_what_it_is_computed_in() -> None:
    recipe = recipes.load("mnist").with_precisions(lambda _: "32-true")

    assert {model.training.precision for model in recipe.models.values()} == {"32-true"}
    assert recipe.with_precisions(lambda own: own) == recipe


def test_a_label_held_out_is_another_set_to_report_against() -> None:
    recipe = recipes.load("digits").without(("4", "9"))
    found = recipe.data.load()
    assert found.labels == tuple("01235678")
    everything = recipes.load("digits").data.load()
    outside = recipe.others(found.levels)["held_out_4_9"]
    parts = [getattr(everything, part) for part in data.PARTS]
    nines = sum(int(np.isin(part.y, [4, 9]).sum()) for part in parts)
    assert len(outside) == nines > 300
    seen = {picture.tobytes() for part in data.PARTS for picture in getattr(found, part).x}
    assert not any(picture.tobytes() in seen for picture in outside)
    with pytest.raises(InvalidInput, match="ten is none of"):
        recipes.load("digits").without(("ten",)).data.load()


def test_labels_are_held_out_beside_those_of_the_recipe() -> None:
    recipe = recipes.load("digits").without(("4",))
    assert recipe.without(("9", "4", "9")).data.without == ("4", "9")


def test_a_label_without_pictures_that_is_held_out_is_no_other_set(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", x=np.zeros((2, 4, 4), np.uint8), y=[1, 2])
    (tmp_path / "mine.toml").write_text(TINY)
    assert recipes.load(tmp_path / "mine.toml").without(("0",)).others(4) == {}


def test_other_sets_are_of_the_same_shape_or_refused(tmp_path: Path) -> None:
    for name, side in (("set", 4), ("same", 4), ("odd", 5)):
        np.savez(tmp_path / name, x=np.zeros((2, side, side), np.uint8), y=[0, 1])
    text = TINY + '[evaluation.others]\nsame = "same.npz"\nabsent = "absent.npz"\n'
    (tmp_path / "mine.toml").write_text(text)
    assert recipes.load(tmp_path / "mine.toml").others(4).keys() == {"same"}
    (tmp_path / "mine.toml").write_text(text + 'odd = "odd.npz"\n')
    with pytest.raises(InvalidInput, match=r"has pictures \(1, 5, 5\) where those of set are"):
        recipes.load(tmp_path / "mine.toml").others(4)


def test_the_data_or_another_set_is_no_other_set(tmp_path: Path) -> None:
    for name in ("set", "near/set", "near/far"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.savez(tmp_path / name, x=np.zeros((2, 4, 4), np.uint8), y=[0, 1])
    (tmp_path / "link.npz").symlink_to("near/far.npz")
    table = f'[evaluation.others]\nnear = "{tmp_path}/near/set.npz"\nfar = "near/far.npz"\n'
    (tmp_path / "mine.toml").write_text(TINY + table)
    recipe = recipes.load(tmp_path / "mine.toml")
    assert recipe.others(4).keys() == {"near", "far"}
    published = recipes.from_table(recipe.published(), recipe.data.source)
    with pytest.raises(InvalidInput, match=r"others\.near: .*set\.npz is the data too"):
        published.others(4)
    (tmp_path / "mine.toml").write_text(TINY + table + 'farther = "link.npz"\n')
    with pytest.raises(InvalidInput, match=r"others\.farther: .*link\.npz is far too"):
        recipes.load(tmp_path / "mine.toml").others(4)


def test_other_sets_span_the_levels_that_no_key_chose(tmp_path: Path) -> None:
    for name, top in (("set", 255), ("dark", 1)):
        np.savez(tmp_path / name, x=np.full((2, 4, 4), top, np.uint8), y=[0, 1])
    text = TINY + '[evaluation.others]\ndark = "dark.npz"\n'
    path = tmp_path / "mine.toml"
    path.write_text(text.replace("levels = 4\n", ""))
    with pytest.raises(InvalidInput, match=r"others\.dark.*reach 1 where white is 255: stretch"):
        recipes.load(path).others(256)
    for levels in (2, 256):  # what they are is said
        path.write_text(text.replace("levels = 4", f"levels = {levels}"))
        assert recipes.load(path).others(levels)["dark"].max() == 1


@pytest.mark.parametrize("name", ["digits", "mine"])
def test_what_is_written_is_read_again(tmp_path: Path, name: str) -> None:
    (tmp_path / "mine.toml").write_text(TINY)
    recipe = recipes.load(name if name == "digits" else tmp_path / "mine.toml")
    (tmp_path / "run").mkdir()
    recipe.write(tmp_path / "run" / "recipe.toml")
    assert recipes.load(tmp_path / "run" / "recipe.toml") == recipe


def test_a_recipe_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, recipe = tmp_path / "recipe.toml", recipes.load("digits")
    recipe.write(path)
    written = path.stat()
    recipe.write(path)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)

    def half(self: Path, text: str, encoding: str) -> None:
        self.write_bytes(text[:50].encode())
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="no space"):
        recipe.reseeded(1).write(path)
    assert recipes.load(path) == recipe and list(tmp_path.iterdir()) == [path]


def test_a_run_of_a_shipped_recipe_finds_the_pictures_beside_which_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = recipes.load("mnist")
    assert recipe.data.source == str(tmp_path / "mnist.npz")
    assert recipes.load("digits").data.source == "digits"
    (tmp_path / "run").mkdir()
    recipe.write(tmp_path / "run" / "recipe.toml")
    monkeypatch.chdir("/")
    assert recipes.load(tmp_path / "run" / "recipe.toml").data.source == recipe.data.source


def test_a_published_recipe_names_no_folder_and_can_be_used_again(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(TINY)
    recipe = recipes.load(tmp_path / "mine.toml")
    published = recipe.published()
    assert str(tmp_path) not in str(published) and published["data"]["source"] == "set.npz"
    assert recipes.from_table(published, str(tmp_path / "set.npz")) == recipe


def test_other_sets_are_published_without_folders_and_found_beside_the_data(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("set", "near", "sub/below"):
        np.savez(tmp_path / name, x=np.zeros((2, 4, 4), np.uint8), y=[0, 1])
    table = f'[evaluation.others]\nnear = "{tmp_path}/near.npz"\nbelow = "sub/below.npz"\n'
    (tmp_path / "mine.toml").write_text(TINY + table)
    published = recipes.load(tmp_path / "mine.toml").published()
    assert published["evaluation"]["others"] == {"near": "near.npz", "below": "sub/below.npz"}
    again = recipes.from_table(published, str(tmp_path / "set.npz"))
    assert again.others(4).keys() == {"near", "below"}


@pytest.mark.parametrize(
    ("old", "new", "field", "says"),
    [
        ("levels = 4", "level = 4", "data.level", "not a known key"),
        ("fit = 10", "fits = 10", "data.splits", "fits is not a known key"),
        ("latent = 2", "latents = 2", "models.a", "latents is not a known key"),
        ("latent = 2", "levels = 2", "models.a", "levels is not a known key"),
        ("latent = 2", 'latent = "two"', "models.a", "latent: .*'two'"),
        ("steps = 3", "stops = 3", "models.a.training", "stops is not a known key"),
        ("steps = 3", "steps = 3\nepochs = 1", "models.a.training", "exactly one"),
        ('family = "cvae"', 'family = "gan"', "models.a", "'gan' is none of pixelcnn, cvae"),
        ('density = "a"', 'density = "b"', "recipe", "b is none of a"),
        ('density = "a"', 'sample = "a"', "recipe", "needs a density"),
        ('density = "a"', 'guess = "a"', "roles.guess", "density"),
        ('version = "1"', "", "version", "is missing"),
        ("calibrate = 20", "", "data.splits", "calibrate is missing"),
        ("[roles]", "[calibration]\nalphas = [2.0]\n[roles]", "calibration.alphas.0", "less than"),
        (
            "[roles]",
            "[calibration]\nalphas = [0.1, 0.05, 0.1]\n[roles]",
            "calibration.alphas",
            "0.1 is named twice",
        ),
        (
            "[roles]",
            '[calibration]\ncontrast = ["wavy", "grainy", "wavy"]\n[roles]',
            "calibration.contrast",
            "wavy is named twice",
        ),
        (
            "[roles]",
            '[[calibration.parts]]\nstatistics = ["surprise", "surprise"]\n[roles]',
            "calibration.parts",
            "surprise is named twice",
        ),
        (
            "[roles]",
            '[calibration]\nstatistics = ["mood"]\n[roles]',
            "calibration.statistics",
            "mood is none of",
        ),
        (
            "[roles]",
            "[calibration]\nalphas = [0.01, 0.04]\n[roles]",
            "recipe",
            "20 calibration pictures promise no alpha below 0.04762",
        ),
        (
            "[roles]",
            '[[calibration.parts]]\nkind = "mixture"\n[roles]',
            "recipe",
            r"mixture of 10 is not in \[1, 7\]",
        ),
        (
            "[roles]",
            '[[calibration.parts]]\nkind = "neighbours"\nneighbours = 8\n[roles]',
            "recipe",
            r"neighbours of 8 is not in \[1, 7\]",
        ),
        ("fit = 10", "fit = 3", "recipe", "3 pictures; to combine statistics, at least 4"),
        (
            "[roles]",
            "[[calibration.parts]]\nweight = -1.0\n[roles]",
            "calibration.parts",
            "weight: -1.0; it must be above 0",
        ),
        (
            "[roles]",
            "[[calibration.parts]]\ndimensions = 0\n[roles]",
            "calibration.parts",
            "dimensions: 0; at least 1",
        ),
        (
            "[roles]",
            '[calibration]\ncontrast = []\nparts = [{ kind = "contrast" }]\n[roles]',
            "calibration",
            "none are named",
        ),
        (
            "[roles]",
            '[[calibration.parts]]\nkind = "contrast"\n[roles]',
            "recipe",
            "fit: 10 pictures; a contrast needs two for each of its 10 corruptions",
        ),
        ("[roles]", "[calibration]\nstatistics = []\n[roles]", "calibration.statistics", "1 item"),
        ("[roles]", "[calibration]\nparts = []\n[roles]", "calibration.parts", "1 item"),
        (
            "[roles]",
            '[calibration]\nstatistics = ["surprise", "surprise"]\n[roles]',
            "calibration.statistics",
            "surprise is named twice",
        ),
        (
            "[roles]",
            '[latent]\nattributes = ["size", "size"]\n[roles]',
            "latent.attributes",
            "size is named twice",
        ),
        ("[data]", "[data", "recipe", "not TOML"),
        ("[roles]", "[role]", "role", "not a known key"),  # and not: roles are missing
        ('name = "tiny"', 'name = "../tiny"', "name", "pattern"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, old: str, new: str, field: str, says: str) -> None:
    assert old in TINY
    (tmp_path / "mine.toml").write_text(TINY.replace(old, new, 1))
    with pytest.raises(InvalidInput, match=says) as caught:
        recipes.load(tmp_path / "mine.toml")
    assert caught.value.field.startswith(field)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_recipe_that_is_not_utf_8(tmp_path: Path, encoding: str) -> None:
    text = TINY.replace("[data]", 'description = "für Ziffern"\n[data]', 1)
    (tmp_path / "mine.toml").write_text(text, encoding=encoding)
    with pytest.raises(InvalidInput, match=r"recipe: .*mine\.toml is not UTF-8"):
        recipes.load(tmp_path / "mine.toml")


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ("[sizes]\npaper = 3\n", r"sizes\.paper: must be a table, not 3"),
        ("[[sizes]]\npaper = 3\n", "sizes: must be a table of sizes"),
        ("[sizes.paper.name]\nlong = 3\n", "name: .*string"),
        ("[sizes.paper]\nmodels = 3\n", "models: .*dictionary"),
    ],
)
def test_a_size_that_is_no_table_or_puts_one_in_the_wrong_place(sizes: str, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        recipes.parse(TINY + sizes, size="paper")


def test_options_that_torch_alone_refuses_are_named_by_the_family() -> None:
    with pytest.raises(InvalidInput, match=r"classifier: .*overflowed"):
        families.create("classifier", {"width": 2**61}, shape=(1, 8, 8), levels=4, labels=2, seed=0)


@pytest.mark.parametrize("name", ["letters", "absent.toml"])
def test_a_recipe_that_is_not_there(name: str) -> None:
    with pytest.raises(InvalidInput, match=name):
        recipes.load(name)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_model_is_restored_from_its_weights(tmp_path: Path, name: str) -> None:
    import torch

    from likely_export.train import WEIGHTS

    shape = {"shape": (1, 3, 3), "levels": 4, "labels": 2}
    first, again, other = (
        families.create(name, {}, **shape, seed=seed)  # type: ignore[arg-type]
        for seed in (0, 0, 1)
    )
    state = first.state_dict()
    assert all(torch.equal(state[key], again.state_dict()[key]) for key in state)
    assert any(not torch.equal(state[key], other.state_dict()[key]) for key in state)
    config = dataclasses.asdict(cast(Any, first.config))
    content = {"model": type(first).__name__, "config": config}
    torch.save({**content, "state": state}, tmp_path / WEIGHTS)
    found = families.restore(tmp_path / WEIGHTS)
    assert found.config == first.config and not found.training
    assert all(torch.equal(state[key], found.state_dict()[key]) for key in state)
    torch.save({**content, "model": "GAN", "state": state}, tmp_path / WEIGHTS)
    with pytest.raises(InvalidInput, match="GAN"):
        families.restore(tmp_path / WEIGHTS)
    with pytest.raises(InvalidInput, match="trained to the end"):
        families.restore(tmp_path / "absent.pt")
