"""The report of a bundle's evaluation: one page that can be mailed, printed and archived.

`page.html` is the frame. Each section is a function of a `Subject` here. It returns the view
that the template of the same name shows, or None if there is nothing to show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from likely.bundle import Manifest
from likely_export.material import Material
from likely_export.report.card import card, reproduction
from likely_export.report.frame import Heading, rendered
from likely_export.report.generation import completions, copies, draws
from likely_export.report.headline import every_figure, headline
from likely_export.report.labels import classification
from likely_export.report.maps import explanations
from likely_export.report.outliers import promises, separation
from likely_export.report.subject import Subject, View

SECTIONS: tuple[tuple[str, str, Callable[[Subject], View]], ...] = (
    ("headline", "In short", headline),
    ("draws", "What it draws", draws),
    ("completions", "What it completes", completions),
    ("copies", "Copies or inventions", copies),
    ("separation", "Outliers", separation),
    ("promises", "False rejections", promises),
    ("classification", "Labels", classification),
    ("explanations", "Why", explanations),
    ("card", "Model card", card),
    ("reproduction", "How to make it again", reproduction),
    ("every_figure", "All figures", every_figure),
)


def page(manifest: Manifest, figures: Mapping[str, Any], material: Material) -> str:
    """Returns the report as self-contained HTML, without scripts.

    Args:
        manifest: manifest of the bundle.
        figures: its `evaluation.json`; figures that are missing are left out of the report.
        material: the pictures and numbers to show beside the figures.
    """
    subject = Subject(manifest, figures, material)
    sections = ((name, title, view(subject)) for name, title, view in SECTIONS)
    heading = Heading("Evaluation of a bundle", manifest.name, manifest.version)
    return rendered(heading, manifest.description, sections)
