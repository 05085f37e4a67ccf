"""Both clients against a real server."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from likely import (
    AdminClient,
    AsyncClient,
    Client,
    DeadlineExceeded,
    Guarantee,
    InvalidInput,
    LabelRule,
    LikelyError,
    ModelNotFound,
    NotAnswered,
    SettingsError,
    Unavailable,
)
from likely.bundle import Bundle, write_manifest
from likely.client import catalogue, plans
from likely.v1.scoring_pb2 import ScoreRequest

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


SIZED: list[Callable[[Any, Any], Any]] = [
    lambda c, x: c.score(x),
    lambda c, x: c.classify(x),
    lambda c, x: c.encode(x),
    lambda c, x: c.complete(x, True),
    lambda c, x: c.traverse(x, "brightness", [0]),
    lambda c, x: c.interpolate(x, x, [0, 1]),
]


@pytest.mark.parametrize("ask", SIZED)
def test_a_picture_above_the_servers_limit_is_refused_unsent(
    running: Running, x: Any, ask: Callable[[Any, Any], Any]
) -> None:
    large = np.zeros((2, 1, 32, 32), np.uint8)  # 1024 bytes each, without what is asked
    with running(request_bytes=1024) as live, Client(live.address, timeout=30) as client:
        ask(client, x[:2])
        with pytest.raises(InvalidInput, match="the server takes 1024 at a time") as caught:
            ask(client, large)
        assert caught.value.field == "images"

        async def likewise() -> None:
            async with AsyncClient(live.address, timeout=30) as other:
                await ask(other, large)

        with pytest.raises(InvalidInput, match=re.escape(str(caught.value))):
            live.run(likewise())


@pytest.mark.parametrize("ask", SIZED)
def test_a_limit_that_a_picture_exceeded_is_asked_anew(
    client: Client, x: Any, ask: Callable[[Any, Any], Any]
) -> None:
    info = client.model()
    low = replace(info, limits=replace(info.limits, request_bytes=20))
    client._catalogue.store(None, None, low)  # as it once was
    with pytest.raises(InvalidInput, match="the server takes 20 at a time"):
        ask(client, x[:2])
    ask(client, x[:2])


def test_bytes_of_maps_divide_inputs_too(running: Running, toy: Toy, x: Any) -> None:
    with running(response_bytes=1024) as live, Client(live.address) as client:
        found = client.score(x[:60], surprise=True).surprise
        assert found is not None and np.allclose(found, toy.surprise(x[:60]), atol=1e-4)
        assert len(client.score(x[:60]).log_px) == 60
        asked = [n for n in live.log.getvalue().splitlines() if '"Score"' in n]
    assert len(asked) == 3 + 1  # 28 maps of 36 bytes fit into 1024


def test_a_level_that_is_none_is_told_of_its_own_picture(client: Client, x: Any) -> None:
    wrong = x.copy()
    wrong[231, 0, 1, 2] = 9
    asks: list[tuple[str, Callable[[], Any]]] = [
        ("images", lambda: client.score(wrong)),
        ("images", lambda: client.classify(wrong)),
        ("images", lambda: client.encode(wrong)),
        ("images", lambda: client.traverse(wrong, "brightness", [0])),
        ("others", lambda: client.interpolate(x, wrong, [0, 1])),
    ]
    for field, ask in asks:
        with pytest.raises(InvalidInput) as caught:
            ask()
        assert caught.value.field == f"{field}.data"
        assert caught.value.description == (
            "level 9 at picture 231, channel 0, row 1, column 2 is not in [0, 4)"
        )


def test_levels_of_a_newer_version_are_asked_about(client: Client, x: Any) -> None:
    client._catalogue.store(None, None, replace(client.model(), levels=2))  # as it once was
    assert len(client.score(x).log_px) == len(x)
    assert client.model().levels == 4


def test_features_of_a_newer_version_are_asked_about(client: Client) -> None:
    client._catalogue.store(None, None, replace(client.model(), latent_dimensions=5))
    assert len(client.decode(np.zeros((1, 2)), labels=[0]).mean) == 1
    assert client.model().latent_dimensions == 2


def test_no_pictures_get_empty_arrays(client: Client) -> None:
    nothing = np.zeros((0, 1, 3, 3), dtype=np.uint8)
    assert client.score(nothing).log_px.shape == (0,)
    assert client.classify(nothing).posterior.shape == (0, 3)
    assert client.encode(nothing).mean.shape == (0, 2)
    completed = client.complete(nothing, True, completions=2, seed=5)
    assert (completed.images.shape, completed.seed) == ((0, 2, 1, 3, 3), 5)


def test_pictures_of_one_channel_need_no_channel_axis(client: Client, x: Any) -> None:
    assert np.array_equal(client.score(x[:5, 0]).log_px, client.score(x[:5]).log_px)
    assert np.array_equal(client.score(x[:5].astype(int)).log_px, client.score(x[:5]).log_px)


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (np.zeros((3, 3), np.uint8), r"shape \(3, 3\)"),
        (np.zeros((1, 1, 3, 3)), "float64; .*: multiply by the top level and round"),
        ([[1, 2], [3]], "not to be read as an array"),
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


def test_proposals_divide_what_is_completed(client: Client, x: Any) -> None:
    known = np.zeros((3, 3), bool)
    known[2] = True  # what follows open pixels
    found = client.complete(x[:30], known, completions=2, proposals=4, seed=3)  # 50 at once
    assert found.images.shape == (30, 2, 1, 3, 3)
    alone = client.complete(x[20:21], known, completions=2, proposals=4, seed=3, first_index=20)
    assert np.array_equal(found.images[20:21], alone.images)


@pytest.mark.parametrize(
    ("channels", "shape", "first"),
    [
        (3, (3, 4, 4), (slice(None), 0)),  # (c, h, w)
        (3, (4, 4), (slice(None), slice(None), 0)),
        (3, (3, 1, 4, 4), (0,)),
        (1, (3, 4, 4), (0,)),  # (n, h, w)
        (1, (1, 4, 4), (slice(None),)),
    ],
)
def test_a_mask_broadcasts_to_the_pictures(
    client: Client, channels: int, shape: tuple[int, ...], first: Any
) -> None:
    x = np.zeros((3, channels, 4, 4), np.uint8)
    mask = np.zeros(shape, bool)
    mask[0] = True
    expected = np.zeros_like(x)
    expected[first] = 1
    (request,) = plans.complete_requests(client.model(), None, x, mask, None, 1, 1, 0, None, 1)
    assert np.array_equal(np.frombuffer(request.mask, np.uint8).reshape(x.shape), expected)


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
        with Client(address, timeout=30) as client, pytest.raises(Unavailable) as caught:
            client.models()
    assert str(caught.value).startswith(
        f"no likely server answers at {address}; `likely serve` starts one. gRPC says: failed to"
    )


@pytest.mark.parametrize(
    ("kind", "start"), [(Client, "serve"), (AdminClient, "serve --admin-port")]
)
def test_who_does_not_answer_in_time_is_named(kind: Any, start: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with kind(address, timeout=0.3) as client, pytest.raises(DeadlineExceeded) as caught:
            client.models() if kind is Client else client.versions()
    words = f"a likely server at {address} had answered; where none runs, `likely {start}"
    assert words in str(caught.value)


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf"), 1e300, 10**30, "5", None])
def test_time_that_is_none_is_refused(timeout: Any) -> None:
    for kind in (Client, AsyncClient, AdminClient):
        with pytest.raises(
            SettingsError, match="it should be seconds above 0, at most 1,000,000,000"
        ):
            kind(timeout=timeout)


def test_a_very_long_time_is_one(live: Live, x: Any) -> None:
    with Client(live.address, timeout=1e9) as client:
        assert len(client.score(x[:1]).log_px) == 1


def test_a_closed_client_says_so(live: Live, x: Any) -> None:
    client = Client(live.address)
    client.score(x[:1])
    client.close()
    client.close()
    for ask in (lambda: client.score(x[:1]), lambda: list(client.score_stream(x[:1, None]))):
        with pytest.raises(LikelyError, match="this client is closed"):
            ask()


def test_a_client_that_is_closed_as_a_call_begins_says_so(
    live: Live, x: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(live.address)
    client.score(x)
    rpc = client._rpcs._rpc

    def closing(kind: Any) -> Any:
        found = rpc(kind)
        client.close()
        return found

    monkeypatch.setattr(client._rpcs, "_rpc", closing)
    with pytest.raises(LikelyError, match="this client is closed"):
        client.score(x)


def test_what_is_asked_of_a_client_that_is_closed_meanwhile_fails(
    live: Live, x: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask() -> None:
        asked = asyncio.Event()

        async def stuck(*_: Any, **__: Any) -> None:
            asked.set()
            await asyncio.sleep(30)

        monkeypatch.setattr(live.server.registry.find("toy"), "score", stuck)
        for cancels in (False, True):
            asked.clear()
            client = AsyncClient(live.address, timeout=20)
            asking = asyncio.create_task(client.score(x[:1]))
            await asyncio.wait_for(asked.wait(), 10)
            if cancels:
                asking.cancel()
            await client.close()
            expected = asyncio.CancelledError if cancels else LikelyError
            with pytest.raises(expected, match=None if cancels else "closed before all"):
                await asking

    live.run(ask())


def test_what_is_asked_of_a_client_that_another_thread_closes_fails(
    live: Live, x: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = threading.Event()

    async def stuck(*_: Any, **__: Any) -> None:
        asked.set()
        await asyncio.sleep(30)

    async def stuck_chunks(*_: Any, **__: Any) -> AsyncIterator[Any]:
        await stuck()
        yield

    engine = live.server.registry.find("toy")
    monkeypatch.setattr(engine, "score", stuck)
    for name in ("generate", "complete"):
        monkeypatch.setattr(engine, name, stuck_chunks)
    asks: list[Callable[[Client], Any]] = [
        lambda client: client.score(x[:1]),
        lambda client: client.generate(1),
        lambda client: client.complete(x[:1], True),
        lambda client: list(client.score_stream([x[:1]])),
    ]
    for ask in asks:
        asked.clear()
        client = Client(live.address, timeout=20)
        with ThreadPoolExecutor(1) as threads:
            asking = threads.submit(ask, client)
            assert asked.wait(10)
            client.close()
            with pytest.raises(LikelyError, match="this client was closed before all") as caught:
                asking.result(10)
        assert type(caught.value) is LikelyError


CALLS: list[tuple[str, Callable[[Any, Any], Any]]] = [
    ("rule", lambda c, x: c.classify(x, rule="other")),
    ("rule", lambda c, x: c.classify(x, rule=7)),
    ("guarantee", lambda c, x: c.score(x, guarantee="pca")),
    ("guarantee", lambda c, x: c.score(x, guarantee=None)),
    ("alpha", lambda c, x: c.score(x, alpha="0.1")),
    ("model_name", lambda c, x: c.score(x, model=5)),
    ("min_posterior", lambda c, x: c.classify(x, min_posterior="high")),
    ("priors", lambda c, x: c.classify(x, priors="even")),
    ("count", lambda c, x: c.generate(2.5)),
    ("count", lambda c, x: c.generate("2")),
    ("first_index", lambda c, x: c.generate(1, first_index=0.5)),
    ("seed", lambda c, x: c.generate(1, seed=1 << 63)),
    ("seed", lambda c, x: c.generate(1, seed="7")),
    ("label", lambda c, x: c.generate(1, label=1.5)),
    ("label", lambda c, x: c.generate(1, label="sneaker")),
    ("label", lambda c, x: c.generate(1, label="--1")),
    ("label", lambda c, x: c.generate(1, label="9" * 5000)),
    ("label", lambda c, x: c.generate(1, label=1 << 20_000)),
    ("label", lambda c, x: c.complete(x, True, label=True)),
    ("labels", lambda c, x: c.encode(x, labels=["label-1", "9" * 20])),
    ("labels", lambda c, x: c.encode(x, labels=["label-1", "9" * 5000])),
    ("max_draws", lambda c, x: c.generate(1, self_check=True, max_draws=2.5)),
    ("alpha", lambda c, x: c.generate(1, alpha=0.1)),
    ("alpha", lambda c, x: c.generate(1, acceptance=True, alpha=0.1)),
    ("max_draws", lambda c, x: c.generate(1, max_draws=0)),
    ("completions", lambda c, x: c.complete(x, np.ones((3, 3), bool), completions="2")),
    ("proposals", lambda c, x: c.complete(x, np.ones((3, 3), bool), proposals="2")),
    ("labels", lambda c, x: c.encode(x, labels=["label-1", "other"])),
    ("draws", lambda c, x: c.decode(np.zeros((1, 2)), draws=1.5)),
]


@pytest.mark.parametrize(("field", "ask"), CALLS)
def test_a_value_that_cannot_be_sent_is_named(
    client: Client, live: Live, x: Any, field: str, ask: Callable[[Any, Any], Any]
) -> None:
    with pytest.raises(InvalidInput) as caught:
        ask(client, x[:2])
    assert caught.value.field == field

    async def likewise() -> None:
        async with AsyncClient(live.address) as other:
            await ask(other, x[:2])

    with pytest.raises(InvalidInput, match=re.escape(str(caught.value))):
        asyncio.run(likewise())


def test_a_seed_is_held_to_its_range(client: Client) -> None:
    with pytest.raises(InvalidInput, match=r"^seed: 9+ is not in \[-2\*\*63, 2\*\*63\)$"):
        client.generate(1, seed=int("9" * 23))


def test_a_bool_is_no_number(client: Client) -> None:
    with pytest.raises(InvalidInput, match=r"^label: True is a bool, which is no label$"):
        client.generate(1, label=True)
    with pytest.raises(InvalidInput, match=r"^seed: True cannot be sent: "):
        client.generate(1, seed=True)


def test_choices_may_be_given_by_name(client: Client, x: Any) -> None:
    by_name = client.classify(x[:5], rule="discriminative", guarantee="pac")
    by_member = client.classify(x[:5], rule=LabelRule.DISCRIMINATIVE, guarantee=Guarantee.PAC)
    assert by_name.rule is LabelRule.DISCRIMINATIVE
    assert np.array_equal(by_name.posterior, by_member.posterior)
    assert np.array_equal(
        client.score(x, guarantee="pac").p_value, client.score(x, guarantee=Guarantee.PAC).p_value
    )


def test_labels_may_be_given_by_name(client: Client, x: Any) -> None:
    for label in ("label-2", "2"):
        drawn = client.generate(4, label=label, seed=1)
        assert np.array_equal(drawn.images, client.generate(4, label=2, seed=1).images)
    by_name = client.encode(x[:2], labels=["label-2", "label-0"])
    assert by_name.label.tolist() == [2, 0]
    with pytest.raises(InvalidInput, match="'seven' is none of label-0, label-1, label-2"):
        client.generate(1, label="seven")


@pytest.fixture(scope="module")
def renamed(make_toy: Callable[..., Toy]) -> Toy:
    """A newer version with the labels in another order, one renamed."""
    newer = make_toy("toy", "1.1")
    manifest = Bundle.open(newer.path).manifest.model_dump(mode="json", exclude={"files"})
    for label, name in zip(manifest["labels"], ("label-2", "new", "label-0"), strict=True):
        label["name"] = name
    write_manifest(newer.path, manifest)
    return newer


OPEN = np.zeros((3, 3), bool)
NAMED: list[tuple[Callable[[Any, Any, Any], Any], str, int]] = [
    (lambda c, x, label: c.generate(60, label=label, seed=1), "label-0", 2),
    (lambda c, x, label: c.generate(1, label=label, seed=1), "new", 1),
    (lambda c, x, label: c.complete(x, OPEN, label=label, seed=1), "label-0", 2),
    (lambda c, x, label: c.encode(x, labels=[label] * len(x)), "label-0", 2),
    (lambda c, x, label: c.encode(x, labels=[label] * len(x)), "new", 1),
    (lambda c, x, label: c.decode(np.eye(2), labels=[label] * 2, draws=2, seed=1), "label-0", 2),
    (lambda c, x, label: c.traverse(x, "brightness", [0], labels=[label] * len(x)), "label-0", 2),
    (
        lambda c, x, label: c.interpolate(x, x, [0], labels=[label] * len(x), seed=1),
        "label-0",
        2,
    ),
    (
        lambda c, x, label: c.interpolate(x, x, [0], other_labels=[label] * len(x), seed=1),
        "label-0",
        2,
    ),
]


def test_a_labels_name_is_that_of_the_version_that_answers(
    running: Running, renamed: Toy, x: Any
) -> None:
    """After a rollout too, with the description of the version before it."""
    with running() as live, Client(live.address, timeout=30) as current:
        clients = [Client(live.address, timeout=30) for _ in NAMED]
        assert {client.model().version for client in clients} == {"1.0"}

        async def roll_out() -> list[Any]:
            others = [AsyncClient(live.address, timeout=30) for _ in NAMED]
            assert {(await other.model()).version for other in others} == {"1.0"}
            await live.server.lifecycle.load(renamed.path)
            asked = zip(others, NAMED, strict=True)
            found = [await ask(other, x[:120], name) for other, (ask, name, _) in asked]
            await asyncio.gather(*(other.close() for other in others))
            return found

        found = live.run(roll_out())
        for client, other, (ask, name, index) in zip(clients, found, NAMED, strict=True):
            expected = ask(current, x[:120], index)
            with client:
                for answer in (other, ask(client, x[:120], name)):
                    assert answer.model_version == expected.model_version == "1.1"
                    for column in ("images", "label", "mean"):
                        if hasattr(answer, column):
                            same = getattr(answer, column) == getattr(expected, column)
                            assert np.all(same), (ask, name)


def test_versions_that_answer_in_turn_answer_by_name_too(
    running: Running, renamed: Toy, x: Any
) -> None:
    labels = ["label-0"] * 3
    with (
        running() as older,
        running(bundles=(renamed.path,)) as newer,
        Client([older.address, newer.address], timeout=30) as client,
    ):
        versions = set[str]()
        while len(versions) < 2:
            found = client.encode(x[:3], labels=labels)
            versions.add(found.model_version)
            assert found.label.tolist() == [0 if found.model_version == "1.0" else 2] * 3


DIVIDED: list[Callable[[Any, Any, str | None], Any]] = [
    lambda c, x, version: c.score(x, version=version),
    lambda c, x, version: c.classify(x, version=version),
    lambda c, x, version: c.encode(x, version=version),
    lambda c, x, version: c.decode(np.zeros((120, 2)), labels=[0] * 120, version=version),
    lambda c, x, version: c.traverse(x, "brightness", [0], version=version),
    lambda c, x, version: c.generate(120, version=version),
    lambda c, x, version: c.complete(x[:120], OPEN, version=version),
    lambda c, x, version: c.model("toy", version),
]


def test_a_version_is_found_where_only_some_replicas_have_it(
    running: Running, renamed: Toy, x: Any
) -> None:
    async def ask(addresses: list[str]) -> None:
        async with AsyncClient(addresses, timeout=30) as client:
            while {(await client.score(x[:1])).model_version for _ in range(2)} != versions:
                pass
            for each in DIVIDED:
                for version in (None, "1.0", "1.1"):
                    await each(client, x, version)
            with pytest.raises(ModelNotFound):
                await client.score(x, version="77")

    versions = {"1.0", "1.1"}
    with running() as older, running(bundles=(renamed.path,)) as newer:
        addresses = [older.address, newer.address]
        with Client(addresses, timeout=30, retries=False) as client:  # not about what is not found
            while {client.score(x[:1]).model_version for _ in range(2)} != versions:
                pass
            for each in DIVIDED:
                for version in (None, "1.0", "1.1"):
                    found = each(client, x, version)
                    if version and each is not DIVIDED[-1]:
                        assert found.model_version == version
            for each in DIVIDED:
                with pytest.raises(ModelNotFound):
                    each(client, x, "77")
        older.run(ask(addresses))


def test_a_question_whose_version_goes_away_is_put_anew(
    client: Client, x: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, losses, ask = list[str](), 1, client._ask
    client.model()

    def losing(request: Any, timeout: float) -> Any:
        if isinstance(request, ScoreRequest):
            asked.append(request.model_version)
            if request.model_version and asked.count("") <= losses:
                raise ModelNotFound("toy@1.0", "gone")
        return ask(request, timeout)

    monkeypatch.setattr(client, "_ask", losing)
    assert len(client.score(x).log_px) == len(x)
    assert asked == ["", "1.0", "", "1.0", "1.0"]
    asked.clear()
    losses = catalogue.MAX_ROUNDS
    with pytest.raises(ModelNotFound):
        client.score(x)
    assert asked == ["", "1.0"] * catalogue.MAX_ROUNDS


def test_a_labels_name_that_never_holds_is_told_in_the_end(client: Client, x: Any) -> None:
    info, versions = client.model(), count()

    class Restless(catalogue.Catalogue):
        """Describes another version each time."""

        def model(self, name: str | None, version: str | None) -> catalogue.Plan[Any]:
            return replace(info, version=f"0.{next(versions)}")
            yield

    with pytest.raises(Unavailable, match="number the labels differently"):
        plan = plans.encode(Restless(), x[:1], ["label-0"], None, None)
        client._follow(plan)


def test_what_a_refused_question_went_by_is_asked_anew(
    running: Running, renamed: Toy, x: Any
) -> None:
    with running() as live, Client(live.address, timeout=30) as client:
        assert client.model().version == "1.0"
        live.run(live.server.lifecycle.load(renamed.path))
        assert client.model().version == "1.0"
        with pytest.raises(InvalidInput):
            client.generate(1, label=7)
        assert client.model().version == "1.1"


def test_a_deadline_ends_the_wait(client: Client, live: Live, monkeypatch: Any, x: Any) -> None:
    async def stuck(*_: Any, **__: Any) -> None:
        await asyncio.sleep(30)

    client.model()
    monkeypatch.setattr(live.server.registry.find("toy"), "score", stuck)
    monkeypatch.setattr(client, "_timeout", 0.05)
    with pytest.raises(DeadlineExceeded):
        client.score(x[:1])


def test_an_answer_that_stops_midway_is_late_in_the_same_words(
    client: Client, live: Live, monkeypatch: Any, x: Any
) -> None:
    engine = live.server.registry.find("toy")
    whole = engine.complete

    async def halting(*args: Any, **how: Any) -> AsyncIterator[Any]:
        async for chunk in whole(*args, **how):
            yield chunk
            await asyncio.sleep(30)

    async def ask() -> None:
        async with AsyncClient(live.address) as other:
            await other.model()
            monkeypatch.setattr(other, "_timeout", 1.0)
            await other.complete(x[:20], True)

    client.model()
    monkeypatch.setattr(engine, "complete", halting)
    monkeypatch.setattr(client, "_timeout", 1.0)
    words = f"the timeout ended before a likely server at {live.address} had answered"
    with pytest.raises(DeadlineExceeded, match=words):
        client.complete(x[:20], True)
    with pytest.raises(DeadlineExceeded, match=words):
        live.run(ask())


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
