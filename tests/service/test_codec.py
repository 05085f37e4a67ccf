"""What goes out comes in again, for every answer."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from likely import codec
from likely.answers import (
    Classifications,
    Direction,
    Draws,
    Features,
    LabelRule,
    Limits,
    ModelInfo,
    ModelVersion,
    ScoreTable,
    Verdict,
    VersionState,
)
from likely.errors import InvalidInput
from likely.serving import merging, tallies
from likely.v1.images_pb2 import Images

pictures = hnp.arrays(
    np.uint8, st.tuples(st.integers(0, 4), st.just(2), st.integers(1, 3), st.integers(1, 3))
)


def same(a: Any, b: Any) -> bool:
    return all(
        np.array_equal(getattr(a, f.name), getattr(b, f.name))
        and getattr(getattr(a, f.name), "dtype", None) == getattr(getattr(b, f.name), "dtype", None)
        for f in fields(a)
    )


@given(pictures)
def test_pictures(x: np.ndarray) -> None:
    assert np.array_equal(codec.pixels(codec.images(x)), x)


@given(st.binary(max_size=40), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6))
def test_nothing_but_invalid_input_comes_of_any_images(data: bytes, shape: list[int]) -> None:
    try:
        x = codec.pixels(Images(data=data, shape=shape))
    except InvalidInput as error:
        assert error.field.startswith("images.")
    else:
        assert x.tobytes() == data


class Long(list[int]):
    """A shape of a whole message, which would hold the event loop while it is taken."""

    def __len__(self) -> int:
        return 15 << 20

    def __iter__(self) -> NoReturn:
        raise AssertionError("it was taken")


def test_a_shape_is_counted_before_it_is_taken() -> None:
    images: Any = SimpleNamespace(shape=Long(), data=b"")
    with pytest.raises(InvalidInput, match=r"15728640 dimensions; 4 are needed"):
        codec.pixels(images)
    request: Any = SimpleNamespace(images=images)
    assert merging.key(request) is None


@pytest.mark.parametrize("shape", [(0, 1, 3, 2**63 - 1), (2**62, 2**62, 0, 3)])
def test_no_pictures_of_a_size_that_cannot_be_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match=r"images\.shape: .* is too large for an array"):
        codec.pixels(Images(shape=shape))


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("surprise", [True, False])
def test_scores(n: int, surprise: bool) -> None:
    rng = np.random.default_rng(n)
    shape = (n, 1, 2, 3)
    table = ScoreTable(
        rows=rng.normal(size=(n, 4)),
        alpha=0.05,
        surprise=rng.random(shape, dtype=np.float32) if surprise else None,
        model_version="1",
    )
    table.p_value[:1] = table.alpha  # which is rejected
    message, scores = codec.score_response(table), table.scores()
    assert same(codec.scores(message, shape if surprise else None), scores)
    assert np.array_equal(scores.verdict == Verdict.OUTLIER, scores.p_value <= 0.05)
    assert tallies.picture_count(message) == n
    assert tallies.verdicts(message) == [Verdict(v) for v in scores.verdict]


@pytest.mark.parametrize("rule", LabelRule)
@pytest.mark.parametrize("n", [0, 1, 3])
def test_classifications(n: int, rule: LabelRule) -> None:
    rng = np.random.default_rng(n)
    answer = Classifications(
        log_pxy=-rng.random((n, 4)),
        posterior=rng.random((n, 4)),
        label=rng.integers(0, 4, n),
        p_value=rng.random(n),
        label_p_values=rng.random((n, 4)),
        verdict=rng.integers(1, 4, n).astype(np.int8),
        alpha=0.01,
        model_version="2",
        composed=-rng.random((n, 4 if n != 1 else 0)),
        rule=rule,
    )
    message = codec.classify_response(answer)
    assert same(codec.classifications(message, 4), answer)
    answer.label_p_values[:, 1] = answer.alpha  # which is not in the set
    assert np.array_equal(answer.label_sets, answer.label_p_values > answer.alpha)
    message.ClearField("rule")  # as a server has it that knows no other
    assert codec.classifications(message, 4).rule is LabelRule.GENERATIVE
    assert tallies.picture_count(message) == n
    assert tallies.verdicts(message) == [Verdict(v) for v in answer.verdict]


@pytest.mark.parametrize("n", [0, 1, 3])
def test_features(n: int) -> None:
    rng = np.random.default_rng(n)
    answer = Features(
        mean=rng.random((n, 5), dtype=np.float32),
        log_variance=rng.random((n, 5), dtype=np.float32),
        label=rng.integers(0, 4, n),
        model_version="2",
    )
    message = codec.encode_response(answer)
    assert same(codec.features(message), answer)
    assert tallies.picture_count(message) == n
    assert tallies.verdicts(message) == []


def test_draws() -> None:
    rng = np.random.default_rng(0)
    answer = Draws(
        images=rng.integers(0, 255, (3, 1, 2, 2), dtype=np.uint8),
        label=np.array([0, 1, 2]),
        first_index=2**62,
        seed=-(2**63),
        draws=np.array([1, 7, 16]),
        accepted=np.array([True, True, False]),
        model_version="2",
    )
    message = codec.generate_response(answer)
    assert same(codec.draws(message), answer)
    assert tallies.picture_count(message) == 3


@pytest.mark.parametrize("conditional", ["elbo", "iwae", None])
def test_model_descriptions(conditional: str | None) -> None:
    info = ModelInfo(
        name="a",
        version="1",
        description="d",
        shape=(1, 2, 3),
        levels=4,
        labels=("x", "y"),
        priors=(0.25, 0.75),
        methods=("m",),
        density_kind="exact",
        conditional_kind=conditional,
        importance_samples=8,
        latent_dimensions=2,
        calibration_size=9,
        finest_alpha=0.1,
        default_alpha=0.2,
        posterior_temperature=1.5,
        execution_providers=("CPUExecutionProvider",),
        limits=Limits(1, 2, 3, 4, 5, 6, 7, 0.5, 8),
        digest="f" * 64,
        version_labels=("canary", "stable"),
        discriminative=conditional is None,
        directions=(Direction("brightness", "attribute"), Direction("label x", "label")),
        deterministic=conditional is None,
    )
    assert codec.model_info(codec.model_message(info)) == info


def test_paths_that_are_no_text_are_told_nevertheless() -> None:
    folder = Path("w/mod\udce8le")  # as Python gives a byte of Latin-1
    version = ModelVersion(VersionState.FAILED, folder, message=f"{folder} is no bundle")
    message = codec.version_message(version)
    assert (message.folder, message.message) == ("w/mod\ufffdle", "w/mod\ufffdle is no bundle")
