"""How well outliers are detected, and whether false rejections are as rare as guaranteed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from likely_export import corruptions
from likely_export.report import charts
from likely_export.report.pictures import sheet, tiles
from likely_export.report.subject import Subject, View
from likely_export.report.text import ERROR, format_figure, joined, measured, words

FAILS = 0.5  # an AUROC below it ranks outliers as more usual than test pictures
HARD_BELOW = 0.95  # an AUROC below it is called hard to detect
SHOWN = "0.05"  # the alpha whose shares are shown, if it was checked
NEAR = tuple(corruptions.HARD)


def separation(subject: Subject) -> View:
    """A row per set of outliers, the hardest first, with their distributions and ROC curves."""
    figures, alone = subject.table("outliers"), subject.table("likelihood_only")
    sets = subject.outliers
    names = [*sets, *(name for name in figures if name not in sets)]
    alphas = [alpha for one in figures.values() for alpha in one.get("accepted", ())]
    alpha = SHOWN if SHOWN in alphas or not alphas else alphas[0]
    rows = [_row(subject, name, alpha) for name in names]
    rows.sort(key=lambda row: row["auroc"] if row["auroc"] is not None else 2)
    view: dict[str, Any] = {
        "rows": rows,
        "alpha": alpha if alphas else None,
        "alone": any(row["alone_auroc"] is not None for row in rows),
        "pictured": any(row["picture"] for row in rows),
        "failing": _failing(alone),
        "precise": any(row["aupr"] is not None for row in rows),
        "left_out": [words(name) for name in subject.figures.get("corruptions_left_out", ())],
        "test_size": format_figure(subject.figures["test_size"])
        if "test_size" in subject.figures
        else "",
    }
    if subject.inliers is not None and sets:
        aurocs = {name: float(one["auroc"]) for name, one in figures.items() if "auroc" in one}
        view["ridges"] = charts.ridges(subject.inliers, sets, aurocs)
        view["rocs"] = charts.rocs(subject.inliers, sets)
    return view if rows else None


def promises(subject: Subject) -> View:
    """P-values against uniform ones; false rejections and label sets, by label, against alpha."""
    view: dict[str, Any] = {}
    labelled, inliers = subject.material.labelled, subject.inliers
    if inliers is not None and len(inliers.p_value) > 1:
        same = labelled is not None and len(labelled.y) == len(inliers.p_value)
        y = labelled.y if same and labelled is not None else None
        view["uniformity"] = charts.uniformity(inliers.p_value, subject.manifest.calibrated.size, y)
        view["by_label"] = y is not None
    rates = subject.table("false_rejection")
    if rates:
        view["alphas"] = list(rates)
        view["rates"] = _rates(rates, subject.material.labels)
        if all(one.get("by_label") for one in rates.values()):
            shown = {alpha: _rates_by_name(one) for alpha, one in rates.items()}
            view["chart"] = charts.rejections(shown)
    if left_out := subject.figures.get("alphas_left_out"):
        view["left_out"] = [format_figure(alpha) for alpha in left_out]
        view["calibration"] = subject.manifest.calibrated.size
    if sets := subject.table("label_set"):
        view["set_alphas"] = list(sets)
        view["sets"] = _sets(sets, subject.material.labels)
    return view or None


def hard(subject: Subject) -> list[tuple[str, str]]:
    """Sets that are hard to detect, with their AUROC."""
    figures = {name: one for name, one in subject.table("outliers").items() if "auroc" in one}
    return [
        (words(name), format_figure(measured(one, "auroc")))
        for name, one in sorted(figures.items(), key=lambda item: float(item[1]["auroc"]))
        if one["auroc"] < HARD_BELOW
    ]


def _failing(alone: Mapping[str, Any]) -> list[str]:
    """Sets that likelihood ranks as more usual than test pictures, the worst first."""
    aurocs = {name: one["auroc"] for name, one in alone.items() if one.get("auroc", 1) < FAILS}
    return [words(name) for name in sorted(aurocs, key=lambda name: float(aurocs[name]))]


def _row(subject: Subject, name: str, alpha: str) -> dict[str, Any]:
    figures = subject.table("outliers").get(name, {})
    alone = subject.table("likelihood_only").get(name, {})
    one = subject.material.sets.get(name)
    made = {**corruptions.PANEL, **corruptions.HARD}.get(name)
    return {
        "name": words(name),
        "what": (made.__doc__ or "").split("\n")[0] if made else "",
        "near": name in NEAR and figures.get("auroc", 1) < HARD_BELOW,
        "size": format_figure(figures["size"]) if "size" in figures else "",
        "picture": _example(subject, name) if one is not None and len(one.examples) else None,
        **{key: figures.get(key) for key in _with_errors("auroc", "fpr95", "aupr")},
        "accepted": figures.get("accepted", {}).get(alpha),
        "accepted_standard_error": figures.get("accepted_standard_error", {}).get(alpha),
        **{f"alone_{key}": alone.get(key) for key in _with_errors("auroc", "fpr95")},
    }


def _with_errors(*names: str) -> list[str]:
    return [*names, *(f"{name}{ERROR}" for name in names)]


def _example(subject: Subject, name: str) -> Any:
    x = subject.material.sets[name].examples[:1]
    return sheet(tiles(x, subject.material.levels), f"an example of {words(name)}", 1, 48)


def _rates(rates: Mapping[str, Any], labels: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = [
        {
            "name": "all",
            "cells": [
                _cell(one.get("overall"), one.get("band"), one.get("overall_standard_error"))
                for one in rates.values()
            ],
        }
    ]
    for label in labels:
        cells = [_label_cell(one, label) for one in rates.values()]
        if any(cells):
            rows.append({"name": label, "cells": cells})
    return rows


def _label_cell(rates: Mapping[str, Any], label: str) -> dict[str, Any] | None:
    """A label's rate, with the band of a label ranked alone.

    Since p-values rank all labels together, nothing is guaranteed for one label, and a rate outside
    the band is not marked.
    """
    keys = ("by_label", "band_by_label", "by_label_standard_error")
    cell = _cell(*(rates.get(name, {}).get(label) for name in keys))
    return cell and {**cell, "inside": None}


def _cell(rate: Any, band: Any, error: Any) -> dict[str, Any] | None:
    if rate is None:
        return None
    inside = band[0] <= rate <= band[1] if band else None
    shown = f"{100 * band[0]:.2f} to {100 * band[1]:.2f}" if band else ""
    return {"rate": format_figure(joined(rate, error), "share"), "band": shown, "inside": inside}


def _rates_by_name(figures: Mapping[str, Any]) -> dict[str, charts.Rate]:
    """The rates and bands of all pictures together and of every label, as far as they exist."""
    overall = {"all": (figures["overall"], figures.get("band"))} if "overall" in figures else {}
    bands, rates = figures.get("band_by_label", {}), figures["by_label"]
    known = {name: rate for name, rate in rates.items() if rate is not None}
    return overall | {name: (rate, bands.get(name)) for name, rate in known.items()}


def _sets(sets: Mapping[str, Any], labels: tuple[str, ...]) -> list[dict[str, Any]]:
    sizes: list[Any] = [
        {"rate": format_figure(measured(one, "mean_size"))}
        for one in sets.values()
        if "mean_size" in one
    ]
    rows = [{"name": "mean size of the set", "cells": sizes}] if len(sizes) == len(sets) else []
    keys = ("coverage_by_label", "least_by_label", "coverage_by_label_standard_error")
    for label in labels:
        cells = [
            _covered(*(one.get(name, {}).get(label) for name in keys)) for one in sets.values()
        ]
        if any(cells):
            rows.append({"name": f"coverage of {label}", "cells": cells})
    return rows


def _covered(rate: Any, least: Any, error: Any) -> dict[str, Any] | None:
    if rate is None:
        return None
    shown = f"at least {100 * least:.2f}" if least is not None else ""
    return {
        "rate": format_figure(joined(rate, error), "share"),
        "band": shown,
        "inside": None if least is None else rate >= least,
    }
