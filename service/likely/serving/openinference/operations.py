"""The models of the Open Inference Protocol for a bundle: one for each question it answers.

| model                 | answers                                       |
| --------------------- | --------------------------------------------- |
| `bundle`              | everything that is decided about pictures     |
| `bundle/score`        | how plausible pictures are                    |
| `bundle/classify`     | which labels pictures have, by Bayes' rule    |
| `bundle/discriminate` | which labels pictures have, by p(y|x)         |
| `bundle/surprise`     | -log p of every pixel                         |
| `bundle/encode`       | latent features of pictures                   |
| `bundle/generate`     | drawn pictures                                |
| `bundle/complete`     | pictures whose unknown pixels are drawn       |

Each model has inputs and outputs of its own, as clients that read metadata expect. A bundle's
name contains no `/`, so no two models have the same name.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from likely import codec
from likely.answers import Classifications, Draws, Limits, ScoreTable, Verdict
from likely.bundle import Role
from likely.errors import InvalidInput
from likely.serving import checks
from likely.serving.openinference.tensors import Array, Arrays, Tensor
from likely.serving.servicers import Generation, Scoring
from likely.v1 import generation_pb2, images_pb2, scoring_pb2

if TYPE_CHECKING:
    from likely.bundle import Manifest
    from likely.engine import Engine

Settings = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Services:
    """Our own services, whose checks, quotas and methods the operations use."""

    scoring: Scoring
    generation: Generation
    limits: Limits


@dataclass(frozen=True, slots=True)
class Question:
    """One request, decoded.

    Attributes:
        engine: engine of the requested version.
        inputs: inputs by name.
        settings: settings by name.
        wanted: names of the requested outputs.
    """

    engine: Engine
    inputs: Arrays
    settings: Settings
    wanted: frozenset[str]

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.engine.manifest

    @property
    def images(self) -> images_pb2.Images:
        """The input `images`."""
        return codec.images(self.inputs["images"])


@dataclass(frozen=True, slots=True)
class Answer:
    """Outputs by name, and parameters that describe them, such as alpha or the seed."""

    outputs: Arrays
    parameters: Settings


@dataclass(frozen=True, slots=True)
class Operation:
    """One question that a bundle may answer.

    Attributes:
        suffix: suffix of the model's name, after the bundle's name and a `/`; may be empty.
        method: the engine's method that it needs.
        merged: whether requests are merged along their first axis.
        settings: names of the settings that it accepts.
        inputs: returns the model's inputs, given the manifest.
        outputs: returns the model's outputs, given the manifest.
        run: computes the answer.
        needs: role of a graph that it needs beside the method's.
    """

    suffix: str
    method: str
    merged: bool
    settings: frozenset[str]
    inputs: Callable[[Manifest], tuple[Tensor, ...]]
    outputs: Callable[[Manifest], tuple[Tensor, ...]]
    run: Callable[[Services, Question], Awaitable[Answer]]
    needs: Role | None = None


async def _score(services: Services, question: Question) -> Answer:
    request = scoring_pb2.ScoreRequest(
        images=question.images,
        surprise="surprise" in question.wanted,
        **question.settings,
    )
    scores = await services.scoring.compute_scores(question.engine, request)
    outputs = _score_outputs(scores)
    if scores.surprise is not None:
        outputs["surprise"] = scores.surprise
    return Answer(outputs, {"alpha": scores.alpha})


def _score_outputs(scores: ScoreTable) -> dict[str, Array]:
    return {
        "log_likelihood": scores.log_px,
        "bits_per_dim": scores.bits_per_dim,
        "unusualness": scores.unusualness,
        "p_value": scores.p_value,
        "outlier": scores.verdict == Verdict.OUTLIER,
    }


async def _classify(services: Services, question: Question) -> Answer:
    """Returns labels and scores, which come from the same run."""
    scores, answer = await _classify_by_rule(services, question, scoring_pb2.LABEL_RULE_GENERATIVE)
    extra_outputs: dict[str, Array] = {
        "log_likelihoods": answer.log_pxy,
        "label_p_values": answer.label_p_values,
    }
    return Answer(
        {**_score_outputs(scores), **_label_outputs(answer), **extra_outputs},
        {"alpha": answer.alpha},
    )


async def _discriminate(services: Services, question: Question) -> Answer:
    _, answer = await _classify_by_rule(services, question, scoring_pb2.LABEL_RULE_DISCRIMINATIVE)
    extra_outputs: dict[str, Array] = {"composed_log_likelihoods": answer.composed}
    return Answer({**_label_outputs(answer), **extra_outputs}, {"alpha": answer.alpha})


async def _classify_by_rule(
    services: Services, question: Question, rule: scoring_pb2.LabelRule.ValueType
) -> tuple[ScoreTable, Classifications]:
    request = scoring_pb2.ClassifyRequest(images=question.images, rule=rule, **question.settings)
    return await services.scoring.compute_classifications(question.engine, request)


def _label_outputs(answer: Classifications) -> dict[str, Array]:
    return {
        "label": answer.label,
        "posterior": answer.posterior,
        "verdict": answer.verdict,
        "p_value": answer.p_value,
    }


async def _score_and_classify(services: Services, question: Question) -> Answer:
    """Returns scores and, only if one of their outputs is requested, labels."""
    if question.wanted & {tensor.name for tensor in _label_tensors(question.manifest)}:
        return await _classify(services, question)
    unused = scoring_pb2.ClassifyRequest(**question.settings)
    checks.priors(unused, question.manifest)
    checks.min_posterior(unused)
    keep = {name: question.settings[name] for name in _SCORE_SETTINGS & set(question.settings)}
    return await _score(services, replace(question, settings=keep))


async def _encode(services: Services, question: Question) -> Answer:
    labels = question.inputs.get("labels")
    request = scoring_pb2.EncodeRequest(
        images=question.images,
        labels=() if labels is None else _to_int32(labels),
    )
    features = await services.scoring.compute_features(question.engine, request)
    outputs: dict[str, Array] = {
        "mean": features.mean,
        "labels": features.label,
    }
    if features.log_variance is not None:
        outputs["log_variance"] = features.log_variance
    return Answer(outputs, {})


async def _generate(services: Services, question: Question) -> Answer:
    count = int(question.inputs["count"][0])
    settings = dict(question.settings)
    wants_check = settings.pop("self_check", False)
    check = {key: settings.pop(key) for key in ("alpha", "max_draws") if key in settings}
    if check and not wants_check:
        raise InvalidInput(f"parameters[{next(iter(check))}]", "is of a self_check only")
    _check_size(count, "count", question.manifest, services.limits)
    request = generation_pb2.GenerateRequest(
        count=count,
        self_check=generation_pb2.SelfCheck(**check) if wants_check else None,
        **settings,
    )
    async with aclosing(services.generation.generate_draws(question.engine, request)) as chunks:
        drawn = [chunk async for chunk in chunks]
    outputs: dict[str, Array] = {
        "images": np.concatenate([chunk.images for chunk in drawn]),
        "labels": np.concatenate([chunk.label for chunk in drawn]),
        "draws": np.concatenate([chunk.draws for chunk in drawn]),
        "accepted": np.concatenate([chunk.accepted for chunk in drawn]),
    }
    return Answer(outputs, {"seed": drawn[0].seed})


async def _complete(services: Services, question: Question) -> Answer:
    mask, x = question.inputs["mask"], question.inputs["images"]
    if mask.shape != x.shape:
        raise InvalidInput("mask.shape", f"{mask.shape}; that of images is {x.shape}")
    rows = len(x) * max(1, question.settings.get("completions", 1))
    _check_size(rows, "parameters[completions]", question.manifest, services.limits)
    request = generation_pb2.CompleteRequest(
        images=question.images, mask=mask.tobytes(), **question.settings
    )
    async with aclosing(services.generation.complete_draws(question.engine, request)) as chunks:
        drawn: list[Draws] = [chunk async for chunk in chunks]
    images = np.concatenate([x[:0], *(chunk.images for chunk in drawn)])
    return Answer({"images": images}, {"seed": drawn[0].seed} if drawn else {})


def _check_size(rows: int, field: str, manifest: Manifest, limits: Limits) -> None:
    """Refuses a request whose answer, which is sent in one message, would be too large."""
    if rows * manifest.dimensions > limits.response_bytes:
        raise InvalidInput(
            field,
            f"{rows} pictures of {manifest.dimensions} bytes; one answer has at most "
            f"{limits.response_bytes}",
        )


def _to_int32(labels: Array) -> list[int]:
    limits = np.iinfo(np.int32)
    if labels.size and (labels.min() < limits.min or labels.max() > limits.max):
        raise InvalidInput("labels", "a label does not fit into 32 bits")
    numbers: list[int] = labels.tolist()
    return numbers


def _image_tensor(manifest: Manifest) -> Tensor:
    return Tensor("images", "UINT8", (-1, *manifest.shape))


def _image_tensors(manifest: Manifest) -> tuple[Tensor, ...]:
    return (_image_tensor(manifest),)


def _score_tensors(_: Manifest) -> tuple[Tensor, ...]:
    names = ("log_likelihood", "bits_per_dim", "unusualness", "p_value")
    return *(Tensor(name, "FP64", (-1,)) for name in names), Tensor("outlier", "BOOL", (-1,))


def _label_tensors(manifest: Manifest) -> tuple[Tensor, ...]:
    if Role.CONDITIONAL not in manifest.graphs:
        return ()
    n = len(manifest.labels)
    return (
        Tensor("label", "INT64", (-1,)),
        Tensor("posterior", "FP64", (-1, n)),
        Tensor("verdict", "INT8", (-1,)),
        Tensor("log_likelihoods", "FP64", (-1, n)),
        Tensor("label_p_values", "FP64", (-1, n)),
    )


def _discriminate_tensors(manifest: Manifest) -> tuple[Tensor, ...]:
    n = len(manifest.labels)
    return (
        Tensor("label", "INT64", (-1,)),
        Tensor("posterior", "FP64", (-1, n)),
        Tensor("verdict", "INT8", (-1,)),
        Tensor("p_value", "FP64", (-1,)),
        Tensor("composed_log_likelihoods", "FP64", (-1, n)),
    )


def _feature_tensors(manifest: Manifest) -> tuple[Tensor, ...]:
    outputs = manifest.graphs[Role.ENCODE].outputs
    return (
        *(Tensor(spec.name, "FP32", (-1, int(spec.shape[-1]))) for spec in outputs),
        Tensor("labels", "INT64", (-1,)),
    )


_SCORE_SETTINGS = frozenset({"alpha", "guarantee"})
_LABEL_SETTINGS = _SCORE_SETTINGS | {"min_posterior", "priors"}
_DRAW_SETTINGS = frozenset({"label", "seed", "first_index", "temperature"})

OPERATIONS: tuple[Operation, ...] = (
    Operation(
        "", "Score", True, _LABEL_SETTINGS, _image_tensors,
        lambda m: (*_label_tensors(m), *_score_tensors(m)), _score_and_classify,
    ),
    Operation("score", "Score", True, _SCORE_SETTINGS, _image_tensors, _score_tensors, _score),
    Operation(
        "classify", "Classify", True, _LABEL_SETTINGS, _image_tensors,
        lambda m: (*_label_tensors(m), Tensor("p_value", "FP64", (-1,))), _classify,
    ),
    Operation(
        "discriminate", "Score", True, _LABEL_SETTINGS, _image_tensors, _discriminate_tensors,
        _discriminate, needs=Role.DISCRIMINATE,
    ),
    Operation(
        "surprise", "Score", True, frozenset(), _image_tensors,
        lambda m: (
            Tensor("surprise", "FP32", (-1, *m.shape)), Tensor("log_likelihood", "FP64", (-1,)),
        ), _score,
    ),
    Operation(
        "encode", "Encode", True, frozenset(),
        lambda m: (_image_tensor(m), Tensor("labels", "INT64", (-1,), optional=True)),
        _feature_tensors, _encode,
    ),
    Operation(
        "generate", "Generate", False, _DRAW_SETTINGS | {"self_check", "alpha", "max_draws"},
        lambda _: (Tensor("count", "INT64", (1,)),),
        lambda m: (
            _image_tensor(m), Tensor("labels", "INT64", (-1,)), Tensor("draws", "INT64", (-1,)),
            Tensor("accepted", "BOOL", (-1,)),
        ), _generate,
    ),
    Operation(
        "complete", "Complete", False, _DRAW_SETTINGS | {"completions", "proposals"},
        lambda m: (_image_tensor(m), Tensor("mask", "BOOL", (-1, *m.shape))), _image_tensors,
        _complete,
    ),
)  # fmt: skip
DRAWING_SUFFIXES = frozenset({"generate", "complete"})


def split_name(name: str) -> tuple[str, str]:
    """Splits a model's name into the bundle's name and the operation's suffix."""
    bundle, _, suffix = name.partition("/")
    return bundle, suffix


def full_name(bundle: str, operation: Operation) -> str:
    """Returns the name of a bundle's model for an operation."""
    return f"{bundle}/{operation.suffix}" if operation.suffix else bundle


def available_operations(engine: Engine) -> list[Operation]:
    """Returns the operations that a bundle can answer."""
    return [
        operation
        for operation in OPERATIONS
        if engine.answers(operation.method)
        and (operation.needs is None or operation.needs in engine.manifest.graphs)
    ]
