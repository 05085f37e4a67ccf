"""Every field of every request: what is allowed passes, anything else names the field."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from likely import codec
from likely.answers import Limits
from likely.bundle import Bundle, Manifest
from likely.errors import InvalidInput
from likely.outliers import Detector
from likely.serving import checks
from likely.v1.generation_pb2 import CompleteRequest, GenerateRequest, SelfCheck
from likely.v1.images_pb2 import Images
from likely.v1.scoring_pb2 import ClassifyRequest, EncodeRequest, ScoreRequest

if TYPE_CHECKING:
    from tests.conftest import Toy

LIMITS = Limits(10, 20, 8, 1 << 20)
GOOD = Images(data=bytes(18), shape=(2, 1, 3, 3))

int64 = st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 30)
int32 = st.integers(-(2**31), 2**31 - 1) | st.integers(-3, 5)
double = st.floats() | st.floats(0, 1)
images = st.builds(
    Images,
    data=st.binary(max_size=40) | st.just(bytes(18)),
    shape=st.lists(int64, max_size=6) | st.just([2, 1, 3, 3]),
)
requests = st.one_of(
    st.builds(ScoreRequest, images=images, alpha=st.none() | double, surprise=st.booleans()),
    st.builds(
        ClassifyRequest,
        images=images,
        alpha=st.none() | double,
        priors=st.lists(double, max_size=4),
        min_posterior=double,
    ),
    st.builds(EncodeRequest, images=images, labels=st.lists(int32, max_size=4)),
    st.builds(
        GenerateRequest,
        label=st.none() | int32,
        count=int64,
        seed=st.none() | int64,
        first_index=int64,
        temperature=st.none() | double,
        self_check=st.none() | st.builds(SelfCheck, alpha=st.none() | double, max_draws=int32),
    ),
    st.builds(
        CompleteRequest,
        images=images,
        mask=st.binary(max_size=20) | st.just(bytes(18)),
        label=st.none() | int32,
        completions=st.none() | int32,
        proposals=st.none() | int32,
        first_index=int64,
    ),
)


def check(request: Any, manifest: Manifest, detector: Detector) -> dict[str, Any]:
    """All checks that the request's RPC makes."""
    if isinstance(request, GenerateRequest):
        judge: Any = SimpleNamespace(detector=detector)
        return {
            "label": checks.label(request, manifest),
            "count": checks.count(request, LIMITS),
            "seed": checks.seed(request),
            "first_index": checks.first_index(request, request.count),
            "temperature": checks.temperature(request),
            "self_check": checks.self_check(request, judge, 0.05),
        }
    if isinstance(request, CompleteRequest):
        checks.geometry(request, manifest, LIMITS)
        known = checks.mask(request)
        x = checks.pixels(request, manifest, LIMITS, known)
        return {"x": x, "completions": checks.completions(request, manifest, LIMITS)}
    x = checks.pixels(request, manifest, LIMITS)
    checked: dict[str, Any] = {"x": x}
    if isinstance(request, EncodeRequest):
        return {**checked, "labels": checks.labels(request, manifest, len(x))}
    checked["alpha"] = checks.alpha(request, detector, 0.05)
    if isinstance(request, ClassifyRequest):
        checked["priors"] = checks.priors(request, manifest)
        checked["min_posterior"] = checks.min_posterior(request)
    return checked


@pytest.fixture
def detector(toy: Toy) -> Detector:
    return Detector(Bundle.open(toy.path).calibration())


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request=requests)
def test_nothing_but_invalid_input_comes_of_any_request(
    manifest: Manifest, detector: Detector, request: Any
) -> None:
    try:
        checked = check(request, manifest, detector)
    except InvalidInput as error:
        top = error.field.split(".")[0].split("[")[0]
        assert top in request.DESCRIPTOR.fields_by_name
        assert len(str(error)) < 1000
        return
    if "x" in checked:
        assert checked["x"].shape[1:] == (1, 3, 3)
        assert len(checked["x"]) <= LIMITS.images_per_request
        assert checked["x"].max(initial=0) < manifest.levels
    if "alpha" in checked:
        assert detector.finest_alpha <= checked["alpha"] < 1
    if "count" in checked:
        assert 1 <= checked["count"] <= LIMITS.images_per_generation
        assert checked["first_index"] + checked["count"] <= 2**63
        assert math.isfinite(checked["temperature"])


def changed(data: bytes) -> Images:
    return Images(data=data, shape=GOOD.shape)


def shaped(*shape: int) -> Images:
    return Images(data=GOOD.data, shape=shape)


BAD: dict[str, tuple[Any, str, str]] = {
    "no images": (ScoreRequest(), "images.shape", "0 dimensions"),
    "rank": (ScoreRequest(images=shaped(2, 3, 3)), "images.shape", "3 dimensions; 4"),
    "negative": (ScoreRequest(images=shaped(-2, 1, 3, 3)), "images.shape[0]", "-2 is negative"),
    "overflow": (ScoreRequest(images=shaped(2**62, 1, 3, 3)), "images.shape[0]", "at most 10"),
    "channels": (ScoreRequest(images=shaped(2, 3, 3, 3)), "images.shape[1]", "takes 1"),
    "rows": (ScoreRequest(images=shaped(2, 1, 9, 1)), "images.shape[2]", "9 rows; the model ta"),
    "columns": (ScoreRequest(images=shaped(2, 1, 3, 28)), "images.shape[3]", "28 columns"),
    "many": (ScoreRequest(images=shaped(11, 1, 3, 3)), "images.shape[0]", "11 pictures"),
    "bytes": (ScoreRequest(images=changed(bytes(17))), "images.data", "17 bytes; .* 18"),
    "level": (
        ScoreRequest(images=changed(bytes(9) + b"\0\0\0\0\0\4\5\0\0")),
        "images.data",
        r"level 4 at picture 1, channel 0, row 1, column 2 is not in \[0, 4\)",
    ),
    "alpha": (ScoreRequest(images=GOOD, alpha=0), "alpha", r"\[0.005, 1\)"),
    "alpha NaN": (ScoreRequest(images=GOOD, alpha=math.nan), "alpha", "nan"),
    "alpha too fine": (ClassifyRequest(images=GOOD, alpha=1e-9), "alpha", "199 calibration"),
    "priors short": (ClassifyRequest(images=GOOD, priors=[1]), "priors", "3 labels"),
    "priors sum": (ClassifyRequest(images=GOOD, priors=[0.3] * 3), "priors", "sum to 0.9"),
    "prior NaN": (ClassifyRequest(images=GOOD, priors=[0, math.nan, 1]), "priors[1]", "nan"),
    "min_posterior": (ClassifyRequest(images=GOOD, min_posterior=1), "min_posterior", r"\[0, 1\)"),
    "min_posterior NaN": (
        ClassifyRequest(images=GOOD, min_posterior=math.nan), "min_posterior", "nan",
    ),
    "labels length": (EncodeRequest(images=GOOD, labels=[1]), "labels", "1 labels for 2 pictures"),
    "labels range": (EncodeRequest(images=GOOD, labels=[0, 3]), "labels[1]", "3 is not in 0 to 2"),
    "label": (GenerateRequest(count=1, label=-1), "label", "-1 is not in 0 to 2: label-0"),
    "count 0": (GenerateRequest(count=0), "count", "0 is not in 1 to 20"),
    "count many": (GenerateRequest(count=10**9), "count", "1 to 20"),
    "index": (GenerateRequest(count=1, first_index=-1), "first_index", "negative"),
    "index end": (GenerateRequest(count=2, first_index=2**63 - 1), "first_index", "no room"),
    "cold": (GenerateRequest(count=1, temperature=-1), "temperature", r"\[0, 2\]"),
    "hot": (GenerateRequest(count=1, temperature=1e30), "temperature", r"\[0, 2\]"),
    "temperature NaN": (GenerateRequest(count=1, temperature=math.nan), "temperature", "nan"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_value_is_refused_with_its_field_and_what_is_allowed(
    manifest: Manifest, detector: Detector, case: str
) -> None:
    request, field, sentence = BAD[case]
    with pytest.raises(InvalidInput, match=sentence) as caught:
        check(request, manifest, detector)
    assert caught.value.field == field


def test_proposals_need_the_density_of_the_model_that_draws(manifest: Manifest) -> None:
    request = CompleteRequest(images=GOOD, mask=bytes(18), proposals=2)
    roles: dict[str, Any] = {"density": ["a", "near"], "sample": "a"}
    one = manifest.model_copy(update={"recipe": {"roles": roles}})
    two = manifest.model_copy(update={"recipe": {"roles": {**roles, "sample": "b"}}})
    for each in (manifest, one):
        assert checks.completions(request, each, LIMITS) == (1, 2)
    with pytest.raises(InvalidInput, match="2 need a model that can compute") as caught:
        checks.completions(request, two, LIMITS)
    assert caught.value.field == "proposals"
    request.proposals = 1
    assert checks.completions(request, two, LIMITS) == (1, 1)


@pytest.mark.parametrize("seed", [0, 2**63 - 1, -(2**63)])
def test_every_seed_is_a_seed(seed: int) -> None:
    assert checks.seed(GenerateRequest(seed=seed)) == seed


def test_absent_values_have_their_defaults(manifest: Manifest, detector: Detector) -> None:
    checked = check(ClassifyRequest(images=GOOD), manifest, detector)
    assert (checked["alpha"], checked["priors"], checked["min_posterior"]) == (0.05, None, 0)
    drawn = check(GenerateRequest(count=1), manifest, detector)
    assert (drawn["label"], drawn["temperature"], drawn["first_index"]) == (None, 1, 0)
    assert drawn["seed"] != check(GenerateRequest(count=1), manifest, detector)["seed"]


def test_no_pictures_are_pictures(manifest: Manifest) -> None:
    request = ScoreRequest(images=shaped(0, 1, 3, 3))
    request.images.data = b""
    assert checks.pixels(request, manifest, LIMITS).shape == (0, 1, 3, 3)


def test_a_model_without_labels_takes_none(make_toy: Callable[..., Toy]) -> None:
    bare = Bundle.open(make_toy(roles=("density",)).path).manifest
    with pytest.raises(InvalidInput, match="no labels"):
        checks.label(GenerateRequest(label=0), bare)


def test_allowed_pictures_come_through(manifest: Manifest) -> None:
    x = np.arange(18, dtype=np.uint8).reshape(2, 1, 3, 3) % 4
    request = ScoreRequest(images=Images(data=x.tobytes(), shape=x.shape))
    assert np.array_equal(checks.pixels(request, manifest, LIMITS), x)


def test_more_pictures_than_may_be_drawn_are_named(manifest: Manifest) -> None:
    request = CompleteRequest(images=codec.images(np.zeros((3, 1, 3, 3), np.uint8)))
    with pytest.raises(InvalidInput, match="3 pictures") as caught:
        checks.completions(request, manifest, replace(LIMITS, images_per_generation=2))
    assert caught.value.field == "images.shape[0]"
