"""Runs over many pictures, batch by batch, of a graph's module."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from likely import machine, noise
from likely.answers import Pixels
from likely.bundle import Graph, TensorSpec
from likely.graphs import Array, Session
from likely_export import passes
from likely_export.roles import GraphSource

SHAPE = (1, 4, 3)


def pictures(n: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 4, (n, *SHAPE)).astype(np.uint8)


def spec(name: str, dtype: str, *axes: int) -> TensorSpec:
    return TensorSpec.model_validate({"name": name, "dtype": dtype, "shape": ("batch", *axes)})


class Noisy(nn.Module):
    """Takes pictures and noise, and gives them added, and multiplied."""

    def forward(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        return x.float() + eps, x.float() * eps


def test_outputs_are_those_of_all_rows_in_the_order_asked() -> None:
    x = pictures(2 * passes.BATCH + 1)
    eps = noise.common(x.shape)  # one for all, which nothing may write to
    inputs = (spec("x", "uint8", *SHAPE), spec("eps", "float32", *SHAPE))
    outputs = (spec("sum", "float32", *SHAPE), spec("product", "float32", *SHAPE))
    source = GraphSource(Noisy(), inputs, outputs)
    product, total = passes.run_module(source, {"eps": eps, "x": x}, ["product", "sum"])
    assert np.array_equal(product, x * eps) and np.array_equal(total, x + eps)


def test_the_common_noise_is_fed_to_graphs_that_take_it() -> None:
    x, own = pictures(5), (spec("x", "uint8", *SHAPE),)
    plain = Graph(file="plain.onnx", inputs=own, outputs=(), importance_samples=0)
    assert passes.picture_feeds(plain, x) == {"x": x}
    noisy = plain.model_copy(update={"inputs": (*own, spec("eps", "float32", 2, 3))})
    fed = passes.picture_feeds(noisy, x)
    assert fed["x"] is x and np.array_equal(fed["eps"], noise.common((5, 2, 3)))


class Wide(nn.Module):
    """Gives a small output beside a large one, and looks whether any is still kept."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert all(output() is None for output in self.given)
        outputs = x.float().repeat(1, 100, 1, 1), x.float().sum((1, 2, 3))
        self.given += map(weakref.ref, outputs)
        return outputs


def test_no_output_of_a_batch_is_kept() -> None:
    outputs = (spec("large", "float32", 100, *SHAPE[1:]), spec("sum", "float32"))
    module, x = Wide(), pictures(3 * passes.BATCH)
    (found,) = passes.run_module(
        GraphSource(module, (spec("x", "uint8", *SHAPE),), outputs), {"x": x}, ["sum"]
    )
    assert len(module.given) == 6 and np.array_equal(found, x.sum((1, 2, 3)))


class Turned:
    """A graph's session whose first batch is answered only after its second."""

    def __init__(self) -> None:
        self.second = threading.Event()

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        x = feeds["x"]
        first = x[0, 0] == 0
        if not first:
            self.second.set()
        assert self.second.wait(30), "batches run one after another"
        return [x * 2 if name == "twice" else -x for name in outputs]


class Counted(nn.Module):
    """Gives how many pictures it was called with."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.full((len(x),), float(len(x)))


def test_a_module_is_called_with_as_many_as_asked_and_convolves_with_channels_last() -> None:
    module = nn.Sequential(nn.Conv2d(3, 2, (2, 3)), Counted())
    source = GraphSource(module, (spec("x", "float32", 3, 4, 5),), (spec("n", "float32"),))
    (found,) = passes.run_module(source, {"x": np.zeros((5, 3, 4, 5), np.float32)}, ["n"], batch=2)
    assert found.tolist() == [2, 2, 2, 2, 1]
    kernel = module[0].weight
    assert isinstance(kernel, Tensor) and kernel.is_contiguous(memory_format=torch.channels_last)


def test_batches_run_beside_each_other_and_keep_their_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 2)
    x = np.arange(7.0)[:, None]
    less, twice = passes.run_graph(cast(Session, Turned()), {"x": x}, ["less", "twice"], batch=3)
    assert np.array_equal(less, -x) and np.array_equal(twice, 2 * x)
