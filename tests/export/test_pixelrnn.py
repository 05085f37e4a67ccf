import asyncio
import itertools
from functools import cache
from pathlib import Path
from typing import Literal

import autoregressive
import numpy as np
import pytest
import torch

from likely.bundle import Bundle, Role
from likely.engine import Engine
from likely.graphs import Device, Session
from likely_export import evaluate, graphs, recipes, roles, runs
from likely_export.build import build
from likely_export.generated import Sizes
from likely_export.pixelrnn import PixelRNNConfig
from likely_export.statistics import STATISTICS

Kind = Literal["row", "diagonal"]
Pixels = frozenset[tuple[int, int]]

RECIPE = """
name = "tiny"
version = "1"
[data]
source = "digits"
splits = { fit = 160, calibrate = 99, validate = 60, test = 100 }
[models.density]
family = "pixelrnn"
kind = "diagonal"
channels = 4
layers = 1
stem = [1, 1, 1]
training = { steps = 20, batch = 16, validations = 1, optimiser = "muon" }
[roles]
density = "density"
sample = "density"
"""


def seen(kind: Kind, h: int, w: int) -> dict[tuple[int, int], Pixels]:
    """The pixels that one layer sees at each place, as the paper draws it.

    The kernel under mask A reaches one pixel far.
    """
    nothing: Pixels = frozenset()

    def inside(i: int, j: int) -> bool:
        return 0 <= i < h and 0 <= j < w

    def stem(i: int, j: int) -> Pixels:
        if not inside(i, j):
            return nothing
        taps = [(i - 1, j - 1), (i - 1, j), (i - 1, j + 1), (i, j - 1)]
        return frozenset(tap for tap in taps if inside(*tap))

    @cache
    def row(i: int, j: int) -> Pixels:
        if not inside(i, j):
            return nothing
        above = [row(i - 1, k) for k in (j - 1, j, j + 1)]
        return stem(i, j - 1).union(stem(i, j), *above)

    @cache
    def diagonal(i: int, j: int, step: int) -> Pixels:
        if not inside(i, j):
            return nothing
        return stem(i, j) | diagonal(i, j + step, step) | diagonal(i - 1, j, step)

    def all_of(i: int, j: int) -> Pixels:
        if kind == "row":
            return stem(i, j) | row(i, j)
        return stem(i, j) | diagonal(i, j, -1) | diagonal(i - 1, j, 1)

    return {place: all_of(*place) for place in itertools.product(range(h), range(w))}


@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "colour"])
@pytest.mark.parametrize("kind", ["row", "diagonal"])
def test_gradients_reach_what_the_paper_draws_and_nothing_else(kind: Kind, channels: int) -> None:
    c, h, w = channels, 3, 7
    config = PixelRNNConfig((c, h, w), 4, channels=5, layers=1, head=6, stem=(1, 1, 1), kind=kind)
    model = autoregressive.randomised(config)
    x = torch.rand(1, c, h, w, requires_grad=True)
    features = model.features(x)[0].sum(0)
    for place, pixels in seen(kind, h, w).items():
        (gradient,) = torch.autograd.grad(features[place], x, retain_graph=True)
        reached = (gradient[0] != 0).any(0).nonzero().tolist()
        assert {(i, j) for i, j in reached} == pixels, place


def test_a_diagonal_layer_misses_but_the_last_pixel_of_the_row_above() -> None:
    h, w = 5, 6
    for (i, j), pixels in seen("diagonal", h, w).items():
        before = {(a, b) for a, b in itertools.product(range(h), range(w)) if (a, b) < (i, j)}
        assert before - pixels <= {(i - 1, w - 1)}


@pytest.mark.parametrize("kind", ["row", "diagonal"])
def test_its_graph_of_statistics_is_cut_down_to_the_density(kind: Kind, tmp_path: Path) -> None:
    config = PixelRNNConfig((1, 3, 4), 4, channels=3, layers=1, head=4, stem=(1, 1, 1), kind=kind)
    names = tuple(name for name, each in STATISTICS.items() if each.needs is None)
    source = roles.density(autoregressive.randomised(config), names)
    whole, part = tmp_path / "whole.onnx", tmp_path / "part.onnx"
    graphs.write(source, whole, config.levels, config.labels)
    graphs.extract_outputs(whole, part, ["log_px"])
    graph = source.graph(whole.name)
    only = tuple(spec for spec in graph.outputs if spec.name == "log_px")
    x = {"x": autoregressive.pictures(config, 3).numpy()}
    (log_px,) = Session(whole, graph, Device("cpu")).run(x, ["log_px"])
    session = Session(part, graph.model_copy(update={"outputs": only}), Device("cpu"))
    assert np.array_equal(session.run(x, ["log_px"])[0], log_px)
    assert part.stat().st_size < whole.stat().st_size


async def drawn(engine: Engine, chunk: int) -> np.ndarray:
    """Six pictures, uint8 (6, 1, 8, 8), in chunks."""
    return np.concatenate([part.images async for part in engine.generate(None, 6, 3, chunk=chunk)])


def test_a_pixelrnn_is_the_density_of_a_bundle_that_serves_and_is_evaluated(tmp_path: Path) -> None:
    recipe = recipes.parse(RECIPE)
    runs.train_all(recipe, tmp_path / "run")
    manifest = build(tmp_path / "run", tmp_path / "bundle", lambda _: None)
    assert set(manifest.graphs) == {Role.DENSITY, Role.SAMPLE}
    assert manifest.parity_nats <= 1e-3 and manifest.decisions_changed == 0
    engine = Engine.load(
        Bundle.open(tmp_path / "bundle"), device=Device("cpu"), threads=1, max_batch=8
    )
    x = asyncio.run(drawn(engine, chunk=6))
    assert len(np.unique(x)) > 1 and np.array_equal(asyncio.run(drawn(engine, chunk=4)), x)
    scores = asyncio.run(engine.score(x, 0.05, surprise=True))
    assert scores.surprise is not None
    assert -scores.log_px == pytest.approx(scores.surprise.sum((1, 2, 3)), abs=1e-2)
    engine.close()

    sizes = Sizes(test=20, outliers=4, drawn=4, bound=4, steps=2, examples=1)
    data = recipe.data.load()
    figures, material = evaluate.evaluate(tmp_path / "bundle", data, (0.1,), sizes=sizes)
    assert figures["statistics_cost"] > 0
    evaluate.attach(tmp_path / "bundle", figures, material)
