"""Completion by real densities, against the conditional distribution by enumeration."""

from __future__ import annotations

import asyncio
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import autoregressive
import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from likely.answers import Floats, Labels, Pixels
from likely.batching.lanes import Lanes
from likely.batching.tuning import Best
from likely.bundle import Role
from likely.generation import Generator
from likely.graphs import Device, Session
from likely_export import graphs, roles
from likely_export.pixelcnn import PixelCNNConfig
from likely_export.sketch import Detail, DetailConfig, Sketch, SketchConfig, Sketched
from likely_export.statistics import STATISTICS


@dataclass(frozen=True)
class Case:
    """A model of so few pictures that all of them can be listed."""

    model: roles.Exact
    everything: Pixels

    @property
    def places(self) -> np.ndarray[Any, Any]:
        """The weight of each pixel in a picture's place in the list, (pixels,)."""
        pixels = self.everything[0].size
        places: np.ndarray[Any, Any] = self.model.config.levels ** np.arange(pixels)[::-1]
        return places


def listed(levels: int, shape: tuple[int, int, int]) -> Pixels:
    pictures = itertools.product(range(levels), repeat=math.prod(shape))
    return np.array(list(pictures), np.uint8).reshape(-1, *shape)


def sketched() -> Sketched:
    options: dict[str, Any] = {"channels": 6, "layers": 2, "head": 6}
    sketch = Sketch(SketchConfig((1, 1, 3), 4, **options))
    model = Sketched(sketch, Detail(DetailConfig((1, 1, 3), 4, window=3, **options)))
    autoregressive.randomise(model, 0.5)
    return model.eval()


ONE_PASS = Case(
    autoregressive.randomised(PixelCNNConfig((1, 2, 3), 2, channels=6, layers=2, head=6), 0.8),
    listed(2, (1, 2, 3)),
)
TWO_PASSES = Case(sketched(), listed(4, (1, 1, 3)))


def generator(case: Case, folder: Path) -> Generator:
    sources = {
        Role.SAMPLE: roles.sample(case.model),
        Role.DENSITY: roles.density(
            case.model, tuple(name for name, each in STATISTICS.items() if each.needs is None)
        ),
    }
    levels = case.model.config.levels
    sessions = {
        role: opened(source, folder / f"{role}.onnx", levels) for role, source in sources.items()
    }
    best = dict.fromkeys(sessions, Best(4096))
    lanes = Lanes("small", sessions, lanes=1, best=best)

    async def surprise(x: Pixels) -> Floats:
        return (await lanes.run(Role.DENSITY, {"x": x}, ["surprise"]))["surprise"]

    async def passes(x: Pixels, labels: Labels, alpha: float) -> Any:
        raise AssertionError("completion checks nothing")

    async def p_label(x: Pixels, labels: Labels) -> Any:
        raise AssertionError("completion keeps everything")

    manifest = cast(Any, SimpleNamespace(name="small", version="1", labels=(), priors=()))
    return Generator(manifest, lanes, passes, surprise, p_label, rows=1)


def opened(source: roles.GraphSource, path: Path, levels: int) -> Session:
    return Session(path, graphs.export(source, path, levels, 0).graph, Device("cpu"))


def completed(
    generator: Generator, x: Pixels, known: np.ndarray[Any, Any], n: int, proposals: int
) -> Pixels:
    async def read() -> list[Pixels]:
        stream = generator.complete(
            x, known, None, n, 3, first_index=0, temperature=1.0, proposals=proposals, chunk=4096
        )
        return [chunk.images async for chunk in stream]

    return np.concatenate(asyncio.run(read()))


def conditional(case: Case, x: Pixels, known: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """p(every picture | the known pixels of x), (64,)."""
    with torch.no_grad():
        p = case.model.log_prob(torch.from_numpy(case.everything)).double().exp().numpy()
    fits = np.all((x == case.everything) | ~known, axis=(1, 2, 3))
    chosen: np.ndarray[Any, Any] = p * fits / (p * fits).sum()
    return chosen


def shares(case: Case, images: Pixels) -> np.ndarray[Any, Any]:
    index = images.reshape(len(images), -1) @ case.places
    return np.bincount(index, minlength=len(case.everything))


def test_an_open_end_follows_the_conditional_distribution(tmp_path: Path) -> None:
    x = np.array([[[[1, 0, 1], [0, 0, 0]]]], np.uint8)
    known = np.array([[[[True, True, True], [False, False, False]]]])
    images = completed(generator(ONE_PASS, tmp_path), x, known, 20_000, 1)
    counts, wanted = shares(ONE_PASS, images), conditional(ONE_PASS, x, known)
    possible = wanted > 0
    assert counts[~possible].sum() == 0
    assert chisquare(counts[possible], wanted[possible] * counts.sum()).pvalue > 1e-3


@pytest.mark.parametrize(
    ("case", "x", "known"),
    [
        (ONE_PASS, [[0, 0, 0], [1, 0, 1]], [[0, 0, 0], [1, 1, 1]]),
        (TWO_PASSES, [[3, 3, 0]], [[0, 0, 1]]),
        (TWO_PASSES, [[1, 3, 0]], [[1, 0, 1]]),
    ],
    ids=["one pass", "two passes", "two passes, fixed around"],
)
def test_proposals_bring_in_what_later_fixed_pixels_say(
    tmp_path: Path, case: Case, x: list[list[int]], known: list[list[int]]
) -> None:
    picture, mask = np.array([[x]], np.uint8), np.array([[known]], bool)
    wanted, n = conditional(case, picture, mask), 4000
    completer = generator(case, tmp_path)

    def distance(proposals: int) -> float:
        counts = shares(case, completed(completer, picture, mask, n, proposals))
        assert counts[wanted == 0].sum() == 0
        return float(np.abs(counts / n - wanted).sum() / 2)

    alone, many = distance(1), distance(64)
    noise = np.sqrt(8 / n)
    assert alone > 0.1, "what comes later must matter to this model"
    assert many < 0.02 + noise
