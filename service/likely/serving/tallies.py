"""What metrics count of an answer: its model, pictures, verdicts and status codes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from operator import attrgetter
from typing import Any

import numpy as np
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from likely.inference import inference_pb2
from likely.v1 import generation_pb2, latent_pb2, models_pb2, scoring_pb2

Answer = (
    scoring_pb2.ScoreResponse
    | scoring_pb2.ClassifyResponse
    | scoring_pb2.EncodeResponse
    | scoring_pb2.ScoreStreamResponse
    | scoring_pb2.ClassifyStreamResponse
    | generation_pb2.GenerateResponse
    | generation_pb2.CompleteResponse
    | latent_pb2.DecodeResponse
    | latent_pb2.TraverseResponse
    | latent_pb2.InterpolateResponse
    | models_pb2.ListModelsResponse
    | models_pb2.GetModelResponse
    | inference_pb2.ModelInferResponse
    | inference_pb2.ModelStreamInferResponse
)
Outcomes = scoring_pb2.ScoreStreamResponse | scoring_pb2.ClassifyStreamResponse
Redrawn = latent_pb2.DecodeResponse | latent_pb2.TraverseResponse | latent_pb2.InterpolateResponse


def model_name(message: Any) -> str:
    """Returns the name of the bundle in a request or an answer; empty if there is none."""
    kind: Any = type(message)
    # Models of the Open Inference Protocol are called `name/operation`.
    return _model_name_getter(kind)(message).partition("/")[0]


@cache  # asking a message for a field that it does not have takes microseconds
def _model_name_getter(kind: Any) -> Callable[[Any], str]:
    """Returns a function that finds the model's name in messages of a type."""
    fields = _fields(getattr(kind, "DESCRIPTOR", None))
    if "model_name" in fields:
        return attrgetter("model_name")
    for inner in ("request", "infer_response"):
        if inner in fields and "model_name" in _fields(fields[inner].message_type):
            return attrgetter(f"{inner}.model_name")
    return lambda _: ""


def _fields(message: Descriptor | None) -> Mapping[str, FieldDescriptor]:
    return message.fields_by_name if message else {}


def picture_count(answer: Answer) -> int:
    """Number of pictures in an answer."""
    count = _PICTURE_COUNTS.get(type(answer))
    return count(answer) if count else 0


def verdicts(answer: Answer) -> list[int]:
    """The verdicts in an answer, as their numbers."""
    extract = _VERDICTS.get(type(answer))
    return extract(answer) if extract else []


def codes(answer: Answer) -> list[int]:
    """The status code of each outcome in an answer of a stream; 0 is OK."""
    if isinstance(answer, Outcomes):
        return [outcome.failure.code for outcome in answer.outcomes]
    return []


def _redrawn_count(answer: Redrawn) -> int:
    return max(answer.redrawings.shape[0], answer.redrawings.drawn.shape[0])


def _outcome_picture_count(answer: Outcomes) -> int:
    return sum(picture_count(outcome.response) for outcome in answer.outcomes)


def _row_verdicts(rows: Iterable[scoring_pb2.Score | scoring_pb2.Classification]) -> list[int]:
    return [row.verdict for row in rows]


def _outcome_verdicts(answer: Outcomes) -> list[int]:
    return [verdict for outcome in answer.outcomes for verdict in verdicts(outcome.response)]


def _inferred_verdicts(answer: inference_pb2.ModelInferResponse) -> list[int]:
    places = {output.name: at for at, output in enumerate(answer.outputs)}
    name = next((name for name in ("verdict", "outlier") if name in places), None)
    if name is None:
        return []
    contents, raw = answer.outputs[places[name]].contents, answer.raw_output_contents
    typed = contents.int_contents or contents.bool_contents
    values = np.frombuffer(raw[places[name]], np.int8).tolist() if raw else typed
    first = 1 if name == "outlier" else 0  # false is ACCEPTED, true OUTLIER
    return [first + value for value in values]


# Looked up by the answer's type, as a chain of comparisons would cost microseconds per answer.
_PICTURE_COUNTS: Mapping[type, Callable[[Any], int]] = {
    scoring_pb2.ScoreResponse: lambda answer: len(answer.scores),
    scoring_pb2.ClassifyResponse: lambda answer: len(answer.classifications),
    scoring_pb2.EncodeResponse: lambda answer: len(answer.labels),
    scoring_pb2.ScoreStreamResponse: _outcome_picture_count,
    scoring_pb2.ClassifyStreamResponse: _outcome_picture_count,
    generation_pb2.GenerateResponse: lambda answer: len(answer.labels),
    generation_pb2.CompleteResponse: lambda answer: answer.images.shape[0],
    latent_pb2.DecodeResponse: _redrawn_count,
    latent_pb2.TraverseResponse: _redrawn_count,
    latent_pb2.InterpolateResponse: _redrawn_count,
    inference_pb2.ModelInferResponse: lambda answer: (
        answer.outputs[0].shape[0] if answer.outputs else 0
    ),
    inference_pb2.ModelStreamInferResponse: lambda answer: picture_count(answer.infer_response),
}
_VERDICTS: Mapping[type, Callable[[Any], list[int]]] = {
    scoring_pb2.ScoreResponse: lambda answer: _row_verdicts(answer.scores),
    scoring_pb2.ClassifyResponse: lambda answer: _row_verdicts(answer.classifications),
    scoring_pb2.ScoreStreamResponse: _outcome_verdicts,
    scoring_pb2.ClassifyStreamResponse: _outcome_verdicts,
    inference_pb2.ModelInferResponse: _inferred_verdicts,
    inference_pb2.ModelStreamInferResponse: lambda answer: verdicts(answer.infer_response),
}
