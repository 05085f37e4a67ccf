"""Converts messages to numpy arrays and back.

What a request may ask for is checked in `serving.checks`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from likely.answers import (
    Classifications,
    Completions,
    Direction,
    Doubles,
    Draws,
    Features,
    Floats,
    LabelRule,
    Limits,
    ModelInfo,
    ModelVersion,
    Pixels,
    Redrawings,
    Scores,
    ScoreTable,
    Traversal,
    VersionState,
)
from likely.errors import InvalidInput
from likely.v1 import admin_pb2, generation_pb2, images_pb2, latent_pb2, models_pb2, scoring_pb2

_WIRE_FLOAT = np.dtype("<f4")
_RULE_NUMBERS = {rule: scoring_pb2.LabelRule.ValueType(rule) for rule in LabelRule}
_ACCEPTED, _OUTLIER = scoring_pb2.VERDICT_ACCEPTED, scoring_pb2.VERDICT_OUTLIER
_STATE_NUMBERS = {
    VersionState.LOADING: admin_pb2.VERSION_STATE_LOADING,
    VersionState.SERVING: admin_pb2.VERSION_STATE_SERVING,
    VersionState.DRAINING: admin_pb2.VERSION_STATE_DRAINING,
    VersionState.FAILED: admin_pb2.VERSION_STATE_FAILED,
}
_STATES_BY_NUMBER = {number: state for state, number in _STATE_NUMBERS.items()}


def images(x: Pixels) -> images_pb2.Images:
    """Pictures, uint8 (n, c, h, w), as a message."""
    return images_pb2.Images(data=x.tobytes(), shape=x.shape)


def shape(message: images_pb2.Images) -> tuple[int, int, int, int]:
    """The shape (n, c, h, w) that a message claims.

    Raises:
        InvalidInput: it does not have four dimensions, or one is negative.
    """
    if len(message.shape) != 4:  # checked first: it may be as long as the message
        raise InvalidInput(
            "images.shape",
            f"{len(message.shape)} dimensions; 4 are needed: pictures, channels, rows, columns",
        )
    n, c, h, w = message.shape
    claimed = n, c, h, w
    if min(claimed) >= 0:
        return claimed
    axis = next(axis for axis, length in enumerate(claimed) if length < 0)
    raise InvalidInput(f"images.shape[{axis}]", f"{claimed[axis]} is negative")


def pixels(message: images_pb2.Images) -> Pixels:
    """The pictures of a message, uint8 (n, c, h, w), read-only; its bytes are copied once.

    Raises:
        InvalidInput: the shape is not valid, or does not fit the bytes.
    """
    claimed, data = shape(message), message.data  # read once: each access copies the bytes
    expected = math.prod(claimed)  # Python's integers cannot overflow
    if len(data) != expected:
        raise InvalidInput(
            "images.data", f"{len(data)} bytes; the shape {claimed} asks for {expected}"
        )
    try:
        return np.frombuffer(data, dtype=np.uint8).reshape(claimed)
    except ValueError as error:  # one length is 0, and the product of the others is too large
        raise InvalidInput("images.shape", f"{claimed} is too large for an array") from error


def check_levels(x: Pixels, levels: int, named: str | Sequence[str]) -> None:
    """Checks that every level of the pictures is in [0, levels).

    Args:
        x: the pictures, (n, c, h, w).
        levels: the model's number of levels.
        named: name of the argument in errors, or one name for each picture.

    Raises:
        InvalidInput: a level is not.
    """
    if np.maximum.reduce(x, None, initial=0) < levels:
        return
    i, c, h, w = np.unravel_index(int(np.argmax(x >= levels)), x.shape)
    where = f"channel {c}, row {h}, column {w} is not in [0, {levels})"
    if isinstance(named, str):
        raise InvalidInput(named, f"level {x[i, c, h, w]} at picture {i}, {where}")
    raise InvalidInput(named[int(i)], f"level {x[i, c, h, w]} at {where}")


def score_response(scores: ScoreTable) -> scoring_pb2.ScoreResponse:
    """Scores as a message."""
    alpha = scores.alpha
    message = scoring_pb2.ScoreResponse(
        model_version=scores.model_version,
        alpha=alpha,
        surprise=b"" if scores.surprise is None else packed(scores.surprise),
    )
    add = message.scores.add  # a list of messages would be copied
    for log_px, bits, z, p in scores.rows.tolist():
        verdict = _OUTLIER if p <= alpha else _ACCEPTED
        add(log_likelihood=log_px, bits_per_dim=bits, p_value=p, verdict=verdict, unusualness=z)
    return message


def scores(message: scoring_pb2.ScoreResponse, surprise: Sequence[int] | None) -> Scores:
    """The scores of a message; `surprise` is the map's shape (n, c, h, w), if requested."""
    rows = message.scores
    return Scores(
        log_px=np.array([row.log_likelihood for row in rows], dtype=np.float64),
        bits_per_dim=np.array([row.bits_per_dim for row in rows], dtype=np.float64),
        unusualness=np.array([row.unusualness for row in rows], dtype=np.float64),
        p_value=np.array([row.p_value for row in rows], dtype=np.float64),
        verdict=np.array([row.verdict for row in rows], dtype=np.int8),
        alpha=message.alpha,
        surprise=None if surprise is None else _unpack_floats(message.surprise, surprise),
        model_version=message.model_version,
    )


def classify_response(answer: Classifications) -> scoring_pb2.ClassifyResponse:
    """Classifications as a message."""
    columns = (
        answer.log_pxy, answer.posterior, answer.label, answer.p_value, answer.verdict,
        answer.label_p_values, answer.composed,
    )  # fmt: skip
    message = scoring_pb2.ClassifyResponse(
        model_version=answer.model_version, alpha=answer.alpha, rule=_RULE_NUMBERS[answer.rule]
    )
    add = message.classifications.add  # a list of messages would be copied
    rows = zip(*(column.tolist() for column in columns), strict=True)
    for log_pxy, posterior, y, p, verdict, label_p_values, composed in rows:
        add(
            log_likelihoods=log_pxy,
            posterior=posterior,
            label=y,
            p_value=p,
            verdict=verdict,
            label_p_values=label_p_values,
            composed_log_likelihoods=composed,
        )
    return message


def classifications(message: scoring_pb2.ClassifyResponse, labels: int) -> Classifications:
    """The classifications of a message, for a model with that number of labels."""
    rows = message.classifications
    return Classifications(
        log_pxy=_matrix([row.log_likelihoods for row in rows], labels),
        posterior=_matrix([row.posterior for row in rows], labels),
        label=np.array([row.label for row in rows], dtype=np.int64),
        p_value=np.array([row.p_value for row in rows], dtype=np.float64),
        label_p_values=_matrix([row.label_p_values for row in rows], labels),
        verdict=np.array([row.verdict for row in rows], dtype=np.int8),
        alpha=message.alpha,
        model_version=message.model_version,
        composed=_matrix([row.composed_log_likelihoods for row in rows], labels),
        rule=LabelRule(message.rule or LabelRule.GENERATIVE),  # unset by servers with one rule
    )


def _matrix(rows: Sequence[Sequence[float]], labels: int) -> Doubles:
    """The rows as an array (n, labels), or (n, 0) if the answer leaves them out."""
    width = len(rows[0]) if rows else labels
    return np.array(rows, dtype=np.float64).reshape(len(rows), width)


def encode_response(answer: Features) -> scoring_pb2.EncodeResponse:
    """Features as a message."""
    return scoring_pb2.EncodeResponse(
        model_version=answer.model_version,
        latent_dimensions=answer.mean.shape[1],
        mean=packed(answer.mean),
        log_variance=b"" if answer.log_variance is None else packed(answer.log_variance),
        labels=answer.label,
    )


def features(message: scoring_pb2.EncodeResponse) -> Features:
    """The features of a message."""
    shape = (len(message.labels), message.latent_dimensions)
    has_variance = bool(message.log_variance) or not message.mean
    return Features(
        mean=_unpack_floats(message.mean, shape),
        log_variance=_unpack_floats(message.log_variance, shape) if has_variance else None,
        label=np.array(message.labels, dtype=np.int64),
        model_version=message.model_version,
    )


def redrawings(answer: Redrawings) -> latent_pb2.Redrawings:
    """Decoded features as a message, with their leading axes merged into one."""
    picture = answer.mean.shape[-3:]
    return latent_pb2.Redrawings(
        shape=(math.prod(answer.mean.shape[:-3]), *picture),
        mean=packed(answer.mean),
        deviation=b"" if answer.deviation is None else packed(answer.deviation),
        drawn=images(answer.drawn.reshape(-1, *picture)),
    )


def traverse_response(answer: Traversal) -> latent_pb2.TraverseResponse:
    """Pictures redrawn along a direction, as a message."""
    return latent_pb2.TraverseResponse(
        model_version=answer.model_version,
        redrawings=redrawings(answer),
        positions=answer.position,
        deviations=() if answer.spread is None else answer.spread,
        seed=answer.seed,
        labels=answer.label,
    )


def redrawn(
    message: latent_pb2.DecodeResponse | latent_pb2.InterpolateResponse,
    draws: int,
    axes: tuple[int, ...] = (),
) -> Redrawings:
    """The decoded features of a message, (n, *axes, c, h, w), each with `draws` draws."""
    return Redrawings(
        **_redrawing_fields(message.redrawings, draws, axes),
        seed=message.seed,
        model_version=message.model_version,
    )


def traversal(message: latent_pb2.TraverseResponse, draws: int, axes: tuple[int, ...]) -> Traversal:
    """The pictures along a direction of a message, (n, *axes, c, h, w), with `draws` draws."""
    has_spread = bool(message.deviations) or not message.positions
    return Traversal(
        **_redrawing_fields(message.redrawings, draws, axes),
        seed=message.seed,
        model_version=message.model_version,
        position=np.array(message.positions, dtype=np.float64),
        spread=np.array(message.deviations, dtype=np.float64) if has_spread else None,
        label=np.array(message.labels, dtype=np.int64),
    )


def _redrawing_fields(
    message: latent_pb2.Redrawings, draws: int, axes: tuple[int, ...]
) -> dict[str, Any]:
    rows, *picture = message.shape
    shape = (rows // max(1, math.prod(axes)), *axes)
    deviation = message.deviation or not message.mean
    return {
        "mean": _unpack_floats(message.mean, (*shape, *picture)),
        "deviation": _unpack_floats(message.deviation, (*shape, *picture)) if deviation else None,
        "drawn": pixels(message.drawn).reshape(*shape, draws, *picture),
    }


def latents(data: bytes, z: int) -> Floats:
    """Unpacks features, float32 (n, z)."""
    return _unpack_floats(data, (len(data) // (4 * z), z))


def generate_response(answer: Draws) -> generation_pb2.GenerateResponse:
    """A chunk of draws as a message."""
    return generation_pb2.GenerateResponse(
        model_version=answer.model_version,
        images=images(answer.images),
        labels=answer.label,
        first_index=answer.first_index,
        seed=answer.seed,
        draws=answer.draws,
        accepted=answer.accepted.tolist(),
    )


def complete_response(answer: Draws) -> generation_pb2.CompleteResponse:
    """A chunk of completions as a message."""
    return generation_pb2.CompleteResponse(
        model_version=answer.model_version,
        images=images(answer.images),
        first_row=answer.first_index,
        seed=answer.seed,
    )


def completions(message: generation_pb2.CompleteResponse) -> Completions:
    """The completions of a chunk, (rows, c, h, w), not yet grouped by picture."""
    return Completions(
        images=pixels(message.images),
        seed=message.seed,
        model_version=message.model_version,
    )


def draws(message: generation_pb2.GenerateResponse) -> Draws:
    """The draws of a chunk."""
    return Draws(
        images=pixels(message.images),
        label=np.array(message.labels, dtype=np.int64),
        first_index=message.first_index,
        seed=message.seed,
        draws=np.array(message.draws, dtype=np.int64),
        accepted=np.array(message.accepted, dtype=np.bool_),
        model_version=message.model_version,
    )


def model_message(info: ModelInfo) -> models_pb2.Model:
    """A model's description as a message."""
    channels, height, width = info.shape
    return models_pb2.Model(
        name=info.name,
        version=info.version,
        description=info.description,
        channels=channels,
        height=height,
        width=width,
        levels=info.levels,
        labels=[
            models_pb2.Label(name=name, prior=prior)
            for name, prior in zip(info.labels, info.priors, strict=True)
        ],
        methods=info.methods,
        density_kind=_kind_number(info.density_kind),
        conditional_kind=_kind_number(info.conditional_kind),
        importance_samples=info.importance_samples,
        latent_dimensions=info.latent_dimensions,
        calibration_size=info.calibration_size,
        finest_alpha=info.finest_alpha,
        default_alpha=info.default_alpha,
        posterior_temperature=info.posterior_temperature,
        execution_providers=info.execution_providers,
        limits=models_pb2.Limits(**asdict(info.limits)),
        digest=info.digest,
        version_labels=info.version_labels,
        discriminative=info.discriminative,
        directions=[
            models_pb2.Direction(name=direction.name, kind=_direction_kind_number(direction.kind))
            for direction in info.directions
        ],
        deterministic=info.deterministic,
    )


def model_info(message: models_pb2.Model) -> ModelInfo:
    """The model's description in a message."""
    return ModelInfo(
        name=message.name,
        version=message.version,
        description=message.description,
        shape=(message.channels, message.height, message.width),
        levels=message.levels,
        labels=tuple(label.name for label in message.labels),
        priors=tuple(label.prior for label in message.labels),
        methods=tuple(message.methods),
        density_kind=_kind_name(message.density_kind),
        conditional_kind=_kind_name(message.conditional_kind),
        importance_samples=message.importance_samples,
        latent_dimensions=message.latent_dimensions,
        calibration_size=message.calibration_size,
        finest_alpha=message.finest_alpha,
        default_alpha=message.default_alpha,
        posterior_temperature=message.posterior_temperature,
        execution_providers=tuple(message.execution_providers),
        limits=Limits(
            **{field.name: getattr(message.limits, field.name) for field in fields(Limits)}
        ),
        digest=message.digest,
        version_labels=tuple(message.version_labels),
        discriminative=message.discriminative,
        directions=tuple(
            Direction(
                direction.name, models_pb2.DirectionKind.Name(direction.kind).split("_")[-1].lower()
            )
            for direction in message.directions
        ),
        deterministic=message.deterministic,
    )


def version_message(version: ModelVersion) -> admin_pb2.ModelVersion:
    """A version of a model, as a message."""
    return admin_pb2.ModelVersion(
        model_name=version.name,
        model_version=version.version,
        state=_STATE_NUMBERS[version.state],
        folder=_replace_surrogates(str(version.folder)),
        digest=version.digest,
        labels=version.labels,
        is_default=version.is_default,
        reason=version.reason,
        message=_replace_surrogates(version.message),
    )


def _replace_surrogates(text: str) -> str:
    """The text, with a replacement for every byte of a path that is not UTF-8."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def model_version(message: admin_pb2.ModelVersion) -> ModelVersion:
    """The version of a model in a message."""
    return ModelVersion(
        state=_STATES_BY_NUMBER[message.state],
        folder=Path(message.folder),
        name=message.model_name,
        version=message.model_version,
        digest=message.digest,
        labels=tuple(message.labels),
        is_default=message.is_default,
        reason=message.reason,
        message=message.message,
    )


def packed(values: Floats) -> bytes:
    """Packs floats for a message: 32 bits each, little-endian."""
    return values.astype(_WIRE_FLOAT, copy=False).tobytes()


def _unpack_floats(data: bytes, shape: Sequence[int]) -> Floats:
    return np.frombuffer(data, dtype=_WIRE_FLOAT).reshape(shape).astype(np.float32)


def _direction_kind_number(name: str) -> models_pb2.DirectionKind.ValueType:
    return models_pb2.DirectionKind.Value(f"DIRECTION_KIND_{name.upper()}")


def _kind_number(name: str | None) -> models_pb2.LikelihoodKind.ValueType:
    return models_pb2.LikelihoodKind.Value(f"LIKELIHOOD_KIND_{(name or 'unspecified').upper()}")


def _kind_name(number: models_pb2.LikelihoodKind.ValueType) -> str | None:
    name = models_pb2.LikelihoodKind.Name(number).removeprefix("LIKELIHOOD_KIND_").lower()
    return None if name == "unspecified" else name
