"""What a bundle is worth, computed from the bundle alone through ONNX Runtime."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binom
from sklearn.metrics import roc_auc_score

from likely.answers import Classifications, Doubles, Pixels, Scores, Verdict
from likely.bundle import Bundle, Role
from likely.engine import Engine
from likely.graphs import Device
from likely_export import baselines
from likely_export.data import Dataset

EVALUATION = "evaluation.json"
BATCH = 16
NATS_PER_BIT = np.log(2)


def write(bundle: Path, data: Dataset, alphas: Sequence[float]) -> dict[str, Any]:
    """Evaluates a bundle and leaves the result in it as `evaluation.json`."""
    found = evaluate(bundle, data, alphas)
    (bundle / EVALUATION).write_text(json.dumps(found, indent=1) + "\n")
    return found


def evaluate(bundle: Path, data: Dataset, alphas: Sequence[float]) -> dict[str, Any]:
    """The figures of a bundle on the test part, beside baselines fitted on the same training part.

    Args:
        bundle: verified and loaded as a server would.
        data: the data set that its recipe names.
        alphas: rates of false rejections to check.

    Returns:
        Values for JSON: nats and bits/dim with standard errors, rates, areas under curves.
    """
    engine = Engine.load(Bundle.open(bundle), device=Device("cpu"), threads=2, max_batch=BATCH)
    try:
        return asyncio.run(_evaluate(engine, data, alphas))
    finally:
        engine.close()


async def _evaluate(engine: Engine, data: Dataset, alphas: Sequence[float]) -> dict[str, Any]:
    manifest = engine.manifest
    alphas = [alpha for alpha in alphas if alpha >= manifest.calibration.finest_alpha]
    test = data.test
    scores = await engine.score(test.x, alphas[-1])
    found: dict[str, Any] = {
        "test_size": len(test),
        "nll_nats": _mean(-scores.log_px),
        "bits_per_dim": _mean(scores.bits_per_dim),
        "false_rejection": {
            f"{alpha:g}": _rejection(scores.p_value <= alpha, alpha) for alpha in alphas
        },
        "outliers": {
            name: _outliers(
                scores, await engine.score(make(test.x, manifest.levels), alphas[-1]), alphas
            )
            for name, make in OUTLIERS.items()
        },
        "parity_nats": manifest.parity_nats,
        "baselines": baselines.evaluate(data),
    }
    if Role.CONDITIONAL in manifest.graphs:
        found |= _labels(await engine.classify(test.x, alphas[-1]), data)
    return found


def _labels(answer: Classifications, data: Dataset) -> dict[str, Any]:
    y = data.test.y
    rows = np.arange(len(y))
    kept = answer.verdict == Verdict.ACCEPTED
    return {
        "conditional_nll_nats": _mean(-answer.log_pxy[rows, y]),
        "accuracy": _mean((answer.label == y).astype(float)),
        "accuracy_of_accepted": _mean((answer.label == y)[kept].astype(float)),
        "label_nll_nats": _mean(-np.log(np.maximum(answer.posterior[rows, y], 1e-300))),
    }


def _outliers(inliers: Scores, outliers: Scores, alphas: Sequence[float]) -> dict[str, Any]:
    truth = np.repeat([0, 1], [len(inliers.p_value), len(outliers.p_value)])
    return {
        "auroc": _auroc(truth, -inliers.p_value, -outliers.p_value),
        "likelihood_only_auroc": _auroc(truth, -inliers.log_px, -outliers.log_px),
        "rejected": {f"{alpha:g}": float(np.mean(outliers.p_value <= alpha)) for alpha in alphas},
    }


def _auroc(truth: Doubles, inliers: Doubles, outliers: Doubles) -> float:
    return float(roc_auc_score(truth, np.concatenate([inliers, outliers])))


def _rejection(rejected: npt.NDArray[np.bool_], alpha: float) -> dict[str, Any]:
    n = len(rejected)
    low, high = binom.interval(0.99, n, alpha)
    return {"rate": float(np.mean(rejected)), "binomial_99": [low / n, high / n]}


def _mean(values: Doubles) -> dict[str, float]:
    error = float(np.std(values, ddof=1) / np.sqrt(len(values)))
    return {"mean": float(np.mean(values)), "standard_error": error}


def _noise(x: Pixels, levels: int) -> Pixels:
    generator = np.random.Generator(np.random.Philox(key=[0, 1]))
    return generator.integers(0, levels, x.shape).astype(np.uint8)


OUTLIERS: dict[str, Callable[[Pixels, int], Pixels]] = {
    "noise": _noise,
    "blank": lambda x, levels: np.zeros_like(x),  # noqa: ARG005
    "inverted": lambda x, levels: (levels - 1 - x).astype(np.uint8),
}
