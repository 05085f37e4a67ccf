"""Compares Bayes' rule in both directions: p(y|x) p(x) / p(y) and a model's own p(x|y).

Every figure is a function of the bundle, the pictures and the seed. The bundle is queried as a
server would query it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from likely.answers import Acceptance, Doubles, Draws, LabelRule, Labels, Pixels, Verdict
from likely.bundle import Kind, Role
from likely.engine import Engine
from likely_export import measures
from likely_export.data import Split
from likely_export.generated import draw_by_label
from likely_export.judge import Judge

MAX_DRAWS = 1000
SEED = 20261128


async def likelihoods(engine: Engine, part: Split, alpha: float = 0.05) -> dict[str, Any]:
    """Compares p(x|y) by composition with that of the conditional model, and their decisions.

    Args:
        engine: engine of a bundle with a conditional and a discriminative model.
        part: pictures and their labels.
        alpha: accepted rate of false rejections.

    Returns:
        Spearman's rank correlation of the two log p(x|y): over pictures under their own label,
        over all labels of a picture, and over all labels but its own (means over pictures; None
        for fewer than two labels). By each rule, over all pictures: accuracy, label NLL in nats,
        calibration error, and log p(x|y) in nats, exact or a bound. The share of pictures that
        both rules label alike, and the rate of false rejections.
    """
    rules = {rule: await engine.classify(part.x, alpha, rule=rule, both=True) for rule in LabelRule}
    answer, rows = rules[LabelRule.GENERATIVE], np.arange(len(part))
    log_pxy, composed = answer.log_pxy, answer.composed
    graphs = engine.manifest.graphs
    kinds = (
        "exact" if graphs[role].kind == Kind.EXACT else "bound"
        for role in (Role.CONDITIONAL, Role.DENSITY)
    )
    return {
        "pictures": len(part),
        "spearman_of_pictures": measures.rank_correlation(
            log_pxy[rows, part.y], composed[rows, part.y]
        ),
        "spearman_of_labels": _row_correlation(log_pxy, composed),
        "spearman_of_other_labels": _row_correlation(
            _without_own_label(log_pxy, part.y), _without_own_label(composed, part.y)
        ),
        "by": {
            rule.name.lower(): {
                "accuracy": measures.mean(classified.label == part.y),
                "label_nll_nats": measures.mean(measures.label_nats(classified.posterior, part.y)),
                "ece": measures.calibration_error(classified.posterior, part.y),
                "log_pxy_nats": measures.mean(values[rows, part.y]) | {"kind": kind},
            }
            for (rule, classified), values, kind in zip(
                rules.items(), (log_pxy, composed), kinds, strict=True
            )
        },
        "agree": measures.mean(
            rules[LabelRule.GENERATIVE].label == rules[LabelRule.DISCRIMINATIVE].label
        ),
        "rejected": measures.mean(answer.verdict == Verdict.OUTLIER),
    }


async def drawings(
    engine: Engine, judge: Judge, per_label: int, *, seed: int = SEED, draws_by_label: bool = True
) -> dict[str, Any]:
    """Judges whether draws show their label, by acceptance and by the model's own p(x|y).

    Args:
        engine: engine of a bundle with a sampler and a discriminative model.
        judge: an independent classifier that labels the draws.
        per_label: pictures per label.
        seed: seed of the draws.
        draws_by_label: whether the sampler can draw by label itself, so that those draws are judged
            too.
    """
    ways: dict[str, Acceptance | None] = {"acceptance": Acceptance(MAX_DRAWS)}
    if draws_by_label:
        ways["own"] = None
    figures: dict[str, Any] = {}
    for name, acceptance in ways.items():
        labels = len(engine.manifest.labels)
        drawn = await draw_by_label(engine, labels, per_label, seed, acceptance=acceptance)
        figures[name] = _faithfulness_figures(engine, judge, drawn)
    return figures


def noise_pictures(
    shape: tuple[int, int, int], levels: int, n: int, seed: int = 0
) -> dict[str, Pixels]:
    """Pictures without content: uniform noise, black-or-white noise, one level everywhere."""
    generator = np.random.Generator(np.random.Philox(key=[seed, 12]))
    top = levels - 1
    made = {
        "uniform": generator.integers(0, levels, (n, *shape)),
        "binary": generator.integers(0, 2, (n, *shape)) * top,
        "flat": np.broadcast_to(generator.integers(0, levels, (n, 1, 1, 1)), (n, *shape)),
    }
    return {name: np.ascontiguousarray(x, dtype=np.uint8) for name, x in made.items()}


def _faithfulness_figures(engine: Engine, judge: Judge, drawn: Sequence[Draws]) -> dict[str, Any]:
    """How often the judge sees the label in its draws, and the number of draws per picture."""
    draws = [group.draws for group in drawn]
    shown = [
        judge.posterior(group.images[group.accepted]).argmax(1) == label
        for label, group in enumerate(drawn)
    ]
    names = [label.name for label in engine.manifest.labels]
    return {
        "faithfulness": measures.mean(np.concatenate(shown)),
        "faithfulness_by_label": {n: measures.share(s) for n, s in zip(names, shown, strict=True)},
        "kept": sum(map(len, shown)),
        "draws_a_picture": measures.mean(np.concatenate(draws)),
        "draws_by_label": {n: measures.mean(d) for n, d in zip(names, draws, strict=True)},
    }


def _without_own_label(values: Doubles, y: Labels) -> Doubles:
    """The values of all labels except a picture's own, (n, labels - 1)."""
    n, labels = values.shape
    return values[np.arange(labels) != y[:, None]].reshape(n, labels - 1)


def _row_correlation(a: Doubles, b: Doubles) -> dict[str, float] | None:
    """The mean of Spearman's rank correlations within rows; None if rows have fewer than two."""
    if a.shape[1] < 2:
        return None
    pairs = zip(a, b, strict=True)
    return measures.mean(np.array([measures.rank_correlation(*pair) for pair in pairs]))
