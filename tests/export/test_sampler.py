import itertools
from dataclasses import replace
from pathlib import Path

import autoregressive
import numpy as np
import pytest
import torch
from autoregressive import CONFIGS, Opener
from scipy.stats import chisquare

from likely.graphs import Device, Session
from likely_export import roles
from likely_export.autoregressive import Autoregressive
from likely_export.pixelcnn import PixelCNNConfig

EVERY = pytest.mark.parametrize("name", CONFIGS)
NEAR = 1e-4  # nats: as good as equal


def scores(
    model: Autoregressive, x: torch.Tensor, noise: torch.Tensor, y: torch.Tensor | None
) -> torch.Tensor:
    """What a full pass over x and that noise make of every digit, (n, h, w, c * digits, base)."""
    return model.log_probs(x, y) + noise.flatten(3, 4)


def are_chosen(digits: torch.Tensor, scores: torch.Tensor) -> bool:
    """Whether the digits (...) have the best of their scores (..., base).

    Another processor or runtime adds up in another order; of two best scores that differ by its
    rounding alone either may be taken, which has to be rare.
    """
    best = scores.max(-1).values
    taken = scores.gather(-1, digits.long()[..., None])[..., 0]
    others = int((digits != scores.argmax(-1)).sum())
    return bool((best - taken < NEAR).all()) and others <= max(1, digits.numel() // 1000)


@EVERY
def test_one_pass_reproduces_every_choice(name: str) -> None:
    model, config = autoregressive.model(name), CONFIGS[name]
    noise, y = autoregressive.gumbel(config, 64), autoregressive.labels(config, 64)
    with torch.no_grad():
        x = roles.sampler(model)(noise, y)
        assert x.dtype == torch.uint8 and x.shape == (64, *config.shape)
        assert len(torch.unique(x)) > 1
        assert are_chosen(model.head.to_digits(x), scores(model, x, noise, y))


def test_a_picture_may_be_one_column_wide(opened: Opener) -> None:
    base = CONFIGS["diagonal_lstm"]
    config = replace(base, shape=(1, 4, 1))
    assert base.layers > 1  # whose states lie side by side
    model, noise = autoregressive.randomised(config), autoregressive.gumbel(config, 16)
    y = autoregressive.labels(config, 16)
    assert y is not None
    session = opened(roles.sample(model), config.levels, config.labels)
    (drawn,) = session.run({"gumbel": noise.numpy(), "y": y.numpy()}, ["x"])
    x = torch.from_numpy(drawn)
    with torch.no_grad():
        assert are_chosen(model.head.to_digits(x), scores(model, x, noise, y))


@EVERY
def test_drawing_equals_the_naive_way(name: str) -> None:
    model, config = autoregressive.model(name), CONFIGS[name]
    noise, y = autoregressive.gumbel(config, 2), autoregressive.labels(config, 2)
    c, h, w = config.shape
    naive = torch.zeros((2, *config.shape), dtype=torch.uint8)
    found: list[torch.Tensor] = []
    with torch.no_grad():
        x = roles.sampler(model)(noise, y)
        digits = model.head.to_digits(x)
        for i, j, k in itertools.product(range(h), range(w), range(c)):
            for d in range(config.digits):  # a digit needs those before it
                at = k * config.digits + d
                found.append(scores(model, naive, noise, y)[:, i, j, at])
                power = model.head.base ** (config.digits - 1 - d)
                naive[:, k, i, j] += (digits[:, i, j, at] * power).byte()
    assert torch.equal(x, naive)
    assert are_chosen(digits.flatten(1), torch.stack(found, 1))


@EVERY
def test_the_graph_draws_the_same_whatever_the_batch_and_threads(
    name: str, opened: Opener, tmp_path: Path
) -> None:
    model, config = autoregressive.model(name), CONFIGS[name]
    session = opened(roles.sample(model), config.levels, config.labels)
    feeds = {"gumbel": autoregressive.gumbel(config, 64).numpy()}
    if config.labels:
        feeds["y"] = np.arange(64) % (config.labels + 1)  # null labels among them
    (together,) = session.run(feeds, ["x"])
    two = Session(tmp_path / "graph.onnx", session.spec, Device("cpu"), threads=2)
    for n, each in itertools.product((1, 3, 16, 64), (session, two)):
        parts = [
            each.run({key: feed[at : at + n] for key, feed in feeds.items()}, ["x"])[0]
            for at in range(0, 64, n)
        ]
        assert np.array_equal(np.concatenate(parts), together)


@pytest.mark.parametrize(
    "config",
    [
        PixelCNNConfig((1, 2, 2), 2, channels=6, layers=2, head=6),
        PixelCNNConfig((1, 3, 3), 2, channels=6, layers=2, head=6),
        PixelCNNConfig((3, 1, 2), 4, channels=6, layers=1, head=6, digits=2, logistics=3),
    ],
    ids=["2x2", "3x3", "mixture"],
)
def test_draws_follow_the_probabilities(config: PixelCNNConfig, opened: Opener) -> None:
    model = autoregressive.randomised(config, 0.8)
    levels, (c, h, w) = config.levels, config.shape
    size = c * h * w
    everything = np.array(list(itertools.product(range(levels), repeat=size)), np.uint8)
    with torch.no_grad():
        log_px = model.log_prob(torch.from_numpy(everything.reshape(-1, *config.shape)))
    expected = np.exp(log_px.double().numpy())
    session = opened(roles.sample(model), levels, 0)
    n = 200_000
    generator = np.random.Generator(np.random.Philox(key=[5, h]))
    shape = (n, h, w, c, config.digits, model.head.base)
    noise = generator.gumbel(size=shape).astype(np.float32)
    (drawn,) = session.run({"gumbel": noise}, ["x"])
    index = drawn.reshape(n, size) @ (levels ** np.arange(size)[::-1])
    counts = np.bincount(index, minlength=levels**size)
    kept = expected * n >= 5
    observed = np.append(counts[kept], counts[~kept].sum())
    wanted = np.append(expected[kept], expected[~kept].sum()) * n
    wanted = np.maximum(wanted, 1e-9) * observed.sum() / wanted.sum()
    if wanted[-1] < 5:
        observed, wanted = observed[:-1], wanted[:-1] * observed[:-1].sum() / wanted[:-1].sum()
    assert chisquare(observed, wanted).pvalue > 1e-3
    # Their mean surprise is the entropy of the model.
    entropy = -(expected * log_px.double().numpy()).sum()
    surprise = -log_px.double().numpy()[index]
    assert abs(surprise.mean() - entropy) < 4 * surprise.std() / np.sqrt(n)


def test_towering_noise_fixes_a_pixel(opened: Opener) -> None:
    model, config = autoregressive.model("rows_nibbles"), CONFIGS["rows_nibbles"]
    session = opened(roles.sample(model), config.levels, config.labels)
    noise = autoregressive.gumbel(config, 8).numpy()
    wanted = autoregressive.pictures(config, 8)
    digits = model.head.to_digits(wanted).unflatten(-1, (1, 2)).numpy()
    rows = np.arange(6)[None, :, None, None, None] < 3
    fixed = np.where(np.arange(4) == digits[..., None], 1e6, 0.0).astype(np.float32)
    noise = np.where(rows[..., None], fixed, noise)
    (x,) = session.run({"gumbel": noise, "y": np.zeros(8, np.int64)}, ["x"])
    assert np.array_equal(x[:, :, :3], wanted.numpy()[:, :, :3])
    assert len(np.unique(x[:, :, 3:])) > 1


@pytest.mark.slow
@pytest.mark.timeout(900)  # minutes on a machine that does other things, too
def test_the_reference_model_draws_exactly(opened: Opener) -> None:
    """The model that `bench` measures: 28x28, 256 levels, gated, 8 layers of 64 channels."""
    config = PixelCNNConfig((1, 28, 28), 256)
    model = autoregressive.randomised(config, 0.03)
    session = opened(roles.sample(model), 256, 0)
    noise = autoregressive.gumbel(config, 64)
    x = torch.from_numpy(session.run({"gumbel": noise.numpy()}, ["x"])[0])
    with torch.no_grad():
        assert are_chosen(model.head.to_digits(x), scores(model, x, noise, None))
        naive = torch.zeros_like(x[:2])
        found: list[torch.Tensor] = []
        for i, j in itertools.product(range(28), range(28)):
            features = model.features(naive)[:, :, i : i + 1, j : j + 1]
            log_probs = model.head.log_probs(features, naive[:, :, i : i + 1, j : j + 1])
            found.append((log_probs[:, 0, 0] + noise[:2, i, j, 0])[:, 0])
            naive[:, 0, i, j] = x[:2, 0, i, j]
    assert are_chosen(x[:2].flatten(1), torch.stack(found, 1))
    assert len(torch.unique(x)) > 100
