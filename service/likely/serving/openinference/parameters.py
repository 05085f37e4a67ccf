"""Reads a request's settings from parameters of the Open Inference Protocol, with their types."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

from likely.answers import Guarantee
from likely.errors import InvalidInput
from likely.inference import inference_pb2

# Parameters that clients for Triton and KServe send by themselves; nothing here depends on them.
IGNORED = frozenset(
    {
        "sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "content_type",
        "headers", "binary_data_output", "triton_enable_empty_final_response",
    }
)  # fmt: skip

DIGITS = 20  # longest integer that is read from a string, including its sign

Given = Mapping[str, inference_pb2.InferParameter]


def read(given: Given, allowed: Collection[str], labels: int) -> dict[str, Any]:
    """Returns a request's settings, as fields of our own request messages.

    Args:
        given: the request's parameters, by name.
        allowed: names of the settings that the model accepts.
        labels: number of the model's labels.

    Raises:
        InvalidInput: the model has no such setting, or it has another type.
    """
    found: dict[str, Any] = {}
    for name, parameter in given.items():
        if name in IGNORED:
            continue
        if name not in allowed:
            known = ", ".join(sorted(allowed)) or "none"
            raise InvalidInput(
                f"parameters[{name[:64]}]", f"this model has no such setting; there are {known}"
            )
        choice = parameter.WhichOneof("parameter_choice")
        value = getattr(parameter, choice) if choice else None
        field = f"parameters[{name}]"
        found[name] = (
            _numbers(field, value, labels) if name == "priors" else _KINDS[name](field, value)
        )
    return found


def _number(field: str, value: object) -> float:
    # Clients that do not know parameters of type double send a string.
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise InvalidInput(field, f"{value!r} is no number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise InvalidInput(field, f"{str(value)[:64]!r} is no number") from None
    if not math.isfinite(number):
        raise InvalidInput(field, f"{number} is not finite")
    return number


def _numbers(field: str, value: object, most: int) -> list[float]:
    if not isinstance(value, str) or not value.strip():
        raise InvalidInput(field, "must be a string of numbers separated by commas")
    if value.count(",") >= max(1, most):  # before splitting, as there may be millions
        raise InvalidInput(field, f"{value.count(',') + 1} values; the model has {most} labels")
    return [_number(field, part.strip()) for part in value.split(",")]


def _whole(bits: int) -> Callable[[str, object], int]:
    most = 1 << (bits - 1)

    def whole(field: str, value: object) -> int:
        if isinstance(value, str) and len(value) <= DIGITS:
            with suppress(ValueError):
                value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not -most <= value < most:
            raise InvalidInput(field, f"{str(value)[:64]} is no whole number of {bits} bits")
        return value

    return whole


def _truth(field: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidInput(field, f"{str(value)[:64]} is neither true nor false")
    return value


def _guarantee(field: str, value: object) -> int:
    names = {each.name.lower(): int(each) for each in Guarantee}
    if not isinstance(value, str) or value not in names:
        raise InvalidInput(field, f"{str(value)[:64]!r} is none of {', '.join(names)}")
    return names[value]


_KINDS: dict[str, Callable[[str, object], Any]] = {
    "alpha": _number,
    "guarantee": _guarantee,
    "min_posterior": _number,
    "label": _whole(32),
    "seed": _whole(64),
    "first_index": _whole(64),
    "temperature": _number,
    "self_check": _truth,
    "max_draws": _whole(32),
    "completions": _whole(32),
    "proposals": _whole(32),
}
