"""Figures as a reader wants to see them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

Kind = Literal["plain", "share"]
PER_CENT = "\u00a0%"
MEASURED = ("mean", "standard_error")
ERROR = "_standard_error"  # ends the name of what stands beside a figure


def value(found: Any, kind: Kind = "plain") -> str:
    """A figure in words: digits by its standard error where it has one.

    Args:
        found: a number, a mean with a standard error, a range, a mapping of these, text, or None.
        kind: a share is told in per cent.
    """
    if isinstance(found, Mapping):
        rest = {key: item for key, item in found.items() if key not in MEASURED}
        told = ", ".join(f"{words(str(key))} {value(item, kind)}" for key, item in rest.items())
        if len(rest) == len(found):
            return told
        mean, error = (float(found[key]) for key in MEASURED)
        return _measured(mean, error, kind) + (f" ({told})" if rest else "")
    if isinstance(found, list | tuple):
        return (" to " if len(found) == 2 else ", ").join(value(item, kind) for item in found)
    if found is None:
        return "–"
    if isinstance(found, bool) or not isinstance(found, int | float):
        return str(found)
    if kind == "share":
        return f"{100 * found:.2f}{PER_CENT}"
    return f"{found:,}".replace(",", "\u202f") if isinstance(found, int) else f"{found:.4g}"


def measured(figures: Mapping[str, Any], name: str) -> Any:
    """The figure of that name, with the standard error that may stand beside it."""
    return joined(figures.get(name), figures.get(f"{name}{ERROR}"))


def joined(found: Any, error: Any) -> Any:
    """A figure as a mean with its standard error; item by item where there are several."""
    if isinstance(found, Mapping) and isinstance(error, Mapping):
        return {key: joined(item, error.get(key)) for key, item in found.items()}
    return (
        found
        if found is None or error is None
        else dict(zip(MEASURED, (found, error), strict=True))
    )


def words(name: str) -> str:
    """A key of the figures without its underscores."""
    return name.replace("_", " ")


def flat(
    figures: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every figure with the path to it; one and its standard error are one figure."""
    for name in figures:
        if name.endswith(ERROR) and name.removesuffix(ERROR) in figures:
            continue
        found = measured(figures, name)
        if isinstance(found, Mapping) and not set(MEASURED) <= found.keys():
            yield from flat(found, (*path, name))
        else:
            yield (*path, name), found


def told(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every figure in words, after its name in words."""
    return [(": ".join(map(words, path)), value(found)) for path, found in flat(figures)]


def find(figures: Mapping[str, Any], path: str) -> Any:
    """The figure at a path like `false_rejection.0.05.overall`, None where there is none."""
    if path in figures:
        return figures[path]
    inside = (
        find(found, path[len(name) + 1 :])
        for name, found in figures.items()
        if isinstance(found, Mapping) and path.startswith(f"{name}.")
    )
    return next((found for found in inside if found is not None), None)


def _measured(mean: float, error: float, kind: Kind) -> str:
    if kind == "share":
        mean, error = 100 * mean, 100 * error
    unit = PER_CENT if kind == "share" else ""
    if not error > 0:
        return f"{mean:.4g}{unit}"
    places = min(2 if unit else 8, max(0, 1 - math.floor(math.log10(error))))
    return f"{mean:.{places}f} ± {error:.{places}f}{unit}"
