"""What every fault must leave behind: a server that is well."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from likely import statuses
from likely.v1.generation_pb2 import CompleteRequest, GenerateRequest
from likely.v1.generation_pb2_grpc import GenerationServiceStub
from likely.v1.images_pb2 import Images
from likely.v1.latent_pb2 import DecodeRequest, InterpolateRequest, TraverseRequest
from likely.v1.latent_pb2_grpc import LatentServiceStub
from likely.v1.models_pb2 import GetModelRequest, ListModelsRequest
from likely.v1.models_pb2_grpc import ModelServiceStub
from likely.v1.scoring_pb2 import ScoreRequest
from likely.v1.scoring_pb2_grpc import ScoringServiceStub

if TYPE_CHECKING:
    from tests.conftest import Live

SECONDS = 30  # a bound for what hangs, not a measure of what is fast
GOOD = Images(data=bytes(9), shape=(1, 1, 3, 3))
IDLE = ("likely_queue_rows", "likely_batches_running", "likely_requests_in_flight")


class Caller:
    """Sends each request to its RPC; a stream comes as a list."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.scoring = ScoringServiceStub(channel)
        self.generation = GenerationServiceStub(channel)
        self.latent = LatentServiceStub(channel)
        self.models = ModelServiceStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)

    def ask(self, request: Any, **more: Any) -> Any:
        method = type(request).__name__.removesuffix("Request")
        match request:
            case GenerateRequest() | CompleteRequest():
                return list(getattr(self.generation, method)(request, timeout=SECONDS, **more))
            case DecodeRequest() | TraverseRequest() | InterpolateRequest():
                return getattr(self.latent, method)(request, timeout=SECONDS, **more)
            case GetModelRequest() | ListModelsRequest():
                return getattr(self.models, method)(request, timeout=SECONDS, **more)
            case _:
                return getattr(self.scoring, method)(request, timeout=SECONDS, **more)


@contextmanager
def calling(address: str, **options: Any) -> Iterator[Caller]:
    """A caller of that address, over a connection of its own."""
    given = [(f"grpc.{name}", value) for name, value in options.items()]
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1), *given]) as channel:
        yield Caller(channel)


def on_toy(kind: Any, **fields: Any) -> Any:
    """A request to the toy, with one good picture if it takes pictures."""
    pictured = "images" in kind.DESCRIPTOR.fields_by_name
    return kind(**{"model_name": "toy", **({"images": GOOD} if pictured else {}), **fields})


def drawing(**fields: Any) -> GenerateRequest:
    """Asks the toy for a picture."""
    return GenerateRequest(**{"model_name": "toy", "count": 1, **fields})


def refused(call: Callable[[], Any], code: grpc.StatusCode, reason: str = "") -> Any:
    """The failure of a call; held to its status and, where one is given, ErrorInfo's reason."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    failure: Any = caught.value
    assert failure.code() is code, failure
    if reason:
        assert detail(failure, error_details_pb2.ErrorInfo).reason == reason
        assert statuses.REASONS[reason] is code
    return failure


def bad_field(call: Callable[[], Any]) -> tuple[str, str]:
    """The field that a refused call names, and what it says of it."""
    failure = refused(call, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT")
    (violation,) = detail(failure, error_details_pb2.BadRequest).field_violations
    return violation.field, violation.description


def detail(failure: Any, kind: Any) -> Any:
    """The detail of that kind which a failure carries."""
    return detail_of(dict(failure.trailing_metadata()), kind)


def detail_of(trailing: Mapping[str, Any], kind: Any) -> Any:
    """The detail of that kind among what a failed call ended with."""
    message = kind()
    rich = status_pb2.Status.FromString(trailing[statuses.DETAILS_KEY])
    assert any(packed.Unpack(message) for packed in rich.details)
    return message


def told_to_come_again(trailing: Mapping[str, Any]) -> None:
    """Returns if both the details and the header that clients obey say when."""
    retry = detail_of(trailing, error_details_pb2.RetryInfo)
    delay = retry.retry_delay.ToTimedelta().total_seconds()
    assert delay > 0
    assert int(trailing[statuses.PUSHBACK_KEY]) == round(1000 * delay)


def is_well(live: Live) -> None:
    """Returns if the server says SERVING, answers a good request and comes to rest."""
    with calling(live.address) as caller:
        check = caller.health.Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        assert check.status == health_pb2.HealthCheckResponse.SERVING
        assert len(caller.ask(on_toy(ScoreRequest)).scores) == 1
    comes_to_rest(live)


def comes_to_rest(live: Live) -> None:
    """Returns once nothing waits, runs or is in flight."""
    end = time.monotonic() + SECONDS
    while busy := {name: value for name, value in gauges(live).items() if value}:
        assert time.monotonic() < end, busy
        time.sleep(0.02)


def gauges(live: Live) -> dict[str, float]:
    """The gauges that are 0 when nothing runs."""
    return {name: value for name, value in scrape(live).items() if name.startswith(IDLE)}


def scrape(live: Live) -> dict[str, float]:
    """Every metric by name and labels."""
    with urllib.request.urlopen(live.metrics_url, timeout=SECONDS) as answer:
        lines = answer.read().decode().splitlines()
    return {
        name: float(value)
        for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")
    }


@contextmanager
def flat_memory(mebibytes: int) -> Iterator[None]:
    """Holds the peak of this process, in which the server runs, to so much more than before.

    Some sandboxes do not let a process begin its peak anew. There, what is within is still done;
    then the test is skipped.
    """
    refusal = _peak_begun_anew()
    before = _kibibytes("VmRSS")
    yield
    if refusal:
        pytest.skip(f"the peak of memory cannot be measured: {refusal}")
    grown = (_kibibytes("VmHWM") - before) >> 10
    assert grown <= mebibytes, f"{grown} MiB more"


def _peak_begun_anew() -> OSError | None:
    """None, or why it could not be."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        return error
    return None


def _kibibytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])
