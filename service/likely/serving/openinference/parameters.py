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

Parameters = Mapping[str, inference_pb2.InferParameter]


def read(parameters: Parameters, allowed: Collection[str], labels: int) -> dict[str, Any]:
    """Returns a request's settings, as fields of our own request messages.

    Args:
        parameters: the request's parameters, by name.
        allowed: names of the settings that the model accepts.
        labels: number of the model's labels.

    Raises:
        InvalidInput: the model has no such setting, or it has another type.
    """
    settings: dict[str, Any] = {}
    for name, parameter in parameters.items():
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
        settings[name] = (
            _parse_numbers(field, value, labels)
            if name == "priors"
            else _PARSERS[name](field, value)
        )
    return settings


def _parse_number(field: str, value: object) -> float:
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


def _parse_numbers(field: str, value: object, most: int) -> list[float]:
    if not isinstance(value, str) or not value.strip():
        raise InvalidInput(field, "must be a string of numbers separated by commas")
    if value.count(",") >= max(1, most):  # before splitting, as there may be millions
        raise InvalidInput(field, f"{value.count(',') + 1} values; the model has {most} labels")
    return [_parse_number(field, part.strip()) for part in value.split(",")]


def _integer_parser(bits: int) -> Callable[[str, object], int]:
    most = 1 << (bits - 1)

    def parse(field: str, value: object) -> int:
        if isinstance(value, str) and len(value) <= DIGITS:
            with suppress(ValueError):
                value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not -most <= value < most:
            raise InvalidInput(field, f"{str(value)[:64]} is no whole number of {bits} bits")
        return value

    return parse


def _parse_bool(field: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidInput(field, f"{str(value)[:64]} is neither true nor false")
    return value


def _parse_guarantee(field: str, value: object) -> int:
    names = {member.name.lower(): int(member) for member in Guarantee}
    if not isinstance(value, str) or value not in names:
        raise InvalidInput(field, f"{str(value)[:64]!r} is none of {', '.join(names)}")
    return names[value]


_PARSERS: dict[str, Callable[[str, object], Any]] = {
    "alpha": _parse_number,
    "guarantee": _parse_guarantee,
    "min_posterior": _parse_number,
    "label": _integer_parser(32),
    "seed": _integer_parser(64),
    "first_index": _integer_parser(64),
    "temperature": _parse_number,
    "self_check": _parse_bool,
    "max_draws": _integer_parser(32),
    "completions": _integer_parser(32),
    "proposals": _integer_parser(32),
}
