"""The measurements of the graphs, one function each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from bench import models
from bench.clock import Timing, time_interleaved
from bench.exports import Exports
from likely import noise
from likely.bundle import Bundle, Role
from likely.graphs import Array, Device, Session
from likely.warmup import LARGEST
from likely_export.graphs import example

SEED = 0


def time_sampling(exports: Exports, batch: int, rounds: int) -> dict[str, Timing]:
    """CPU time of `pass`, `sample`, `naive` (a single step), `noise` and `matmul`, interleaved."""
    sample, density = exports.session("sample"), exports.session("pass")
    naive, product = exports.session("naive"), exports.session("matmul")
    shape = sample.spec.inputs[0].array_shape(batch)[1:]
    gumbel = noise.gumbel(SEED, range(batch), shape)
    (x,) = sample.run({"gumbel": gumbel}, ["x"])
    rows, inner, _ = models.MATMUL
    a = np.random.default_rng(SEED).standard_normal((rows, inner), dtype=np.float32)

    def step() -> None:
        i, j = shape[0] // 2, shape[1] // 2
        at = np.full(batch, i * shape[1] + j)
        feeds = {"x": x, "gumbel": gumbel[:, i, j, 0, 0], "y": at}
        x[:, 0, i, j] = naive.run(feeds, ["levels"])[0]

    return time_interleaved(
        {
            "pass": partial(density.run, {"x": x}, ["log_px"]),
            "sample": partial(_run_in_service_batches, sample, {"gumbel": gumbel}, "x"),
            "naive": step,
            "noise": partial(noise.gumbel, SEED, range(batch), shape),
            "matmul": partial(product.run, {"a": a}, ["c"]),
        },
        rounds,
    )


def count_differing_pixels(exports: Exports, pictures: int) -> int:
    """Number of pixels of drawn pictures for which a forward pass chooses another level."""
    sample, choices = exports.session("sample"), exports.session("choices")
    gumbel = noise.gumbel(SEED, range(pictures), sample.spec.inputs[0].array_shape(1)[1:])
    (x,) = sample.run({"gumbel": gumbel}, ["x"])
    (chosen,) = choices.run({"x": x, "gumbel": gumbel}, ["choices"])
    return int(np.sum(chosen != x))


def time_conditional(exports: Exports, name: str, batch: int, rounds: int) -> dict[str, Timing]:
    """CPU time of log p(x|y) for all labels: `fused` in one call, `single` in one per label."""
    fused, single = exports.session(f"{name}_fused"), exports.session(f"{name}_single")
    config = models.BOUNDS[name]
    feeds = example(fused.spec.inputs, batch, config.levels, config.labels, SEED)
    labels = [np.full(batch, y) for y in range(config.labels)]

    def run_fused() -> Array:
        return fused.run(feeds, ["log_pxy"])[0]

    def run_per_label() -> Array:
        runs = [single.run({**feeds, "y": y}, ["log_pxy"])[0] for y in labels]
        return np.stack(runs, 1)

    if not np.allclose(run_fused(), run_per_label(), rtol=1e-5, atol=1e-3):
        raise RuntimeError(f"the fused graph and the single one of {name} differ")
    return time_interleaved({"fused": run_fused, "single": run_per_label}, rounds)


def time_bundle(folder: Path, batch: int, rounds: int) -> dict[str, Timing]:
    """CPU time of a bundle's `density` and `sample` graphs, interleaved."""
    bundle = Bundle.open(folder)
    levels, labels = bundle.manifest.levels, len(bundle.manifest.labels)
    calls: dict[str, Callable[[], object]] = {}
    for role, output in ((Role.DENSITY, "log_px"), (Role.SAMPLE, "x")):
        if role not in bundle.manifest.graphs:
            continue
        spec = bundle.manifest.graphs[role]
        session = Session(bundle.graph(role), spec, Device("cpu"))
        feeds = example(spec.inputs, batch, levels, labels, SEED)
        calls[role] = partial(session.run, feeds, [output])
        if role is Role.SAMPLE:
            calls[role] = partial(_run_in_service_batches, session, feeds, output)
    return time_interleaved(calls, rounds)


def _run_in_service_batches(session: Session, feeds: Mapping[str, Array], output: str) -> None:
    """Runs a batch in as many calls as the service would make."""
    for start in range(0, len(next(iter(feeds.values()))), LARGEST):
        part = {name: feed[start : start + LARGEST] for name, feed in feeds.items()}
        session.run(part, [output])


def load_seconds(exports: Exports, names: Sequence[str], rounds: int) -> dict[str, float]:
    """Wall-clock seconds to open each session, the minimum over the rounds."""
    return {name: min(_time_load(exports, name) for _ in range(rounds)) for name in names}


def _time_load(exports: Exports, name: str) -> float:
    start = time.perf_counter()
    exports.session(name)
    return time.perf_counter() - start
