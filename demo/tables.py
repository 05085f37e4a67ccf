"""The demo's tables, for a terminal with 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text
from scipy.stats import betabinom
from sklearn.metrics import roc_auc_score

from demo.figures import Example
from likely import Classifications, Scores, Verdict
from likely.answers import Doubles, Labels, Pixels

SHADES = " .:-=+*%@"


def rejection(answers: Mapping[str, Mapping[float, Scores]], reference: str) -> Table:
    """Rates of rejection: one row per set of pictures, one column per alpha.

    Args:
        answers: scores by set and alpha.
        reference: name of the in-distribution set.
    """
    alphas = list(answers[reference])
    inside = answers[reference][alphas[0]]
    table = _table(
        f"How plausible is it? {len(inside.log_px)} pictures of each kind, share rejected at alpha"
    )
    table.add_column("pictures", no_wrap=True)
    table.add_column("log p(x)", justify="right")
    for alpha in alphas:
        table.add_column(f"{alpha:g}", justify="right")
    for name in ("AUROC", "of log p"):
        table.add_column(name, justify="right")
    for name, by_alpha in answers.items():
        one = by_alpha[alphas[0]]
        shares = [float(np.mean(by_alpha[a].verdict == Verdict.OUTLIER)) for a in alphas]
        areas = ["", ""]
        if name != reference:
            areas = [_area(inside.p_value, one.p_value), _area(inside.log_px, one.log_px)]
        table.add_row(
            name,
            f"{one.log_px.mean():.0f}",
            *(_percent(share) for share in shares),
            *areas,
            style="bold" if name == reference else "",
        )
    return table


def promise(alpha: float, calibration: int, test: int) -> str:
    """A sentence with the range of rejected shares of digits for 99 % of calibrations.

    The rejection rate of one calibration of n pictures follows Beta(k, n + 1 - k), with
    k = floor(alpha (n + 1)) (Vovk, 2012).

    Args:
        alpha: the accepted rate of false rejections.
        calibration: number of calibration pictures.
        test: number of digits that were scored.
    """
    k = int(alpha * (calibration + 1) + 1e-9)
    low, high = betabinom.ppf([0.005, 0.995], test, k, calibration + 1 - k) / test
    return (
        "alpha is guaranteed on average over calibrations. With one calibration of "
        f"{calibration} pictures, 99 times in a hundred, {_percent(low)} to {_percent(high)} "
        f"of {test} digits are rejected at {alpha:g}."
    )


def strangers(found: Mapping[str, Mapping[str, Scores]]) -> Table:
    """Scores of each model's draws under each model: one row per set, two columns per model.

    Args:
        found: scores by the model that drew and the model that scored.
    """
    table = _table("A known failure of likelihood, and what calibrated p-values reject")
    table.add_column("drawn by", no_wrap=True)
    for model in found:
        table.add_column(f"bits/dim of {model}", justify="right")
        table.add_column("rejected", justify="right")
    for name, by_model in found.items():
        cells: list[str] = []
        for one in by_model.values():
            cells += [
                f"{one.bits_per_dim.mean():.2f}",
                _percent(float(np.mean(one.verdict == Verdict.OUTLIER))),
            ]
        table.add_row(name, *cells)
    return table


def labels(answer: Classifications, strict: Classifications, y: Labels) -> Table:
    """How often Bayes' rule assigns a label, and how often the label is right."""
    table = _table("Which label does Bayes' rule assign, if any?")
    table.add_column("held-out digits")
    for name in ("share", "labelled right"):
        table.add_column(name, justify="right")
    kept, sure = (a.verdict == Verdict.ACCEPTED for a in (answer, strict))
    for name, rows in (
        ("all of them", np.ones(len(y), dtype=bool)),
        (f"those accepted at alpha {answer.alpha:g}", kept),
        ("those accepted whose posterior is at least 0.9", sure),
    ):
        table.add_row(name, _percent(rows.mean()), _percent((answer.label == y)[rows].mean()))
    return table


def examples(shown: Sequence[Example], posterior: Sequence[str]) -> Table:
    """A few pictures side by side, with their scores and labels."""
    table = _table("One picture at a time")
    for example in shown:
        table.add_column(example.name, justify="center", width=17)
    table.add_row(*(_drawn(example.x) for example in shown))
    table.add_row(*(f"log p(x) {example.log_px:.0f}" for example in shown))
    table.add_row(*(f"p-value {example.p_value:.2g}" for example in shown))
    table.add_row(*posterior)
    table.add_row(
        *(Text("outlier", "red") if e.rejected else Text("accepted", "green") for e in shown)
    )
    return table


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )


def _drawn(x: Pixels) -> Text:
    steps = (x.astype(int) * (len(SHADES) - 1) + 15) // 16
    return Text("\n".join("".join(2 * SHADES[step] for step in row) for row in steps))


def _area(inside: Doubles, outside: Doubles) -> str:
    truth = np.repeat([0, 1], [len(inside), len(outside)])
    return f"{roc_auc_score(truth, -np.concatenate([inside, outside])):.3f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
