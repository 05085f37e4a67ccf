"""Plots the demo's figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from likely import Scores
from likely.answers import Floats, Pixels

MOST_NATS = 8.0  # top of the colour scale, nats per pixel: one extreme pixel must not darken all
INK = "#1b2a41"
ACCEPTED, REJECTED = "#2a7f62", "#c0392b"
COLOURS = ("#e69f00", "#7f7f7f", "#b07aa1", "#c0392b", "#56b4e9", "#8c6d31")
STYLE: Any = {
    "font.size": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "savefig.dpi": 150,
}


@dataclass(frozen=True)
class Example:
    """One picture and its scores.

    Attributes:
        name: title of the picture.
        x: uint8 (h, w), levels.
        surprise: float32 (h, w), -log p of each pixel in nats.
        log_px: log p(x) in nats.
        p_value: calibrated p-value, in (0, 1].
        rejected: whether the picture is an outlier at the request's alpha.
    """

    name: str
    x: Pixels
    surprise: Floats
    log_px: float
    p_value: float
    rejected: bool


def generated(path: Path, rows: Sequence[Pixels], labels: Sequence[str]) -> None:
    """Plots a grid of drawn pictures: one row per label, each uint8 (n, 1, h, w)."""
    levels = 1 + int(max(pictures.max() for pictures in rows))
    longest = max(map(len, labels))
    size, left = (15, 0.09) if longest < 3 else (9, 0.16)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 7.0))
        grid = figure.subplots(
            len(rows), len(rows[0]),
            gridspec_kw={
                "wspace": 0.08, "hspace": 0.08, "left": left, "right": 0.98, "top": 0.9,
                "bottom": 0.02,
            },
        )  # fmt: skip
        figure.suptitle("Drawn from p(x|y): one row for each label", y=0.95)
        for label, axes, pictures in zip(labels, grid, rows, strict=True):
            for ax, x in zip(axes, pictures[:, 0], strict=True):
                _picture(ax, x, levels=levels)
            axes[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=size)
        figure.savefig(path)


def surprise(path: Path, examples: Sequence[Example], alpha: float) -> None:
    """Plots pictures above their surprise maps, on a common scale of nats."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.2 * len(examples) + 1.1, 3.75))
        grid = figure.subplots(
            2, len(examples),
            gridspec_kw={
                "wspace": 0.12, "hspace": 0.06, "left": 0.055, "right": 0.92, "top": 0.81,
                "bottom": 0.17,
            },
        )  # fmt: skip
        for example, (above, below) in zip(examples, grid.T, strict=True):
            colour = REJECTED if example.rejected else ACCEPTED
            _picture(above, example.x, colour)
            above.set_title(example.name, fontsize=9.5)
            shown = below.imshow(example.surprise, cmap="magma", vmin=0, vmax=MOST_NATS)
            _bare(below, colour)
            verdict = "rejected" if example.rejected else "accepted"
            below.set_xlabel(
                f"log p {example.log_px:.0f}\np-value {example.p_value:.2g}\n{verdict}",
                color=colour, fontsize=8.5,
            )  # fmt: skip
        grid[0, 0].set_ylabel("picture")
        grid[1, 0].set_ylabel("surprise")
        figure.suptitle(
            f"What surprises the model: how much every pixel adds to -log p(x). "
            f"Verdicts at alpha = {alpha:g}",
            x=0.055, y=0.965, ha="left",
        )  # fmt: skip
        bar = figure.colorbar(shown, cax=figure.add_axes((0.935, 0.17, 0.012, 0.64)), extend="max")
        bar.set_label("nats per pixel")
        figure.savefig(path)


def likelihoods(path: Path, digits: Scores, others: Mapping[str, Scores]) -> None:
    """Plots log p(x) of digits and of other pictures, and beside it their rates of rejection."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12, 5.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        _histograms(left, digits, others)
        _rejections(right, digits, others)
        figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=8)
        figure.savefig(path)


def _histograms(ax: Axes, digits: Scores, others: Mapping[str, Scores]) -> None:
    everything = np.concatenate([digits.log_px, *(scores.log_px for scores in others.values())])
    # Without this quantile, a few noise pictures would squeeze all others into a corner.
    bins = np.linspace(np.quantile(everything, 0.002), everything.max() + 5, 70).tolist()
    for scores, colour in zip(others.values(), COLOURS, strict=True):
        weights = np.full(len(scores.log_px), 1 / len(scores.log_px))
        clipped = np.clip(scores.log_px, bins[0], bins[-1])
        ax.hist(clipped, bins, weights=weights, histtype="stepfilled", alpha=0.35, color=colour)
        ax.hist(clipped, bins, weights=weights, histtype="step", color=colour)
    weights = np.full(len(digits.log_px), 1 / len(digits.log_px))
    ax.hist(digits.log_px, bins, weights=weights, histtype="step", color=INK, linewidth=2.2)
    ax.set_ylim(0, 0.3)
    ax.set_xlabel("log p(x) in nats")
    ax.set_ylabel("share of pictures")
    ax.set_title("Log-likelihoods", loc="left")


def _rejections(ax: Axes, digits: Scores, others: Mapping[str, Scores]) -> None:
    alphas = np.geomspace(0.004, 1, 200)

    def share(scores: Scores) -> Any:
        return (scores.p_value[:, None] <= alphas).mean(0)

    for (name, scores), colour in zip(others.items(), COLOURS, strict=True):
        ax.plot(alphas, share(scores), color=colour, linewidth=1.8, label=name)
    ax.plot(alphas, share(digits), color=INK, linewidth=2.4, label="held-out digits")
    ax.plot(alphas, alphas, color=INK, linewidth=1, linestyle=":", label="guaranteed by alpha")
    ax.set_xscale("log")
    ax.set_ylim(0, 1.03)
    ax.set_xlabel("alpha, the rate of false rejections that the caller accepts")
    ax.set_ylabel("share rejected")
    ax.set_title("What calibrated p-values reject", loc="left")


def _picture(ax: Axes, x: Pixels, edge: str = "#c9ced6", levels: int = 17) -> None:
    ax.imshow(x, cmap="gray_r", vmin=0, vmax=levels - 1)
    _bare(ax, edge)


def _bare(ax: Axes, edge: str) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set(visible=True, color=edge, linewidth=1.4)
