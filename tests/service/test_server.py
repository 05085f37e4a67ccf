"""RPCs against a real server on a free port."""

from __future__ import annotations

import asyncio
import json
import math
import random
import shutil
import threading
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from likely import Client, codec, statuses
from likely.batching import callers
from likely.batching.admission import Quota
from likely.engine import Engine
from likely.errors import BundleError, Overloaded, SettingsError
from likely.serving import tallies
from likely.v1.generation_pb2 import GenerateRequest
from likely.v1.generation_pb2_grpc import GenerationServiceStub
from likely.v1.images_pb2 import Images
from likely.v1.models_pb2 import GetModelRequest, ListModelsRequest
from likely.v1.models_pb2_grpc import ModelServiceStub
from likely.v1.scoring_pb2 import ClassifyRequest, EncodeRequest, ScoreRequest, Verdict
from likely.v1.scoring_pb2_grpc import ScoringServiceStub
from likely.versions.watch import Watcher

if TYPE_CHECKING:
    from tests.conftest import Live, Running, Toy

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
GOOD = Images(data=bytes(9), shape=(1, 1, 3, 3))


class Stubs:
    """All services over one channel."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.scoring = ScoringServiceStub(channel)
        self.generation = GenerationServiceStub(channel)
        self.models = ModelServiceStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)
        self.reflection = reflection_pb2_grpc.ServerReflectionStub(channel)

    def ask(self, request: Any, **more: Any) -> Any:
        """Sends a request to its RPC; a stream comes as a list."""
        match request:
            case GenerateRequest():
                return list(self.generation.Generate(request, timeout=30, **more))
            case GetModelRequest():
                return self.models.GetModel(request, timeout=30, **more)
            case _:
                method = type(request).__name__.removesuffix("Request")
                return getattr(self.scoring, method)(request, timeout=30, **more)


@pytest.fixture
def stubs(live: Live) -> Iterator[Stubs]:
    with grpc.insecure_channel(live.address) as channel:
        yield Stubs(channel)


@pytest.fixture
def x(toy: Toy) -> Any:
    return toy.draw(np.random.default_rng(9), 40)


def failure(call: Callable[[], Any]) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def detail(error: Any, kind: Any) -> Any:
    rich = status_pb2.Status.FromString(dict(error.trailing_metadata())[statuses.DETAILS_KEY])
    message = kind()
    assert any(packed.Unpack(message) for packed in rich.details)
    return message


def test_score_is_the_closed_form(stubs: Stubs, toy: Toy, x: Any) -> None:
    answer = stubs.ask(
        ScoreRequest(model_name="toy", images=codec.images(x), alpha=0.1, surprise=True)
    )
    scores = codec.scores(answer, x.shape)
    assert np.allclose(scores.log_px, toy.log_px(x), atol=1e-4)
    assert np.allclose(scores.bits_per_dim, -toy.log_px(x) / 9 / np.log(2), atol=1e-5)
    assert scores.surprise is not None
    assert np.allclose(scores.surprise, toy.surprise(x), atol=1e-5)
    assert np.allclose(scores.surprise.sum((1, 2, 3)), -scores.log_px, atol=1e-4)
    assert np.array_equal(scores.verdict == Verdict.VERDICT_OUTLIER, scores.p_value <= 0.1)
    assert (scores.alpha, scores.model_version) == (0.1, "1.0")


def test_classify_is_the_closed_form(stubs: Stubs, toy: Toy, x: Any) -> None:
    priors = [0.2, 0.2, 0.6]
    request = ClassifyRequest(
        model_name="toy", images=codec.images(x), priors=priors, min_posterior=0.9
    )
    answer = codec.classifications(stubs.ask(request), 3)
    joint = np.exp(toy.log_pxy(x)) * priors
    posterior = joint / joint.sum(1, keepdims=True)
    assert np.allclose(answer.log_pxy, toy.log_pxy(x), atol=1e-4)
    assert np.allclose(answer.posterior, posterior, atol=1e-5)
    assert np.array_equal(answer.label, posterior.argmax(1))
    accepted = answer.verdict == Verdict.VERDICT_ACCEPTED
    assert np.array_equal(accepted, (answer.p_value > 0.05) & (posterior.max(1) >= 0.9))


def test_encode_is_the_closed_form(stubs: Stubs, x: Any) -> None:
    labels = np.arange(len(x)) % 3
    request = EncodeRequest(model_name="toy", images=codec.images(x), labels=labels)
    answer = codec.features(stubs.ask(request))
    assert np.array_equal(answer.mean, np.stack((x.sum((1, 2, 3)), labels), 1))
    assert np.array_equal(answer.label, labels)
    unlabelled = codec.features(stubs.ask(EncodeRequest(model_name="toy", images=request.images)))
    assert np.array_equal(unlabelled.mean[:, 1], unlabelled.label)


def draw(stubs: Stubs, count: int, first: int = 0, **more: Any) -> Any:
    request = GenerateRequest(model_name="toy", count=count, first_index=first, seed=3, **more)
    chunks = [codec.draws(message) for message in stubs.ask(request)]
    starts = np.cumsum([first] + [len(chunk.images) for chunk in chunks])
    assert [chunk.first_index for chunk in chunks] == list(starts[:-1])
    assert max(len(chunk.images) for chunk in chunks) <= 8
    return (
        np.concatenate([chunk.images for chunk in chunks]),
        np.concatenate([chunk.label for chunk in chunks]),
    )


@pytest.mark.parametrize("label", [None, 2])
def test_one_seed_gives_the_same_pictures_however_divided(stubs: Stubs, label: int | None) -> None:
    whole, labels = draw(stubs, 37, label=label)
    parts = [draw(stubs, n, first, label=label) for first, n in ((0, 5), (5, 31), (36, 1))]
    assert np.array_equal(whole, np.concatenate([images for images, _ in parts]))
    assert np.array_equal(labels, np.concatenate([drawn for _, drawn in parts]))
    assert label is None or set(labels) == {label}


def test_another_seed_gives_other_pictures(stubs: Stubs) -> None:
    again = [
        stubs.ask(GenerateRequest(model_name="toy", count=8, label=0, seed=seed))
        for seed in (0, 1, 2**63 - 1, -(2**63))
    ]
    assert len({message[0].images.data for message in again}) == 4


def test_without_a_seed_the_server_picks_one_and_says_which(stubs: Stubs) -> None:
    first, second = (stubs.ask(GenerateRequest(model_name="toy", count=1))[0] for _ in range(2))
    assert first.seed != second.seed
    again = stubs.ask(GenerateRequest(model_name="toy", count=1, seed=first.seed))[0]
    assert again.images == first.images


def test_no_noise_gives_the_most_probable_levels(stubs: Stubs, toy: Toy) -> None:
    images, _ = draw(stubs, 2, label=1, temperature=0)
    assert np.array_equal(images, np.broadcast_to(toy.log_theta[1].argmax(-1), images.shape))


def test_drawn_pictures_follow_the_model(stubs: Stubs, toy: Toy) -> None:
    images = np.concatenate([draw(stubs, 50, 50 * i, label=0)[0] for i in range(20)])
    seen = np.eye(4)[images].mean(0)
    assert np.abs(seen - np.exp(toy.log_theta[0])).max() < 0.08


def test_order_and_company_change_nothing(stubs: Stubs, x: Any) -> None:
    def ask(pictures: Any) -> Any:
        request = ClassifyRequest(model_name="toy", images=codec.images(pictures))
        return codec.classifications(stubs.ask(request), 3)

    whole, turned = ask(x), ask(x[::-1].copy())
    alone = [ask(x[i : i + 1]) for i in range(len(x))]
    for name in ("log_pxy", "posterior", "label", "p_value", "verdict"):
        values = getattr(whole, name)
        assert np.allclose(values, getattr(turned, name)[::-1], atol=1e-5)
        assert np.allclose(values, np.concatenate([getattr(a, name) for a in alone]), atol=1e-5)


@pytest.mark.parametrize("kind", [ScoreRequest, ClassifyRequest, EncodeRequest])
def test_no_pictures_get_no_answers(stubs: Stubs, kind: Any) -> None:
    answer = stubs.ask(kind(model_name="toy", images=Images(shape=(0, 1, 3, 3))))
    assert tallies.picture_count(answer) == 0
    assert answer.model_version == "1.0"


def test_models_are_described(stubs: Stubs) -> None:
    listed = stubs.models.ListModels(ListModelsRequest())
    one = stubs.models.GetModel(GetModelRequest(model_name="toy"))
    assert list(listed.models) == [one.model]
    assert one.model_version == one.model.version == "1.0"
    assert list(one.model.execution_providers) == ["CPUExecutionProvider"]
    assert one.model.limits.images_per_request == 100


def on_toy(kind: Any, **fields: Any) -> Any:
    return kind(**{"model_name": "toy", "images": GOOD, **fields})


def drawing(**fields: Any) -> GenerateRequest:
    return GenerateRequest(**{"model_name": "toy", "count": 1, **fields})


BAD = [
    (on_toy(ScoreRequest, images=None), "images.shape"),
    (on_toy(ScoreRequest, images=Images(data=b"1", shape=(1, 1, 1))), "images.shape"),
    (on_toy(ScoreRequest, images=Images(data=bytes(9), shape=(-1, 1, 3, 3))), "images.shape[0]"),
    (on_toy(ScoreRequest, images=Images(data=bytes(9), shape=(2**62, 1, 3, 3))), "images.shape[0]"),
    (on_toy(EncodeRequest, images=Images(data=bytes(9), shape=(1, 9, 1, 1))), "images.shape[1]"),
    (on_toy(EncodeRequest, images=Images(data=bytes(9), shape=(1, 1, 1, 9))), "images.shape[2]"),
    (on_toy(ClassifyRequest, images=Images(data=bytes(8), shape=(1, 1, 3, 3))), "images.data"),
    (on_toy(ClassifyRequest, images=Images(data=b"\4" * 9, shape=(1, 1, 3, 3))), "images.data"),
    (on_toy(ScoreRequest, alpha=math.nan), "alpha"),
    (on_toy(ScoreRequest, alpha=1e-6), "alpha"),
    (on_toy(ClassifyRequest, alpha=1), "alpha"),
    (on_toy(ClassifyRequest, priors=[1]), "priors"),
    (on_toy(ClassifyRequest, priors=[1, -1, 0]), "priors[1]"),
    (on_toy(ClassifyRequest, min_posterior=-0.5), "min_posterior"),
    (on_toy(EncodeRequest, labels=[0, 0]), "labels"),
    (on_toy(EncodeRequest, labels=[7]), "labels[0]"),
    (on_toy(ScoreRequest, model_name=""), "model_name"),
    (on_toy(ScoreRequest, model_name="../toy"), "model_name"),
    (on_toy(ScoreRequest, model_name="x" * 10_000), "model_name"),
    (on_toy(ScoreRequest, model_version="\0"), "model_version"),
    (GetModelRequest(model_name=" "), "model_name"),
    (drawing(model_name=""), "model_name"),
    (drawing(label=3), "label"),
    (drawing(count=0), "count"),
    (drawing(count=10**9), "count"),
    (drawing(temperature=math.inf), "temperature"),
    (drawing(first_index=-1), "first_index"),
    (drawing(first_index=2**63 - 1, count=2), "first_index"),
]


@pytest.mark.parametrize(("request_", "field"), BAD)
def test_a_bad_field_is_named(stubs: Stubs, request_: Any, field: str) -> None:
    error = failure(lambda: stubs.ask(request_))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    violation = detail(error, error_details_pb2.BadRequest).field_violations[0]
    assert violation.field == field
    assert error.details() == f"{field}: {violation.description}"
    assert detail(error, error_details_pb2.ErrorInfo).reason == "INVALID_INPUT"


def test_an_unknown_model_is_named_and_the_known_are_listed(stubs: Stubs) -> None:
    for request, resource in (
        (on_toy(ScoreRequest, model_name="other"), "other"),
        (on_toy(ScoreRequest, model_version="9"), "toy@9"),
        (drawing(model_name="other"), "other"),
    ):
        error = failure(partial(stubs.ask, request))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert "toy@1.0" in error.details()
        assert detail(error, error_details_pb2.ResourceInfo).resource_name == resource


def test_a_question_that_the_model_cannot_answer(
    running: Running, make_toy: Callable[..., Toy]
) -> None:
    bare = make_toy("bare", roles=("density",))
    with running(bundles=(bare.path,)) as live, grpc.insecure_channel(live.address) as channel:
        stubs = Stubs(channel)
        assert len(stubs.ask(on_toy(ScoreRequest, model_name="bare")).scores) == 1
        model = stubs.ask(GetModelRequest(model_name="bare")).model
        assert list(model.methods) == ["likely.v1.ScoringService/Score"]
        for request in (
            on_toy(ClassifyRequest, model_name="bare"),
            on_toy(EncodeRequest, model_name="bare"),
            drawing(model_name="bare"),
        ):
            error = failure(partial(stubs.ask, request))
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert detail(error, error_details_pb2.ErrorInfo).reason == "NOT_ANSWERED"


@pytest.mark.parametrize(
    "method",
    [
        "/likely.v1.ScoringService/Score",
        "/likely.v1.GenerationService/Generate",
        "/likely.v1.ModelService/ListModels",
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
    ],
)
def test_bytes_that_are_no_message_are_refused(stubs: Stubs, method: str) -> None:
    call: Any = stubs.channel.unary_stream(method)
    error = failure(lambda: list(call(b"\xff" * 40, timeout=30)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "no message" in error.details()


def test_bytes_that_are_no_message_are_refused_in_streams_too(stubs: Stubs) -> None:
    method = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    call: Any = stubs.channel.stream_stream(method)
    error = failure(lambda: list(call(iter([b"\xff" * 40]), timeout=30)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_an_unknown_method_is_unimplemented(stubs: Stubs) -> None:
    call: Any = stubs.channel.unary_unary("/likely.v1.ScoringService/Guess")
    error = failure(lambda: call(b""))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_fault_tells_nothing_but_its_request_id(
    stubs: Stubs, live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the secret of the house")

    engine = live.server.registry.find("toy")
    for method, request in (
        ("score", on_toy(ScoreRequest)),
        ("generate", drawing()),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(engine, method, broken)
            error = failure(partial(stubs.ask, request, metadata=(("x-request-id", "trace-7"),)))
        assert error.code() is grpc.StatusCode.INTERNAL
        assert error.details() == "internal error, request trace-7"
        assert "secret" not in str(error.trailing_metadata())
        faults = [line for line in log(live) if line["event"] == "fault"]
        assert faults[-1]["request_id"] == "trace-7"
        assert "the secret of the house" in faults[-1]["exception"]
    assert stubs.ask(on_toy(ScoreRequest)).scores


def log(live: Live) -> list[dict[str, Any]]:
    return [json.loads(line) for line in live.log.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("given", "kept"), [("abc-1.2_3", True), ("a b", False), ("x" * 65, False)]
)
def test_request_ids_come_back_if_sane(stubs: Stubs, live: Live, given: str, kept: bool) -> None:
    _, call = stubs.scoring.Score.with_call(
        on_toy(ScoreRequest), metadata=(("x-request-id", given),)
    )
    returned = dict(call.trailing_metadata())["x-request-id"]
    assert (returned == given) is kept
    line = next(line for line in log(live) if line.get("request_id") == returned)
    logged = [line[key] for key in ("method", "model", "code", "images")]
    assert logged == ["Score", "toy", "OK", 1]


def test_what_goes_well_or_is_refused_for_now_is_told_for_debugging_alone(running: Running) -> None:
    limits = {"client_images_per_second": 1e-3, "client_images_at_once": 1}
    with (
        running(**limits) as live,
        grpc.insecure_channel(live.address, (("grpc.enable_retries", 0),)) as channel,
    ):
        stubs = Stubs(channel)
        stubs.ask(on_toy(ScoreRequest))
        failure(lambda: stubs.ask(on_toy(ScoreRequest)))
        failure(lambda: stubs.ask(on_toy(ScoreRequest, model_name="other")))
        lines = [line for line in log(live) if line["event"] == "rpc"]
    assert [(line["code"], line["level"]) for line in lines] == [
        ("OK", "debug"),
        ("RESOURCE_EXHAUSTED", "debug"),
        ("NOT_FOUND", "info"),
    ]


Z = np.zeros((3, 2), np.float32)
COSTS: dict[str, tuple[Callable[[Client, Any], Any], int]] = {
    "Score": (lambda c, x: c.score(x), 3),
    "Classify": (lambda c, x: c.classify(x), 3),
    "Encode": (lambda c, x: c.encode(x), 3),
    "Decode": (lambda c, x: c.decode(Z, labels=[0] * 3), 3),
    "Decode, drawn": (lambda c, x: c.decode(Z, labels=[0] * 3, draws=2), 6),
    "Traverse": (lambda c, x: c.traverse(x, "brightness", [0, 1]), 6),
    "Traverse, drawn": (lambda c, x: c.traverse(x, "brightness", [0, 1], draws=4), 24),
    "Interpolate": (lambda c, x: c.interpolate(x, x, [0, 1]), 6),
    "Interpolate, drawn": (lambda c, x: c.interpolate(x, x, [0, 1], draws=4), 24),
    "Complete": (lambda c, x: c.complete(x, True, completions=2), 6),
    "Complete, proposed": (lambda c, x: c.complete(x, True, completions=2, proposals=4), 24),
    "Generate": (lambda c, x: c.generate(5), 5),
    "Generate, checked": (lambda c, x: c.generate(5, self_check=True, alpha=0.2), 7),
    "Generate, checked once": (lambda c, x: c.generate(5, self_check=True, max_draws=1), 5),
    "Generate, accepted": (lambda c, x: c.generate(5, acceptance=True), 15),
    "Generate, accepted soon": (lambda c, x: c.generate(5, acceptance=True, max_draws=2), 10),
}


@pytest.mark.parametrize("what", COSTS)
def test_a_question_costs_what_is_looked_at_or_drawn_for_it(
    live: Live, x: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    charged = list[tuple[str, int, str]]()

    def noted(_: Quota, rows: int, model: str) -> Any:
        charged.append((callers.current().client, rows, model))
        return nullcontext()

    monkeypatch.setattr(Quota, "charged", noted)
    ask, cost = COSTS[what]
    with Client(live.address) as client:
        ask(client, x[:3])
    assert charged == [("ipv4:127.0.0.1", cost, "toy")]  # whatever the port


def test_no_two_requests_share_an_id_though_random_is_set_back(stubs: Stubs) -> None:
    ids = []
    for _ in range(2):
        random.seed(0)  # as Hypothesis does before each of its tests, in the server's process too
        _, call = stubs.scoring.Score.with_call(on_toy(ScoreRequest))
        ids.append(dict(call.trailing_metadata())["x-request-id"])
    assert len(set(ids)) == 2


def test_health_and_reflection_name_every_service(stubs: Stubs) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    listed = next(iter(stubs.reflection.ServerReflectionInfo(iter([request]))))
    names = {service.name for service in listed.list_services_response.service}
    ours = {f"likely.v1.{name}Service" for name in ("Scoring", "Generation", "Model")}
    assert ours <= names
    assert "grpc.health.v1.Health" in names
    for service in ("", *ours):
        check = health_pb2.HealthCheckRequest(service=service)
        assert stubs.health.Check(check).status == SERVING
    error = failure(lambda: stubs.health.Check(health_pb2.HealthCheckRequest(service="x")))
    assert error.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_can_be_off(running: Running) -> None:
    with running(reflection=False) as live, grpc.insecure_channel(live.address) as channel:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        error = failure(lambda: list(stub.ServerReflectionInfo(iter([request]))))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED


def test_requests_wait_for_the_watched_folder_and_the_labels_too(
    running: Running, make_toy: Callable[..., Toy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, more = make_toy("toy", "1"), make_toy("toy", "2", seed=3), make_toy("more", "1")
    begun, go_on, follow = threading.Event(), threading.Event(), Watcher._load_changed

    async def slow(watcher: Watcher, settled: Any) -> None:
        begun.set()
        await asyncio.to_thread(go_on.wait, 30)
        await follow(watcher, settled)

    monkeypatch.setattr(Watcher, "_load_changed", slow)
    shutil.copytree(more.path, tmp_path / "watched" / "more")
    with (
        running(
            load=False,
            bundles=(old.path, new.path),
            watch=tmp_path / "watched",
            labels=("toy:stable=1",),
        ) as live,
        grpc.insecure_channel(live.address) as channel,
    ):
        stubs = Stubs(channel)
        asks = (
            partial(stubs.ask, on_toy(ScoreRequest)),
            partial(stubs.ask, on_toy(ScoreRequest, model_name="more")),
            partial(stubs.ask, GetModelRequest(model_name="more")),
            partial(stubs.models.ListModels, ListModelsRequest()),
        )
        loading = asyncio.run_coroutine_threadsafe(live.server.load(), live.loop)
        assert begun.wait(30)
        for ask in asks:
            assert failure(ask).code() is grpc.StatusCode.UNAVAILABLE
        go_on.set()
        loading.result(30)
        assert asks[0]().model_version == "1"
        for ask in asks[1:]:
            ask()


def test_until_models_are_loaded_the_server_is_not_ready(running: Running) -> None:
    with running(load=False) as live, grpc.insecure_channel(live.address) as channel:
        stubs = Stubs(channel)
        assert stubs.health.Check(health_pb2.HealthCheckRequest()).status == NOT_SERVING
        error = failure(lambda: stubs.ask(on_toy(ScoreRequest)))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert detail(error, error_details_pb2.RetryInfo).retry_delay.seconds == 1
        assert dict(error.trailing_metadata())[statuses.PUSHBACK_KEY] == "1000"
        watch = stubs.health.Watch(health_pb2.HealthCheckRequest(), timeout=30)
        assert next(watch).status == NOT_SERVING
        live.run(live.server.load())
        assert next(watch).status == SERVING
        assert stubs.ask(on_toy(ScoreRequest)).scores
        watch.cancel()


def test_running_requests_end_and_watchers_do_not_hold_the_server(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(drain_seconds=60) as live, grpc.insecure_channel(live.address) as channel:
        stubs = Stubs(channel)
        engine = live.server.registry.find("toy")
        arrived, release = asyncio.Event(), asyncio.Event()
        score = engine.score

        async def slow(*args: Any, **more: Any) -> Any:
            arrived.set()
            await release.wait()
            return await score(*args, **more)

        monkeypatch.setattr(engine, "score", slow)
        watch = stubs.health.Watch(health_pb2.HealthCheckRequest(), timeout=30)
        assert next(watch).status == SERVING
        running_call = stubs.scoring.Score.future(on_toy(ScoreRequest), timeout=30)
        live.run(arrived.wait())
        stopping = asyncio.run_coroutine_threadsafe(live.server.stop(), live.loop)
        last = failure(lambda: list(watch))
        assert last.code() is grpc.StatusCode.UNAVAILABLE
        assert not stopping.done()
        live.loop.call_soon_threadsafe(release.set)
        assert len(running_call.result().scores) == 1
        stopping.result(10)


def test_who_watches_health_again_and_again_does_not_hold_the_server(running: Running) -> None:
    with running(drain_seconds=300) as live, grpc.insecure_channel(live.address) as channel:
        stubs = Stubs(channel)
        watched, over = threading.Event(), threading.Event()

        def watch() -> None:
            while not over.is_set():
                with suppress(grpc.RpcError):
                    for _ in stubs.health.Watch(health_pb2.HealthCheckRequest()):
                        watched.set()

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            assert watched.wait(30)
            live.run(live.server.stop())  # raises after a minute
        finally:
            over.set()
            watcher.join()


def test_drawing_that_is_refused_for_now_costs_no_quota(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"client_images_per_second": 1e-3, "client_images_at_once": 5}
    with (
        running(**limits) as live,
        grpc.insecure_channel(live.address, (("grpc.enable_retries", 0),)) as channel,
    ):
        stubs = Stubs(channel)
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "generate", refusing)
            for _ in range(3):
                error = failure(lambda: stubs.ask(drawing(count=5)))
                assert (error.code(), error.details()) == (
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    "the queue is full",
                )
        assert stubs.ask(drawing(count=5))
        assert "quota" in failure(lambda: stubs.ask(drawing())).details()


async def refusing(*_: Any, **__: Any) -> AsyncIterator[Any]:
    raise Overloaded("the queue is full")
    yield


def scrape(live: Live) -> dict[str, float]:
    with urllib.request.urlopen(live.metrics_url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {
        name: float(value)
        for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")
    }


def test_metrics_count_what_happened(running: Running, x: Any) -> None:
    with running() as live, grpc.insecure_channel(live.address) as channel:
        stubs = Stubs(channel)
        answer = stubs.ask(on_toy(ScoreRequest, images=codec.images(x), alpha=0.3))
        stubs.ask(drawing(count=20))
        for name in ("a", "b", "c"):
            failure(partial(stubs.ask, on_toy(ScoreRequest, model_name=name)))
        failure(lambda: stubs.ask(on_toy(ScoreRequest, model_name="../../x")))
        seen = scrape(live)
        digest = live.server.registry.find("toy").digest
    outliers = sum(row.verdict == Verdict.VERDICT_OUTLIER for row in answer.scores)
    assert 0 < outliers < len(x)
    expected = {
        'likely_requests_total{code="OK",method="Score",model="toy"}': 1,
        'likely_requests_total{code="OK",method="Generate",model="toy"}': 1,
        'likely_requests_total{code="NOT_FOUND",method="Score",model="unknown"}': 3,
        'likely_requests_total{code="INVALID_ARGUMENT",method="Score",model="unknown"}': 1,
        'likely_requests_in_flight{method="Score"}': 0,
        'likely_request_seconds_count{method="Score",model="toy"}': 1,
        'likely_request_seconds_count{method="Score",model="unknown"}': 4,
        'likely_images_total{method="Score",model="toy"}': len(x),
        'likely_images_total{method="Generate",model="toy"}': 20,
        'likely_verdicts_total{method="Score",model="toy",verdict="outlier"}': outliers,
        f'likely_model_info{{digest="{digest}",name="toy",provider="CPUExecutionProvider",'
        'version="1.0"}': 1,
    }
    assert {name: seen.get(name) for name in expected} == expected
    assert any(name.startswith("likely_build_info{") for name in seen)


def test_metrics_can_be_off(running: Running) -> None:
    with running(metrics_port="off") as live:
        assert live.server.metrics_port is None


def test_a_request_above_the_limit_is_refused(running: Running) -> None:
    with running(request_bytes=2000) as live, grpc.insecure_channel(live.address) as channel:
        stubs = Stubs(channel)
        large = Images(data=bytes(9 * 300), shape=(300, 1, 3, 3))
        error = failure(lambda: stubs.ask(on_toy(ScoreRequest, images=large)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert stubs.ask(on_toy(ScoreRequest)).scores


def test_a_cancelled_stream_ends_and_is_counted(running: Running) -> None:
    with running(images_per_generation=10**5) as live:
        with grpc.insecure_channel(live.address) as channel:
            stream = Stubs(channel).generation.Generate(drawing(count=10**5))
            next(stream)
            stream.cancel()
            live.run(quiet(live))
        assert [line["code"] for line in log(live) if line["event"] == "rpc"] == ["CANCELLED"]
        assert scrape(live)['likely_requests_in_flight{method="Generate"}'] == 0


async def quiet(live: Live) -> None:
    """Returns once the RPC that runs has been logged."""
    async with asyncio.timeout(20):
        while not any(line["event"] == "rpc" for line in log(live)):
            await asyncio.sleep(0.01)


def test_a_deadline_that_passes_is_told(stubs: Stubs, live: Live, monkeypatch: Any) -> None:
    async def stuck(*_: Any, **__: Any) -> None:
        await asyncio.sleep(30)

    monkeypatch.setattr(live.server.registry.find("toy"), "score", stuck)
    error = failure(lambda: stubs.scoring.Score(on_toy(ScoreRequest), timeout=0.05))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("which", ["port", "metrics_port"])
def test_a_taken_port_is_one_sentence(running: Running, live: Live, which: str) -> None:
    taken = {which: getattr(live.server, which)}
    with pytest.raises(SettingsError, match=r"cannot listen on 127\.0\.0\.1"), running(**taken):
        pass


def test_two_bundles_of_one_name_are_refused(running: Running, toy: Toy) -> None:
    twice = (toy.path, toy.path)
    with pytest.raises(BundleError, match=r"two bundles hold toy@1\.0"), running(bundles=twice):
        pass


def test_a_default_alpha_that_cannot_be_promised_is_refused(running: Running) -> None:
    sentence = r"default_alpha = 0\.001 is finer than 0\.005"
    with pytest.raises(SettingsError, match=sentence), running(default_alpha=0.001):
        pass
