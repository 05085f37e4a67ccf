"""Pictures redrawn by their features: of the toy, whose decoder has a closed form."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from likely import Client
from likely.answers import Features
from likely.bundle import Bundle
from likely.cli import main
from likely.client import AsyncClient
from likely.engine import Engine
from likely.errors import BundleError, InvalidInput, NotAnswered
from likely.graphs import Device
from likely.latent import Direction, Drawing, directions
from tests.conftest import DIRECTIONS, LATENT, LEVELS, OFFSETS, PROBES, SHAPE, STEPS

if TYPE_CHECKING:
    from tests.conftest import Array, Live, Running, Toy

BRIGHTNESS, LABEL = DIRECTIONS
# Dark pictures: the toy's features are sums of levels, and large ones leave draws no choice.
X = (np.random.default_rng(3).random((4, *SHAPE)) < 0.1).astype(np.uint8)
Y = np.array([0, 1, 2, 1])


@pytest.fixture(scope="module")
def engine(toy: Toy) -> Iterator[Engine]:
    opened = Engine.load(Bundle.open(toy.path), device=Device("cpu"), threads=1, max_batch=3)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[Client]:
    with Client(live.address) as opened:
        yield opened


@pytest.fixture(scope="module")
def plain(make_toy: Callable[..., Toy]) -> Toy:
    return make_toy("plain", roles=("encode", "decode"), plain=True)


def test_features_stand_for_their_closed_form(toy: Toy, client: Client) -> None:
    z = np.random.default_rng(0).normal(size=(5, LATENT)).astype(np.float32)
    y = np.arange(5) % 3
    found = client.decode(z, labels=y, draws=2, seed=7)
    gumbel = np.zeros((5, *SHAPE[1:], SHAPE[0], LEVELS), np.float32)
    expected = toy.answer("decode", {"z": z, "y": y, "gumbel": gumbel})
    assert found.mean == pytest.approx(expected["mean"], abs=1e-5)
    assert found.deviation == pytest.approx(expected["deviation"], abs=1e-5)
    assert found.drawn.shape == (5, 2, *SHAPE) and found.drawn.max() < LEVELS
    assert np.array_equal(
        client.decode(z, labels=y, draws=1, temperature=0).drawn[:, 0], expected["x"]
    )


def test_draws_follow_the_distribution_that_is_told(client: Client) -> None:
    z = np.zeros((1, LATENT), np.float32)
    parts = [
        client.decode(z, labels=[1], draws=50, seed=3, first_index=100 * part) for part in range(40)
    ]
    drawn = np.concatenate([part.drawn[0] for part in parts]) / (LEVELS - 1)
    mean, deviation = parts[0].mean[0], parts[0].deviation
    assert deviation is not None
    error = deviation[0] / np.sqrt(len(drawn))
    assert np.all(abs(drawn.mean(0) - mean) < 5 * error + 1e-9)
    assert drawn.std(0) == pytest.approx(deviation[0], abs=0.05)


def test_point_0_is_the_reconstruction(client: Client) -> None:
    features = client.encode(X, labels=Y)
    own = client.decode(features.mean, labels=Y, draws=3, seed=5)
    moved = client.traverse(X, BRIGHTNESS, [-1, 0, 2], labels=Y, draws=3, seed=5)
    assert moved.mean.shape == (4, 3, *SHAPE) and moved.drawn.shape == (4, 3, 3, *SHAPE)
    assert np.array_equal(moved.mean[:, 1], own.mean)
    assert np.array_equal(moved.drawn[:, 1], own.drawn) and own.drawn.min() < LEVELS - 1
    assert not np.array_equal(moved.mean[:, 2], own.mean)


def test_the_ends_between_two_pictures_are_their_reconstructions(client: Client) -> None:
    a, b = X[:2], X[2:]
    found = client.interpolate(a, b, [0, 0.5, 1], labels=Y[:2], other_labels=Y[2:], draws=1, seed=2)
    for at, x, y in ((0, a, Y[:2]), (2, b, Y[2:])):
        own = client.decode(client.encode(x, labels=y).mean, labels=y, draws=1, seed=2)
        assert np.array_equal(found.mean[:, at], own.mean)
        assert np.array_equal(found.drawn[:, at], own.drawn)
    halves = [client.encode(x, labels=y).mean / 2 for x, y in ((a, Y[:2]), (b, Y[2:]))]
    middle = client.decode(sum(halves), labels=Y[2:])  # as near to either, it is of the last
    assert found.mean[:, 1] == pytest.approx(middle.mean, abs=1e-6)


def test_a_place_is_told_with_its_deviation(client: Client) -> None:
    features = client.encode(X, labels=Y)
    assert features.log_variance is not None
    found = client.traverse(X, BRIGHTNESS, [0], labels=Y)
    assert found.position == pytest.approx(features.mean @ PROBES[0] + OFFSETS[0], abs=1e-5)
    variance = np.exp(features.log_variance) @ PROBES[0] ** 2
    assert found.spread == pytest.approx(np.sqrt(variance), rel=1e-5)
    assert np.array_equal(found.label, Y)


def test_a_step_moves_the_place_by_itself(client: Client) -> None:
    way = Direction(STEPS[0], PROBES[0], OFFSETS[0])
    mean = client.encode(X, labels=Y).mean
    for t in (-3.0, 0.0, 1.5):
        moved = Features((mean + t * STEPS[0]).astype(np.float32), None, Y, "1")
        still = Features(mean, None, Y, "1")
        assert way.position_of(moved)[0] - way.position_of(still)[0] == pytest.approx(t, abs=1e-5)


def test_an_answer_is_of_its_own_picture_alone(engine: Engine) -> None:
    points = np.array([-1.0, 0.5])

    def ask(rows: slice, drawing: Drawing) -> Coroutine[Any, Any, Any]:
        return engine.traverse(X[rows], LABEL, points, drawing, label=Y[rows])

    whole = asyncio.run(ask(slice(0, 4), Drawing(3, 9, 10)))
    for i in range(4):
        one = asyncio.run(ask(slice(i, i + 1), Drawing(2, 9, 10 + i)))
        assert np.array_equal(one.drawn[0], whole.drawn[i, :, :2])
        assert np.array_equal(one.mean[0], whole.mean[i])


def test_large_inputs_are_divided_and_answers_joined(client: Client) -> None:
    x = np.concatenate([X] * 8)
    whole = client.traverse(x, BRIGHTNESS, [-5, -3], draws=2, seed=1)
    part = client.traverse(x[30:], BRIGHTNESS, [-5, -3], draws=2, seed=1, first_index=30)
    assert whole.drawn.shape == (32, 2, 2, *SHAPE) and len(whole.position) == 32
    assert np.array_equal(whole.drawn[30:], part.drawn)
    assert len({tuple(drawn.ravel()) for drawn in whole.drawn[::4]}) > 4


def test_the_asynchronous_client_says_the_same(live: Live, client: Client) -> None:
    async def ask() -> tuple[Any, Any, Any]:
        async with AsyncClient(live.address) as other:
            moved = await other.traverse(X, LABEL, [1], labels=Y, draws=1, seed=4)
            between = await other.interpolate(X[:2], X[2:], [0.5], draws=1, seed=4)
            return moved, between, await other.decode(np.zeros((2, LATENT)), labels=[0, 1])

    moved, between, decoded = live.run(ask())
    assert np.array_equal(
        moved.drawn, client.traverse(X, LABEL, [1], labels=Y, draws=1, seed=4).drawn
    )
    assert np.array_equal(
        between.drawn, client.interpolate(X[:2], X[2:], [0.5], draws=1, seed=4).drawn
    )
    assert decoded.mean.shape == (2, *SHAPE) and decoded.drawn.shape == (2, 0, *SHAPE)


def test_nothing_is_answered_by_nothing(client: Client) -> None:
    assert client.traverse(X[:0], LABEL, [0, 1], draws=2).drawn.shape == (0, 2, 2, *SHAPE)
    assert client.decode(np.empty((0, LATENT)), draws=2).mean.shape == (0, *SHAPE)
    assert client.interpolate(X[:0], X[:0], [0]).mean.shape == (0, 1, *SHAPE)


Ask = Callable[[Client], Any]
WRONG: dict[str, tuple[Ask, str]] = {
    "an unknown direction": (lambda c: c.traverse(X, "size", [0]), "direction"),
    "no points": (lambda c: c.traverse(X, LABEL, []), "points"),
    "a point too far": (lambda c: c.traverse(X, LABEL, [0, 101]), "points[1]"),
    "a point that is none": (lambda c: c.traverse(X, LABEL, [np.nan]), "points[0]"),
    "a point beyond": (lambda c: c.interpolate(X, X, [1.5]), "points[0]"),
    "a negative number of draws": (lambda c: c.traverse(X, LABEL, [0], draws=-1), "draws"),
    "too many draws": (lambda c: c.traverse(X[:1], LABEL, [0], draws=51), "draws"),
    "too many points": (lambda c: c.traverse(X[:1], LABEL, [0] * 51), "points"),
    "a label that is none": (lambda c: c.traverse(X[:1], LABEL, [0], labels=[3]), "labels[0]"),
    "another label": (
        lambda c: c.interpolate(X[:1], X[:1], [0], labels=[0], other_labels=[9]),
        "other_labels[0]",
    ),
    "too hot": (lambda c: c.decode([[0, 0]], labels=[0], temperature=3), "temperature"),
    "a negative index": (lambda c: c.decode([[0, 0]], labels=[0], first_index=-1), "first_index"),
    "features too large": (lambda c: c.decode([[0, 2e4]], labels=[0]), "features"),
    "features that are none": (lambda c: c.decode([[0, np.inf]], labels=[0]), "features"),
    "features of another size": (lambda c: c.decode([[0, 0, 0]], labels=[0]), "features"),
    "features of twice the size": (lambda c: c.decode([[0] * 4], labels=[0]), "features"),
    "no labels to decode under": (lambda c: c.decode([[0, 0]]), "labels"),
    "a level too high": (lambda c: c.traverse(X + LEVELS, LABEL, [0]), "images.data"),
    "another level too high": (lambda c: c.interpolate(X, X + LEVELS, [0]), "others.data"),
    "fewer others": (lambda c: c.interpolate(X, X[:1], [0]), "others"),
    "others of another shape": (
        lambda c: c.interpolate(X[:1], np.zeros((1, 1, 2, 3), np.uint8), [0]),
        "others.shape[2]",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_names_its_field(client: Client, name: str) -> None:
    ask, field = WRONG[name]
    with pytest.raises(InvalidInput) as caught:
        ask(client)
    assert caught.value.field == field


def test_features_alone_are_a_model_too(plain: Toy, running: Running) -> None:
    with running(bundles=(plain.path,)) as live, Client(live.address) as client:
        info = client.model()
        assert info.deterministic and info.latent_dimensions == LATENT
        assert (info.density_kind, info.calibration_size, info.labels) == (None, 0, ())
        assert {method.rpartition("/")[2] for method in info.methods} == {
            "Decode", "Encode", "Interpolate", "Traverse",
        }  # fmt: skip
        assert [(d.name, d.kind) for d in info.directions] == [
            (BRIGHTNESS, "attribute"), (LABEL, "label"),
        ]  # fmt: skip
        features = client.encode(X)
        assert features.log_variance is None and set(features.label) == {-1}
        moved = client.traverse(X, BRIGHTNESS, [0, 1])
        assert moved.deviation is None and moved.spread is None
        expected = plain.answer("decode", {"z": features.mean})["mean"]
        assert moved.mean[:, 0] == pytest.approx(expected, abs=1e-6)
        with pytest.raises(InvalidInput, match=r"^features: shape \(2, 1\); expected \(n, 2\)$"):
            client.decode(features.mean[:1].T)  # as many bytes as one row has
        refused: list[Callable[[], Any]] = [
            lambda: client.score(X),
            lambda: client.classify(X),
            lambda: client.generate(1),
            lambda: client.traverse(X, BRIGHTNESS, [0], draws=1),
        ]
        for ask in refused:
            with pytest.raises(NotAnswered, match="plain"):
                ask()
        with pytest.raises(InvalidInput, match="no label"):
            client.encode(X, labels=Y)
        with pytest.raises(InvalidInput, match="no label") as caught:
            client.interpolate(X, X, [0], other_labels=Y)
        assert caught.value.field == "other_labels[0]"


def test_a_model_without_a_decoder_says_so(make_toy: Callable[..., Toy]) -> None:
    bundle = Bundle.open(make_toy(roles=("density",)).path)
    engine = Engine.load(bundle, device=Device("cpu"), threads=1, max_batch=4)
    try:
        for method in ("Decode", "Traverse", "Interpolate"):
            assert not engine.answers(method)
            with pytest.raises(NotAnswered, match="no decode graph"):
                engine.require(method)
    finally:
        engine.close()


def test_a_model_without_directions_does_not_traverse(toy: Toy, engine: Engine) -> None:
    aimless = Engine.load(Bundle.open(toy.path), device=Device("cpu"), threads=1, max_batch=3)
    try:
        aimless.directions = {}
        assert aimless.answers("Interpolate") and not aimless.answers("Traverse")
        with pytest.raises(NotAnswered, match="no directions"):
            asyncio.run(aimless.traverse(X, BRIGHTNESS, np.zeros(1), Drawing()))
        assert engine.answers("Traverse")
    finally:
        aimless.close()


def test_labels_of_the_second_pictures_are_theirs_alone(engine: Engine) -> None:
    ends, to_none = np.array([0.0, 1.0]), Drawing()
    asked = engine.interpolate(X, X, ends, to_none, label=Y, other_label=(Y + 1) % 3)
    found = asyncio.run(asked).mean
    for at, label in ((0, Y), (1, (Y + 1) % 3)):
        encoded = asyncio.run(engine.encode(X, label))
        assert found[:, at] == pytest.approx(
            asyncio.run(engine.decode(encoded.mean, label, to_none)).mean, abs=1e-6
        )
    assert not np.allclose(found[:, 0], found[:, 1])


def test_features_without_labels_take_none_for_the_second_pictures(plain: Toy) -> None:
    opened = Engine.load(Bundle.open(plain.path), device=Device("cpu"), threads=1, max_batch=3)
    try:
        asked = opened.interpolate(X, X, np.zeros(1), Drawing(), other_label=Y)
        with pytest.raises(InvalidInput) as caught:
            asyncio.run(asked)
        assert caught.value.field == "other_labels"
    finally:
        opened.close()


HARMS: dict[str, dict[str, Array]] = {
    "missing": {"steps": np.array(STEPS), "probes": np.array(PROBES)},
    "of another size": {"steps": np.zeros((2, 3)), "probes": PROBES, "offsets": np.array(OFFSETS)},
    "not finite": {"steps": STEPS, "probes": PROBES, "offsets": np.array([np.nan, 0])},
    "not consistent": {"steps": STEPS, "probes": 2 * PROBES, "offsets": np.array(OFFSETS)},
}


@pytest.mark.parametrize("name", HARMS)
def test_directions_that_are_none_are_refused(toy: Toy, name: str) -> None:
    latent = Bundle.open(toy.path).manifest.latent
    with pytest.raises(BundleError, match=r"latent\.npz") as caught:
        directions(latent, HARMS[name], LATENT)
    assert caught.value.reason == "latent"


def test_commands_write_contact_sheets(live: Live, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    address = ["--address", live.address]
    words = ["traverse", str(tmp_path / "x.npy"), "--direction", BRIGHTNESS, "--draws", "2"]
    ran = CliRunner().invoke(main, [*words, *address, "--out", str(tmp_path / "t.png"), "--json"])
    assert ran.exit_code == 0, ran.output
    assert ran.output.count('"position"') == 4
    with Image.open(tmp_path / "t.png") as sheet:
        # As it is and five points across; of four pictures a mean and two draws each.
        assert sheet.size == (6 * 4 - 1, 12 * 4 - 1)
    words = ["interpolate", str(tmp_path / "x.npy"), str(tmp_path / "x.npy"), "--steps", "3"]
    ran = CliRunner().invoke(main, [*words, *address, "--out", str(tmp_path / "i.npz")])
    assert ran.exit_code == 0, ran.output
    with np.load(tmp_path / "i.npz") as arrays:
        assert arrays["mean"].shape == (4, 3, *SHAPE)
        assert arrays["mean"][:, 0] == pytest.approx(arrays["mean"][:, 2])
