"""Drawing in part and drawing again: completion, its distribution, and the self-check."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

from likely import Client, InvalidInput
from likely.answers import Draws, SelfCheck
from likely.bundle import Bundle, Role
from likely.engine import Engine
from likely.generation import _draw_ahead
from likely.graphs import Device
from likely.v1 import generation_pb2, generation_pb2_grpc, images_pb2

if TYPE_CHECKING:
    from tests.conftest import Live, Toy

LEVELS, SHAPE = 4, (1, 3, 3)


@pytest.fixture(scope="module")
def engine(toy: Toy) -> Iterator[Engine]:
    made = Engine.load(Bundle.open(toy.path), device=Device("cpu"), threads=1, max_batch=16)
    yield made
    made.close()


@pytest.fixture
def client(live: Live) -> Iterator[Client]:
    with Client(live.address) as connected:
        yield connected


def drawn(stream: AsyncIterator[Draws]) -> list[Draws]:
    async def read() -> list[Draws]:
        return [chunk async for chunk in stream]

    return asyncio.run(read())


def pictures(n: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, LEVELS, (n, *SHAPE)).astype(np.uint8)


def test_fixed_pixels_come_back_unchanged(client: Client) -> None:
    x, mask = pictures(7), np.random.default_rng(1).random((7, *SHAPE)) < 0.5
    answer = client.complete(x, mask, completions=5, seed=3)
    assert answer.images.shape == (7, 5, *SHAPE)
    where = np.broadcast_to(mask[:, None], answer.images.shape)
    assert np.array_equal(answer.images[where], np.broadcast_to(x[:, None], where.shape)[where])
    assert len(np.unique(answer.images[~where])) == LEVELS


def test_open_levels_do_not_matter(client: Client) -> None:
    x, mask = pictures(4), np.arange(3)[:, None] < 2
    other = np.where(np.broadcast_to(mask, x.shape), x, 255)
    again = client.complete(other, mask, completions=2, seed=8)
    assert np.array_equal(client.complete(x, mask, completions=2, seed=8).images, again.images)


def test_completions_do_not_depend_on_their_number_or_division(client: Client) -> None:
    x, mask = pictures(6), np.arange(3)[:, None] < 1
    whole = client.complete(x, mask, completions=4, seed=5).images
    assert np.array_equal(client.complete(x, mask, completions=2, seed=5).images, whole[:, :2])
    tail = client.complete(x[4:], mask, completions=4, seed=5, first_index=4)
    assert np.array_equal(tail.images, whole[4:])
    large = np.repeat(x, 12, 0)  # above the 50 pictures that the server draws a request
    assert client.complete(large, mask, seed=5).images.shape == (72, 1, *SHAPE)


@pytest.mark.parametrize("label", [None, 1])
def test_completions_follow_the_model(engine: Engine, toy: Toy, label: int | None) -> None:
    x, known = pictures(1), np.zeros((1, *SHAPE), dtype=np.bool_)
    known[..., :2, :] = True
    n = 4000
    rows = np.concatenate(
        [chunk.images for chunk in drawn(engine.complete(x, known, label, n, 7, chunk=500))]
    )
    table = np.exp(toy.log_tables[-1 if label is None else label])
    for column in range(3):
        share = np.bincount(rows[:, 0, 2, column], minlength=LEVELS) / n
        assert share == pytest.approx(table[0, 2, column], abs=4 * np.sqrt(0.25 / n))


def test_proposals_keep_fixed_pixels(client: Client) -> None:
    x, mask = pictures(3), np.arange(3)[:, None] != 1
    answer = client.complete(x, mask, completions=3, proposals=4, seed=1)
    assert np.array_equal(answer.images[..., 0, :], np.repeat(x[:, None], 3, 1)[..., 0, :])
    with pytest.raises(InvalidInput, match="proposals"):
        client.complete(x, mask, proposals=4, label=1)


def test_no_pictures_have_no_completions(client: Client) -> None:
    assert client.complete(pictures(0), np.ones(SHAPE), completions=3).images.shape == (
        0,
        3,
        *SHAPE,
    )


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("mask", {"mask": b"\1"}),
        ("mask", {"mask": b"\2" * 9}),
        ("completions", {"completions": 0}),
        ("completions", {"completions": 1000}),
        ("proposals", {"proposals": 257}),
        ("temperature", {"temperature": float("nan")}),
        ("label", {"label": 3}),
        ("first_index", {"first_index": -1}),
        ("images.data", {"mask": b"\1" * 9, "images": b"\xff" * 9}),
        ("images.data", {"images": b""}),
        ("images.shape", {"shape": ()}),
        ("images.shape[1]", {"shape": (0, 2**62, 2**62, 8), "images": b"", "mask": b""}),
        ("proposals", {"proposals": 8, "completions": 10}),
        ("proposals", {"proposals": 2, "temperature": 0.5}),
    ],
)
def test_bad_completions_are_refused(live: Live, field: str, change: dict[str, Any]) -> None:
    given = {"images": bytes(9), "shape": (1, *SHAPE), "mask": bytes(9), **change}
    images = images_pb2.Images(data=given.pop("images"), shape=given.pop("shape"))
    request = generation_pb2.CompleteRequest(model_name="toy", images=images, **given)
    with grpc.insecure_channel(live.address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Complete(request))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert str(caught.value.details()).startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("label", "takes_label", "role"),
    [
        (None, True, Role.SAMPLE),
        (None, False, Role.SAMPLE),
        (1, True, Role.SAMPLE),
        (1, False, Role.GENERATE),
    ],
)
def test_p_x_draws_unless_a_label_is_asked_that_it_does_not_take(
    engine: Engine, monkeypatch: Any, label: int | None, takes_label: bool, role: Role
) -> None:
    asked: list[Role] = []

    async def run_all(ask: Any) -> Any:
        asked.append(ask.role)
        return [{"x": np.zeros((ask.rows, *SHAPE), np.uint8)}]

    monkeypatch.setattr(engine._lanes, "run_all", run_all)
    takes = {Role.SAMPLE: takes_label, Role.GENERATE: True}
    monkeypatch.setattr(engine._generator, "_takes_label", takes.__getitem__)
    drawn(engine.generate(label, 2, 0, chunk=2))
    assert asked == [role]


def test_who_leaves_a_stream_stops_the_chunk_that_is_drawn_ahead() -> None:
    ended: list[tuple[int, bool]] = []

    async def draw(start: int, stop: int) -> Any:
        cancelled = True
        try:
            if start:
                await asyncio.Event().wait()
            cancelled = False
        finally:
            ended.append((start, cancelled))
        return range(start, stop)

    async def leave() -> None:
        async with asyncio.timeout(10):
            chunks = _draw_ahead(draw, 6, 3)
            first: Any = await anext(chunks)
            assert first == range(3)
            await asyncio.sleep(0)  # the next chunk begins
            await chunks.aclose()
        assert ended == [(0, False), (3, True)]

    asyncio.run(leave())


def test_self_check_redraws_what_the_server_would_reject(engine: Engine) -> None:
    check = SelfCheck(0.3, 50)
    plain = drawn(engine.generate(None, 60, 11, chunk=60))[0]
    checked = drawn(engine.generate(None, 60, 11, chunk=60, check=check))[0]
    assert np.all(plain.draws == 1) and np.all(plain.accepted)
    assert np.all(checked.accepted) and checked.draws.max() > 1
    once = checked.draws == 1
    assert np.array_equal(checked.images[once], plain.images[once])
    answer = asyncio.run(engine.classify(checked.images, 0.3))
    assert np.all(answer.p_value > 0.3)
    assert np.array_equal(answer.label, checked.label)


def test_self_check_gives_up_at_its_limit(engine: Engine) -> None:
    checked = drawn(engine.generate(2, 30, 4, chunk=30, check=SelfCheck(0.9, 2)))[0]
    assert checked.draws.max() == 2
    assert not np.all(checked.accepted)
    assert np.all(checked.draws[~checked.accepted] == 2)


def test_self_checked_draws_do_not_depend_on_the_chunk(client: Client) -> None:
    whole = client.generate(20, seed=3, self_check=True, alpha=0.2)
    tail = client.generate(9, seed=3, first_index=11, self_check=True, alpha=0.2)
    assert np.array_equal(whole.images[11:], tail.images)
    assert np.array_equal(whole.draws[11:], tail.draws)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("self_check.alpha", {"alpha": 0.0}),
        ("self_check.alpha", {"alpha": float("nan")}),
        ("self_check.max_draws", {"max_draws": 0}),
        ("self_check.max_draws", {"max_draws": 101}),
    ],
)
def test_bad_self_checks_are_refused(client: Client, field: str, change: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as caught:
        client.generate(2, self_check=True, **change)
    assert caught.value.field == field
