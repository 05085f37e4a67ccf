"""The frame of a page: a heading, and sections that each have a template of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from likely_export.report.subject import View


class Heading(NamedTuple):
    """What a page is headed by."""

    kind: str
    name: str
    version: str = ""


def rendered(heading: Heading, lead: str, sections: Iterable[tuple[str, str, View]]) -> str:
    """The page as HTML.

    Args:
        heading: of the page.
        lead: a sentence below it; none if empty.
        sections: name of the template, title, and what it shows; without that it is left out.
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
