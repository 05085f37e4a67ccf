"""The frame of a page: a heading, and sections with one template each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from likely_export.report.subject import View


class Heading(NamedTuple):
    """Heading of a page."""

    kind: str
    name: str
    version: str = ""


def rendered(heading: Heading, lead: str, sections: Iterable[tuple[str, str, View]]) -> str:
    """Renders a page as HTML.

    Args:
        heading: heading of the page.
        lead: a sentence below the heading; empty for none.
        sections: template's name, title and view of each section; None as view leaves it out.
    """
    environment = Environment(
        loader=PackageLoader("likely_export.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = [section for section in sections if section[2] is not None]
    return environment.get_template("page.html").render(
        kind=heading.kind,
        heading=heading.name,
        version=heading.version,
        lead=lead,
        sections=shown,
    )
