"""The subject of a report, from which all sections are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from likely.bundle import Manifest
from likely_export.corruptions import INLIERS
from likely_export.material import Material, PictureSet
from likely_export.report.text import ERROR, find, joined

# What a section passes to its template; None if it has nothing to show.
View = dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Subject:
    """A bundle, its figures, and the material behind them."""

    manifest: Manifest
    figures: Mapping[str, Any]
    material: Material

    def figure(self, path: str) -> Any:
        """Returns the figure at this path, or None."""
        return find(self.figures, path)

    def measured(self, path: str) -> Any:
        """Returns the figure at this path, with its standard error if there is one."""
        return joined(self.figure(path), self.figure(f"{path}{ERROR}"))

    def table(self, name: str) -> Mapping[str, Any]:
        """Returns the figures under this name; empty if there are none."""
        table = self.figures.get(name)
        return table if isinstance(table, Mapping) else {}

    @property
    def inliers(self) -> PictureSet | None:
        """The test part."""
        return self.material.sets.get(INLIERS)

    @property
    def outliers(self) -> dict[str, PictureSet]:
        """All other sets, the hardest ones first."""
        figures = self.table("outliers")
        others = {name: one for name, one in self.material.sets.items() if name != INLIERS}
        return dict(sorted(others.items(), key=lambda item: _auroc(figures.get(item[0]))))


def _auroc(figures: Any) -> float:
    return float(figures.get("auroc", 2)) if isinstance(figures, Mapping) else 2.0
