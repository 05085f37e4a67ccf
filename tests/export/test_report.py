import base64
import dataclasses
import functools
import io
import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from likely.answers import Doubles, Pixels
from likely.bundle import Bundle, Manifest, Role
from likely_export import corruptions, measures, recipes, report
from likely_export.corruptions import INLIERS
from likely_export.material import Compared, Completed, Explained, Labelled, Material, PictureSet
from likely_export.report import charts, pictures, text
from likely_export.report.card import ANSWERS
from likely_export.report.outliers import hard, separation
from likely_export.report.subject import Subject

LABELS = ("0", "<one> & $two$", "ankle boot")
N, CALIBRATION = 400, 199
VOID = {"meta", "img", "br", "link", "input", "hr"}
ALWAYS = ["card", "reproduction"]


class Page(HTMLParser):
    """Reads a page as strictly as XML and keeps what its tests ask for."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.tags: list[str] = []
        self.sections: dict[str, list[str]] = {}
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.ids += [found["id"]] if found.get("id") else []  # type: ignore[list-item]
        self.addresses += [str(found[key]) for key in ("src", "href", "xlink:href") if key in found]
        self.images += [found] if tag == "img" else []
        if tag == "section":
            self.sections[str(found["id"])] = []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> inside {self.open}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "section" in self.open and "h2" not in self.open and data.strip():
            list(self.sections.values())[-1].append(data.strip())


def drawn(*shape: int, levels: int = 256) -> Pixels:
    return np.random.default_rng(len(shape)).integers(0, levels, shape).astype(np.uint8)


def one_set(x: Pixels, seed: int, nats: float, score: float) -> PictureSet:
    generator = np.random.default_rng(seed)
    unusualness: Doubles = generator.normal(score, 1, N)
    ranks = (unusualness[:, None] <= generator.normal(0, 1, CALIBRATION)).sum(1)
    p_value = (1 + ranks) / (CALIBRATION + 1)
    return PictureSet(x[:3], generator.normal(nats, 5, N), unusualness, p_value)


def material(channels: int = 1, levels: int = 256, patch: int | None = None) -> Material:
    generator = np.random.default_rng(7)
    x = drawn(6, channels, 8, 6, levels=levels)
    y = generator.integers(0, 3, N)
    posterior = generator.dirichlet(np.ones(3), N) + 2 * np.eye(3)[y]
    names = [*corruptions.PANEL, *corruptions.HARD, "other_data"]
    sets = {INLIERS: one_set(x, 1, 80, 0)}
    sets |= {name: one_set(x, at + 2, 40 + 10 * at, 0.5 + at / 2) for at, name in enumerate(names)}
    labelled = Labelled(y, posterior / posterior.sum(1, keepdims=True), sets[INLIERS].p_value)
    discriminated = Labelled(y, generator.dirichlet(np.ones(3), N), sets[INLIERS].p_value)
    known = np.zeros(x.shape, np.bool_)
    known[:, :, :4] = True
    maps = generator.normal(size=(2, *x.shape)).astype(np.float32)
    return Material(
        levels=levels,
        labels=LABELS,
        sets=sets,
        labelled=labelled,
        discriminated=discriminated,
        drawn=drawn(3, 5, channels, 8, 6, levels=levels),
        nearest=drawn(4, 2, channels, 8, 6, levels=levels),
        completed=Completed(x, known, drawn(6, 4, channels, 8, 6, levels=levels)),
        explained=Explained(
            x,
            np.abs(maps[0]),
            Compared(np.array([[0, 1]] * 6), maps[1].sum((1, 2, 3)), maps[1], patch),
        ),
    )


@functools.cache
def apart(name: str) -> tuple[dict[str, float], dict[str, float]]:
    """How well a set is told from the test part, by its score and by its nats."""
    inliers, one = (material().sets[each] for each in (INLIERS, name))
    return (
        measures.separation(inliers.unusualness, one.unusualness),
        measures.separation(inliers.nats, one.nats),
    )


def figures(shown: Material) -> dict[str, Any]:
    outliers = [name for name in shown.sets if name != INLIERS]
    rates = {"overall": 0.0475, "band": [0.02, 0.09]}
    by_label = {"by_label": dict.fromkeys(LABELS, 0.0525), "band_by_label": {"0": [0.2, 0.3]}}
    rates |= {"overall_standard_error": 0.0106}
    by_label |= {"by_label_standard_error": dict.fromkeys(LABELS, 0.0193)}
    return {
        "name": "shapes",
        "test_size": N,
        "nll_nats": {"mean": 80.123, "standard_error": 0.25},
        "accuracy": {"mean": 0.9925, "standard_error": 0.0009},
        "ece": 0.00321,
        "ece_standard_error": 0.00042,
        "discriminative": {
            "accuracy": {"mean": 0.9635, "standard_error": 0.0008},
            "ece": 0.00456,
            "ece_standard_error": 0.00034,
        },
        "decisions": {"compared_with_torch": 10000, "changed": 0},
        "false_rejection": {"0.05": rates | by_label, "0.1": rates | by_label},
        "label_set": {
            "0.05": {
                "coverage_by_label": {"0": 0.8125},
                "coverage_by_label_standard_error": {"0": 0.0338},
                "least_by_label": {"0": 0.9375},
                "mean_size": 1.0375,
            }
        },
        "cnn": {"accuracy": 0.9765, "accuracy_standard_error": 0.0076},
        "mixed": {
            "other_data": {
                "aurc": 0.2515,
                "cnn_max_softmax_aurc": 0.3525,
                "oscr": 0.8617,
                "oscr_standard_error": 0.0123,
            }
        },
        "marginal_nll_nats": {"mean": 77.7, "standard_error": 0.1, "by_draw": [77.6, 77.7, 77.8]},
        "outliers": {
            name: {
                **apart(name)[0],
                "accepted": {"0.05": 0.125},
                "accepted_standard_error": {"0.05": 0.0166},
                "size": N,
            }
            for name in outliers
        },
        "likelihood_only": {name: apart(name)[1] for name in outliers},
        "faithfulness": 0.9834,
        "faithfulness_by_label": {"0": 0.9712},
        "faithfulness_by_label_standard_error": {"0": 0.0053},
        "train_on_draws_accuracy_by_label": {"0": 0.9412},
        "panel": {"auroc_mean": 0.9, "auroc_mean_standard_error": 0.0031},
        "self_checked": {
            "faithfulness": {"mean": 0.9934, "standard_error": 0.0004},
            "draws_a_picture": {"mean": 1.25, "standard_error": 0.01},
        },
        "self_entropy": {"draws": {"mean": 79.5, "standard_error": 0.5}},
        "memorisation": {"nearest": 5.125},
        "baselines": {"png": {"bits_per_dim": 2.4375}},
        "anchors": [
            {"figure": "nll_nats", "value": 81.3, "source": "PixelCNN, 2016"},
            {"figure": "outliers.blank.auroc", "value": 0.875, "source": "a guess"},
        ],
    }


def floats(name: str, *axes: int) -> dict[str, Any]:
    return {"name": name, "dtype": "float32", "shape": ("batch", *axes)}


def manifest(channels: int = 1, labels: tuple[str, ...] = LABELS) -> Manifest:
    x = {"name": "x", "dtype": "uint8", "shape": ("batch", channels, 8, 6)}
    outputs = [floats(name) for name in ("log_px", "surprise", "statistics")]
    graph = {"file": "density.onnx", "inputs": (x,), "outputs": outputs, "kind": "exact"}
    names = ("density.onnx", "calibration.npz", "golden.npz")
    return Manifest.model_validate(
        {
            "name": "shapes",
            "version": "3",
            "description": "Shapes <drawn> for tests",
            "shape": (channels, 8, 6),
            "levels": 256,
            "labels": [{"name": name, "prior": 1 / len(labels)} for name in labels],
            "graphs": {"density": graph},
            "calibration": {"file": "calibration.npz", "size": CALIBRATION},
            "golden": "golden.npz",
            "parity_nats": 1e-4,
            "test_parity_nats": 2.5e-3,
            "decisions_compared": 777,
            "recipe": recipes.load("digits").published(),
            "data_digest": "a1" * 32,
            "files": {name: {"size": 10, "sha256": "0" * 64} for name in names},
        }
    )


@pytest.fixture(scope="module")
def whole() -> str:
    shown = material()
    return report.page(manifest(), figures(shown), shown)


def test_a_page_is_well_formed_and_needs_nothing_else(whole: str) -> None:
    page = Page(whole)
    assert len(page.ids) == len(set(page.ids))
    inside = {address[1:] for address in page.addresses if address.startswith("#")}
    assert inside <= set(page.ids)
    assert all(a.startswith(("#", "data:image/png;base64,")) for a in page.addresses)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert set(re.findall(r"url\(#?([^)]*)\)", whole)) <= set(page.ids)
    assert "@import" not in whole and "http" not in re.sub(r"data:[^\"]*", "", whole)


def test_all_sections_are_there_with_headings_and_alternatives(whole: str) -> None:
    page = Page(whole)
    assert list(page.sections) == [name for name, _, _ in report.SECTIONS]
    assert page.tags.count("h1") == 1 and page.tags.count("h2") == len(page.sections)
    assert page.tags.count("svg") == whole.count('role="img" aria-label="') > 5
    scales = [image for image in page.images if not image["alt"]]
    assert len(page.images) > 30 and len(scales) == 2  # whose ends are written beside them
    assert all(int(str(i["width"])) > 0 and int(str(i["height"])) > 0 for i in page.images)


def test_every_set_and_every_figure_is_told(whole: str) -> None:
    shown = material()
    page = Page(whole)
    table = " ".join(page.sections["separation"])
    for name, one in figures(shown)["outliers"].items():
        assert name.replace("_", " ") in table
        assert f"{one['auroc']:.4f}" in table and f"{one['fpr95']:.4f}" in table
        assert f"{figures(shown)['likelihood_only'][name]['auroc']:.4f}" in table
    everything = " ".join(page.sections["every_figure"])
    paths = [path for path, _ in text.flat(figures(shown)) if path[0] != "anchors"]
    assert all(".".join(path) in everything for path in paths)
    headline = " ".join(page.sections["headline"])
    for value in (
        "80.12",
        "± 0.25",
        "96.35",
        "0.00456",
        "± 0.00034",
        "99.25",
        "0.00321",
        "± 0.00042",
        "81.3",
        "PixelCNN, 2016",
        "0.875",
        "2.438",
    ):
        assert value in headline
    # A coverage alone: of a label, whose rate is outside too, the p-value promises nothing.
    assert page.sections["promises"].count("outside") == 1
    assert "20.00 to 30.00" in page.sections["promises"]
    assert "of 400 pictures; by likelihood alone" in headline
    assert "400 pictures" in table
    assert {"12.50 %", "0.2515"} <= {*page.sections["separation"], *page.sections["classification"]}


def test_standard_errors_are_told_beside_their_figures(whole: str) -> None:
    found, sections = figures(material()), Page(whole).sections
    table = " ".join(sections["separation"])
    for name in ("blank", "other_data"):
        for one in (found["outliers"][name], found["likelihood_only"][name]):
            assert f"{one['auroc']:.4f} ± {one['auroc_standard_error']:.4f}" in table
            assert f"{one['fpr95']:.4f} ± {one['fpr95_standard_error']:.4f}" in table
        blank = found["outliers"][name]
        assert f"{blank['aupr']:.4f} ± {blank['aupr_standard_error']:.4f}" in table
    assert "12.50 % ± 1.66 %" in table and "400 test pictures" in table
    rates = sections["promises"]
    assert {"4.8 ± 1.1\u00a0%", "5.2 ± 1.9\u00a0%", "81.2 ± 3.4\u00a0%"} <= set(rates)
    assert "0.862 ± 0.012" in sections["classification"]
    assert {"97.12 ± 0.53\u00a0%", "94.12\u00a0%"} <= set(sections["draws"])
    headline = " ".join(sections["headline"])
    assert "97.65 ± 0.76" in headline and "± 0.0031" in headline
    other = found["outliers"]["other_data"]
    assert f"{other['auroc']:.4f} ± {other['auroc_standard_error']:.4f}" in headline


@pytest.mark.parametrize(
    ("kind", "samples", "says"),
    [("exact", 0, ""), ("elbo", 1, "an ELBO"), ("iwae", 4, "an IWAE bound of 4 samples")],
)
def test_a_bound_given_the_label_is_told_as_one(kind: str, samples: int, says: str) -> None:
    fields = manifest().model_dump()
    own = {"file": "c.onnx", "kind": kind, "importance_samples": samples}
    own |= {"outputs": [floats("log_pxy", len(LABELS))]}
    fields["graphs"]["conditional"] = fields["graphs"]["density"] | own
    fields["files"]["c.onnx"] = fields["files"]["density.onnx"]
    shown = material()
    found = figures(shown) | {
        "conditional_nll_nats": {"mean": 85.5, "standard_error": 0.25},
        "conditional_bits_per_dim": {"mean": 2.5, "standard_error": 0.1, "importance_samples": 64},
    }
    page = report.page(Manifest.model_validate(fields), found, shown)
    headline = " ".join(Page(page).sections["headline"])
    assert ("nats given the label, at most" in headline) == bool(says)
    assert f"p(x|y); lower is better{says and '; '}{says} 85.50 ± 0.25" in headline
    assert ("IWAE bound of 64 samples" in headline) == bool(says)


def test_the_card_says_what_was_compared_and_what_chose(whole: str) -> None:
    card = " ".join(Page(whole).sections["card"])
    assert "0.0001 nats on random pixels, log p(x) by at most 0.0025 nats on 777 test" in card
    assert "no training, fitting or calibration saw them" in card
    assert "fitted to" not in card and "shifted 3" in card
    fitted = {"parts": [{"kind": "contrast"}], "contrast": ["chimera", "shifted_3"]}
    models = {
        "first": {"family": "pixelcnn", "training": {"epochs": 4.0}},
        "second": {"family": "detail", "start_from": "first", "training": {"epochs": 2.5}},
    }
    recipe = {**manifest().recipe, "calibration": fitted, "models": models}
    changed = {"recipe": recipe, "test_parity_nats": None}
    shown = material()
    page = report.page(manifest().model_copy(update=changed), figures(shown), shown)
    card = " ".join(Page(page).sections["card"])
    assert "fitted to pictures that are chimera, shifted 3." in card and "on 777 test" not in card
    assert "Model “first” family pixelcnn; epochs 4 " in card
    assert "Model “second” family detail; starts from “first”, epochs 2.5 " in card


@pytest.mark.parametrize(
    ("copies", "of_test", "says", "seen"),
    [
        (None, None, "is in one part Test", ""),
        ({"calibrate": 0, "test": 0}, {}, "none of them is a copy of one to train on", ""),
        ({"calibrate": 2, "test": 0}, {}, "copies of training pictures: calibrate 2.", ""),
        ({"calibrate": 2, "test": 3}, {}, "training pictures: calibrate 2, test 3.", "train 3"),
        (
            {"calibrate": 0, "test": 0},
            {"fit": 4, "calibrate": 5},
            "none of them is a copy of one to train on",
            "fit 4, calibrate 5",
        ),
    ],
)
def test_the_card_tells_of_pictures_that_are_in_two_parts(
    copies: dict[str, int] | None, of_test: dict[str, int] | None, says: str, seen: str
) -> None:
    shown = material()
    additions = {"copies_of_training": copies, "test_copies_of": of_test}
    found = figures(shown) | {key: one for key, one in additions.items() if one is not None}
    card = " ".join(Page(report.page(manifest(), found, shown)).sections["card"])
    assert says in card
    assert ("calibration saw them" + (f", except for copies ({seen})" if seen else " C")) in card


@pytest.mark.parametrize("folder", ["bundles/digits", "bundles/fashion_mnist"])
def test_evaluations_without_standard_errors_still_have_a_report(folder: str) -> None:
    evaluation = json.loads((Path(folder) / "evaluation.json").read_text())
    found = without_errors(evaluation)
    names = [label.name for label in Bundle.open(Path(folder)).manifest.labels]
    shown = dataclasses.replace(
        material(), labels=tuple(names), drawn=None, labelled=None, discriminated=None
    )
    page = report.page(Bundle.open(Path(folder)).manifest, found, shown)
    sections = Page(page).sections
    assert {"headline", "separation", "promises", "card", "every_figure"} <= set(sections)
    assert ">None<" not in page and "AUPR" not in page
    assert f"{found['outliers']['blank']['auroc']:.4f}" in " ".join(sections["separation"])


def without_errors(found: Any) -> Any:
    """The figures as they were before standard errors and AUPR stood beside them."""
    if not isinstance(found, Mapping):
        return found
    later = ("_standard_error", "aupr", "oscr")
    return {k: without_errors(v) for k, v in found.items() if not k.endswith(later)}


def test_what_could_not_be_measured_is_told_as_such() -> None:
    shown, found = material(), figures(material())
    found |= {"accuracy_of_accepted": None, "alphas_left_out": [0.001, 0.0005]}
    found["corruptions_left_out"] = ["half_contrast"]
    for rates in found["false_rejection"].values():
        rates["by_label"] = {**rates["by_label"], "0": None}
        rates["band_by_label"] = {"0": None}
    for one in found["label_set"].values():
        one["coverage_by_label"] = one["least_by_label"] = {"0": None}
    page = report.page(manifest(), found, shown)
    assert "or turn blank: half contrast." in " ".join(Page(page).sections["separation"])
    promises = " ".join(Page(page).sections["promises"])
    assert f"{CALIBRATION} calibration pictures cannot guarantee so little" in promises
    assert "alpha = 0.001, 0.0005" in promises and ">None<" not in page


def test_names_are_shown_as_they_are(whole: str) -> None:
    page = Page(whole)
    for section in ("draws", "promises", "classification", "card"):
        assert any("<one> & $two$" in words for words in page.sections[section]), section
    assert "<one>" not in whole and "Shapes &lt;drawn&gt;" in whole


def test_the_same_evaluation_gives_the_same_page(whole: str) -> None:
    shown = material()
    assert report.page(manifest(), figures(shown), shown) == whole


@pytest.mark.parametrize(
    ("part", "gone"),
    [
        ("drawn", "draws"),
        ("completed", "completions"),
        ("nearest", "copies"),
        ("explained", "explanations"),
    ],
)
def test_what_is_missing_leaves_no_section(part: str, gone: str) -> None:
    less: dict[str, Any] = {part: None}
    shown = dataclasses.replace(material(), **less)
    found = {k: v for k, v in figures(shown).items() if k != "memorisation"}
    sections = Page(report.page(manifest(), found, shown)).sections
    assert set(sections) == {name for name, _, _ in report.SECTIONS} - {gone}
    assert all(sections.values())


def test_each_rule_is_told_where_it_classifies() -> None:
    shown = material()
    bayes, own = "Bayes' rule, p(y|x) ∝ p(x|y) p(y), is right", "p(y|x) itself, is right"
    for rules in ((), ("labelled",), ("discriminated",), ("labelled", "discriminated")):
        gone: dict[str, Any] = dict.fromkeys({"labelled", "discriminated"} - set(rules))
        page = report.page(manifest(), figures(shown), dataclasses.replace(shown, **gone))
        section = " ".join(Page(page).sections.get("classification", []))
        assert (bayes in section, own in section) == ("labelled" in rules, "discriminated" in rules)
        assert page.count('class="confusion"') == len(rules)
        assert ('id="classification"' in page) == bool(rules)
    less = {name: one for name, one in figures(shown).items() if name != "discriminative"}
    assert "p(y|x) itself" not in " ".join(
        Page(report.page(manifest(), less, shown)).sections["headline"]
    )


def test_with_nothing_evaluated_the_card_remains() -> None:
    page = report.page(manifest(labels=()), {}, Material(256, (), {}))
    assert list(Page(page).sections) == ALWAYS


@pytest.mark.parametrize("name", [n for n in figures(material()) if n != "anchors"])
def test_any_figure_may_be_missing(name: str) -> None:
    shown = material()
    found = {key: value for key, value in figures(shown).items() if key != name}
    bare = dataclasses.replace(shown, sets={INLIERS: shown.sets[INLIERS]})
    sections = Page(report.page(manifest(), found, bare)).sections
    assert all(sections.values())
    assert ("separation" in sections) == (name != "outliers")


def test_a_bundle_without_labels_has_a_report() -> None:
    shown = dataclasses.replace(
        material(), labels=(), labelled=None, discriminated=None, drawn=drawn(1, 30, 1, 8, 6),
        explained=Explained(drawn(2, 1, 8, 6), np.ones((2, 1, 8, 6), np.float32)),
    )  # fmt: skip
    page = Page(report.page(manifest(labels=()), {"nll_nats": 80.0}, shown))
    assert "48.0" in page.sections["explanations"] and "classification" not in page.sections
    assert any("Drawn from p(x)." in words for words in page.sections["draws"])


@pytest.mark.parametrize(("patch", "says"), [(None, "nats a pixel for"), (4, "nats a patch for")])
def test_what_speaks_for_a_label_is_told_as_it_was_found(patch: int | None, says: str) -> None:
    shown = material(patch=patch)
    words = " ".join(Page(report.page(manifest(), figures(shown), shown)).sections["explanations"])
    assert says in words and ("in place of a patch" in words) == bool(patch)
    assert shown.explained is not None and shown.explained.compared is not None
    ratio = f"{abs(shown.explained.compared.log_ratio[0]):.1f}"
    assert ratio in words


def test_a_large_colour_bundle_stays_small() -> None:
    x = drawn(12, 3, 32, 32)  # noise does not compress
    shown = material(channels=3)
    completed = Completed(x[:6], np.ones((6, 3, 32, 32), np.bool_), drawn(6, 6, 3, 32, 32))
    large = dataclasses.replace(
        shown, completed=completed, drawn=drawn(10, 12, 3, 32, 32), labels=tuple("0123456789"),
        sets={n: dataclasses.replace(s, examples=x) for n, s in shown.sets.items()},
        labelled=None, discriminated=None,
    )  # fmt: skip
    assert len(report.page(manifest(3), figures(shown), large).encode()) < 1_500_000


def decoded(picture: pictures.Picture) -> np.ndarray[Any, np.dtype[np.uint8]]:
    content = base64.b64decode(picture.uri.removeprefix("data:image/png;base64,"))
    return np.array(Image.open(io.BytesIO(content)))


@pytest.mark.parametrize(("channels", "levels"), [(1, 2), (1, 17), (1, 256), (3, 256), (3, 8)])
def test_a_sheet_holds_the_very_pixels(channels: int, levels: int) -> None:
    x = drawn(5, channels, 4, 3, levels=levels)
    canvas = decoded(pictures.sheet(pictures.tiles(x, levels), "five", 3))
    assert canvas.shape == (2 * 5 - 1, 3 * 4 - 1, channels + 1)
    for at, picture in enumerate(x):
        top, left = at // 3 * 5, at % 3 * 4
        tile = canvas[top : top + 4, left : left + 3]
        assert (tile[..., -1] == 255).all()
        expected = np.moveaxis(picture, 0, -1) * (255 / (levels - 1))
        assert np.abs(tile[..., :-1] - expected).max() <= 0.5
    assert (canvas[..., -1] == 255).sum() == 5 * 12  # gaps, and what is left over, show the page


def test_sheets_are_enlarged_by_whole_numbers_and_stay_narrow() -> None:
    for size in (4, 8, 28, 64, 300):
        shown = pictures.sheet(np.zeros((12, size, size, 1), np.uint8), "", 12)
        assert shown.width % (12 * (size + 1) - 1) == 0
        assert shown.width <= max(pictures.WIDEST, 12 * (size + 1))


def test_maps_are_neutral_at_zero_and_tell_signs_apart() -> None:
    middle, plus, minus = pictures.coloured(
        np.array([0, 1, -1.0]).reshape(3, 1, 1), "RdBu_r", -1, 1
    )[:, 0, 0].astype(int)
    assert np.ptp(middle) < 8 and middle.min() > 235
    assert plus[0] > plus[2] + 50 and minus[2] > minus[0] + 50


def test_completions_show_what_was_given_and_what_was_drawn() -> None:
    x = np.full((1, 1, 2, 2), 200, np.uint8)
    known = np.array([[[True, False], [False, True]]])
    given = pictures.hidden(pictures.tiles(x, 256), known)
    made = pictures.tinted(pictures.tiles(x, 256), known)
    assert (given[known] == 200).all() and (given[~known] == pictures.UNKNOWN).all()
    assert (made[known] == 200).all()
    assert (made[~known][:, 0] == 200).all() and (made[~known][:, 2] < 150).all()


@pytest.mark.parametrize(
    ("found", "kind", "expected"),
    [
        ({"mean": 79.1034, "standard_error": 0.0512}, "plain", "79.103 ± 0.051"),
        ({"mean": 0.99234, "standard_error": 0.00087}, "share", "99.23 ± 0.09\u00a0%"),
        ({"mean": 2.0, "standard_error": 0.0}, "plain", "2"),
        (0.05, "share", "5.00\u00a0%"),
        (10000, "plain", "10\u202f000"),
        (0.00041, "plain", "0.00041"),
        ([0.25, 0.5], "share", "25.00\u00a0% to 50.00\u00a0%"),
        ({"a_b": 1.5}, "plain", "a b 1.5"),
        ({"mean": 2.0, "standard_error": 0.5, "n": 3}, "plain", "2.00 ± 0.50 (n 3)"),
        ("none", "plain", "none"),
        (text.measured({"a": 0.25, "a_standard_error": 0.5}, "a"), "plain", "0.25 ± 0.50"),
        (text.measured({"a": "b", "a_standard_error": None}, "a"), "plain", "b"),
    ],
)
def test_figures_are_told_with_the_digits_they_have(
    found: Any, kind: text.Kind, expected: str
) -> None:
    assert text.format_figure(found, kind) == expected


def test_figures_are_found_by_paths_whose_names_have_dots() -> None:
    tree: Mapping[str, Any] = {"a": {"0": {"5": 3}, "0.05": {"all": 1}}, "b": 4}
    assert text.find(tree, "a.0.05.all") == 1
    assert text.find(tree, "a.0.5") == 3 and text.find(tree, "b") == 4
    assert text.find(tree, "a.0.05") == {"all": 1}
    assert text.find(tree, "a.0.1") is None and text.find(tree, "c.d") is None


def test_a_standard_error_is_no_figure_of_its_own() -> None:
    tree = {"a": {"x": 0.5, "y": 0.25}, "a_standard_error": {"x": 0.125}, "b_standard_error": 2}
    measured = {"mean": 0.5, "standard_error": 0.125}
    expected = [(("a", "x"), measured), (("a", "y"), 0.25), (("b_standard_error",), 2)]
    assert list(text.flat(tree)) == expected


def test_charts_take_their_colours_from_the_page_and_keep_their_digits() -> None:
    shown = material()
    outliers = Subject(manifest(), figures(shown), shown).outliers
    chart = charts.ridges(shown.sets[INLIERS], outliers, {"blank": 0.98765})
    assert not re.search(r"#[0-9a-f]{6}", chart.svg) and "var(--series-0)" in chart.svg
    assert "0.9877" in chart.svg and "blank" in chart.svg


def test_the_hardest_set_comes_first() -> None:
    shown = material()
    subject = Subject(manifest(), figures(shown), shown)
    aurocs = [subject.figures["outliers"][name]["auroc"] for name in subject.outliers]
    assert len(aurocs) > 10 and aurocs == sorted(aurocs)


def test_a_set_is_hard_by_its_auroc_alone() -> None:
    shown = material()
    found = {"blurred": {"auroc": 0.9995}, "half_contrast": {"auroc": 0.94}, "salt": {"auroc": 0.9}}
    subject = Subject(manifest(), {"outliers": found}, shown)
    assert [name for name, _ in hard(subject)] == ["salt", "half contrast"]
    view = separation(subject)
    assert view is not None
    rows = {row["name"]: row["near"] for row in view["rows"]}
    assert rows["half contrast"] and not rows["blurred"] and not rows["salt"]


def test_the_card_knows_every_graph_that_a_bundle_may_have() -> None:
    assert set(ANSWERS) == set(Role)
