"""Members of the family side by side: a bundle with p(x), p(x|y) and p(y|x), and a VAE."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from likely.bundle import Bundle
from likely.errors import InvalidInput
from likely_export import recipes, runs
from likely_export.build import build, extend
from likely_export.cli import main
from likely_export.compare import Comparison, Sizes, compare
from likely_export.data import Dataset
from likely_export.report import family

pytestmark = pytest.mark.timeout(900)  # they train, on whatever is left of the machine
SIZES = Sizes(
    test=60, outside=20, drawn=20, composed=30, accepted=10, labelled=(100,), steps=30, shown=4
)
SHORT = "\ntraining = { steps = 20, batch = 32, validations = 1 }\n"
DATA = """
version = "1"
[data]
source = "digits"
splits = { fit = 160, calibrate = 260, validate = 120, test = 300 }
"""
VAE = f"""
name = "features"{DATA}
[models.vae]
family = "vae"
latent = 3
width = 16
logistics = 1
importance_samples = 2{SHORT}
[roles]
encode = "vae"
decode = "vae"
generate = "vae"
"""
LABELS = f"""
name = "labels"{DATA}
[models.labels]
family = "classifier"
channels = [4]
width = 8{SHORT}
[models.density]
family = "pixelcnn"{SHORT}
[roles]
density = "density"
discriminate = "labels"
"""


CVAE = VAE.replace('"vae"', '"cvae"').replace("features", "given_labels").replace(".vae]", ".cvae]")


@pytest.fixture(scope="module")
def data() -> Dataset:
    return recipes.parse(VAE).data.load()


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("family")
    runs.train_all(recipes.parse(VAE), folder / "vae")
    runs.train_all(recipes.parse(LABELS), folder / "labels", only=("labels",))
    runs.train_all(recipes.parse(CVAE), folder / "cvae")
    build(folder / "vae", folder / "features")
    build(folder / "cvae", folder / "given_labels")
    extend(Path("bundles/digits"), folder / "labels", folder / "digits")
    return [folder / "digits", folder / "features", folder / "given_labels"]


@pytest.fixture(scope="module")
def found(members: list[Path], data: Dataset) -> Comparison:
    dark = np.zeros((30, *data.shape), np.uint8)
    return compare(members, data, {"dark": dark}, SIZES)


def test_each_member_answers_what_it_has_a_graph_for(found: Comparison) -> None:
    digits, features = (found.figures["members"][name] for name in ("digits", "features"))
    assert digits["learns"] == ["p(x)", "p(x|y)", "p(y|x)", "features"]
    assert features["learns"] == ["p(x)", "features"]
    assert set(digits["accuracy"]) == {"by p(x|y)", "by p(y|x)"}
    assert digits["accuracy"]["by p(x|y)"]["mean"] > 0.9
    assert features["accuracy"] == {} == features["outside"]
    assert set(digits["outside"]) == {"noise", "blank", "dark"}
    assert digits["outside"]["noise"]["rejected"] == 1
    assert digits["outside"]["dark"] == digits["outside"]["blank"]
    assert (digits["draws"], features["draws"]) == ("by label", "pictures")


def test_features_that_need_a_label_are_none_of_a_picture_alone(found: Comparison) -> None:
    given_labels = found.figures["members"]["given_labels"]
    assert given_labels["learns"] == ["p(x|y)", "features"]
    assert "features" not in given_labels and given_labels["draws"] == "by label"


def test_bayes_rule_is_compared_where_both_directions_are_known(found: Comparison) -> None:
    digits, features = (found.figures["members"][name] for name in ("digits", "features"))
    assert "composition" not in features
    likelihoods = digits["composition"]["likelihoods"]
    assert likelihoods["pictures"] == 30
    # What a picture's likelihood is in all decides either way; twenty steps teach labels little.
    assert likelihoods["spearman_of_pictures"] > 0.5
    assert likelihoods["by"]["generative"]["accuracy"]["mean"] > 0.8
    kinds = {rule: by["log_pxy_nats"]["kind"] for rule, by in likelihoods["by"].items()}
    assert kinds == {"generative": "bound", "discriminative": "exact"}
    drawings = digits["composition"]["drawings"]
    assert set(drawings) == {"acceptance", "own"}
    assert drawings["own"]["draws_a_picture"]["mean"] == 1
    assert drawings["acceptance"]["draws_a_picture"]["mean"] > 1


def test_an_exact_density_and_a_bound_are_told_apart(found: Comparison) -> None:
    digits, features = (found.figures["members"][name] for name in ("digits", "features"))
    assert (digits["nats"]["kind"], features["nats"]["kind"]) == ("exact", "bound")
    assert (features["nats"]["test_size"], features["nats"]["importance_samples"]) == (300, 2)
    assert digits["nats"]["mean"] < features["nats"]["mean"]  # twenty steps teach a VAE little
    bits = digits["nats"]["mean"] / (64 * np.log(2))
    assert digits["bits_per_dim"]["mean"] == pytest.approx(bits, rel=1e-5)


def test_costs_are_of_every_graph_and_of_training(found: Comparison, members: list[Path]) -> None:
    for folder in members:
        manifest = Bundle.open(folder).manifest
        milliseconds = found.figures["members"][manifest.name]["milliseconds"]
        assert set(milliseconds) == {*(role.value for role in manifest.graphs), "training"}
        assert min(milliseconds.values()) > 0


def test_features_are_probed_beside_pixels(found: Comparison) -> None:
    probed = found.figures["members"]["features"]["features"]
    assert probed["dimensions"] == 3
    assert set(probed["probe"]) == set(found.figures["probe_of_pixels"]) == {"100"}
    assert found.figures["probe_of_pixels"]["100"] > probed["probe"]["100"]


def test_of_more_labels_than_draws_each_is_drawn_once(members: list[Path], data: Dataset) -> None:
    found = compare(members[2:], data, sizes=replace(SIZES, drawn=7))
    figures = found.figures["members"]["given_labels"]
    assert figures["draws"] == "by label" and "mean" in figures["faithfulness"]
    assert len(found.drawn["given_labels"]) == SIZES.shown


def test_nothing_is_said_of_rejections_that_a_calibration_is_too_small_for(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("likely_export.compare.ALPHA", 0.001)
    few = replace(SIZES, test=20, outside=4, drawn=10, composed=4, steps=2)
    found = compare([Path("bundles/digits")], data, sizes=few)
    assert set(found.figures["members"]["digits"]["outside"]["noise"]) == {"sure by p(x|y)"}
    family.write(tmp_path / "it.html", found.figures, found.drawn, found.outside, found.levels)
    assert "<td>not at 0.001</td>" in (tmp_path / "it.html").read_text()


def test_members_must_be_of_the_same_data(members: list[Path], data: Dataset) -> None:
    with pytest.raises(InvalidInput, match="other data"):
        compare(members, replace(data, digest="0" * 64))
    with pytest.raises(InvalidInput, match="two bundles"):
        compare([members[0], members[0]], data)


def test_without_labels_there_is_no_judge_nor_a_probe(tmp_path: Path, data: Dataset) -> None:
    x, x_test = data.train.x, data.test.x
    np.savez(tmp_path / "set.npz", x=x, x_test=x_test)
    np.savez(tmp_path / "one.npz", x=x, y=0 * data.train.y, x_test=x_test, y_test=0 * data.test.y)
    text = VAE.replace('"digits"', '"set.npz"\nlevels = 17').replace(", test = 300", "")
    (tmp_path / "vae.toml").write_text(text)
    recipe = recipes.load(tmp_path / "vae.toml")
    runs.train_all(recipe, tmp_path / "run")
    words = ["build", str(tmp_path / "run"), "--out", str(tmp_path / "bundle")]
    for source in ("one", "set"):  # of one label the data are the same to the bit
        built = CliRunner().invoke(main, [*words, "--data", str(tmp_path / f"{source}.npz")])
        assert built.exit_code == 0 and "features 1, " in built.stdout
        assert ("Now: likely-export features" in built.stdout) == (source == "one")

    found = compare([tmp_path / "bundle"], recipe.data.load(), sizes=SIZES)
    assert found.figures.keys() == {"pictures", "alpha", "members"}
    assert found.figures["members"]["features"]["draws"] == "pictures"
    family.write(tmp_path / "it.html", found.figures, found.drawn, found.outside, found.levels)
    text = (tmp_path / "it.html").read_text()
    assert "family_draws" in Page(text).titles and "independent network" not in text


class Page(HTMLParser):
    """Its sections, and what it points to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.titles: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [str(v) for k, v in attrs if k in ("src", "href")]
        self.titles += [str(v) for k, v in attrs if tag == "section" and k == "id"]


def test_the_page_needs_nothing_else(found: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "compare.html"
    figures = json.loads(json.dumps(found.figures))
    family.write(path, figures, found.drawn, found.outside, found.levels)
    page = Page(path.read_text())
    assert page.titles == [
        *("answers", "family_draws", "composition", "nothing", "probe", "expense")
    ]
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    for name in figures["members"]:
        assert f">{name}<" in path.read_text()
    bounds = re.findall(r"<small>(bound, [^<]*)", path.read_text())
    assert bounds == ["bound, by PyTorch on 300 pictures"]
    own, composed = re.findall(r'<tr><th scope="row">(?:its own|p\(y).*', path.read_text())
    assert "<small>bound</small>" in own and "bound" not in composed
