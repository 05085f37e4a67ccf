"""Bayes' rule in either direction: composed likelihoods, both rules, and drawing by acceptance."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from likely import Client, InvalidInput, LabelRule, NotAnswered, bayes, codec, noise
from likely.answers import Acceptance, Draws, Pixels, Verdict
from likely.bundle import Bundle
from likely.engine import Engine
from likely.generation import Generator
from likely.graphs import Device
from likely.serving import merging
from likely.v1 import scoring_pb2

if TYPE_CHECKING:
    from tests.conftest import Live, Running, Toy

LEVELS, SHAPE, LABELS = 4, (1, 3, 3), 3
PRIORS = np.array([0.5, 0.3, 0.2])
RULE = LabelRule.DISCRIMINATIVE


def loaded(toy: Toy, max_batch: int) -> Engine:
    return Engine.load(Bundle.open(toy.path), device=Device("cpu"), threads=1, max_batch=max_batch)


@pytest.fixture(scope="module")
def engine(toy: Toy) -> Iterator[Engine]:
    made = loaded(toy, 1024)
    yield made
    made.close()


@pytest.fixture
def client(live: Live) -> Iterator[Client]:
    with Client(live.address) as connected:
        yield connected


def drawn(engine: Engine, label: int | None, count: int, most: int = 1000, **more: Any) -> Draws:
    async def read(stream: AsyncIterator[Draws]) -> list[Draws]:
        return [chunk async for chunk in stream]

    more = {"chunk": count, **more}
    (one,) = asyncio.run(
        read(engine.generate(label, count, 7, acceptance=Acceptance(most), **more))
    )
    return one


def pictures(n: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, LEVELS, (n, *SHAPE)).astype(np.uint8)


@given(
    joint=hnp.arrays(np.float64, (6, LABELS), elements=st.floats(1e-6, 1.0)),
    priors=hnp.arrays(np.float64, LABELS, elements=st.floats(1e-3, 1.0)),
)
def test_bayes_rule_turned_round_and_back_is_itself(joint: Any, priors: Any) -> None:
    p_xy, expected = joint / joint.sum(), priors / priors.sum()
    p_x, p_y = p_xy.sum(1), p_xy.sum(0)
    composed = bayes.composed(np.log(p_xy / p_x[:, None]), np.log(p_x), p_y)
    assert np.exp(composed) == pytest.approx(p_xy / p_y)
    assert bayes.posterior(composed, p_y) == pytest.approx(p_xy / p_x[:, None])
    by_hand = p_xy / p_y * expected
    by_hand /= by_hand.sum(1, keepdims=True)
    assert bayes.posterior(composed, expected) == pytest.approx(by_hand)


def test_a_label_of_no_prior_is_never_composed() -> None:
    composed = bayes.composed(np.log([[0.7, 0.3]]), np.array([-3.0]), np.array([1.0, 0.0]))
    assert composed.tolist() == [[np.log(0.7) - 3, -np.inf]]


def test_what_is_composed_is_a_distribution_for_every_label(engine: Engine) -> None:
    """Σ_x p(x|y) = 1 over all pictures that there are."""
    half = np.indices((LEVELS,) * 6).reshape(6, -1).T.astype(np.uint8)
    total = np.zeros(LABELS)
    for last in np.indices((LEVELS,) * 3).reshape(3, -1).T:
        x = np.concatenate([half, np.broadcast_to(last, (len(half), 3))], 1)
        answer = asyncio.run(
            engine.classify(x.reshape(-1, *SHAPE).astype(np.uint8), 0.05, rule=RULE, seen=False)
        )
        total += np.exp(answer.composed).sum(0)
    assert total == pytest.approx(np.ones(LABELS), abs=1e-4)


def test_each_rule_answers_by_its_own_model(client: Client, toy: Toy) -> None:
    x = pictures(20)
    generative, discriminative = client.classify(x), client.classify(x, rule=RULE)
    assert discriminative.posterior == pytest.approx(np.exp(toy.log_pyx(x)), abs=1e-5)
    assert discriminative.log_pxy.shape == discriminative.label_p_values.shape == (20, 0)
    by_hand = toy.log_pyx(x) + toy.log_px(x)[:, None] - np.log(PRIORS)
    assert discriminative.composed == pytest.approx(by_hand, abs=1e-4)
    assert generative.composed.shape == (20, 0)
    assert (generative.rule, discriminative.rule) == (LabelRule.GENERATIVE, RULE)
    assert np.array_equal(discriminative.p_value, generative.p_value)
    for rule, alone in ((RULE, discriminative), (LabelRule.GENERATIVE, generative)):
        both = client.classify(x, rule=rule, both=True)
        assert np.array_equal(both.log_pxy, generative.log_pxy)
        assert np.array_equal(both.label_p_values, generative.label_p_values)
        assert np.array_equal(both.composed, discriminative.composed)
        assert np.array_equal(both.posterior, alone.posterior) and both.rule == rule


def test_the_requests_priors_take_the_place_of_trainings(client: Client, toy: Toy) -> None:
    x, priors = pictures(20), np.array([0.1, 0.0, 0.9])
    answer = client.classify(x, rule=RULE, priors=priors)
    by_hand = np.exp(toy.log_pyx(x)) * priors / PRIORS
    by_hand /= by_hand.sum(1, keepdims=True)
    assert answer.posterior == pytest.approx(by_hand, abs=1e-5)
    assert np.array_equal(answer.composed, client.classify(x, rule=RULE).composed)
    # What a label's pictures look like does not depend on how many of them are expected.
    usual, other = client.classify(x), client.classify(x, priors=[0.98, 0.01, 0.01])
    assert np.array_equal(other.label_p_values, usual.label_p_values)
    assert not np.array_equal(other.posterior, usual.posterior)


def test_outliers_are_rejected_by_either_rule(client: Client, toy: Toy) -> None:
    """p(y|x) is as sure of an outlier as of any picture: p(x) alone tells."""
    x = np.broadcast_to(toy.log_q.argmin(-1), (1, *SHAPE)).astype(np.uint8)
    x = np.repeat(x, LEVELS, 0)
    x[:, 0, 0, 0] = range(LEVELS)
    answer = client.classify(x, rule=RULE)
    assert np.all(answer.verdict == Verdict.OUTLIER)
    assert answer.posterior.max() > 0.9
    assert answer.posterior == pytest.approx(np.exp(toy.log_t), abs=1e-5)
    unsure = client.classify(x, rule=RULE, min_posterior=0.999999, alpha=0.005)
    assert np.all(unsure.verdict != Verdict.ACCEPTED)


def test_only_questions_by_one_rule_go_together() -> None:
    def key(**more: Any) -> Any:
        images = codec.images(pictures(1))
        return merging.key(scoring_pb2.ClassifyRequest(model_name="toy", images=images, **more))

    assert key(rule=RULE) == key(rule=RULE)
    assert len({key(), key(rule=RULE), key(both=True), key(rule=RULE, both=True)}) == 4
    assert key(priors=[0.5, 0.5, 0]) == key(priors=[0.5, 0.5, 0]) is not None
    assert key(priors=[0] * 100_000) is None  # to compare them would take its time


def test_feeds_are_answered_by_their_rule(client: Client) -> None:
    x = pictures(30)
    for rule, both in ((RULE, False), (LabelRule.GENERATIVE, True)):
        whole = client.classify(x, rule=rule, both=both)
        feed = client.classify_stream([x[i : i + 1] for i in range(30)], rule=rule, both=both)
        for i, answer in enumerate(feed):
            assert not isinstance(answer, Exception) and answer.rule == rule
            assert answer.composed == pytest.approx(whole.composed[i : i + 1], abs=1e-4)
            assert answer.log_pxy == pytest.approx(whole.log_pxy[i : i + 1], abs=1e-4)


@pytest.mark.parametrize("label", range(LABELS))
def test_what_acceptance_keeps_follows_bayes_rule(engine: Engine, toy: Toy, label: int) -> None:
    """χ² over two pixels: p(x|y) = p(y|x) p(x) / p(y), one draw in 1 / p(y) kept."""
    n = 3000
    draws = drawn(engine, label, n)
    assert np.all(draws.accepted) and np.all(draws.label == label)
    q = np.exp(toy.log_q[0])
    first = q[0, 0] * np.exp(toy.log_t[:, label]) / PRIORS[label]
    expected = n * first[:, None] * q[2, 1]
    seen = np.zeros((LEVELS, LEVELS))
    np.add.at(seen, (draws.images[:, 0, 0, 0], draws.images[:, 0, 2, 1]), 1)
    likely = expected > 5
    rest = np.maximum(expected[~likely].sum(), 1e-9)
    terms = [*((seen - expected) ** 2 / expected)[likely], (seen[~likely].sum() - rest) ** 2 / rest]
    assert np.sum(terms) < likely.sum() + 5 * np.sqrt(2 * likely.sum())
    spread = np.sqrt((1 - PRIORS[label]) / n) / PRIORS[label]
    assert draws.draws.mean() == pytest.approx(1 / PRIORS[label], abs=4 * spread)


def test_draws_are_those_until_the_first_that_is_kept(engine: Engine, toy: Toy) -> None:
    """The k-th attempt of a picture is what it is under any limit: tells each draw, one by one."""
    n, whole = 12, drawn(engine, 2, 12)
    assert whole.draws.max() > 3
    for most in range(1, int(whole.draws.max()) + 1):
        cut = drawn(engine, 2, n, most)
        assert np.array_equal(cut.accepted, whole.draws <= most)
        assert np.array_equal(cut.draws, np.minimum(whole.draws, most))
        assert np.array_equal(cut.images[cut.accepted], whole.images[cut.accepted])


@pytest.mark.parametrize("max_batch", [1, 3, 64])
def test_accepted_draws_do_not_depend_on_batch_or_chunk(
    engine: Engine, toy: Toy, max_batch: int
) -> None:
    whole, other = drawn(engine, 1, 20), loaded(toy, max_batch)
    tail = drawn(other, 1, 7, first_index=13)
    other.close()
    assert np.array_equal(whole.images[13:], tail.images)
    assert np.array_equal(whole.draws[13:], tail.draws)


def test_what_is_never_kept_is_the_last_draw(engine: Engine, toy: Toy) -> None:
    n, most = 12, 3
    cut = drawn(engine, 2, n, most)
    gumbel = noise.gumbel(7, range(n), (*SHAPE[1:], SHAPE[0], LEVELS), [most - 1] * n)
    last = (toy.log_q + gumbel.transpose(0, 3, 1, 2, 4)).argmax(-1)
    assert np.array_equal(cut.images[~cut.accepted], last[~cut.accepted])
    assert not np.all(cut.accepted)


def test_a_label_that_is_hardly_ever_kept_is_drawn_by_the_batch() -> None:
    manifest: Any = SimpleNamespace(priors=np.array([0.7, 0.3, 0.0]))
    other: Any = None
    generator = Generator(manifest, other, other, other, other, rows=64)
    assert [generator._draws_at_once(np.array([label])) for label in range(3)] == [2, 4, 64]
    assert generator._draws_at_once(np.full(30, 1)) == 2
    assert generator._draws_at_once(np.full(100, 1)) == 1


def test_labels_left_open_are_those_of_any_drawing(client: Client) -> None:
    kept = client.generate(30, seed=2, acceptance=True)
    assert np.array_equal(kept.label, client.generate(30, seed=2).label)
    assert len(set(kept.label.tolist())) == LABELS and kept.draws.max() > 1


def test_a_picture_that_is_never_kept_is_told(client: Client) -> None:
    kept = client.generate(40, label=2, seed=5, acceptance=True, max_draws=2)
    assert not np.all(kept.accepted) and kept.draws.max() == 2
    assert np.all(kept.draws[~kept.accepted] == 2)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("acceptance.max_draws", {"max_draws": 0}),
        ("acceptance.max_draws", {"max_draws": 1001}),
        ("acceptance", {"self_check": True}),
    ],
)
def test_bad_acceptances_are_refused(client: Client, field: str, change: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as caught:
        client.generate(2, acceptance=True, **change)
    assert caught.value.field == field


def test_a_rule_that_is_none_is_refused(client: Client) -> None:
    with pytest.raises(InvalidInput) as caught:
        client.classify(pictures(1), rule=7)  # type: ignore[arg-type]
    assert caught.value.field == "rule"


def test_a_bundle_without_the_model_refuses(running: Running, make_toy: Callable[..., Toy]) -> None:
    roles = ("density", "conditional", "sample")
    with (
        running(bundles=(make_toy(roles=roles).path,)) as server,
        Client(server.address) as client,
    ):
        assert not client.model().discriminative
        for more in ({"rule": RULE}, {"both": True}):
            with pytest.raises(NotAnswered, match="discriminate"):
                client.classify(pictures(1), **more)
        with pytest.raises(NotAnswered, match="discriminate"):
            client.generate(1, label=0, acceptance=True)


def test_a_density_and_a_classifier_need_no_conditional_model(
    running: Running, make_toy: Callable[..., Toy]
) -> None:
    roles = ("density", "sample", "discriminate")
    with (
        running(bundles=(make_toy(roles=roles).path,)) as server,
        Client(server.address) as client,
    ):
        assert client.model().discriminative
        assert client.classify(pictures(3), rule=RULE).composed.shape == (3, LABELS)
        assert np.all(client.generate(3, label=1, acceptance=True).label == 1)
        with pytest.raises(NotAnswered, match="conditional"):
            client.classify(pictures(1))
