"""Figures as text for readers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

Kind = Literal["plain", "share"]
PER_CENT = "\u00a0%"
MEASURED = ("mean", "standard_error")
ERROR = "_standard_error"  # suffix of the name of a figure's standard error


def format_figure(found: Any, kind: Kind = "plain") -> str:
    """Formats a figure, with digits according to its standard error if it has one.

    Args:
        found: a number, a mean with a standard error, a range, a mapping of these, text, or None.
        kind: `share` is formatted in per cent.
    """
    if isinstance(found, Mapping):
        rest = {key: item for key, item in found.items() if key not in MEASURED}
        details = ", ".join(
            f"{words(str(key))} {format_figure(item, kind)}" for key, item in rest.items()
        )
        if len(rest) == len(found):
            return details
        mean, error = (float(found[key]) for key in MEASURED)
        return _measured(mean, error, kind) + (f" ({details})" if rest else "")
    if isinstance(found, list | tuple):
        return (" to " if len(found) == 2 else ", ").join(
            format_figure(item, kind) for item in found
        )
    if found is None:
        return "–"
    if isinstance(found, bool) or not isinstance(found, int | float):
        return str(found)
    if kind == "share":
        return f"{100 * found:.2f}{PER_CENT}"
    return f"{found:,}".replace(",", "\u202f") if isinstance(found, int) else f"{found:.4g}"


def measured(figures: Mapping[str, Any], name: str) -> Any:
    """Returns the figure of this name, joined with its standard error if there is one."""
    return joined(figures.get(name), figures.get(f"{name}{ERROR}"))


def joined(found: Any, error: Any) -> Any:
    """Returns a figure as a mean with a standard error; mappings are joined item by item."""
    if isinstance(found, Mapping) and isinstance(error, Mapping):
        return {key: joined(item, error.get(key)) for key, item in found.items()}
    return (
        found
        if found is None or error is None
        else dict(zip(MEASURED, (found, error), strict=True))
    )


def words(name: str) -> str:
    """Replaces the underscores of a figure's key by spaces."""
    return name.replace("_", " ")


def flat(
    figures: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields every figure with its path; a figure and its standard error count as one."""
    for name in figures:
        if name.endswith(ERROR) and name.removesuffix(ERROR) in figures:
            continue
        figure = measured(figures, name)
        if isinstance(figure, Mapping) and not set(MEASURED) <= figure.keys():
            yield from flat(figure, (*path, name))
        else:
            yield (*path, name), figure


def rows_of(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the name and the text of every figure."""
    return [(": ".join(map(words, path)), format_figure(figure)) for path, figure in flat(figures)]


def find(figures: Mapping[str, Any], path: str) -> Any:
    """Returns the figure at a path like `false_rejection.0.05.overall`, or None."""
    if path in figures:
        return figures[path]
    inside = (
        find(nested, path[len(name) + 1 :])
        for name, nested in figures.items()
        if isinstance(nested, Mapping) and path.startswith(f"{name}.")
    )
    return next((figure for figure in inside if figure is not None), None)


def _measured(mean: float, error: float, kind: Kind) -> str:
    if kind == "share":
        mean, error = 100 * mean, 100 * error
    unit = PER_CENT if kind == "share" else ""
    if not error > 0:
        return f"{mean:.4g}{unit}"
    places = min(2 if unit else 8, max(0, 1 - math.floor(math.log10(error))))
    return f"{mean:.{places}f} ± {error:.{places}f}{unit}"
