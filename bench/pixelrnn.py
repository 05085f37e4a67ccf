"""Compares PixelCNN, Row LSTM and Diagonal BiLSTM at equal parameters and equal CPU time.

`python -m bench.pixelrnn digits --seconds 60` or `... mnist --source mnist.npz --seconds 600`
trains each model with the same optimiser on one thread. It prints and writes the nats of the test
split: `nll_nats`, -log p(x), and with labels `conditional_nll_nats`, -log p(x|y). The number of
steps that fit into the given seconds is measured first, for all models in turn, so that a slow
phase of the machine affects all of them; given these numbers, a run is repeatable. MNIST is
binarised afresh at each look in training; its test split is binarised once, with the seed of the
recipe `mnist_binary`.

`python -m bench.pixelrnn mnist --draw` measures the cost of drawing instead, in passes of
log p(x).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from bench import models
from bench.clock import time_interleaved
from likely.bundle import Graph, TensorSpec
from likely.graphs import Device, Session
from likely_export import families, graphs, recipes, roles, train
from likely_export.autoregressive import Autoregressive, AutoregressiveConfig
from likely_export.data import Dataset, Split
from likely_export.optimisers import Training, optimisers
from likely_export.pixelcnn import PixelCNN, PixelCNNConfig
from likely_export.pixelrnn import PixelRNN, PixelRNNConfig
from likely_export.roles import GraphSource

BATCH = 64
DRAW_BATCHES = (1, 16)
ROUNDS = 5
STEM = (3, 3, 3)  # the papers' first kernel, 7x7 under mask A


@dataclass(frozen=True)
class Comparison:
    """Models of equal size on one data set.

    Attributes:
        recipe: name of the recipe whose data is used.
        training: settings of the training, except its length; the same for all models.
        models: configurations by name; their parameter counts agree within 5 %.
        validate: number of validation pictures.
        test: number of test pictures.
    """

    recipe: str
    training: dict[str, Any]
    models: dict[str, AutoregressiveConfig]
    validate: int
    test: int


DIGITS: dict[str, Any] = {"shape": (1, 8, 8), "levels": 17, "labels": 10, "head": 64, "stem": STEM}
DIGITS |= {"dropout": 0.3, "label_dropout": 0.25}
MNIST: dict[str, Any] = {"shape": (1, 28, 28), "levels": 2, "head": 32, "stem": STEM}
COMPARISONS = {
    "digits": Comparison(
        "digits",
        {"batch": 32, "weight_decay": 0.1, "muon_weight_decay": 0.1},
        {
            "pixelcnn": PixelCNNConfig(channels=28, layers=3, **DIGITS),
            "row": PixelRNNConfig(channels=27, layers=2, kind="row", **DIGITS),
            "diagonal": PixelRNNConfig(channels=25, layers=2, kind="diagonal", **DIGITS),
        },
        validate=120,
        test=300,
    ),
    "mnist": Comparison(
        "mnist_binary",
        {"batch": 16, "validations": 2, "keep_best": False},
        {
            "pixelcnn": PixelCNNConfig(channels=16, layers=5, **MNIST),
            "row": PixelRNNConfig(channels=16, layers=3, kind="row", **MNIST),
            "diagonal": PixelRNNConfig(channels=15, layers=3, kind="diagonal", **MNIST),
        },
        validate=256,
        test=2000,
    ),
}


def build_model(config: AutoregressiveConfig, seed: int) -> Autoregressive:
    """An untrained model of that configuration; its weights depend on the seed alone."""
    torch.manual_seed(seed)
    if isinstance(config, PixelRNNConfig):
        return PixelRNN(config)
    assert isinstance(config, PixelCNNConfig)
    return PixelCNN(config)


def train_model(
    config: AutoregressiveConfig, data: Dataset, training: Training, folder: Path
) -> dict[str, Any]:
    """Trains a model; returns its size, its steps, and -log p of the test split in nats."""
    run = train.fit(build_model(config, training.seed), data, training, folder, resume=False)
    net = cast(Autoregressive, families.restore(run.weights))
    figures = {
        "parameters": sum(weight.numel() for weight in net.parameters()),
        "steps": run.steps,
        "epochs": run.steps * training.batch / len(data.train),
        "seconds": run.seconds,
        "nll_nats": _mean_nats(data.test, lambda x, _: net.log_prob(x)),
    }
    if config.labels:
        figures["conditional_nll_nats"] = _mean_nats(data.test, net.log_prob)
    return figures


@torch.no_grad()
def _mean_nats(part: Split, log_prob: Callable[[Tensor, Tensor], Tensor]) -> dict[str, float]:
    """The mean of -log p over a split in nats, and its standard error."""
    x, y = torch.from_numpy(part.x), torch.from_numpy(part.y)
    pairs = zip(x.split(BATCH), y.split(BATCH), strict=True)
    nats = -torch.cat([log_prob(*pair) for pair in pairs]).double()
    return {"mean": nats.mean().item(), "error": (nats.std() / len(nats) ** 0.5).item()}


def measure_step_seconds(chosen: Comparison, data: Dataset, training: Training) -> dict[str, float]:
    """CPU time in seconds of one training step of each model, the minimum of several."""
    x, y = torch.from_numpy(data.train.x), torch.from_numpy(data.train.y)
    x, y = x[: training.batch], y[: training.batch]
    steps = {
        name: partial(_train_step, net, optimisers(net, training), x, y)
        for name, config in chosen.models.items()
        for net in [build_model(config, training.seed)]
    }
    return {name: timing.minimum for name, timing in time_interleaved(steps, ROUNDS).items()}


def _train_step(
    net: Autoregressive, net_optimisers: list[torch.optim.Optimizer], x: Tensor, y: Tensor
) -> None:
    net.zero_grad(set_to_none=True)
    net.objective(x, y).mean().backward()
    for optimiser in net_optimisers:
        optimiser.step()


def run_comparison(
    chosen: Comparison, source: str | None, seconds: float, seed: int, only: list[str], out: Path
) -> None:
    """Trains the models one after another; prints and writes the results of each."""
    data = recipes.load(chosen.recipe, source).data.load()
    validate, test = (np.arange(size) for size in (chosen.validate, chosen.test))
    data = replace(data, validate=data.validate.take(validate), test=data.test.take(test))
    training = Training(steps=1, optimiser="muon", seed=seed, **chosen.training)
    results = json.loads(out.read_text()) if out.exists() else {}
    results.setdefault("step_seconds", measure_step_seconds(chosen, data, training))
    for name in only or chosen.models:
        timed = replace(training, steps=round(seconds / results["step_seconds"][name]))
        results[name] = train_model(chosen.models[name], data, timed, out.parent / out.stem / name)
        out.write_text(json.dumps(results, indent=1) + "\n")
        print(name, json.dumps(results[name]), flush=True)


def measure_drawing(chosen: Comparison, batches: Sequence[int], out: Path) -> dict[str, Any]:
    """CPU time per picture of a pass and of drawing in ms, and their ratio, by batch size."""
    by_model: dict[str, Any] = {}
    for name, config in chosen.models.items():
        config = replace(config, labels=0)
        net = build_model(config, 0).eval()
        torch.nn.init.normal_(net.head.weight, std=0.3)  # with zeros, only the noise would decide
        sample = roles.sample(net)
        log_px = TensorSpec(name="log_px", dtype="float32", shape=("batch",))
        log_likelihood = GraphSource(models.Pass(net), sample.outputs, (log_px,))
        for n in batches:
            calls = {
                role: _make_call(source, out / f"{name}-{role}.onnx", config.levels, n)
                for role, source in (("pass", log_likelihood), ("sample", sample))
            }
            timings = time_interleaved(calls, ROUNDS)
            times = {role: 1e3 * timing.minimum / n for role, timing in timings.items()}
            by_model.setdefault(name, {})[n] = times | {"ratio": times["sample"] / times["pass"]}
    return by_model


def _make_call(source: GraphSource, path: Path, levels: int, n: int) -> Callable[[], object]:
    """A call that runs the graph with a batch of n on one thread; exports it if necessary."""
    if not path.exists():
        graphs.write(source, path, levels, 0)
    spec = Graph(file=path.name, inputs=source.inputs, outputs=source.outputs, importance_samples=0)
    feeds = graphs.example(source.inputs, n, levels, 0, seed=0)
    names = [output.name for output in source.outputs]
    return partial(Session(path, spec, Device("cpu")).run, feeds, names)


def main() -> None:
    """Runs one comparison."""
    parser = argparse.ArgumentParser(prog="python -m bench.pixelrnn", description=__doc__)
    parser.add_argument("comparison", choices=COMPARISONS)
    parser.add_argument("--source", help="source of the pictures; for mnist, an .npz file")
    parser.add_argument("--seconds", type=float, default=60, help="CPU time for each model [60]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], help="train only these models")
    parser.add_argument("--out", type=Path, default=Path("build/pixelrnn"), help="output folder")
    parser.add_argument("--draw", action="store_true", help="measure drawing; train nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = COMPARISONS[options.comparison]
    if options.draw:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure_drawing(chosen, DRAW_BATCHES, Path(folder)), indent=1))
        return
    out = options.out / f"{options.comparison}-{options.seconds:g}-{options.seed}.json"
    run_comparison(chosen, options.source, options.seconds, options.seed, options.only, out)


if __name__ == "__main__":
    main()
