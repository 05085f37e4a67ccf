"""The Open Inference Protocol says what our own services say, and refuses what they refuse."""

from __future__ import annotations

import asyncio
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_reflection.v1alpha import reflection_pb2

from likely import Client, LabelRule, Verdict, statuses
from likely.bundle import Role
from likely.engine import Engine
from likely.inference import inference_pb2 as pb
from likely.inference.inference_pb2_grpc import GRPCInferenceServiceStub
from likely.serving import tallies
from likely.serving.openinference import tensors
from likely.telemetry.metrics import CODES, INFERRING

if TYPE_CHECKING:
    from likely.batching.batches import Runner
    from tests.conftest import Live, Running, Toy

NUMPY = {
    "BOOL": "?", "UINT8": "u1", "INT8": "i1", "INT64": "<i8", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
FIELDS = {
    "BOOL": "bool", "UINT8": "uint", "INT8": "int", "INT64": "int64", "FP32": "fp32",
    "FP64": "fp64",
}  # fmt: skip


@pytest.fixture
def stub(live: Live) -> Iterator[GRPCInferenceServiceStub]:
    with grpc.insecure_channel(live.address) as channel:
        yield GRPCInferenceServiceStub(channel)


@pytest.fixture
def client(live: Live) -> Iterator[Client]:
    with Client(live.address, timeout=30) as ours:
        yield ours


@pytest.fixture
def x(toy: Toy) -> Any:
    return toy.draw(np.random.default_rng(9), 20)


def parameter(value: object) -> pb.InferParameter:
    match value:
        case bool():
            return pb.InferParameter(bool_param=value)
        case int():
            return pb.InferParameter(int64_param=value)
        case float():
            return pb.InferParameter(double_param=value)
        case _:
            return pb.InferParameter(string_param=str(value))


def question(
    model: str,
    tensors: dict[str, tuple[str, Any]],
    *,
    raw: bool = True,
    outputs: tuple[str, ...] = (),
    **settings: object,
) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=model, id="7")
    for name, (datatype, values) in tensors.items():
        given = request.inputs.add(name=name, datatype=datatype, shape=np.shape(values))
        stored = np.asarray(values, NUMPY[datatype])
        if raw:
            request.raw_input_contents.append(stored.tobytes())
        else:
            getattr(given.contents, f"{FIELDS[datatype]}_contents").extend(stored.ravel().tolist())
    for name in outputs:
        request.outputs.add(name=name)
    for name, value in settings.items():
        request.parameters[name].CopyFrom(parameter(value))
    return request


def pictures(model: str, x: Any, **more: Any) -> pb.ModelInferRequest:
    return question(model, {"images": ("UINT8", x)}, **more)


def arrays(answer: pb.ModelInferResponse) -> dict[str, Any]:
    """The outputs by name, however they are written."""
    found = {}
    for at, output in enumerate(answer.outputs):
        if answer.raw_output_contents:
            values = np.frombuffer(answer.raw_output_contents[at], NUMPY[output.datatype])
        else:
            field = getattr(output.contents, f"{FIELDS[output.datatype]}_contents")
            values = np.array(field, NUMPY[output.datatype])
        found[output.name] = values.reshape(tuple(output.shape))
    return found


@pytest.mark.parametrize("raw", [True, False])
def test_pictures_get_the_answers_of_our_own_services(
    stub: GRPCInferenceServiceStub, client: Client, x: Any, raw: bool
) -> None:
    scores = client.score(x, alpha=0.2, surprise=True)
    priors = [0.2, 0.2, 0.6]
    labelled = client.classify(x, alpha=0.2, priors=priors, min_posterior=0.9)
    given: dict[str, Any] = {"priors": "0.2, 0.2,0.6", "min_posterior": 0.9}
    answer = stub.ModelInfer(pictures("toy", x, raw=raw, alpha=0.2, **given))
    assert (answer.model_name, answer.model_version, answer.id) == ("toy", "1.0", "7")
    assert answer.parameters["alpha"].double_param == 0.2
    assert bool(answer.raw_output_contents) is raw
    found = arrays(answer)
    np.testing.assert_allclose(found["log_likelihood"], scores.log_px, rtol=1e-6)
    np.testing.assert_allclose(found["bits_per_dim"], scores.bits_per_dim, rtol=1e-6)
    assert found["outlier"].tolist() == (scores.p_value <= 0.2).tolist()
    np.testing.assert_allclose(found["posterior"], labelled.posterior, rtol=1e-5)
    assert found["label"].tolist() == labelled.label.tolist()
    assert found["verdict"].tolist() == labelled.verdict.tolist()
    assert found["label_p_values"].shape == (20, 3)
    for model, names in (
        ("toy/score", {"log_likelihood", "bits_per_dim", "unusualness", "p_value", "outlier"}),
        ("toy/surprise", {"surprise", "log_likelihood"}),
        ("toy/encode", {"mean", "log_variance", "labels"}),
    ):
        assert set(arrays(stub.ModelInfer(pictures(model, x, raw=raw)))) == names
    maps = arrays(stub.ModelInfer(pictures("toy/surprise", x, raw=raw)))["surprise"]
    assert scores.surprise is not None
    np.testing.assert_allclose(maps, scores.surprise, rtol=1e-5)
    only = stub.ModelInfer(pictures("toy", x, raw=raw, outputs=("p_value",)))
    assert list(arrays(only)) == ["p_value"]


def test_labels_by_the_discriminative_rule(
    stub: GRPCInferenceServiceStub, client: Client, x: Any
) -> None:
    ours = client.classify(x, alpha=0.2, min_posterior=0.9, rule=LabelRule.DISCRIMINATIVE)
    asked = pictures("toy/discriminate", x, alpha=0.2, min_posterior=0.9)
    found = arrays(stub.ModelInfer(asked))
    np.testing.assert_allclose(found["posterior"], ours.posterior, rtol=1e-5)
    np.testing.assert_allclose(found["composed_log_likelihoods"], ours.composed, rtol=1e-5)
    assert found["label"].tolist() == ours.label.tolist()
    assert found["verdict"].tolist() == ours.verdict.tolist()
    other = client.classify(x, alpha=0.2, min_posterior=0.9)
    assert not np.allclose(found["posterior"], other.posterior)


def test_drawing(stub: GRPCInferenceServiceStub, client: Client, x: Any) -> None:
    ours = client.generate(20, label=1, seed=5, self_check=True, max_draws=3, alpha=0.1)
    asked = question(
        "toy/generate", {"count": ("INT64", [20])}, label=1, seed=5, self_check=True, max_draws=3,
        alpha=0.1,
    )  # fmt: skip
    answer = stub.ModelInfer(asked)
    assert answer.parameters["seed"].int64_param == 5
    asked.parameters["seed"].string_param, asked.parameters["label"].string_param = "5", "1"
    assert arrays(stub.ModelInfer(asked))["images"].tobytes() == arrays(answer)["images"].tobytes()
    found = arrays(answer)
    assert np.array_equal(found["images"], ours.images)
    assert found["draws"].tolist() == ours.draws.tolist()
    mask = np.zeros(x.shape, bool)
    mask[:, :, 0] = True
    halves = client.complete(x, mask, completions=2, seed=3)
    asked = question(
        "toy/complete", {"images": ("UINT8", x), "mask": ("BOOL", mask)}, completions=2, seed=3
    )
    images = arrays(stub.ModelInfer(asked))["images"]
    assert np.array_equal(images.reshape(halves.images.shape), halves.images)
    labels = np.arange(20) % 3
    asked = question("toy/encode", {"images": ("UINT8", x), "labels": ("INT64", labels)})
    assert np.array_equal(
        arrays(stub.ModelInfer(asked))["mean"], client.encode(x, labels=labels).mean
    )


def test_models_are_described(stub: GRPCInferenceServiceStub) -> None:
    listed = stub.RepositoryIndex(pb.RepositoryIndexRequest()).models
    names = [model.name for model in listed]
    suffixes = ["score", "classify", "discriminate", "surprise", "encode", "generate", "complete"]
    assert names == ["toy", *(f"toy/{suffix}" for suffix in sorted(suffixes))]
    for model in listed:
        meta = stub.ModelMetadata(pb.ModelMetadataRequest(name=model.name))
        config = stub.ModelConfig(pb.ModelConfigRequest(name=model.name)).config
        assert stub.ModelReady(pb.ModelReadyRequest(name=model.name)).ready
        assert (meta.name, list(meta.versions)) == (model.name, ["1.0"])
        first = 1 if config.max_batch_size else 0
        for described, configured in ((meta.inputs, config.input), (meta.outputs, config.output)):
            assert [t.name for t in described] == [c.name for c in configured]
            assert [list(t.shape)[first:] for t in described] == [list(c.dims) for c in configured]
            types = [pb.DataType.Name(c.data_type) for c in configured]
            assert [f"TYPE_{t.datatype}" for t in described] == types
    assert stub.ServerLive(pb.ServerLiveRequest()).live
    assert stub.ServerReady(pb.ServerReadyRequest()).ready
    assert stub.ServerMetadata(pb.ServerMetadataRequest()).name == "likely"
    for name in ("other", "toy/guess"):
        assert not stub.ModelReady(pb.ModelReadyRequest(name=name)).ready


def test_answers_have_the_shapes_that_metadata_tells(
    stub: GRPCInferenceServiceStub, x: Any
) -> None:
    judging = ["score", "classify", "discriminate", "surprise", "encode"]
    for model in ("toy", *(f"toy/{suffix}" for suffix in judging)):
        meta = stub.ModelMetadata(pb.ModelMetadataRequest(name=model))
        answer = stub.ModelInfer(pictures(model, x))
        for described, given in zip(meta.outputs, answer.outputs, strict=True):
            assert (described.name, described.datatype) == (given.name, given.datatype)
            assert list(given.shape) == [20, *list(described.shape)[1:]]


def refused(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    """The status, and the field or resource that it names."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    rich = status_pb2.Status.FromString(dict(error.trailing_metadata())[statuses.DETAILS_KEY])
    for packed in rich.details:
        bad, missing = error_details_pb2.BadRequest(), error_details_pb2.ResourceInfo()
        if packed.Unpack(bad):
            return error.code(), bad.field_violations[0].field
        if packed.Unpack(missing):
            return error.code(), missing.resource_name
    return error.code(), ""


GOOD = np.zeros((1, 1, 3, 3), np.uint8)


def broken(**fields: Any) -> pb.ModelInferRequest:
    """A good request but for these fields of it, or of its first input."""
    request = pictures("toy/score", GOOD)
    for name, value in fields.items():
        target: Any = request if hasattr(request, name) else request.inputs[0]
        if isinstance(value, list | tuple):
            del getattr(target, name)[:]
            getattr(target, name).extend(value)
        else:
            setattr(target, name, value)
    return request


def typed(**contents: Any) -> pb.ModelInferRequest:
    request = broken(raw_input_contents=[])
    request.inputs[0].contents.CopyFrom(pb.InferTensorContents(**contents))
    return request


BAD: list[tuple[pb.ModelInferRequest, str]] = [
    (broken(raw_input_contents=[bytes(8)]), "raw_input_contents[0]"),
    (broken(raw_input_contents=[bytes(9), b""]), "raw_input_contents"),
    (broken(shape=[2, 1, 3, 3]), "raw_input_contents[0]"),
    (broken(shape=[2**62, 1, 3, 3]), "images.shape[0]"),
    (broken(shape=[0, 1, 3, 2**63 - 1], raw_input_contents=[b""]), "images.shape[3]"),
    (broken(shape=[0, 1, 3, 2**63 - 1], raw_input_contents=[]), "images.shape[3]"),
    (broken(shape=[101, 1, 3, 3], raw_input_contents=[]), "images.shape[0]"),
    (broken(shape=[-1, 1, 3, 3]), "images.shape[0]"),
    (broken(shape=[9]), "images.shape"),
    (broken(shape=[1, 1, 9, 1]), "images.shape[2]"),
    (broken(shape=[1, 2, 3, 3]), "images.shape[1]"),
    (broken(raw_input_contents=[b"\4" * 9]), "images.data"),
    (broken(datatype="FP32"), "inputs[0].datatype"),
    (broken(name="pixels"), "inputs[0].name"),
    (broken(inputs=[], raw_input_contents=[]), "inputs"),
    (broken(model_name="../x"), "model_name"),
    (typed(uint_contents=[0] * 8), "images.contents"),
    (typed(uint_contents=[256] * 9), "images.contents"),
    (typed(int_contents=[0] * 9), "images.contents"),
    (pictures("toy/score", GOOD, outputs=("guess",)), "outputs[0].name"),
    (pictures("toy/score", GOOD, outputs=("p_value", "p_value")), "outputs[1].name"),
    (pictures("toy/score", GOOD, alpha=7), "alpha"),
    (pictures("toy/score", GOOD, alpha="high"), "parameters[alpha]"),
    (pictures("toy/score", GOOD, guarantee="none"), "parameters[guarantee]"),
    (question("toy/generate", {"count": ("INT64", [1])}, seed="5.0"), "parameters[seed]"),
    (question("toy/generate", {"count": ("INT64", [1])}, seed="9" * 5000), "parameters[seed]"),
    (pictures("toy/score", GOOD, seed=1), "parameters[seed]"),
    (pictures("toy/classify", GOOD, priors="1,0"), "priors"),
    (pictures("toy/classify", GOOD, priors="1,0,0,0"), "parameters[priors]"),
    (pictures("toy", GOOD, outputs=("p_value",), priors="1,0"), "priors"),
    (pictures("toy", GOOD, outputs=("p_value",), min_posterior=7.0), "min_posterior"),
    (pictures("toy/score", np.zeros((101, 1, 3, 3))), "images.shape[0]"),
    (question("toy/generate", {"count": ("INT64", [51])}), "count"),
    (question("toy/generate", {"count": ("INT64", [1, 1])}), "count.shape[0]"),
    (question("toy/generate", {"count": ("INT64", [1])}, label=2**40), "parameters[label]"),
    (question("toy/generate", {"count": ("INT64", [1])}, alpha=0.1), "parameters[alpha]"),
]


@pytest.mark.parametrize(("request_", "field"), BAD)
def test_a_bad_request_is_refused_with_its_field(
    stub: GRPCInferenceServiceStub, request_: pb.ModelInferRequest, field: str
) -> None:
    call = lambda: stub.ModelInfer(request_, timeout=30)  # noqa: E731
    assert refused(call) == (grpc.StatusCode.INVALID_ARGUMENT, field)


def test_many_single_elements_are_read_piece_by_piece(
    stub: GRPCInferenceServiceStub, x: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "CHUNK", 7)
    asked = pictures("toy/score", x, raw=False)
    assert tensors.is_long(asked) and not tensors.is_long(pictures("toy/score", x))
    whole = arrays(stub.ModelInfer(pictures("toy/score", x)))
    assert np.array_equal(arrays(stub.ModelInfer(asked))["p_value"], whole["p_value"])
    asked.inputs[0].contents.uint_contents[-1] = 256
    call = lambda: stub.ModelInfer(asked, timeout=30)  # noqa: E731
    assert refused(call) == (grpc.StatusCode.INVALID_ARGUMENT, "images.contents")


def test_a_version_that_is_unloaded_answers_what_it_has_begun_to_read(
    running: Running, make_toy: Callable[..., Toy], x: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = make_toy("toy", "2.0", seed=1)
    reads, read_on = threading.Event(), threading.Event()
    read = tensors.read

    def slowly(*given: Any) -> Any:
        reads.set()
        assert read_on.wait(30)
        return read(*given)

    monkeypatch.setattr(tensors, "CHUNK", 7)
    monkeypatch.setattr(tensors, "read", slowly)
    with running() as live, grpc.insecure_channel(live.address) as channel:
        live.run(live.server.lifecycle.load(newer.path))
        asked = pictures("toy/score", x, raw=False)
        asked.model_version = "1.0"
        call = GRPCInferenceServiceStub(channel).ModelInfer.future(asked, timeout=60)
        assert reads.wait(30)
        unloading = asyncio.run_coroutine_threadsafe(
            live.server.lifecycle.unload("toy", "1.0"), live.loop
        )
        while live.run(_served(live)) != ["2.0"]:
            time.sleep(0.01)
        read_on.set()
        assert call.result().model_version == "1.0"
        unloading.result(30)


async def _served(live: Live) -> list[str]:
    return [engine.manifest.version for engine in live.server.registry.engines()]


def test_many_single_elements_are_written_piece_by_piece(
    stub: GRPCInferenceServiceStub, x: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = arrays(stub.ModelInfer(pictures("toy", x, raw=False), timeout=30))
    monkeypatch.setattr(tensors, "CHUNK", 4)
    answer = stub.ModelInfer(pictures("toy", x, raw=False), timeout=30)
    assert not answer.raw_output_contents
    for name, values in arrays(answer).items():
        np.testing.assert_allclose(values, whole[name], rtol=1e-5)


@pytest.mark.parametrize("raw", [True, False])
def test_verdicts_are_counted_whatever_the_order_of_outputs(
    stub: GRPCInferenceServiceStub, x: Any, raw: bool
) -> None:
    for outputs in (("verdict", "outlier"), ("outlier", "verdict")):
        request = pictures("toy", x, raw=raw, outputs=outputs, min_posterior=0.9)
        answer = stub.ModelInfer(request, timeout=30)
        found = tallies.verdicts(answer)
        assert found == arrays(answer)["verdict"].tolist()
        assert Verdict.AMBIGUOUS in found
    outlier = stub.ModelInfer(pictures("toy", x, raw=raw, outputs=("outlier",)), timeout=30)
    assert tallies.verdicts(outlier) == [1 + each for each in arrays(outlier)["outlier"]]


def test_an_unknown_model_is_not_found(stub: GRPCInferenceServiceStub) -> None:
    for name in ("other", "toy/guess"):
        code, resource = refused(lambda name=name: stub.ModelInfer(pictures(name, GOOD)))  # type: ignore[misc]
        assert (code, resource) == (grpc.StatusCode.NOT_FOUND, name)


def test_what_clients_send_of_their_own_accord_is_let_pass(stub: GRPCInferenceServiceStub) -> None:
    asked = pictures("toy/score", GOOD, sequence_id=3, priority=1, sequence_start=True)
    assert len(arrays(stub.ModelInfer(asked))["p_value"]) == 1


def test_a_stream_goes_on_after_a_bad_message(stub: GRPCInferenceServiceStub) -> None:
    requests = []
    for n in range(60):
        model = ("toy/score", "toy", "toy/guess")[n % 3]
        request = pictures(model, GOOD)
        request.id = str(n)
        requests.append(request)
    answers = list(stub.ModelStreamInfer(iter(requests), timeout=30))
    by_id = {int(answer.infer_response.id): answer for answer in answers}
    assert sorted(by_id) == list(range(60))
    for n, answer in by_id.items():
        assert bool(answer.error_message) is (n % 3 == 2)
        assert len(answer.infer_response.outputs) == (5, 10, 0)[n % 3]


def test_statistics_and_metrics_count_what_was_asked(running: Running, x: Any) -> None:
    with running() as live, grpc.insecure_channel(live.address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        for _ in range(3):
            stub.ModelInfer(pictures("toy/score", x))
        refused(lambda: stub.ModelInfer(pictures("toy/score", GOOD, alpha=7)))
        asked = pb.ModelStatisticsRequest(name="toy/score")
        (statistics,) = stub.ModelStatistics(asked).model_stats
        assert (statistics.inference_count, statistics.execution_count) == (60, 3)
        stats = statistics.inference_stats
        assert (stats.success.count, stats.fail.count) == (3, 1)
        parts = stats.compute_input.ns + stats.compute_infer.ns + stats.compute_output.ns
        assert 0 < parts == stats.success.ns
        assert len(stub.ModelStatistics(pb.ModelStatisticsRequest()).model_stats) == 8
        with urllib.request.urlopen(live.metrics_url, timeout=10) as answer:
            text = answer.read().decode()
    assert 'likely_images_total{method="ModelInfer",model="toy"} 60.0' in text
    assert 'likely_requests_total{code="OK",method="ModelInfer",model="toy"} 3.0' in text


def test_statistics_are_of_the_versions_that_are_asked_for(
    running: Running, make_toy: Callable[..., Toy]
) -> None:
    newer = make_toy("toy", "2.0", seed=1)
    with running() as live, grpc.insecure_channel(live.address) as channel:
        live.run(live.server.lifecycle.load(newer.path))
        live.run(live.server.lifecycle.set_label("toy", "stable", "1.0"))
        stub = GRPCInferenceServiceStub(channel)

        def covered(name: str = "", version: str = "") -> set[tuple[str, str]]:
            asked = pb.ModelStatisticsRequest(name=name, version=version)
            return {(m.name, m.version) for m in stub.ModelStatistics(asked).model_stats}

        whole = covered()
        assert {version for _, version in whole} == {"1.0", "2.0"}
        assert covered("toy/score") == {("toy/score", "1.0"), ("toy/score", "2.0")}
        assert covered("toy/score", "stable") == {("toy/score", "1.0")}
        assert covered(version="2.0") == {key for key in whole if key[1] == "2.0"}


def test_messages_of_a_stream_are_counted_by_what_became_of_them(running: Running, x: Any) -> None:
    with running() as live, grpc.insecure_channel(live.address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        before = messages(live)
        # The first message's model is not all the others'; nobody's wish names a series.
        asked = [pictures(model, x) for model in ("guess", "toy/score", "toy", "toy/guess")]
        asked.append(pictures("toy/score", GOOD, alpha=7))
        assert len(list(stub.ModelStreamInfer(iter(asked), timeout=30))) == 5
        batcher = live.server.registry.find("toy")._lanes._batchers[Role.DENSITY]
        batcher.runner = Broken(batcher.runner)
        broken = list(stub.ModelStreamInfer(iter([pictures("toy/score", x)] * 20), timeout=30))
        assert all("internal error" in answer.error_message for answer in broken)
        after = messages(live)
    assert before == {("toy", code): 0 for code in CODES}
    assert after == {
        **before,
        ("toy", "OK"): 2,
        ("toy", "NOT_FOUND"): 1,
        ("toy", "INVALID_ARGUMENT"): 1,
        ("unknown", "NOT_FOUND"): 1,
        ("toy", "INTERNAL"): 20,
    }


class Broken:
    """A graph whose runs fail."""

    def __init__(self, runner: Runner) -> None:
        self.spec, self.providers, self.empty = runner.spec, runner.providers, runner.empty

    def run(self, *_: Any) -> Any:
        raise RuntimeError("broken")


def messages(live: Live) -> dict[tuple[str, str], float]:
    """How many messages of ModelStreamInfer were counted, by model and code."""
    return {
        (sample.labels["model"], sample.labels["code"]): sample.value
        for family in live.server._metrics._messages._metric.collect()
        for sample in family.samples
        if sample.name.endswith("_total") and sample.labels["method"] == "ModelStreamInfer"
    }


def test_what_is_inferred_begins_with_0(running: Running) -> None:
    with running() as live, urllib.request.urlopen(live.metrics_url, timeout=10) as answer:
        text = answer.read().decode()
    for method in INFERRING:
        asked = f'method="{method}",model="toy"'
        assert f'likely_requests_total{{code="INTERNAL",{asked}}} 0.0' in text
        assert f'likely_verdicts_total{{{asked},verdict="outlier"}} 0.0' in text


def test_all_that_is_decided_comes_of_one_look(running: Running, x: Any) -> None:
    quota = {"client_images_per_second": 0.001, "client_images_at_once": len(x)}
    with running(**quota) as live, grpc.insecure_channel(live.address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        answer = arrays(stub.ModelInfer(pictures("toy", x, priors="0, 0.5, 0.5")))
        assert {"posterior", "log_likelihood", "outlier"} <= set(answer)
        assert not answer["posterior"].reshape(len(x), -1)[:, 0].any()
        deadline = time.monotonic() + 30
        while p_values(live) < len(x) and time.monotonic() < deadline:  # told a little later
            time.sleep(0.01)
        assert p_values(live) == len(x)


def p_values(live: Live) -> float:
    """How many p-values the histograms have seen."""
    with urllib.request.urlopen(live.metrics_url, timeout=10) as page:
        lines = page.read().decode().splitlines()
    counts = [line for line in lines if line.startswith("likely_p_value_count")]
    return sum(float(line.split()[-1]) for line in counts)


def test_a_server_that_will_end_or_whose_models_are_ill_is_not_ready(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running() as live, grpc.insecure_channel(live.address) as channel:
        stub = GRPCInferenceServiceStub(channel)

        def ready() -> tuple[bool, bool]:
            model = stub.ModelReady(pb.ModelReadyRequest(name="toy")).ready
            return stub.ServerReady(pb.ServerReadyRequest()).ready, model

        assert ready() == (True, True)
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "healthy", False)
            assert ready() == (False, False)
            listed = stub.RepositoryIndex(pb.RepositoryIndexRequest()).models
            assert {(m.state, m.reason) for m in listed} == {("UNAVAILABLE", "unhealthy")}
            assert not stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=True)).models
        assert len(stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=True)).models) == 8
        stopping = asyncio.run_coroutine_threadsafe(live.server.stop(delay=30), live.loop)
        while ready() != (False, False):
            time.sleep(0.01)
        stopping.cancel()


def test_until_models_are_loaded_nothing_is_ready(running: Running) -> None:
    with running(load=False) as live, grpc.insecure_channel(live.address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        assert stub.ServerLive(pb.ServerLiveRequest()).live
        assert not stub.ServerReady(pb.ServerReadyRequest()).ready
        assert not stub.ModelReady(pb.ModelReadyRequest(name="toy")).ready


def test_a_bundle_offers_what_it_answers(running: Running, make_toy: Callable[..., Toy]) -> None:
    bare = make_toy("bare", roles=("density",))
    with running(bundles=(bare.path,)) as live, grpc.insecure_channel(live.address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        listed = stub.RepositoryIndex(pb.RepositoryIndexRequest()).models
        assert [model.name for model in listed] == ["bare", "bare/score", "bare/surprise"]
        found = arrays(stub.ModelInfer(pictures("bare", GOOD)))
        assert "p_value" in found
        assert "label" not in found


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_answers_in_both_versions(live: Live, version: str) -> None:
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(
            file_containing_symbol=f"grpc.reflection.{version}.ServerReflection"
        ),
        reflection_pb2.ServerReflectionRequest(
            file_containing_symbol="inference.GRPCInferenceService"
        ),
    ]
    with grpc.insecure_channel(live.address) as channel:
        call: Any = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        listed, *files = call(iter(asked), timeout=30)
    names = [service.name for service in listed.list_services_response.service]
    assert names == sorted(set(names))
    assert f"grpc.reflection.{version}.ServerReflection" in names
    assert all(each.file_descriptor_response.file_descriptor_proto for each in files)


def test_a_token_needs_the_scope_of_what_is_asked(running: Running, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(
        "".join(
            f'[[token]]\nname = "{scope}"\nscopes = ["{scope}"]\nsecret = "{scope:x<20}"\n'
            for scope in ("score", "generate")
        )
    )
    scoring, drawing = pictures("toy", GOOD), question("toy/generate", {"count": ("INT64", [1])})
    with running(tokens=tokens) as live, grpc.insecure_channel(live.address) as channel:
        stub = GRPCInferenceServiceStub(channel)

        def ask(scope: str, request: pb.ModelInferRequest) -> Any:
            metadata = (("authorization", f"Bearer {scope:x<20}"),)
            return stub.ModelInfer(request, metadata=metadata, timeout=30)

        assert ask("score", scoring).outputs
        assert ask("generate", drawing).outputs
        for scope, request in (("score", drawing), ("generate", scoring)):
            with pytest.raises(grpc.RpcError) as caught:
                ask(scope, request)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        with pytest.raises(grpc.RpcError) as caught:
            stub.RepositoryIndex(pb.RepositoryIndexRequest())
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
