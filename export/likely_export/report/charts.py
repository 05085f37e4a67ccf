"""Charts as inline SVG, coloured by variables of the page, which is light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from scipy.stats import binomtest

from likely.answers import Doubles, Labels
from likely_export.material import Labelled, PictureSet
from likely_export.measures import BAND, BINS, rejection_band
from likely_export.report.text import words

# Colours that matplotlib draws with, and the page's variables for them; series by Okabe and Ito.
INK, FAINT, INLIER_COLOUR = "#1b2a41", "#b9c0ca", "#5b6b80"
SERIES = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
VARIABLES = {
    INK: "--ink",
    FAINT: "--faint",
    INLIER_COLOUR: "--in",
    **{colour: f"--series-{at}" for at, colour in enumerate(SERIES)},
}
OUTLIER_COLOUR, MAIN = SERIES[:2]
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 2, 1, 2)), "-", (0, (5, 2)))
HIGHLIGHTED = len(SERIES)
STYLE: Any = {
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.labelsize": 11,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "figure.facecolor": "none",
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "likely",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "xtick.labelsize": 10,
    "ytick.color": INK,
    "ytick.labelsize": 10,
}
NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
ROW = 0.34  # inches
TICKS = (-100, -10, -3, 0, 3, 10, 100, 1000, 10_000, 100_000)

Rate = tuple[float, tuple[float, float] | None]


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart of a page.

    Attributes:
        svg: an SVG element.
        alt: description of what it shows.
    """

    svg: Markup
    alt: str


def ridges(
    inliers: PictureSet, outliers: Mapping[str, PictureSet], auroc: Mapping[str, float]
) -> Chart:
    """Histograms of -log p(x) and of the score, one row per set, over those of the test part.

    Args:
        inliers: the test part.
        outliers: sets by name, from top to bottom.
        auroc: AUROC of each set, to write beside its row.
    """
    alt = (
        "Two columns of histograms, by likelihood alone and by the score, one row for each of "
        f"{', '.join(map(words, outliers))}: the set in colour over the test part in grey."
    )
    size = (12, 1.3 + ROW * len(outliers))
    return _chart("ridges", size, alt, partial(_ridges, inliers, outliers, auroc))


def rocs(inliers: PictureSet, outliers: Mapping[str, PictureSet]) -> Chart:
    """ROC curves: share of outliers against share of test pictures rejected, by two scores.

    The scores are the likelihood alone and the score that decides.

    Args:
        inliers: the test part.
        outliers: sets by name; the first few are highlighted.
    """
    first = ", ".join(map(words, list(outliers)[:HIGHLIGHTED]))
    alt = (
        "ROC curves with a logarithmic axis of false rejections, by likelihood alone and by the "
        f"score; highlighted are {first}."
    )
    return _chart("rocs", (12, 4.6), alt, partial(_rocs, inliers, outliers))


def uniformity(p_value: Doubles, calibration: int, y: Labels | None = None) -> Chart:
    """The distribution of the test part's p-values, and what is guaranteed.

    Args:
        p_value: (n,).
        calibration: number of scores that they were ranked against.
        y: labels to show separately, (n,).
    """
    alt = (
        "A histogram of the test part's p-values with the level line of uniformity, and the share "
        f"rejected over alpha with the {100 * BAND:.0f} % band around the promise."
    )
    return _chart("uniformity", (12, 4), alt, partial(_uniformity, p_value, calibration, y))


def rejections(rates: Mapping[str, Mapping[str, Rate]]) -> Chart:
    """False rejection rates over their bands, one column per alpha and one row per name.

    Args:
        rates: rates with bands by alpha and name; every alpha has the same names.
    """
    alt = "Rates of false rejections as dots on their bands; the table tells them too."
    size = (12, 1.2 + 0.26 * max(map(len, rates.values())))
    return _chart("rejections", size, alt, partial(_rejections, rates))


def reliability(labelled: Labelled, rule: str) -> Chart:
    """A reliability diagram: accuracy against the posterior of the assigned label, in 15 bins."""
    alt = "Reliability diagram: dots with intervals beside the diagonal, and counts below."
    return _chart(f"reliability_{rule}", (6, 5), alt, partial(_reliability, labelled))


def accuracy_of_kept(labelled: Labelled, rule: str) -> Chart:
    """Accuracy among the pictures kept, against the share of pictures set aside, by one rule."""
    alt = "Accuracy over the share of pictures set aside, by three orders of doing so."
    return _chart(f"accuracy_of_kept_{rule}", (6, 5), alt, partial(_accuracy_of_kept, labelled))


def _ridges(
    inliers: PictureSet,
    outliers: Mapping[str, PictureSet],
    auroc: Mapping[str, float],
    figure: Figure,
) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    _histograms(left, inliers.nats, [one.nats for one in outliers.values()], "log")
    scores = [one.unusualness for one in outliers.values()]
    _histograms(right, inliers.unusualness, scores, "asinh")
    left.set_yticks(range(len(outliers)), [words(name) for name in outliers])
    left.set_xlabel("−log p(x) in nats")
    right.set_xlabel("score that is ranked")
    left.set_title("Likelihood alone")
    right.set_title("What decides")
    if rejected := inliers.unusualness[inliers.p_value <= 0.05].tolist():
        right.axvline(min(rejected), color=INK, linewidth=1, linestyle=":")
        _note(right, "rejected at alpha 0.05 →", (min(rejected), 1), (3, -3), "top")
    for row, name in enumerate(outliers):
        if name in auroc:
            right.annotate(
                f"{auroc[name]:.4f}", (1, row), (4, 2), va="bottom", fontsize=10,
                xycoords=("axes fraction", "data"), textcoords="offset points",
            )  # fmt: skip
    if auroc:
        _note(right, "AUROC", (1, 1), (4, 4), "bottom", ("axes fraction", "axes fraction"))


def _histograms(ax: Axes, inliers: Doubles, outliers: Sequence[Doubles], scale: str) -> None:
    low, high = np.quantile(np.concatenate([inliers, *outliers]), [0.001, 0.999])
    if scale == "log":
        low = max(low, 1e-1)  # blank pictures cost hardly any nats
        edges = np.geomspace(low, max(high, 2 * low) * 1.02, 72)
    else:
        edges = np.sinh(np.linspace(np.arcsinh(low), np.arcsinh(high) + 0.1, 72))
    behind = _heights(inliers, edges)
    for row, values in enumerate(outliers):
        for heights, colour, alpha in (
            (behind, INLIER_COLOUR, 0.35),
            (_heights(values, edges), OUTLIER_COLOUR, 0.45),
        ):
            top = row - 0.84 * heights
            ax.stairs(
                top, edges, baseline=row, fill=True, color=colour, alpha=alpha, linewidth=0
            )  # fmt: skip
            ax.stairs(top, edges, baseline=row, color=colour, linewidth=0.9)
    ax.set_xscale(scale)
    if scale == "asinh":
        ax.set_xticks([tick for tick in TICKS if edges[0] <= tick <= edges[-1]])
    elif edges[-1] < 100 * edges[0]:  # powers of ten alone would be too few ticks
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    _plain(ax.xaxis)
    ax.set_xlim(edges[0], edges[-1])
    ax.set_ylim(len(outliers) - 0.9, -1.2)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)


def _heights(values: Doubles, edges: npt.NDArray[np.floating]) -> Doubles:
    inside = np.clip(values, edges[0], np.nextafter(edges[-1], edges[0]))
    counts = np.histogram(inside, edges)[0]
    return np.asarray(counts / counts.max(), np.float64)


def _rocs(inliers: PictureSet, outliers: Mapping[str, PictureSet], figure: Figure) -> None:
    axes = figure.subplots(1, 2, sharey=True)
    floor = max(1e-4, 1 / len(inliers.nats))
    rates = np.geomspace(floor, 1, 160)
    for ax, name in zip(axes, ("nats", "unusualness"), strict=True):
        thresholds = np.quantile(getattr(inliers, name), 1 - rates)
        for at, (label, one) in reversed(list(enumerate(outliers.items()))):
            caught = (getattr(one, name)[:, None] > thresholds).mean(0)
            if at < HIGHLIGHTED:
                ax.plot(rates, caught, color=SERIES[at], linestyle=DASHES[at], label=words(label))
            else:
                ax.plot(rates, caught, color=FAINT, linewidth=0.9)
        ax.plot(rates, rates, color=INK, linewidth=1, linestyle=":")
        ax.axvline(0.05, color=FAINT, linewidth=1)
        ax.set_xscale("log")
        _plain(ax.xaxis)
        ax.set_xlim(floor, 1)
        ax.set_ylim(0, 1.02)
        ax.set_xlabel("share of test pictures rejected")
    axes[0].set_ylabel("share of outliers rejected")
    axes[0].set_title("Likelihood alone")
    axes[1].set_title("What decides")
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=HIGHLIGHTED)


def _uniformity(p_value: Doubles, calibration: int, y: Labels | None, figure: Figure) -> None:
    n = len(p_value)
    left, right = figure.subplots(1, 2)
    if (band := rejection_band(0.05, calibration, n)) is not None:
        left.axhspan(20 * band[0], 20 * band[1], color=FAINT, alpha=0.5, linewidth=0)
    edges, weights = np.linspace(0, 1, 21).tolist(), np.full(n, 20 / n)
    left.hist(p_value, edges, weights=weights, color=MAIN, histtype="step", linewidth=1.8)
    left.axhline(1, color=INK, linewidth=1, linestyle=":")
    left.set_ylim(0, None)
    left.set_xlim(0, 1)
    left.set_xlabel("p-value")
    left.set_ylabel("density")
    left.set_title("Histogram")
    alphas = np.geomspace(max(1 / (calibration + 1), 1 / n), 0.5, 60)
    for label in np.unique(y) if y is not None else ():
        _rates(right, p_value[y == label], alphas, color=FAINT, linewidth=0.8)
    few = alphas[::3]
    bands = [rejection_band(float(alpha), calibration, n) or (0.0, 0.0) for alpha in few]
    lowest, highest = np.maximum(np.array(bands).T, 1e-9)
    right.fill_between(few, lowest, highest, color=FAINT, alpha=0.5, linewidth=0)
    _rates(right, p_value, alphas, color=MAIN)
    right.plot(alphas, alphas, color=INK, linewidth=1, linestyle=":")
    right.set_xscale("log")
    right.set_yscale("log")
    _plain(right.xaxis)
    _plain(right.yaxis)
    right.set_ylim(alphas[0] / 2, 0.6)
    right.set_xlim(alphas[0], 0.5)
    right.set_xlabel("alpha asked for")
    right.set_ylabel("share rejected")
    right.set_title("False rejections")


def _rates(ax: Axes, p_value: Doubles, alphas: npt.NDArray[np.floating], **look: Any) -> None:
    rates = (p_value[:, None] <= alphas).mean(0)
    ax.plot(alphas, np.where(rates > 0, rates, np.nan), **look)


def _rejections(rates: Mapping[str, Mapping[str, Rate]], figure: Figure) -> None:
    axes = figure.subplots(1, len(rates), sharey=True, squeeze=False)[0]
    for ax, (alpha, by_name) in zip(axes, rates.items(), strict=True):
        for row, (rate, band) in enumerate(by_name.values()):
            if band is not None:
                ax.barh(row, band[1] - band[0], 0.62, band[0], color=FAINT, alpha=0.6, linewidth=0)
            ax.plot(rate, row, marker="o", color=MAIN, markersize=5)
        ax.axvline(float(alpha), color=INK, linewidth=1, linestyle=":")
        ax.set_xlim(0, None)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.tick_params(axis="y", length=0)
        ax.set_title(f"alpha = {alpha}")
        ax.set_xlabel("share rejected")
        ax.set_yticks(range(len(by_name)), list(by_name))
    axes[0].invert_yaxis()


def _reliability(labelled: Labelled, figure: Figure) -> None:
    posterior, y = labelled.posterior, labelled.y
    sure, right = posterior.max(1), posterior.argmax(1) == y
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=":")
    for k in np.unique(bins):
        kept = bins == k
        n, hits, at = int(kept.sum()), int(right[kept].sum()), float(sure[kept].mean())
        interval = binomtest(hits, n).proportion_ci(method="wilson")
        above.plot([at, at], [interval.low, interval.high], color=MAIN, linewidth=1.2)
        above.plot(at, hits / n, marker="o", markersize=6, color=MAIN)
        below.bar((k + 0.5) / BINS, n, 0.9 / BINS, color=INLIER_COLOUR, linewidth=0)
    above.set_ylim(0, 1.03)
    above.set_xlim(0, 1.01)
    above.set_ylabel("share of right labels")
    below.set_yscale("log")
    _plain(below.yaxis)
    below.set_ylim(0.7, None)
    below.set_ylabel("pictures")
    below.set_xlabel("probability of the label given")


def _accuracy_of_kept(labelled: Labelled, figure: Figure) -> None:
    right = labelled.posterior.argmax(1) == labelled.y
    aside = np.linspace(0, 0.5, 101)
    kept = np.maximum(1, np.round((1 - aside) * len(right))).astype(int)
    ax = figure.subplots()
    for name, trust, colour, dash in (
        ("the best order there is", right.astype(np.float64), INK, ":"),
        ("least sure label first", labelled.posterior.max(1), MAIN, "-"),
        ("smallest p-value first", labelled.p_value, OUTLIER_COLOUR, DASHES[1]),
    ):
        hits = np.cumsum(right[np.argsort(-trust, kind="stable")])
        ax.plot(aside, hits[kept - 1] / kept, color=colour, linestyle=dash, label=name)
    bottom = ax.get_ylim()[0]
    ax.set_ylim(bottom, 1 + (1 - bottom) * 0.04)
    ax.set_xlim(0, 0.5)
    ax.set_xlabel("share of pictures set aside")
    ax.set_ylabel("accuracy among the others")
    ax.grid(axis="y")
    ax.legend(loc="best")


def _plain(axis: Axis) -> None:
    """Writes powers of ten as plain numbers, because labels are not parsed as mathematics."""
    axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}".replace("-", "−")))
    axis.set_minor_formatter(NullFormatter())


def _note(
    ax: Axes,
    text: str,
    at: tuple[float, float],
    offset: tuple[float, float],
    side: str,
    where: Any = ("data", "axes fraction"),
) -> None:
    ax.annotate(
        text, at, offset, xycoords=where, textcoords="offset points", va=side, fontsize=10
    )  # fmt: skip


def _chart(
    name: str, size: tuple[float, float], alt: str, paint: Callable[[Figure], None]
) -> Chart:
    """Draws a chart of this size.

    Args:
        name: a name that no other chart of the page has.
        size: width and height in inches; an inch is 72 CSS pixels.
        alt: description of what the chart shows.
        paint: draws on the figure.
    """
    file = io.StringIO()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure)
        figure.savefig(file, format="svg", metadata=NO_METADATA)
    width, height = (f"{72 * inches:.0f}" for inches in size)
    start = (
        f'<svg role="img" aria-label="{escape(alt)}" viewBox="0 0 {width} {height}" '
        f'style="max-width:{width}px">'
    )
    return Chart(Markup(start + _inlined(file.getvalue(), name) + "</svg>"), alt)  # noqa: S704


def _inlined(svg: str, name: str) -> str:
    """The content of an SVG, for a page with other charts: unique ids, and the page's colours."""
    match = re.search(r"<svg[^>]*>\s*<defs>\s*<style.*?</defs>(.*)</svg>", svg, re.DOTALL)
    assert match is not None, "matplotlib writes its drawings in another way"
    return re.sub(r"<[^>]*>", lambda tag: _tag(tag.group(), name), match.group(1))


def _tag(tag: str, name: str) -> str:
    tag = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", tag)
    tag = re.sub(r"(\d\.\d\d)\d+", r"\1", tag)  # a hundredth of a pixel is enough
    tag = re.sub(r"'?DejaVu Sans'?", "inherit", tag)
    for colour, variable in VARIABLES.items():
        tag = tag.replace(colour, f"var({variable})")
    return tag
