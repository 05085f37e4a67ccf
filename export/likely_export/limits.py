"""Range checks that the configs of all families share."""

from __future__ import annotations

from likely.errors import InvalidInput


def at_least(least: int, config: object, *names: str) -> None:
    """Raises unless these attributes, or all of their items, are at least `least`.

    Raises:
        InvalidInput: a value is smaller.
    """
    for name in names:
        value = getattr(config, name)
        several = isinstance(value, tuple | list)
        if not all(item >= least for item in (value if several else (value,))):
            shown = list(value) if several else value
            raise InvalidInput(name, f"{shown}; at least {least} is needed")


def in_unit_interval(config: object, *names: str) -> None:
    """Raises unless these attributes lie in [0, 1].

    Raises:
        InvalidInput: a value lies outside.
    """
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise InvalidInput(name, f"{getattr(config, name)} is not in [0, 1]")
