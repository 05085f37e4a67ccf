"""Runs over many pictures, batch by batch, of a graph's module."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from likely import noise
from likely.answers import Pixels
from likely.bundle import TensorSpec
from likely.graphs import Array
from likely_export import families, passes, roles
from likely_export.autoregressive import Autoregressive
from likely_export.cvae import CVAE
from likely_export.roles import GraphSource

SHAPE, LEVELS, LABELS = (1, 4, 3), 4, 2


def pictures(n: int) -> Pixels:
    return np.random.default_rng(0).integers(0, LEVELS, (n, *SHAPE)).astype(np.uint8)


def test_outputs_are_those_of_all_rows_at_once_in_the_order_asked() -> None:
    exact, bound = (
        families.create(name, options, shape=SHAPE, levels=LEVELS, labels=LABELS, seed=0).eval()
        for name, options in (
            ("pixelcnn", {"channels": 4, "layers": 1, "head": 4}),
            ("cvae", {"latent": 2, "width": 8, "importance_samples": 2}),
        )
    )
    assert isinstance(exact, Autoregressive) and isinstance(bound, CVAE)
    source = roles.conditional(exact, bound)
    x = pictures(2 * passes.BATCH + 1)
    feeds: dict[str, Array] = {"eps": noise.common((len(x), 2, 2)), "x": x}
    with torch.no_grad():
        _, evidence, surprise = source.module(*map(torch.from_numpy, (x, feeds["eps"].copy())))
    found = passes.torch_rows(source, feeds, ["surprise", "evidence"])
    for ours, whole in zip(found, (surprise, evidence), strict=True):
        assert ours.shape == whole.shape and ours == pytest.approx(whole.numpy(), abs=1e-4)


class Wide(nn.Module):
    """Gives a small output beside a large one, and looks whether any large one is still kept."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert all(large() is None for large in self.given)
        large = x.float().repeat(1, 100, 1, 1)
        self.given.append(weakref.ref(large))
        return large, x.float().sum((1, 2, 3))


def test_outputs_that_are_not_asked_for_are_not_kept() -> None:
    axes = {"x": ("uint8", SHAPE), "large": ("float32", (100, *SHAPE[1:])), "sum": ("float32", ())}
    x_spec, *outputs = (
        TensorSpec.model_validate({"name": name, "dtype": dtype, "shape": ("batch", *shape)})
        for name, (dtype, shape) in axes.items()
    )
    module, x = Wide(), pictures(3 * passes.BATCH)
    (found,) = passes.torch_rows(GraphSource(module, (x_spec,), tuple(outputs)), {"x": x}, ["sum"])
    assert len(module.given) == 3 and np.array_equal(found, x.sum((1, 2, 3)))
