"""Where the nats of a picture come from, and which pixels favour which label."""

from __future__ import annotations

from typing import Any

import numpy as np

from likely_export.report.pictures import coloured, ramp, sheet, tiles
from likely_export.report.subject import Subject, View

SURPRISE, SPEAKING = "magma", "RdBu_r"
SIZE = 84
MOST = 12


def explanations(subject: Subject) -> View:
    """A few pictures with their surprise maps, and maps of which of two labels pixels favour."""
    explained, labels = subject.material.explained, subject.material.labels
    if explained is None or not len(explained.x):
        return None
    shown = tiles(explained.x[:MOST], subject.material.levels)
    surprise = explained.surprise[:MOST].sum(1, dtype=np.float64)
    most = _limit(surprise)
    maps = coloured(surprise, SURPRISE, 0, most)
    view: dict[str, Any] = {
        "most": f"{most:.2g}",
        "ramp": ramp(SURPRISE),
        "compared": None,
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
    if (compared := explained.compared) is not None:
        speaking = compared.maps[:MOST].sum(1, dtype=np.float64)
        strongest = _limit(np.abs(speaking))
        maps = coloured(speaking, SPEAKING, -strongest, strongest)
        view["compared"] = {
            "strongest": f"{strongest:.2g}",
            "ramp": ramp(SPEAKING),
            "patch": compared.patch,
        }
        for at, card in enumerate(view["cards"]):
            first, second = (labels[label] for label in compared.pair[at])
            alt = f"what speaks for {first} over {second} in test picture {at + 1}"
            card |= {
                "speaking": sheet(maps[at : at + 1], alt, 1, SIZE),
                "first": first,
                "second": second,
                "log_ratio": f"{compared.log_ratio[at]:+.1f}".replace("-", "−"),
            }
    return view


def _limit(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """The end of a colour scale: a quantile, so that extreme pixels do not darken all others."""
    return max(float(np.quantile(values, 0.995)), 1e-3)
