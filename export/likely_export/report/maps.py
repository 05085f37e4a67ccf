"""Where the nats of a picture come from, and which pixels speak for which label."""

from __future__ import annotations

from typing import Any

import numpy as np

from likely_export.report.pictures import coloured, ramp, sheet, tiles
from likely_export.report.subject import Subject, View

SURPRISE, EVIDENCE = "magma", "RdBu_r"
SIZE = 84
MOST = 12


def explanations(subject: Subject) -> View:
    """A few pictures with their surprise and evidence maps, and the sums of these."""
    explained, labels = subject.material.explained, subject.material.labels
    if explained is None or not len(explained.x):
        return None
    shown = tiles(explained.x[:MOST], subject.material.levels)
    surprise = explained.surprise[:MOST].sum(1, dtype=np.float64)
    most = _limit(surprise)
    maps = coloured(surprise, SURPRISE, 0, most)
    compared = bool(explained.evidence.size) and bool(explained.pair.size)
    view: dict[str, Any] = {
        "most": f"{most:.2g}",
        "ramp": ramp(SURPRISE),
        "compared": compared,
        "cards": [
            {
                "picture": sheet(shown[at : at + 1], f"test picture {at + 1}", 1, SIZE),
                "surprise": sheet(
                    maps[at : at + 1], f"surprise map of test picture {at + 1}", 1, SIZE
                ),
                "nats": f"{surprise[at].sum():.1f}",
            }
            for at in range(len(shown))
        ],
    }
    if compared:
        evidence = explained.evidence[:MOST].sum(1, dtype=np.float64)
        strongest = _limit(np.abs(evidence))
        maps = coloured(evidence, EVIDENCE, -strongest, strongest)
        view |= {
            "strongest": f"{strongest:.2g}",
            "evidence_ramp": ramp(EVIDENCE),
            "patch": explained.patch,
        }
        for at, card in enumerate(view["cards"]):
            first, second = (labels[label] for label in explained.pair[at])
            alt = f"evidence for {first} over {second} in test picture {at + 1}"
            card |= {
                "evidence": sheet(maps[at : at + 1], alt, 1, SIZE),
                "first": first,
                "second": second,
                "log_odds": f"{explained.log_odds[at]:+.1f}".replace("-", "−"),
            }
    return view


def _limit(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """The end of a colour scale: a few pixels beyond it would darken all others."""
    return max(float(np.quantile(values, 0.995)), 1e-3)
