"""Both clients against a real server."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from likely import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    InvalidInput,
    ModelNotFound,
    NotAnswered,
    Unavailable,
)
from likely.client import plans

if TYPE_CHECKING:
    from tests.conftest import Live, Running, Toy


@pytest.fixture
def client(live: Live) -> Iterator[Client]:
    with Client(live.address, timeout=30) as client:
        yield client


@pytest.fixture
def x(toy: Toy) -> Any:
    return toy.draw(np.random.default_rng(4), 250)


def test_large_inputs_are_divided_and_joined(client: Client, toy: Toy, x: Any) -> None:
    scores = client.score(x, surprise=True)
    assert np.allclose(scores.log_px, toy.log_px(x), atol=1e-4)
    assert scores.surprise is not None
    assert scores.surprise.shape == x.shape
    assert len(client.classify(x).label) == len(x)
    labels = np.arange(len(x)) % 3
    assert np.array_equal(client.encode(x, labels=labels).mean[:, 1], labels)


def test_bytes_divide_inputs_too(running: Running, toy: Toy, x: Any) -> None:
    with running(request_bytes=plans.OVERHEAD_BYTES + 100) as live, Client(live.address) as client:
        assert np.allclose(client.score(x[:30]).log_px, toy.log_px(x[:30]), atol=1e-4)
        sizes = [n for n in live.log.getvalue().splitlines() if '"Score"' in n]
    assert len(sizes) == 3  # 11 pictures of 9 bytes fit into 100


def test_no_pictures_get_empty_arrays(client: Client) -> None:
    nothing = np.zeros((0, 1, 3, 3), dtype=np.uint8)
    assert client.score(nothing).log_px.shape == (0,)
    assert client.classify(nothing).posterior.shape == (0, 3)
    assert client.encode(nothing).mean.shape == (0, 2)


def test_pictures_of_one_channel_need_no_channel_axis(client: Client, x: Any) -> None:
    assert np.array_equal(client.score(x[:5, 0]).log_px, client.score(x[:5]).log_px)
    assert np.array_equal(client.score(x[:5].astype(int)).log_px, client.score(x[:5]).log_px)


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (np.zeros((3, 3), np.uint8), r"shape \(3, 3\)"),
        (np.zeros((1, 1, 3, 3)), "float64"),
        (np.full((1, 3, 3), 256), "256"),
        (np.full((1, 3, 3), -1), "-1"),
        (np.zeros((1, 1, 4, 3), np.uint8), "4 rows; the model takes 3"),
        (np.full((1, 3, 3), 4, np.uint8), "level 4 at picture 0"),
    ],
)
def test_arrays_that_are_no_pictures_are_refused(
    client: Client, images: Any, sentence: str
) -> None:
    with pytest.raises(InvalidInput, match=sentence) as caught:
        client.score(images)
    assert caught.value.field.startswith("images")


def test_drawing_is_divided_and_joined(client: Client) -> None:
    drawn = client.generate(120, label=1, seed=5, first_index=7)  # the server draws 50 at once
    assert drawn.images.shape == (120, 1, 3, 3)
    assert (drawn.first_index, drawn.seed) == (7, 5)
    chunks = list(client.generate_stream(120, label=1, seed=5, first_index=7))
    assert len(chunks) == 17
    assert np.array_equal(np.concatenate([chunk.images for chunk in chunks]), drawn.images)


def test_a_seed_that_the_server_picked_holds_for_all_parts(client: Client) -> None:
    drawn = client.generate(60)
    assert np.array_equal(client.generate(60, seed=drawn.seed).images, drawn.images)


def test_a_stream_may_be_left(client: Client) -> None:
    stream = client.generate_stream(50)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert client.generate(1).images.shape == (1, 1, 3, 3)


def test_errors_are_typed(client: Client, x: Any) -> None:
    with pytest.raises(InvalidInput) as invalid:
        client.score(x, alpha=1e-9)
    assert invalid.value.field == "alpha"
    with pytest.raises(InvalidInput) as invalid:
        client.generate(0)
    assert invalid.value.field == "count"
    with pytest.raises(ModelNotFound) as missing:
        client.score(x, model="other")
    assert missing.value.resource == "other"
    with pytest.raises(ModelNotFound):
        client.model("toy", "77")


def test_an_unreachable_server_is_unavailable() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with Client(address, timeout=30) as client, pytest.raises(Unavailable):
            client.models()


def test_a_deadline_ends_the_wait(client: Client, live: Live, monkeypatch: Any, x: Any) -> None:
    async def stuck(*_: Any, **__: Any) -> None:
        await asyncio.sleep(30)

    client.model()
    monkeypatch.setattr(live.server.registry.find("toy"), "score", stuck)
    monkeypatch.setattr(client, "_timeout", 0.05)
    with pytest.raises(DeadlineExceeded):
        client.score(x[:1])


def test_of_several_models_one_must_be_named(
    running: Running, toy: Toy, make_toy: Callable[..., Toy], x: Any
) -> None:
    bare, newer = make_toy("bare", roles=("density",)), make_toy("toy", "1.10")
    with running(bundles=(toy.path, bare.path, newer.path)) as live, Client(live.address) as client:
        with pytest.raises(InvalidInput, match="name one of bare, toy"):
            client.score(x)
        assert client.score(x, model="toy").model_version == "1.10"
        assert client.score(x, model="toy", version="1.0").model_version == "1.0"
        named = [(info.name, info.version) for info in client.models()]
        assert named == [("bare", "1.0"), ("toy", "1.0"), ("toy", "1.10")]
        with pytest.raises(NotAnswered, match="bare has no conditional graph"):
            client.classify(x, model="bare")


def test_the_asynchronous_client_gives_the_same(live: Live, client: Client, x: Any) -> None:
    scores, drawn = client.score(x), client.generate(60, seed=2)
    listed, described = client.models(), client.model()

    async def ask() -> None:
        async with AsyncClient(live.address, timeout=30) as other:
            assert np.array_equal((await other.score(x)).p_value, scores.p_value)
            assert len((await other.classify(x, priors=[0.1, 0.1, 0.8])).label) == len(x)
            assert (await other.encode(x)).mean.shape == (len(x), 2)
            assert await other.models() == listed
            assert await other.model() == described
            assert np.array_equal((await other.generate(60, seed=2)).images, drawn.images)
            stream = other.generate_stream(10)
            assert (await anext(stream)).images.shape == (8, 1, 3, 3)
            with pytest.raises(ModelNotFound):
                await other.score(x, model="other")
            with pytest.raises(InvalidInput, match="count"):
                await other.generate(-1)

    live.run(ask())
