"""Completion by a real PixelCNN, against the conditional distribution by enumeration."""

from __future__ import annotations

import asyncio
import itertools
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
from likely_export.statistics import STATISTICS

CONFIG = PixelCNNConfig((1, 2, 3), 2, channels=6, layers=2, head=6)
MODEL = autoregressive.randomised(CONFIG, 0.8)
EVERYTHING = np.array(list(itertools.product((0, 1), repeat=6)), np.uint8).reshape(-1, 1, 2, 3)


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    folder = tmp_path_factory.mktemp("graphs")
    sources = {
        Role.SAMPLE: roles.sample(MODEL),
        Role.DENSITY: roles.density(
            MODEL, tuple(name for name, each in STATISTICS.items() if each.needs is None)
        ),
    }
    sessions = {role: opened(source, folder / f"{role}.onnx") for role, source in sources.items()}
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


def opened(source: roles.GraphSource, path: Path) -> Session:
    return Session(path, graphs.export(source, path, 2, 0).graph, Device("cpu"))


def completed(
    generator: Generator, x: Pixels, known: np.ndarray[Any, Any], n: int, proposals: int
) -> Pixels:
    async def read() -> list[Pixels]:
        stream = generator.complete(
            x, known, None, n, 3, first_index=0, temperature=1.0, proposals=proposals, chunk=4096
        )
        return [chunk.images async for chunk in stream]

    return np.concatenate(asyncio.run(read()))


def conditional(x: Pixels, known: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """p(every picture | the known pixels of x), (64,)."""
    with torch.no_grad():
        p = MODEL.log_prob(torch.from_numpy(EVERYTHING)).double().exp().numpy()
    fits = np.all((x == EVERYTHING) | ~known, axis=(1, 2, 3))
    chosen: np.ndarray[Any, Any] = p * fits / (p * fits).sum()
    return chosen


def shares(images: Pixels) -> np.ndarray[Any, Any]:
    index = images.reshape(len(images), 6) @ (1 << np.arange(6)[::-1])
    return np.bincount(index, minlength=64)


def test_an_open_end_follows_the_conditional_distribution(generator: Generator) -> None:
    x = np.array([[[[1, 0, 1], [0, 0, 0]]]], np.uint8)
    known = np.array([[[[True, True, True], [False, False, False]]]])
    counts, wanted = shares(completed(generator, x, known, 20_000, 1)), conditional(x, known)
    possible = wanted > 0
    assert counts[~possible].sum() == 0
    assert chisquare(counts[possible], wanted[possible] * counts.sum()).pvalue > 1e-3


def test_proposals_bring_in_what_later_fixed_pixels_say(generator: Generator) -> None:
    x = np.array([[[[0, 0, 0], [1, 0, 1]]]], np.uint8)
    known = np.array([[[[False, False, False], [True, True, True]]]])
    wanted, n = conditional(x, known), 4000

    def distance(proposals: int) -> float:
        counts = shares(completed(generator, x, known, n, proposals))
        assert counts[wanted == 0].sum() == 0
        return float(np.abs(counts / n - wanted).sum() / 2)

    alone, many = distance(1), distance(64)
    noise = np.sqrt(8 / n)
    assert alone > 0.1, "what comes later must matter to this model"
    assert many < 0.02 + noise
