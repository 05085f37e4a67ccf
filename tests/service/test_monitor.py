"""What monitors see of the pictures that were scored, on a real server."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from likely import codec
from likely.telemetry.histograms import BulkHistogram
from likely.telemetry.metrics import Metrics
from likely.telemetry.monitor import KEPT, P_VALUES
from likely.v1.admin_pb2 import ResetDriftRequest, UnloadModelRequest
from likely.v1.admin_pb2_grpc import AdminServiceStub
from likely.v1.generation_pb2 import GenerateRequest, SelfCheck
from likely.v1.scoring_pb2 import ClassifyRequest, ScoreRequest, ScoreResponse
from tests.faults.alive import Caller, calling, refused, scrape

if TYPE_CHECKING:
    from tests.conftest import Live, Running, Toy

SECONDS = 20  # a bound for what hangs


@pytest.fixture
def watched(running: Running) -> Iterator[Live]:
    """A server of its own, whose test for drift has just begun."""
    with running(admin_port=0, drift_level=0.01) as live:
        yield live


def found(live: Live, name: str, **labels: str) -> float:
    """A metric of the toy."""
    wanted = {"model": "toy", "version": "1.0", **labels}
    rendered = ",".join(f'{key}="{value}"' for key, value in sorted(wanted.items()))
    samples = {_sorted(sample): value for sample, value in scrape(live).items()}
    return samples[f"{name}{{{rendered}}}"]


def _sorted(sample: str) -> str:
    name, brace, labels = sample.partition("{")
    return f"{name}{{{','.join(sorted(labels[:-1].split(',')))}}}" if brace else name


def drift(live: Live, name: str, method: str = "Score") -> float:
    return found(live, f"likely_drift_{name}", method=method)


def until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.05)


def score(caller: Caller, x: Any) -> ScoreResponse:
    request = ScoreRequest(model_name="toy", images=codec.images(x), alpha=0.05)
    answer: ScoreResponse = caller.ask(request)
    return answer


def improbable(toy: Toy, n: int) -> Any:
    """The least probable picture, so many times."""
    return np.repeat(toy.log_q.argmin(-1).astype(np.uint8)[None], n, 0)


def admin(live: Live, request: Any) -> Any:
    with grpc.insecure_channel(f"127.0.0.1:{live.server.admin_port}") as channel:
        method = type(request).__name__.removesuffix("Request")
        return getattr(AdminServiceStub(channel), method)(request, timeout=SECONDS)


@given(st.lists(st.floats(-1, 2) | st.sampled_from([0.0, 0.25, 1.0]), max_size=30))
def test_a_tally_counts_as_a_histogram_does(values: list[float]) -> None:
    texts = []
    for kind in (Histogram, BulkHistogram):
        registry = CollectorRegistry()
        histogram = kind("x", "x", ("model",), buckets=(0, 0.25, 1), registry=registry)
        child = histogram.labels("toy")
        if isinstance(child, BulkHistogram):
            child.observe_all(np.array(values))
        else:
            for value in values:
                child.observe(value)
        lines = generate_latest(registry).decode().splitlines()
        texts.append([line for line in lines if "_created" not in line and "_sum" not in line])
        (total,) = [float(line.split()[1]) for line in lines if line.startswith("x_sum")]
        assert total == pytest.approx(sum(values), abs=1e-9)
    assert texts[0] == texts[1]


def test_histograms_hold_what_was_answered(watched: Live, toy: Toy) -> None:
    x = toy.draw(np.random.default_rng(1), 80)
    with calling(watched.address) as caller:
        answer = score(caller, x)
        caller.ask(ClassifyRequest(model_name="toy", images=codec.images(x[:30])))
    rows = [*answer.scores, *answer.scores[:30]]
    until(lambda: found(watched, "likely_p_value_count") == len(rows))
    p = np.array([row.p_value for row in rows])
    for end in (0.05, 0.5, 1.0):
        assert end in P_VALUES
        assert found(watched, "likely_p_value_bucket", le=str(end)) == (p <= end).sum()
    nats = -np.array([row.log_likelihood for row in rows])
    name = "likely_negative_log_likelihood"
    assert found(watched, f"{name}_nats_sum") == pytest.approx(nats.sum(), rel=1e-6)
    assert found(watched, f"{name}_nats_bucket", le="10.0") == (nats <= 10).sum()
    each = found(watched, f"{name}_nats_per_dimension_sum")
    assert each == pytest.approx(nats.sum() / 9, rel=1e-6)


def test_drift_is_seen_in_what_is_served_and_ended_by_hand(watched: Live, toy: Toy) -> None:
    rng = np.random.default_rng(2)
    with calling(watched.address) as caller:
        for _ in range(30):
            score(caller, toy.draw(rng, 100))
        until(lambda: drift(watched, "images_total") == 3000)
        assert drift(watched, "alarm") == 0
        assert drift(watched, "log10_martingale") < 1
        threshold = scrape(watched)["likely_drift_log10_threshold"]
        assert threshold == pytest.approx(math.log10(2 / 0.01))
        x = toy.draw(rng, 200)
        unlike = rng.random(200) < 0.2
        x[unlike] = improbable(toy, unlike.sum())
        for part in np.split(x, 20):
            score(caller, part)
        until(lambda: drift(watched, "images_total") == 3200)
        assert drift(watched, "alarm") == 1
        assert drift(watched, "log10_martingale") >= threshold
        # The other method's stream is a test of its own.
        assert drift(watched, "alarm", "Classify") == 0
        assert admin(watched, ResetDriftRequest(model_name="toy")).model_version == "1.0"
        assert drift(watched, "alarm") == 0
        assert drift(watched, "log10_martingale") == 0
        score(caller, toy.draw(rng, 100))
        until(lambda: drift(watched, "images_total") == 3300)
        assert drift(watched, "alarm") == 0
    with calling(watched.address) as caller:
        for _ in range(2):
            images = codec.images(improbable(toy, 40))
            caller.ask(ClassifyRequest(model_name="toy", images=images))
        until(lambda: drift(watched, "alarm", "Classify") == 1)
    admin(watched, UnloadModelRequest(model_name="toy", model_version="1.0"))
    assert drift(watched, "alarm", "Classify") == 0
    assert scrape(watched)["likely_ready"] == 0
    gone = ResetDriftRequest(model_name="toy")
    refused(lambda: admin(watched, gone), grpc.StatusCode.NOT_FOUND)


def test_draws_that_check_themselves_are_not_served_pictures(watched: Live) -> None:
    with calling(watched.address) as caller:
        checked = GenerateRequest(model_name="toy", count=20, label=1, self_check=SelfCheck())
        caller.ask(checked)
        time.sleep(0.5)
    assert found(watched, "likely_p_value_count") == 0
    assert drift(watched, "images_total", "Classify") == 0


def test_without_a_level_there_is_no_test(running: Running, toy: Toy) -> None:
    with running(drift_level=0) as live, calling(live.address) as caller:
        score(caller, improbable(toy, 50))
        until(lambda: found(live, "likely_p_value_count") == 50)
        assert drift(live, "images_total") == 0
        assert drift(live, "alarm") == 0
        assert scrape(live)["likely_drift_log10_threshold"] == math.inf


def test_metrics_of_versions_long_unloaded_are_removed() -> None:
    """A server that is given a new version every hour has no metrics without end."""
    metrics = Metrics(drift_level=0.01)
    for version in range(40):
        metrics.set_served([_Engine(str(version)), _Engine("kept")])  # type: ignore[list-item]
    metrics.set_served([_Engine("0")])  # type: ignore[list-item]
    page = generate_latest(metrics.registry).decode()
    for family in ("likely_model_info", "likely_p_value_count", "likely_drift_alarm"):
        lines = [line for line in page.splitlines() if line.startswith(f"{family}{{")]
        versions = {re.search('version="([^"]*)"', line)[1] for line in lines}  # type: ignore[index]
        assert versions == {"0", "kept", *map(str, range(40 - KEPT + 1, 40))}, family


class _Engine:
    """As much of an engine as metrics look at."""

    digest = "0"
    providers = ("CPUExecutionProvider",)
    detector = SimpleNamespace(scores=np.arange(9.0))

    def __init__(self, version: str) -> None:
        self.manifest = SimpleNamespace(name="toy", version=version, dimensions=4)

    def answers(self, method: str) -> bool:
        return method == "Score"


def test_readiness_and_loads_are_told(running: Running) -> None:
    with running(load=False) as live:
        assert scrape(live)["likely_ready"] == 0
        live.run(live.server.load())
        samples = scrape(live)
        assert samples["likely_ready"] == 1
        assert samples['likely_loads_total{model="toy"}'] == 1
