"""What a report is about, and what its sections are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from likely.bundle import Manifest
from likely_export.corruptions import INLIERS
from likely_export.material import Material, Sets
from likely_export.report.text import ERROR, find, joined

# What a section's template is given; a section without anything to show is None.
View = dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Subject:
    """A bundle, its figures and what they were computed from."""

    manifest: Manifest
    figures: Mapping[str, Any]
    material: Material

    def figure(self, path: str) -> Any:
        """The figure at that path, None where there is none."""
        return find(self.figures, path)

    def measured(self, path: str) -> Any:
        """The same, with its standard error where that is told."""
        return joined(self.figure(path), self.figure(f"{path}{ERROR}"))

    def table(self, name: str) -> Mapping[str, Any]:
        """The figures of that name, none where they are absent."""
        found = self.figures.get(name)
        return found if isinstance(found, Mapping) else {}

    @property
    def inliers(self) -> Sets | None:
        """The test part."""
        return self.material.sets.get(INLIERS)

    @property
    def outliers(self) -> dict[str, Sets]:
        """All other sets, the hardest first."""
        found = self.table("outliers")
        others = {name: one for name, one in self.material.sets.items() if name != INLIERS}
        return dict(sorted(others.items(), key=lambda item: _auroc(found.get(item[0]))))


def _auroc(figures: Any) -> float:
    return float(figures.get("auroc", 2)) if isinstance(figures, Mapping) else 2.0
