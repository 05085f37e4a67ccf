"""Several requests as one: which go together, the one that asks for all, and its answer divided."""

from __future__ import annotations

import copy
import math
from collections.abc import Hashable, Sequence
from itertools import accumulate, pairwise
from typing import TypeVar, cast

from likely.v1 import scoring_pb2

Request = scoring_pb2.ScoreRequest | scoring_pb2.ClassifyRequest
Response = scoring_pb2.ScoreResponse | scoring_pb2.ClassifyResponse
Q = TypeVar("Q", bound=Request)
R = TypeVar("R", bound=Response)
MOST_PRIORS = 4096  # of requests that go together


def key(request: Request) -> Hashable:
    """What is equal for requests that go together; None for one that goes alone.

    Two whose bytes fit no shape could fit when put together: each has to be refused by itself. Of
    priors there may be as many as a message holds.
    """
    if len(request.images.shape) != 4:
        return None
    shape = tuple(request.images.shape)
    if min(shape) < 0 or len(request.images.data) != math.prod(shape):
        return None
    if isinstance(request, scoring_pb2.ClassifyRequest) and len(request.priors) > MOST_PRIORS:
        return None
    common = (
        request.model_name,
        request.model_version,
        shape[1:],
        request.alpha if request.HasField("alpha") else None,
        request.guarantee,
    )
    if isinstance(request, scoring_pb2.ScoreRequest):
        return *common, request.surprise
    return *common, tuple(request.priors), request.min_posterior, request.rule, request.both


def rows(request: Request) -> int:
    """How many pictures a request with a key brings."""
    return int(request.images.shape[0])


def merged(requests: Sequence[Q]) -> Q:
    """One request for the pictures of all; their keys are equal, and not None."""
    whole = copy.deepcopy(requests[0])
    whole.images.data = b"".join([request.images.data for request in requests])
    whole.images.shape[0] = sum(map(rows, requests))
    return whole


def parted(response: R, requests: Sequence[Request]) -> list[R]:
    """The answer to each request, from the answer to `merged` of them."""
    spans = pairwise(accumulate(map(rows, requests), initial=0))
    if isinstance(response, scoring_pb2.ClassifyResponse):
        return [cast("R", _classifications(response, start, stop)) for start, stop in spans]
    return [cast("R", _scores(response, start, stop)) for start, stop in spans]


def _scores(
    response: scoring_pb2.ScoreResponse, start: int, stop: int
) -> scoring_pb2.ScoreResponse:
    each = len(response.surprise) // max(1, len(response.scores))  # bytes of a picture's map
    return scoring_pb2.ScoreResponse(
        model_version=response.model_version,
        scores=response.scores[start:stop],
        alpha=response.alpha,
        surprise=response.surprise[start * each : stop * each] if each else b"",
    )


def _classifications(
    response: scoring_pb2.ClassifyResponse, start: int, stop: int
) -> scoring_pb2.ClassifyResponse:
    return scoring_pb2.ClassifyResponse(
        model_version=response.model_version,
        classifications=response.classifications[start:stop],
        alpha=response.alpha,
        rule=response.rule,
    )
