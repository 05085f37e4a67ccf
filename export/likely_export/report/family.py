"""A comparison as a page: a row for each member of the family, a column for each question."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from likely.answers import Pixels
from likely_export.report.frame import Heading, rendered
from likely_export.report.pictures import sheet, tiles
from likely_export.report.subject import View
from likely_export.report.text import format_figure, words

COLUMNS = 10
WAYS = {
    "generative": "its own p(x|y)",
    "discriminative": "p(y|x) p(x) / p(y)",
    "own": "its own p(x|y)",
    "acceptance": "p(x), kept with p(y|x)",
}
LEAD = (
    "Which member answers which question: how plausible a picture is, which label it has, "
    "whether to reject it, what a new one looks like, and what its features are worth."
)


def write(
    path: Path,
    figures: Mapping[str, Any],
    drawn: Mapping[str, Pixels],
    outside: Mapping[str, Pixels],
    levels: int,
) -> None:
    """Writes the page as a self-contained HTML file.

    Args:
        path: path of the file.
        figures: figures of a comparison.
        drawn: draws by member, uint8 (k, c, h, w).
        outside: one picture of each set that is not of the data, uint8 (1, c, h, w).
        levels: number of levels.
    """
    sections = (
        ("answers", "Which member answers what", _answers(figures)),
        ("family_draws", "What they draw", _drawn(figures, drawn, levels)),
        ("composition", "Bayes' rule in each direction", _composed(figures)),
        ("nothing", "Asked about what is none of the data", _nothing(figures, outside, levels)),
        ("probe", "What features are worth", _probed(figures)),
        ("expense", "What it costs", _expense(figures)),
    )
    page = rendered(Heading("The family side by side", _title(figures)), LEAD, sections)
    path.write_text(page, encoding="utf-8")


def _title(figures: Mapping[str, Any]) -> str:
    return f"{len(figures['members'])} models, {format_figure(figures['pictures'])} test pictures"


def _answers(figures: Mapping[str, Any]) -> View:
    """A row per member: what it learns, how well, and what it cannot do."""
    rows = []
    for name, member in figures["members"].items():
        nats = member.get("nats")
        rows.append(
            {
                "name": name,
                "families": ", ".join(_families(member)),
                "learns": ", ".join(member["learns"]),
                "nats": "" if nats is None else format_figure(_measured(nats)),
                "kind": "" if nats is None else _kind(nats),
                "bits": _format_optional(member.get("bits_per_dim")),
                "accuracy": {
                    rule: format_figure(a, "share") for rule, a in member["accuracy"].items()
                },
                "rejects": _rejects(member, figures["alpha"]),
                "draws": member["draws"],
            }
        )
    return {"rows": rows, "test": format_figure(figures["pictures"])}


def _rejects(member: Mapping[str, Any], alpha: float) -> str:
    """Whether a member rejects pictures; a small calibration may not suffice for alpha."""
    if any("rejected" in row for row in member["outside"].values()):
        return "yes"
    return f"not at {alpha:g}" if member.get("nats", {}).get("kind") == "exact" else "no"


def _drawn(figures: Mapping[str, Any], drawn: Mapping[str, Pixels], levels: int) -> View:
    rows = [
        {
            "name": name,
            "draws": figures["members"][name]["draws"],
            "sheet": sheet(tiles(x, levels), f"{len(x)} draws of {name}", COLUMNS),
            "faithfulness": _format_optional(figures["members"][name].get("faithfulness"), "share"),
        }
        for name, x in drawn.items()
    ]
    judge = _format_optional(figures.get("judge_accuracy"), "share")
    return {"rows": rows, "judge": judge} if rows else None


def _composed(figures: Mapping[str, Any]) -> View:
    """A table per question: p(x|y) computed in two ways, and drawn in two ways."""
    likelihoods, drawings = [], []
    for name, member in figures["members"].items():
        composition = member.get("composition", {})
        if comparison := composition.get("likelihoods"):
            likelihoods.append(
                {
                    "name": name,
                    "pictures": format_figure(comparison["pictures"]),
                    "agreement": [
                        format_figure(comparison["spearman_of_pictures"]),
                        format_figure(comparison["spearman_of_labels"]),
                        format_figure(comparison["spearman_of_other_labels"]),
                    ],
                    "rules": [
                        {
                            "name": WAYS[rule],
                            "cells": [
                                format_figure(by["accuracy"], "share"),
                                format_figure(by["label_nll_nats"]),
                            ],
                            "nats": format_figure(_measured(by["log_pxy_nats"])),
                            "kind": by["log_pxy_nats"]["kind"],
                        }
                        for rule, by in comparison["by"].items()
                    ],
                }
            )
        drawings += [
            {
                "name": name,
                "way": WAYS[way],
                "kept": format_figure(drawn["kept"]),
                "shown": format_figure(drawn["faithfulness"], "share"),
                "draws": format_figure(drawn["draws_a_picture"]),
                "by_label": [
                    format_figure(draws["mean"]) for draws in drawn["draws_by_label"].values()
                ],
            }
            for way, drawn in composition.get("drawings", {}).items()
        ]
    if not likelihoods and not drawings:
        return None
    labels = next(
        (
            list(way["draws_by_label"])
            for member in figures["members"].values()
            for way in member.get("composition", {}).get("drawings", {}).values()
        ),
        [],
    )
    return {"likelihoods": likelihoods, "drawings": drawings, "labels": labels}


def _nothing(figures: Mapping[str, Any], outside: Mapping[str, Pixels], levels: int) -> View:
    """A column per set: the share that is rejected, or labelled with confidence."""
    rows = []
    for name, member in figures["members"].items():
        whats = dict.fromkeys(what for row in member["outside"].values() for what in row)
        for what in whats:
            shares = [member["outside"].get(x, {}).get(what) for x in outside]
            cells = ["" if share is None else format_figure(share, "share") for share in shares]
            rows.append({"name": name, "what": what, "shares": cells, "bad": what != "rejected"})
    heads = [
        {"name": words(name), "picture": sheet(tiles(x, levels), f"one of {words(name)}", 1)}
        for name, x in outside.items()
    ]
    return {"rows": rows, "heads": heads, "alpha": figures["alpha"]} if rows else None


def _probed(figures: Mapping[str, Any]) -> View:
    """A column per number of labelled pictures."""
    pixels = figures.get("probe_of_pixels", {})
    rows = []
    for name, member in figures["members"].items():
        if (features := member.get("features")) is None:
            continue
        size = features["dimensions"]
        components = features["probe_of_principal_components"]
        rows.append({"name": name, "size": size, "shares": _shares(features["probe"], pixels)})
        title = f"as many principal components as {name} has features"
        rows.append({"name": title, "size": size, "shares": _shares(components, pixels)})
    if not rows:
        return None
    rows.append({"name": "pixels", "size": "", "shares": _shares(pixels, pixels)})
    return {"rows": rows, "labelled": list(pixels)}


def _expense(figures: Mapping[str, Any]) -> View:
    members = figures["members"]
    columns = list(dict.fromkeys(c for m in members.values() for c in m["milliseconds"]))
    rows = [
        {"name": name, "cells": [_format_optional(member["milliseconds"].get(c)) for c in columns]}
        for name, member in members.items()
    ]
    return {"rows": rows, "columns": columns}


def _families(member: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for names in member["models"].values() for name in names))


def _kind(nats: Mapping[str, Any]) -> str:
    """How a bound on -log p(x) was measured, if it is one, since exact values were not so."""
    if nats["kind"] != "bound":
        return ""
    size = f" on {format_figure(nats['test_size'])} pictures" if "test_size" in nats else ""
    return f"bound, by PyTorch{size}"


def _measured(nats: Mapping[str, Any]) -> dict[str, Any]:
    return {key: nats[key] for key in ("mean", "standard_error")}


def _format_optional(figure: Any, kind: Any = "plain") -> str:
    return "" if figure is None else format_figure(figure, kind)


def _shares(accuracies: Mapping[str, float], sizes: Mapping[str, float]) -> list[str]:
    return [_format_optional(accuracies.get(size), "share") for size in sizes]
