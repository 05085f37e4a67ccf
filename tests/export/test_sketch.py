import asyncio
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import autoregressive
import numpy as np
import pytest
import torch
from autoregressive import Opener
from scipy.stats import chisquare

from likely.bundle import Bundle, Role
from likely.engine import Engine
from likely.errors import InvalidInput
from likely.graphs import Device
from likely_export import evaluate, families, recipes, roles, runs
from likely_export.build import build
from likely_export.generated import Sizes
from likely_export.pixelcnn import PixelCNN, PixelCNNConfig
from likely_export.sketch import Detail, DetailConfig, Sketch, SketchConfig, Sketched

SMALL: dict[str, Any] = {
    "channels": 6,
    "layers": 2,
    "head": 8,
    "gated": False,
    "positions": True,
    "row_layers": 1,
    "row_width": 8,
    "row_heads": 2,
    "stem": (2, 1, 2),
}
LABELLED: dict[str, Any] = {"shape": (1, 5, 4), "levels": 16, "labels": 3}
COLOUR: dict[str, Any] = {"shape": (3, 4, 3), "levels": 16, "labels": 0}
EVERY = pytest.mark.parametrize("data", [LABELLED, COLOUR], ids=["labelled", "colour"])

RECIPE = """
name = "tiny"
version = "1"
[data]
source = "digits"
levels = 16
splits = { fit = 160, calibrate = 99, validate = 60, test = 100 }
[models.sketch]
family = "sketch"
channels = 4
layers = 1
stem = [1, 1, 1]
training = { steps = 20, batch = 16, validations = 1, optimiser = "muon" }
[models.detail]
family = "detail"
channels = 4
layers = 1
stem = [1, 1, 1]
digits = 2
training = { steps = 20, batch = 16, validations = 1, optimiser = "muon" }
[roles]
density = ["sketch", "detail"]
sample = ["sketch", "detail"]
conditional = ["sketch", "detail"]
"""


def sketched(
    data: dict[str, Any], digits: int = 2, sketch_levels: int = 2, scale: float = 0.3
) -> Sketched:
    """A density in two passes, its weights random but fixed."""
    torch.manual_seed(7)
    options = {**SMALL, **data, "sketch_levels": sketch_levels}
    model = Sketched(
        Sketch(SketchConfig(**options)), Detail(DetailConfig(**options, digits=digits, window=3))
    )
    autoregressive.randomise(model, scale)
    return model.eval()


def pictures(model: Sketched, n: int) -> torch.Tensor:
    return autoregressive.pictures(model.config, n)


def gumbel(model: Sketched, n: int) -> torch.Tensor:
    """Gumbel noise for the sampler, float32 (n, h, w, c, 1 + digits, base)."""
    c, h, w = model.config.shape
    noise = np.random.default_rng(3).gumbel(size=(n, h, w, c, model.digits, model.base))
    return torch.from_numpy(noise.astype(np.float32))


def labels(model: Sketched, n: int) -> torch.Tensor | None:
    """Labels in turn, null labels among them; None where the model takes none."""
    count = model.config.labels
    return torch.arange(n) % (count + 1) if count else None


def are_chosen(model: Sketched, x: torch.Tensor, noise: torch.Tensor) -> bool:
    """Whether one full pass over x, with that noise, chooses x again, but for near ties."""
    with torch.no_grad():
        tables = model.log_probs(x, labels(model, len(x)))
    c = model.config.shape[0]
    scores = tables.unflatten(-2, (c, model.digits)) + noise
    of_sketch = tables.unflatten(-2, (c, model.digits))[..., 0, : model.config.sketch_levels]
    scores[..., 0, :] = -torch.inf
    levels = model.config.sketch_levels
    scores[..., 0, :levels] = of_sketch + noise[..., 0, 1 : 1 + levels]
    digits = model.to_digits(x).unflatten(-1, (c, model.digits))
    best = scores.max(-1).values
    taken = scores.gather(-1, digits[..., None])[..., 0]
    others = int((digits != scores.argmax(-1)).sum())
    return bool((best - taken < 1e-4).all()) and others <= max(1, digits.numel() // 1000)


@EVERY
@pytest.mark.parametrize(("digits", "sketch_levels"), [(2, 2), (1, 4)])
def test_every_table_sums_to_one_and_gives_the_surprise(
    data: dict[str, Any], digits: int, sketch_levels: int
) -> None:
    model = sketched(data, digits, sketch_levels)
    x, c = pictures(model, 6), model.config.shape[0]
    y = labels(model, 6)
    with torch.no_grad():
        tables = model.log_probs(x, y)
        surprise = model.surprise(x, y)
        log_px = model.log_prob(x, y)
    assert tables.exp().sum(-1) == pytest.approx(torch.ones(tables.shape[:-1]), abs=1e-5)
    taken = -tables.gather(-1, model.to_digits(x)[..., None])[..., 0]
    by_pixel = taken.unflatten(-1, (c, model.digits)).sum(-1).permute(0, 3, 1, 2)
    assert surprise.numpy() == pytest.approx(by_pixel.numpy(), abs=1e-4)
    assert log_px.numpy() == pytest.approx(-surprise.flatten(1).sum(1).numpy(), abs=1e-3)


def test_the_probabilities_of_all_pictures_sum_to_one() -> None:
    model = sketched({"shape": (1, 2, 2), "levels": 4, "labels": 2}, digits=1, scale=0.8)
    everything = torch.tensor(list(itertools.product(range(4), repeat=4))).byte().view(-1, 1, 2, 2)
    for y in range(3):
        with torch.no_grad():
            log_px = model.log_prob(everything, torch.full((len(everything),), y))
        assert float(log_px.double().exp().sum()) == pytest.approx(1, abs=1e-5)
        assert log_px.std() > 0.5


def test_a_pixel_sees_the_whole_sketch_but_no_later_level() -> None:
    model = sketched(LABELLED)
    x = pictures(model, 8)
    within, across = x.clone(), x.clone()
    within[..., 3, 2] ^= 7  # another level of the same half
    across[..., 3, 2] ^= 8  # the same level of the other half
    with torch.no_grad():
        before, same, other = (
            model.detail.surprise(part).flatten(2) for part in (x, within, across)
        )
        sketched_before, sketched_other = (
            model.sketch.density.surprise(model.sketch.of(part)).flatten(2) for part in (x, across)
        )
    place = 3 * 4 + 2
    assert torch.equal(model.sketch.of(x), model.sketch.of(within))
    assert torch.allclose(before[..., :place], same[..., :place], atol=1e-6)
    assert not torch.allclose(before[..., place + 1], same[..., place + 1], atol=1e-3)
    assert not torch.allclose(before[..., place - 1], other[..., place - 1], atol=1e-3)
    assert torch.allclose(sketched_before[..., :place], sketched_other[..., :place], atol=1e-6)


@EVERY
def test_one_pass_reproduces_every_choice_of_the_graph(
    data: dict[str, Any], opened: Opener
) -> None:
    model = sketched(data)
    session = opened(roles.sample(model), model.config.levels, model.config.labels)
    noise, y = gumbel(model, 64), labels(model, 64)
    feeds = {"gumbel": noise.numpy()} | ({} if y is None else {"y": y.numpy()})
    (drawn,) = session.run(feeds, ["x"])
    x = torch.from_numpy(drawn)
    assert len(torch.unique(x)) > model.config.levels // 2
    assert are_chosen(model, x, noise)
    parts = [
        session.run({name: feed[at : at + 3] for name, feed in feeds.items()}, ["x"])[0]
        for at in range(0, 64, 3)
    ]
    assert np.array_equal(np.concatenate(parts), drawn)


def test_draws_follow_the_probabilities(opened: Opener) -> None:
    model = sketched({"shape": (1, 2, 2), "levels": 4, "labels": 0}, digits=1, scale=0.8)
    everything = torch.tensor(list(itertools.product(range(4), repeat=4))).byte().view(-1, 1, 2, 2)
    with torch.no_grad():
        expected = model.log_prob(everything).double().exp().numpy()
    session = opened(roles.sample(model), 4, 0)
    n = 100_000
    (drawn,) = session.run({"gumbel": gumbel(model, n).numpy()}, ["x"])
    counts = np.bincount(drawn.reshape(n, 4) @ (4 ** np.arange(4)[::-1]), minlength=256)
    kept = expected * n >= 5
    observed = np.append(counts[kept], counts[~kept].sum())
    wanted = np.append(expected[kept], expected[~kept].sum()) * n
    assert chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-3


def test_the_families_refuse_what_does_not_fit() -> None:
    for levels, sketch_levels in ((16, 3), (16, 16), (16, 1), (16, 0)):
        with pytest.raises(InvalidInput, match=f"sketch_levels: {sketch_levels} is no divisor"):
            SketchConfig((1, 4, 4), levels, sketch_levels=sketch_levels)
    with pytest.raises(InvalidInput, match="sketch_levels: 4 is no divisor of 4"):
        DetailConfig((1, 4, 4), 16, digits=2, sketch_levels=4)
    with pytest.raises(InvalidInput, match="digits: 2; the level of a sketch is one digit"):
        SketchConfig((1, 4, 4), 16, digits=2, sketch_levels=4)
    with pytest.raises(InvalidInput, match="window: 4 is not odd"):
        DetailConfig((1, 4, 4), 16, window=4)
    with pytest.raises(InvalidInput, match="logistics"):
        DetailConfig((1, 4, 4), 16, logistics=3)
    model = sketched(LABELLED)
    four = Sketch(replace(model.sketch.config, sketch_levels=4))
    with pytest.raises(InvalidInput, match="sketch_levels: is 4 in the sketch and 2 in the detail"):
        Sketched(four, model.detail)


@pytest.mark.parametrize("role", [Role.DENSITY, Role.SAMPLE, Role.CONDITIONAL])
def test_a_detail_alone_and_a_sketch_alone_play_no_role(role: Role) -> None:
    model = sketched(LABELLED)
    whole = PixelCNN(PixelCNNConfig(**LABELLED))
    refused: list[tuple[list[torch.nn.Module], str]] = [
        ([model.detail], "a Detail follows a Sketch"),
        ([model.detail, model.sketch], "a Detail follows a Sketch"),
        ([whole, model.detail], "a Detail follows a Sketch"),
        ([model.sketch], "has no such graph"),
        ([model.sketch, whole], "has no such graph"),
    ]
    for models, problem in refused:
        with pytest.raises(InvalidInput, match=problem):
            roles.graph_source(role, models, ("surprise",))


def test_the_sketch_is_trained_as_a_picture_of_its_levels() -> None:
    sketch = sketched(LABELLED).sketch
    x, y = autoregressive.pictures(sketch.config, 8), torch.arange(8) % 3
    torch.manual_seed(0)
    loss = sketch.objective(x, y)
    torch.manual_seed(0)
    assert torch.equal(loss, sketch.density.objective(x // 8, y))
    assert torch.equal(sketch.evaluate(x, y), sketch.density.evaluate(x // 8, y))
    assert {id(weight) for weight in sketch.matrices()} <= set(map(id, sketch.parameters()))


async def completed(engine: Engine, x: np.ndarray, known: np.ndarray) -> np.ndarray:
    """One completion of each picture."""
    parts = [part.images async for part in engine.complete(x, known, None, 1, 5, chunk=len(x))]
    return np.concatenate(parts)


def test_a_bundle_in_two_passes_serves_and_is_evaluated(tmp_path: Path) -> None:
    recipe = recipes.parse(RECIPE)
    runs.train_all(recipe, tmp_path / "run")
    restored = families.restore(tmp_path / "run" / "detail" / "weights.pt")
    assert isinstance(restored, Detail) and restored.config.digits == 2
    manifest = build(tmp_path / "run", tmp_path / "bundle", lambda _: None)
    assert set(manifest.graphs) == {Role.DENSITY, Role.SAMPLE, Role.CONDITIONAL}
    assert manifest.parity_nats <= 1e-3 and manifest.decisions_changed == 0
    engine = Engine.load(
        Bundle.open(tmp_path / "bundle"), device=Device("cpu"), threads=1, max_batch=8
    )
    data = recipe.data.load()
    x = data.test.x[:12]
    scores = asyncio.run(engine.score(x, 0.05, surprise=True))
    assert scores.surprise is not None
    assert -scores.log_px == pytest.approx(scores.surprise.sum((1, 2, 3)), abs=1e-2)
    answer = asyncio.run(engine.classify(x, 0.05))
    assert answer.log_pxy.shape == (12, 10)
    known = np.zeros(x.shape, bool)
    known[..., ::2, :] = True  # among them pixels of both halves of the levels
    drawn = asyncio.run(completed(engine, x, known))
    assert np.array_equal(drawn[known], x[known]) and not np.array_equal(drawn, x)
    engine.close()

    sizes = Sizes(test=20, outliers=4, drawn=4, bound=4, steps=2, examples=1)
    figures, material = evaluate.evaluate(tmp_path / "bundle", data, (0.1,), sizes=sizes)
    assert figures["statistics_cost"] > 0
    evaluate.attach(tmp_path / "bundle", figures, material)
