"""The headline figures with what they are compared with, and all other figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from likely.bundle import Kind as Likelihood
from likely.bundle import Role
from likely_export.corruptions import HARD, PANEL
from likely_export.report.subject import Subject, View
from likely_export.report.text import MEASURED, PER_CENT, Kind, flat, format_figure, rows_of, words

Anchors = dict[str, list[dict[str, str]]]

_AUROC_ERROR = "auroc_standard_error"
CNN = "a small convolutional network of the same pictures"


@dataclass(frozen=True, slots=True)
class Headline:
    """A figure that the report shows first.

    Attributes:
        path: path of the figure.
        title: its title.
        note: how to read it.
        kind: how to format it.
        tile: whether it is among the large ones at the top.
    """

    path: str
    title: str
    note: str
    kind: Kind = "plain"
    tile: bool = False


HEADLINES = (
    Headline("bits_per_dim", "bits per dimension", "−log₂ p a pixel; lower is better", tile=True),
    Headline("nll_nats", "nats a picture", "−log p(x); lower is better", tile=True),
    Headline(
        "marginal_nll_nats", "nats a picture, over labels", "−log Σ p(x|y) p(y); lower is better",
        tile=True,
    ),
    Headline("conditional_nll_nats", "nats given the label", "−log p(x|y); lower is better"),
    Headline(
        "conditional_bits_per_dim", "bits per dimension given the label",
        "−log₂ p(x|y) a pixel; lower is better",
    ),
    Headline("accuracy", "accuracy by Bayes' rule", "of the test part", "share", tile=True),
    Headline(
        "accuracy_of_accepted", "accuracy of what is accepted", "at the largest alpha", "share"
    ),
    Headline("label_nll_nats", "nats a label", "−log p(y|x) of the true label; lower is better"),
    Headline("ece", "expected calibration error", "15 bins; lower is better"),
    Headline("aurc", "area under risk–coverage", "lower is better"),
    Headline(
        "discriminative.accuracy", "accuracy by p(y|x) itself", "of the test part", "share",
        tile=True,
    ),
    Headline(
        "discriminative.accuracy_of_accepted",
        "the same of what is accepted",
        "at the largest alpha",
        "share",
    ),
    Headline(
        "discriminative.label_nll_nats",
        "nats a label, by p(y|x) itself",
        "−log p(y|x) of the true label; lower is better",
    ),
    Headline(
        "discriminative.ece",
        "expected calibration error, by p(y|x) itself",
        "15 bins; lower is better",
    ),
    Headline(
        "discriminative.aurc", "area under risk–coverage, by p(y|x) itself", "lower is better"
    ),
    Headline(
        "false_rejection.0.05.overall",
        "false rejections at alpha 0.05",
        "of the test part; 5 % are promised",
        "share",
        tile=True,
    ),
    Headline(
        "faithfulness", "draws with the label asked for", "by an independent classifier", "share",
        tile=True,
    ),
    Headline(
        "self_checked.faithfulness",
        "the same of draws that check themselves",
        "by an independent classifier",
        "share",
    ),
    Headline(
        "train_on_draws_accuracy",
        "accuracy of a classifier trained on draws",
        "on the test part",
        "share",
    ),
    Headline(
        "parity_nats",
        "torch against ONNX Runtime",
        "largest difference of log p, in nats, on random pixels",
    ),
    Headline(
        "test_parity_nats",
        "the same on test pictures",
        "largest difference of log p(x), in nats",
    ),
    Headline("decisions", "decisions in torch and ONNX Runtime", "how many came out differently"),
    Headline(
        "statistics_cost",
        "cost of the outlier decision",
        "all statistics and what combines them, in plain log-likelihood passes",
    ),
    Headline("classification_cost", "cost of classifying", "in plain log-likelihood passes"),
)  # fmt: skip


def headline(subject: Subject) -> View:
    """The headline figures, each with what it is compared with."""
    anchors = _anchors(subject.figures)
    rows = [*_rows(subject, anchors), *_separations(subject, anchors)]
    known = {one.path for one in HEADLINES} | set(map(_auroc, _whole_sets(subject)))
    for path, beside in anchors.items():
        if path not in known:
            figure = subject.figure(path)
            shown = format_figure(figure) if figure is not None else ""
            rows.append({"title": _title(path), "value": shown, "note": "", "anchors": beside})
    baselines = rows_of(subject.table("baselines"))
    if not rows and not baselines:
        return None
    return {
        "tiles": [row for row in rows if row.get("tile")],
        "rows": rows,
        "anchored": any(row["anchors"] for row in rows),
        "baselines": baselines,
    }


def every_figure(subject: Subject) -> View:
    """All figures with their paths."""
    figures = {name: figure for name, figure in subject.figures.items() if name != "anchors"}
    rows = [(".".join(path), format_figure(figure)) for path, figure in flat(figures)]
    return {"rows": rows} if rows else None


def _rows(subject: Subject, anchors: Anchors) -> Iterator[dict[str, Any]]:
    for one in HEADLINES:
        figure = subject.measured(one.path)
        beside = anchors.get(one.path, [])
        cnn = subject.measured(f"cnn.{one.path.removeprefix('discriminative.')}")
        if figure is not None and cnn is not None:
            beside = [*beside, {"value": format_figure(cnn, one.kind), "source": CNN}]
        if figure is not None or beside:
            bound = _bound(subject, one.path)
            yield {
                "title": f"{one.title}, at most" if bound else one.title,
                "note": f"{one.note}; an {bound}" if bound else one.note,
                "value": "" if figure is None else format_figure(figure, one.kind),
                "tile": _tile(figure, one.kind) if one.tile and figure is not None else None,
                "anchors": beside,
            }


def _bound(subject: Subject, path: str) -> str:
    """The kind of bound that a figure given the label is; empty if it is exact or none."""
    graph = subject.manifest.graphs.get(Role.CONDITIONAL)
    if graph is None or not path.startswith("conditional_"):
        return ""
    if graph.kind in (None, Likelihood.EXACT):
        return ""
    samples = subject.figure(f"{path}.importance_samples") or graph.importance_samples
    return f"IWAE bound of {samples} samples" if samples > 1 else "ELBO"


def _separations(subject: Subject, anchors: Anchors) -> Iterator[dict[str, Any]]:
    """One row for each other data set, and one for all corruptions together."""
    outliers = subject.table("outliers")
    for name in _whole_sets(subject):
        shown, error = f"{outliers[name]['auroc']:.4f}", _error(outliers[name].get(_AUROC_ERROR))
        alone = subject.figure(f"likelihood_only.{name}.auroc")
        yield {
            "title": f"AUROC, {words(name)} as outliers",
            "note": "; ".join(_notes(outliers[name].get("size"), alone)),
            "value": f"{shown} ± {error}" if error else shown,
            "tile": (shown, error),
            "anchors": anchors.get(_auroc(name), []),
        }
    panel = {n: one["auroc"] for n, one in outliers.items() if n in PANEL and "auroc" in one}
    if panel:
        worst = min(panel, key=lambda name: float(panel[name]))
        shown = f"{sum(panel.values()) / len(panel):.4f}"
        error = _error(subject.figure("panel.auroc_mean_standard_error"))
        yield {
            "title": f"mean AUROC of {len(panel)} corruptions",
            "note": f"the smallest is {panel[worst]:.4f}, of “{words(worst)}”",
            "value": f"{shown} ± {error}" if error else shown,
            "tile": (shown, error),
            "anchors": [],
        }


def _notes(size: int | None, alone: float | None) -> Iterator[str]:
    """The number of pictures behind an AUROC, and the AUROC of likelihood alone."""
    if size is not None:
        yield f"of {format_figure(size)} pictures"
    if alone is not None:
        yield f"by likelihood alone {alone:.4f}"


def _error(standard_error: float | None) -> str:
    """The standard error of an AUROC, with as many digits."""
    return "" if standard_error is None else f"{standard_error:.4f}"


def _whole_sets(subject: Subject) -> list[str]:
    """Outlier sets that are other data, not corruptions of these."""
    outliers = subject.table("outliers")
    return [n for n, one in outliers.items() if n not in (*PANEL, *HARD) and "auroc" in one]


def _auroc(name: str) -> str:
    return f"outliers.{name}.auroc"


def _tile(figure: Any, kind: Kind) -> tuple[str, str]:
    """The figure and its standard error, if any."""
    known = {key: figure[key] for key in MEASURED} if isinstance(figure, Mapping) else figure
    mean, _, error = format_figure(known, kind).partition(" ± ")
    return mean + (PER_CENT if error.endswith(PER_CENT) else ""), error


def _title(path: str) -> str:
    """The title of a figure that is no headline, such as `outliers.blank.auroc`."""
    first, _, rest = path.partition(".")
    name, _, last = rest.rpartition(".")
    if first in ("outliers", "likelihood_only") and name:
        alone = " by likelihood alone" if first == "likelihood_only" else ""
        return f"{last.upper()}, outliers from “{words(name)}”{alone}"
    return words(path)


def _anchors(figures: Mapping[str, Any]) -> Anchors:
    anchors: Anchors = {}
    for one in figures.get("anchors", ()):
        shown = {"value": format_figure(one["value"]), "source": str(one.get("source", ""))}
        anchors.setdefault(str(one["figure"]), []).append(shown)
    return anchors
