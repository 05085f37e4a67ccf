"""Merges several requests into one, and splits its answer again."""

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
MOST_PRIORS = 4096  # requests with more priors are not merged


def key(request: Request) -> Hashable:
    """Returns a key that is equal for requests that may be merged; None for one that may not.

    Requests whose bytes do not match their shape are not merged, since together they could match;
    each must be refused by itself. Neither are requests with very many priors, whose number is
    limited only by the size of a message.
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
    """Number of pictures of a request that has a key."""
    return int(request.images.shape[0])


def merge(requests: Sequence[Q]) -> Q:
    """Merges requests into one for all their pictures; their keys must be equal and not None."""
    whole = copy.deepcopy(requests[0])
    whole.images.data = b"".join([request.images.data for request in requests])
    whole.images.shape[0] = sum(map(rows, requests))
    return whole


def split(response: R, requests: Sequence[Request]) -> list[R]:
    """Splits the answer to `merge(requests)` into the answers to the requests."""
    spans = pairwise(accumulate(map(rows, requests), initial=0))
    if isinstance(response, scoring_pb2.ClassifyResponse):
        return [cast("R", _classifications(response, start, stop)) for start, stop in spans]
    return [cast("R", _scores(response, start, stop)) for start, stop in spans]


def _scores(
    response: scoring_pb2.ScoreResponse, start: int, stop: int
) -> scoring_pb2.ScoreResponse:
    map_bytes = len(response.surprise) // max(1, len(response.scores))  # bytes per surprise map
    return scoring_pb2.ScoreResponse(
        model_version=response.model_version,
        scores=response.scores[start:stop],
        alpha=response.alpha,
        surprise=response.surprise[start * map_bytes : stop * map_bytes] if map_bytes else b"",
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
