"""Faults of the wire: requests and connections that are wrong, each answered as it should be."""

from __future__ import annotations

import math
import resource
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2

from likely import Client, codec
from likely.serving import server, tallies
from likely.v1.generation_pb2 import CompleteRequest, SelfCheck
from likely.v1.images_pb2 import Images
from likely.v1.models_pb2 import GetModelRequest
from likely.v1.scoring_pb2 import ClassifyRequest, EncodeRequest, ScoreRequest
from tests.faults import http2
from tests.faults.alive import (
    SECONDS,
    Caller,
    bad_field,
    calling,
    detail,
    drawing,
    flat_memory,
    is_well,
    on_toy,
    refused,
    scrape,
)
from tests.faults.rpcs import ADMIN, OURS, THEIRS, Rpc, listed
from tests.faults.served import wait_until

if TYPE_CHECKING:
    from tests.conftest import Live, Running

PICTURED = (ScoreRequest, ClassifyRequest, EncodeRequest)
SCORE = "/likely.v1.ScoringService/Score"
WATCH = "/grpc.health.v1.Health/Watch"
INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture
def caller(live: Live) -> Iterator[Caller]:
    """Calls the shared server, which must be well afterwards."""
    with calling(live.address) as channel:
        yield channel
    is_well(live)


@pytest.mark.fault(1)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused_and_the_first_is_named(
    caller: Caller, wrong: float
) -> None:
    for request, field in (
        (on_toy(ClassifyRequest, priors=[0.5, wrong, wrong]), "priors[1]"),
        (on_toy(ClassifyRequest, alpha=wrong), "alpha"),
        (on_toy(ClassifyRequest, min_posterior=wrong), "min_posterior"),
        (on_toy(ScoreRequest, alpha=wrong), "alpha"),
        (drawing(temperature=wrong), "temperature"),
        (drawing(self_check=SelfCheck(alpha=wrong)), "self_check.alpha"),
        (on_toy(CompleteRequest, mask=bytes(9), temperature=wrong), "temperature"),
    ):
        found, said = bad_field(partial(caller.ask, request))
        assert found == field
        assert f"{wrong:g}" in said


@pytest.mark.fault(2)
def test_finite_extremes_give_finite_answers(caller: Caller) -> None:
    extremes = np.stack([np.full((1, 3, 3), level, np.uint8) for level in (0, 3)])
    images = codec.images(extremes)
    score = codec.scores(caller.ask(on_toy(ScoreRequest, images=images)), None)
    assert np.isfinite(score.log_px).all()
    priors = [1 - 1e-45 - 1e-300, 1e-45, 1e-300]
    for row in caller.ask(
        on_toy(ClassifyRequest, images=images, priors=priors, min_posterior=5e-324)
    ).classifications:
        assert np.isfinite([*row.log_likelihoods, *row.posterior]).all()
        assert math.isclose(sum(row.posterior), 1, abs_tol=1e-9)
    (chunk,) = caller.ask(drawing(seed=1, temperature=1e-45))
    (coldest,) = caller.ask(drawing(seed=1, temperature=0))
    assert chunk.images == coldest.images
    assert bad_field(partial(caller.ask, drawing(temperature=1e38)))[0] == "temperature"
    huge = on_toy(ClassifyRequest, priors=[1e38, 0, 0])
    assert bad_field(partial(caller.ask, huge))[0] == "priors[0]"


@pytest.mark.fault(4)
@pytest.mark.parametrize("kind", PICTURED)
@pytest.mark.parametrize("size", [0, 8, 10, 9 * 4])
def test_bytes_that_do_not_fit_their_shape_are_counted(
    caller: Caller, kind: Any, size: int
) -> None:
    images = Images(data=bytes(size), shape=(1, 1, 3, 3))
    field, said = bad_field(lambda: caller.ask(on_toy(kind, images=images)))
    assert field == "images.data"
    assert said == f"{size} bytes; the shape (1, 1, 3, 3) asks for 9"


@pytest.mark.fault(5)
@pytest.mark.parametrize("kind", PICTURED)
@pytest.mark.parametrize(
    ("shape", "field"),
    [
        ((-1, 1, 3, 3), "images.shape[0]"),
        ((1, 1, -3, -3), "images.shape[2]"),
        ((2**62, 1, 3, 3), "images.shape[0]"),
        ((2**63 - 1, 1, 3, 3), "images.shape[0]"),
        ((1, 2**31, 2**31, 4), "images.shape[1]"),
        ((100, 1, 3, 3), "images.data"),
    ],
)
def test_dimensions_are_checked_before_anything_is_allocated(
    caller: Caller, kind: Any, shape: tuple[int, ...], field: str
) -> None:
    with flat_memory(32):
        images = Images(data=bytes(9), shape=shape)
        assert bad_field(lambda: caller.ask(on_toy(kind, images=images)))[0] == field


@pytest.mark.fault(6)
def test_no_pictures_get_an_empty_answer(caller: Caller) -> None:
    for kind in PICTURED:
        answer = caller.ask(on_toy(kind, images=Images(shape=(0, 1, 3, 3))))
        assert tallies.picture_count(answer) == 0
        assert answer.model_version == "1.0"
    assert caller.ask(on_toy(CompleteRequest, images=Images(shape=(0, 1, 3, 3)))) == []


@pytest.mark.fault(7)
@pytest.mark.parametrize(
    ("shape", "field"),
    [
        ((), "images.shape"),
        ((9,), "images.shape"),
        ((1, 3, 3), "images.shape"),
        ((1, 1, 1, 3, 3), "images.shape"),
        ((1, 3, 3, 1), "images.shape[1]"),
        ((1, 9, 1, 1), "images.shape[1]"),
        ((1, 1, 1, 9), "images.shape[2]"),
        ((1, 1, 3, 4), "images.shape[3]"),
    ],
)
def test_another_shape_is_neither_cast_nor_reshaped(
    caller: Caller, shape: tuple[int, ...], field: str
) -> None:
    for kind in PICTURED:
        images = Images(data=bytes(9), shape=shape)
        assert bad_field(partial(caller.ask, on_toy(kind, images=images)))[0] == field


@pytest.mark.fault(8)
@pytest.mark.parametrize("level", [4, 255])
def test_a_level_above_the_models_is_found(caller: Caller, level: int) -> None:
    data = bytearray(18)
    data[14] = level
    images = Images(data=bytes(data), shape=(2, 1, 3, 3))
    for kind in PICTURED:
        field, said = bad_field(partial(caller.ask, on_toy(kind, images=images)))
        assert field == "images.data"
        assert said == f"level {level} at picture 1, channel 0, row 1, column 2 is not in [0, 4)"


@pytest.mark.fault(9)
def test_too_many_pictures_are_told_the_limit_and_our_client_divides_them(
    caller: Caller, live: Live
) -> None:
    images = Images(data=bytes(9 * 101), shape=(101, 1, 3, 3))
    for kind in PICTURED:
        field, said = bad_field(partial(caller.ask, on_toy(kind, images=images)))
        assert (field, "at most 100" in said) == ("images.shape[0]", True)
    with Client(live.address) as client:
        assert len(client.score(np.zeros((101, 3, 3), np.uint8)).log_px) == 101


@pytest.mark.fault(10)
@pytest.mark.parametrize(
    ("request_", "field", "allowed"),
    [
        (drawing(label=3), "label", "0 to 2: label-0, label-1, label-2"),
        (drawing(label=-1), "label", "0 to 2"),
        (on_toy(EncodeRequest, labels=[-1]), "labels[0]", "0 to 2"),
        (drawing(count=0), "count", "1 to 50"),
        (drawing(count=10**9), "count", "1 to 50"),
        (drawing(count=-1), "count", "1 to 50"),
        (drawing(temperature=-0.5), "temperature", "[0, 2]"),
        (drawing(temperature=1e30), "temperature", "[0, 2]"),
        (on_toy(CompleteRequest, mask=bytes(9), completions=0), "completions", "1 to 50"),
        (on_toy(CompleteRequest, mask=bytes(9), completions=2**31 - 1), "completions", "1 to 50"),
        (on_toy(CompleteRequest, mask=bytes(9), proposals=-1), "proposals", "1 to 50"),
        (on_toy(CompleteRequest, mask=b"\2" * 9), "mask", "0 or 1"),
        (on_toy(CompleteRequest, mask=bytes(8)), "mask", "9"),
    ],
)
def test_a_value_outside_its_range_is_told_the_range(
    caller: Caller, request_: Any, field: str, allowed: str
) -> None:
    found, said = bad_field(lambda: caller.ask(request_))
    assert found == field
    assert allowed in said


@pytest.mark.fault(11)
@pytest.mark.parametrize("seed", [0, 2**63 - 1, -(2**63)])
def test_every_seed_gives_the_same_bytes_again(caller: Caller, seed: int) -> None:
    first, second = (caller.ask(drawing(count=20, seed=seed)) for _ in range(2))
    assert first == second
    assert {chunk.seed for chunk in first} == {seed}
    mask = bytes([1, 0] * 4 + [0])
    request = on_toy(CompleteRequest, mask=mask, seed=seed, completions=3)
    assert caller.ask(request) == caller.ask(request)


@pytest.mark.fault(12)
@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({"priors": [1, -0.5, 0.5]}, "priors[1]", "-0.5"),
        ({"priors": [0.5, 0.5, 0.5]}, "priors", "1.5"),
        ({"priors": [0, 0, 0]}, "priors", "0; 1 within"),
        ({"priors": [math.nan] * 3}, "priors[0]", "nan"),
        ({"priors": [1]}, "priors", "3 labels"),
        ({"priors": [0.25] * 4}, "priors", "3 labels"),
        ({"alpha": 0.0}, "alpha", "0.005"),
        ({"alpha": 1.0}, "alpha", "0.005"),
        ({"alpha": -0.1}, "alpha", "0.005"),
        ({"alpha": 0.004}, "alpha", "0.005"),
    ],
)
def test_priors_and_alpha_are_held_to_what_can_be_promised(
    caller: Caller, fields: dict[str, Any], field: str, said: str
) -> None:
    found, description = bad_field(lambda: caller.ask(on_toy(ClassifyRequest, **fields)))
    assert found == field
    assert said in description


@pytest.mark.fault(14)
def test_an_unknown_model_is_one_value_in_the_metrics(caller: Caller, live: Live) -> None:
    for request, named in (
        *((on_toy(ScoreRequest, model_name=f"other-{i}"), f"other-{i}") for i in range(5)),
        (on_toy(ScoreRequest, model_version="9"), "toy@9"),
        (drawing(model_name="other"), "other"),
        (GetModelRequest(model_name="other"), "other"),
    ):
        failure = refused(
            partial(caller.ask, request), grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"
        )
        assert detail(failure, error_details_pb2.ResourceInfo).resource_name == named
    assert not [name for name in scrape(live) if "other" in name]


@pytest.mark.fault(15)
@pytest.mark.parametrize("name", ["", " ", "../x", "a/b", "\0", "Toy", "x" * 10_000, "é", ".."])
def test_a_name_that_is_none_reaches_no_path_and_no_metric(
    caller: Caller, live: Live, name: str
) -> None:
    requests = [on_toy(kind, model_name=name) for kind in (*PICTURED, GetModelRequest)]
    if name:
        requests.append(on_toy(ScoreRequest, model_version=name))
    for request in [*requests, drawing(model_name=name)]:
        field, said = bad_field(partial(caller.ask, request))
        assert field in ("model_name", "model_version")
        assert len(said) < 200
    labels = {part for line in scrape(live) for part in line.split('"')[1::2]}
    assert name == "" or name not in labels


@pytest.mark.fault(16)
def test_much_metadata_is_refused(caller: Caller) -> None:
    with flat_memory(32):
        for _ in range(20):
            refused(
                lambda: caller.ask(on_toy(ScoreRequest), metadata=(("x-much", "y" * 20_000),)),
                grpc.StatusCode.RESOURCE_EXHAUSTED,
            )


@pytest.mark.fault(16)
def test_a_large_request_is_refused(running: Running) -> None:
    with running(request_bytes=1 << 20) as live, calling(live.address) as caller:
        large = on_toy(ScoreRequest, images=Images(data=bytes(2 << 20)))
        caller.ask(on_toy(ScoreRequest))
        with flat_memory(64):
            for _ in range(20):
                refused(lambda: caller.ask(large), grpc.StatusCode.RESOURCE_EXHAUSTED)
        is_well(live)


@pytest.mark.fault(16)
def test_a_bomb_is_not_unpacked(running: Running) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    parts = [packer.compress(bytes(1 << 20)) for _ in range(60)]
    bomb = b"".join([*parts, packer.flush()])
    assert len(bomb) < 1 << 16
    with running(request_bytes=1 << 20) as live:
        is_well(live)
        with flat_memory(32):
            for _ in range(10):
                with http2.connected(live.address) as there:
                    there.sendall(http2.headers(1, SCORE, grpc_encoding="gzip"))
                    there.sendall(http2.message(1, bomb, compressed=True))
                    assert http2.status(there) == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        is_well(live)


@pytest.mark.fault(17)
@pytest.mark.timeout(600)
def test_an_answer_above_four_mebibytes_comes_to_our_client(running: Running) -> None:
    n, seconds = 100_000, 280
    with running(images_per_request=n) as live:
        x = np.zeros((n, 3, 3), np.uint8)
        with Client(live.address, timeout=seconds) as client:
            answer = client.score(x, surprise=True)
        assert answer.surprise is not None
        assert answer.surprise.nbytes + 30 * n > 4 << 20
        with calling(live.address) as caller:  # gRPC's own default: its client refuses it
            request = on_toy(ScoreRequest, images=codec.images(x[:, None]), surprise=True)
            score = partial(caller.scoring.Score, request, timeout=seconds)
            refused(score, grpc.StatusCode.RESOURCE_EXHAUSTED)
        is_well(live)


NO_MESSAGE = (b"\xff" * 40, b"\x0a\x05ab", b"\0")
NO_TEXT = b"\x0a\x02\xff\xfe"  # where no text is the first field, it may be a message


def garbage(rpc: Rpc) -> tuple[bytes, ...]:
    """What is no message of the RPC's type."""
    first = rpc.method.input_type.fields_by_number.get(1)
    return (*NO_MESSAGE, NO_TEXT) if first and first.type == first.TYPE_STRING else NO_MESSAGE


@pytest.fixture(scope="module")
def administered(running: Running) -> Iterator[Live]:
    """A server whose admin RPCs are on."""
    with running(admin_port=0) as live:
        yield live


@pytest.mark.fault(18)
@pytest.mark.parametrize("rpc", [*OURS, *THEIRS], ids=str)
def test_garbage_is_an_invalid_argument(administered: Live, rpc: Rpc) -> None:
    server = administered.server
    port = server.admin_port if rpc.service == ADMIN else server.port
    with calling(f"127.0.0.1:{port}") as caller:
        for data in garbage(rpc):
            ask = partial(rpc.ask_bytes, caller.channel, data)
            failure = refused(ask, INVALID, "INVALID_INPUT")
            assert failure.details() == "the request's bytes are no message of the RPC's type"
    is_well(administered)


@pytest.mark.fault(18)
def test_no_service_is_spared_the_garbage(caller: Caller) -> None:
    assert listed(caller.channel) == {rpc.service for rpc in (*OURS, *THEIRS)}


@pytest.mark.fault(19)
@pytest.mark.parametrize(
    "method",
    [
        "/likely.v1.ScoringService/Guess",
        "/likely.v2.ScoringService/Score",
        "/a",
        "/",
        "//",
        "/a/b/c",
    ],
)
def test_an_unknown_method_is_unimplemented(caller: Caller, live: Live, method: str) -> None:
    for kind, given in (("unary_unary", b""), ("stream_stream", iter([b"x"]))):
        call: Any = getattr(caller.channel, kind)(method)

        def ask(call: Any = call, given: Any = given) -> Any:
            answer = call(given, timeout=SECONDS)
            return answer if isinstance(answer, bytes) else list(answer)

        refused(ask, grpc.StatusCode.UNIMPLEMENTED, "METHOD_UNKNOWN")
    assert not [name for name in scrape(live) if "Guess" in name]


@pytest.mark.fault(19)
def test_unknown_fields_are_passed_over(caller: Caller) -> None:
    known = on_toy(ScoreRequest).SerializeToString()
    call: Any = caller.channel.unary_unary(SCORE)
    plain, later = (call(data, timeout=SECONDS) for data in (known, known + b"\xfa\x3f\x02hi"))
    assert plain == later


@pytest.mark.fault(20)
def test_a_bug_tells_nothing_but_its_request_id(
    caller: Caller, live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the secret of the house")

    engine = live.server.registry.find("toy")
    requests = {
        "score": on_toy(ScoreRequest),
        "judge": on_toy(ClassifyRequest),
        "encode": on_toy(EncodeRequest),
        "generate": drawing(),
        "complete": on_toy(CompleteRequest, mask=bytes(9)),
    }
    for method, request in requests.items():
        with monkeypatch.context() as patch:
            patch.setattr(engine, method, broken)
            failure = refused(
                partial(caller.ask, request, metadata=(("x-request-id", "trace-9"),)),
                grpc.StatusCode.INTERNAL,
                "INTERNAL",
            )
        assert failure.details() == "internal error, request trace-9"
        assert "secret" not in str(failure.trailing_metadata())
    assert "the secret of the house" in live.log.getvalue()


@pytest.mark.fault(23)
def test_a_thousand_clients_that_ask_and_drop_harm_nobody(running: Running) -> None:
    with running() as live:
        is_well(live)
        request = on_toy(ScoreRequest).SerializeToString()
        with flat_memory(96):
            for i in range(1000):
                with http2.connected(live.address) as there:
                    there.sendall(http2.headers(1, SCORE))
                    if i % 2:
                        there.sendall(http2.message(1, request))
        is_well(live)


@pytest.mark.fault(24)
def test_a_caller_that_does_not_read_is_cut_off(running: Running) -> None:
    many = {"images_per_generation": 1 << 20, "images_per_chunk": 4096}
    with running(slow_reader_seconds=0.5, **many) as live:
        is_well(live)
        narrow = {"http2.lookahead_bytes": 1 << 16, "http2.bdp_probe": 0}
        with flat_memory(96), calling(live.address, **narrow) as caller:
            stream: Any = caller.generation.Generate(drawing(count=1 << 20))
            drawn = len(next(stream).labels)
            is_well(live)  # nothing runs any more while nothing is read
            failure = refused(lambda: list(stream), grpc.StatusCode.DEADLINE_EXCEEDED)
        assert "did not read an answer within 0.5 seconds" in failure.details()
        counted = scrape(live)['likely_images_total{method="Generate",model="toy"}']
        assert drawn <= counted < 1 << 18, "the stream was drawn although nobody read it"
        sample = 'likely_requests_total{code="DEADLINE_EXCEEDED",method="Generate",model="toy"}'
        assert scrape(live)[sample] == 1
        is_well(live)


@pytest.mark.fault(24)
def test_a_watcher_of_health_that_does_not_read_holds_nobody(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "READ_SECONDS", 0.5)
    with (
        running(load=False, slow_reader_seconds=2) as live,
        http2.connected(live.address) as there,
        calling(live.address) as caller,
    ):
        there.sendall(http2.setting(http2.WINDOW, 0) + http2.headers(1, WATCH))
        there.sendall(http2.message(1, b""))
        assert http2.HEADERS in (kind for kind, *_ in http2.frames(there))  # it is answered
        watch = caller.health.Watch(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        live.run(live.server.load())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        wait_until(lambda: "DEADLINE_EXCEEDED" in live.log.getvalue())
        live.run(live.server.stop(1))
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        refused(lambda: next(watch), grpc.StatusCode.UNAVAILABLE)


@pytest.mark.fault(24)
def test_half_a_request_and_an_answer_unread_do_not_hold_the_end(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "READ_SECONDS", 0.5)
    body = on_toy(ScoreRequest).SerializeToString()
    with running(drain_seconds=300) as live, http2.connected(live.address) as there:
        there.sendall(http2.setting(http2.WINDOW, 0) + http2.headers(1, SCORE))
        there.sendall(http2.message(1, body) + http2.headers(3, SCORE))
        there.sendall(http2.frame(http2.DATA, stream=3, payload=struct.pack(">BI", 0, 100)))
        assert http2.HEADERS in (kind for kind, *_ in http2.frames(there))  # the first is answered
        is_well(live)
        live.run(live.server.stop())  # raises after a minute


@pytest.mark.fault(39)
def test_a_flood_of_pings_harms_nobody(caller: Caller, live: Live) -> None:
    with flat_memory(96), http2.connected(live.address) as there:
        there.settimeout(1)
        try:
            for _ in range(500):
                there.sendall(http2.frame(http2.PING, payload=bytes(8)) * 100)
        except (ConnectionError, TimeoutError):
            pass  # the server closed, or reads no more while nobody reads its answers
        is_well(live)


@pytest.mark.fault(39)
def test_rapid_reset_harms_nobody(caller: Caller, live: Live) -> None:
    request = on_toy(ScoreRequest).SerializeToString()
    with flat_memory(96), http2.connected(live.address) as there:
        try:
            for stream in range(1, 20_000, 2):
                there.sendall(
                    http2.headers(stream, SCORE)
                    + http2.message(stream, request)
                    + http2.frame(http2.RESET, stream=stream, payload=b"\0\0\0\x08")
                )
        except ConnectionError:
            pass  # the server may have had enough
        # gRPC itself sheds, as CANCELLED, while thousands of calls wait to be looked at.
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            try:
                with calling(live.address) as other:
                    other.ask(on_toy(ScoreRequest))
                break
            except grpc.RpcError as shed:
                failure: Any = shed
                assert failure.code() is grpc.StatusCode.CANCELLED
                time.sleep(0.05)
        is_well(live)


@pytest.mark.fault(39)
@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        np.random.default_rng(3).bytes(100_000),
        http2.PREFACE[:10],
        http2.PREFACE + http2.frame(http2.SETTINGS) + b"\xff" * 1000,
    ],
    ids=["http/1", "tls", "random", "half a preface", "random frames"],
)
def test_random_bytes_on_the_port_harm_nobody(caller: Caller, live: Live, data: bytes) -> None:
    for _ in range(20):
        with http2.connected(live.address, greet=False) as there:
            try:
                there.sendall(data)
            except ConnectionError:
                continue


@pytest.mark.fault(39)
def test_half_open_connections_harm_nobody(caller: Caller, live: Live) -> None:
    with ExitStack() as stack:
        for greet in (True, False) * 100:
            there = stack.enter_context(http2.connected(live.address, greet=greet))
            if greet:
                there.sendall(http2.headers(1, SCORE))
            there.shutdown(socket.SHUT_WR)
        is_well(live)


IDLE = """
import resource, socket, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
held = []
for i in range(count):
    held.append(socket.create_connection((host, port), 60))
    held[-1].sendall(b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n" + b"\\0\\0\\0\\4\\0\\0\\0\\0\\0")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.fault(39)
def test_ten_thousand_idle_connections_harm_nobody(running: Running) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(10_000, hard - 1000)
    if count < 1000:
        pytest.skip(f"this machine lets a process hold {hard} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with running() as live:
            host, _, port = live.address.rpartition(":")
            command = [sys.executable, "-c", IDLE, host, port, str(count)]
            pipe = subprocess.PIPE
            with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as idle:
                assert idle.stdout is not None
                assert idle.stdout.readline() == "held\n"
                is_well(live)
                idle.communicate("")
            is_well(live)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
from likely.cli import main
main()
"""


@pytest.mark.fault(40)
@pytest.mark.parametrize("name", ["drawn.npz", "drawn.png"])
def test_a_full_disk_leaves_nothing_half_written(live: Live, tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    command = ["generate", "--address", live.address, "--count", "50", "--out", str(out)]
    for before in (None, b"what was there"):
        if before is not None:
            out.write_bytes(before)
        ran = subprocess.run(
            [sys.executable, "-c", FULL, *command], capture_output=True, text=True, timeout=60
        )
        assert ran.returncode == 1
        assert "Traceback" not in ran.stderr
        assert "File too large" in ran.stderr
        assert (out.read_bytes() if out.exists() else None) == before
        assert [path.name for path in tmp_path.iterdir()] == ([name] if before else [])
    is_well(live)


@pytest.mark.fault(40)
def test_a_place_that_cannot_be_written_is_one_sentence(live: Live, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file" / "x.npz", tmp_path / "missing" / "x.png"):
        ran = subprocess.run(
            [sys.executable, "-m", "likely", "generate", "--address", live.address, "--out", out],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert ran.returncode == 1
        assert str(out) in ran.stderr
        assert "Traceback" not in ran.stderr
