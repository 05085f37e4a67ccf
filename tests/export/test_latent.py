"""VAE and autoencoder: bounds, moments, draws, and the bundles that they become."""

from __future__ import annotations

import asyncio
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from likely.bundle import Bundle, Role
from likely.engine import Engine
from likely.errors import InvalidInput, NotAnswered
from likely.graphs import Device
from likely.latent import Drawing
from likely_export import families, features, logistic, recipes, roles, runs
from likely_export.build import build
from likely_export.cvae import CVAEConfig
from likely_export.features import Sizes
from likely_export.vae import VAE, Pixels, noise_axes

pytestmark = pytest.mark.timeout(900)  # they train, on whatever is left of the machine
ENUMERABLE = CVAEConfig((1, 2, 2), 2, 0, latent=1, width=8)
EVERY = torch.tensor(list(itertools.product(range(2), repeat=4))).view(16, 1, 2, 2).byte()
NONE = torch.zeros(16, dtype=torch.int64)


def vae(config: CVAEConfig) -> VAE:
    torch.manual_seed(0)
    model = VAE(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2)
    return model


@torch.no_grad()
def exact(model: VAE) -> Tensor:
    """log p(x) of all 2 x 2 pictures, integrated over z on a grid."""
    z = torch.linspace(-8, 8, 4001)[:, None]
    tables = model.log_probs(z, torch.zeros(len(z)).long())
    log_pxz = torch.stack(
        [tables.gather(-1, x.expand(len(z), -1, -1, -1)[..., None].long()).sum((1, 2, 3, 4))
         for x in EVERY]
    )  # fmt: skip
    log_prior = -0.5 * z[:, 0].square() - 0.5 * math.log(2 * math.pi)
    return torch.logsumexp(log_pxz + log_prior, 1) + math.log(16 / 4000)


@torch.no_grad()
def test_bounds_lie_below_log_px_and_rise_with_k() -> None:
    model = vae(ENUMERABLE)
    log_px = exact(model)
    assert log_px.exp().sum() == pytest.approx(1, abs=1e-4)
    eps = torch.randn(16, 4000, 64, 1, generator=torch.Generator().manual_seed(1))
    weights = model.log_weights(EVERY, NONE, eps.view(16, -1, 1)).view(16, 4000, 64)
    bounds = [(torch.logsumexp(weights[..., :k], -1) - math.log(k)).mean(1) for k in (1, 4, 16, 64)]
    assert all(bool((b > a).all()) for a, b in itertools.pairwise(bounds))
    assert bool((bounds[-1] < log_px + 1e-2).all())
    assert bounds[-1].numpy() == pytest.approx(log_px.numpy(), abs=0.15)  # 64 samples are not all


def test_no_label_is_looked_at() -> None:
    model, eps = vae(ENUMERABLE), torch.randn(16, 3, 1)
    assert torch.equal(model.iwae(EVERY, NONE, eps), model.iwae(EVERY, NONE + 7, eps))
    assert not [name for name, _ in model.named_parameters() if "label" in name]
    for option in ({"contrast": 1.0}, {"label_prior": True}):
        with pytest.raises(InvalidInput, match="there are none"):
            CVAEConfig((1, 2, 2), 2, 0, **option)


@pytest.mark.parametrize(("levels", "logistics"), [(2, 0), (5, 0), (17, 2), (256, 1)])
@torch.no_grad()
def test_moments_and_draws_are_those_of_the_table(levels: int, logistics: int) -> None:
    model = vae(CVAEConfig((1, 2, 3), levels, 0, latent=2, width=8, logistics=logistics))
    pixels, z = Pixels(model), torch.randn(3, 2, generator=torch.Generator().manual_seed(2))
    parameters = pixels.parameters_of(z, torch.zeros(3).long())
    p = model.log_probs(z, torch.zeros(3).long()).double().exp()
    scale = torch.linspace(0, 1, levels).double()
    mean, deviation = pixels.moments(parameters)
    expected = p @ scale
    spread = torch.sqrt((p * (scale - expected[..., None]).square()).sum(-1))
    assert mean.numpy() == pytest.approx(expected.numpy(), abs=1e-5)
    assert deviation.numpy() == pytest.approx(spread.numpy(), abs=1e-5)

    n, axes = 4000, noise_axes(model)
    gumbel = np.random.default_rng(0).gumbel(size=(n, *axes)).astype(np.float32)
    repeated = parameters[:1].expand(n, *parameters.shape[1:])
    drawn = pixels.draw(repeated, torch.from_numpy(gumbel)).long()
    assert int(drawn.min()) >= 0 and int(drawn.max()) < levels
    share = torch.nn.functional.one_hot(drawn, levels).double().mean(0)
    error = torch.sqrt(p[0] * (1 - p[0]) / n)
    assert bool(((share - p[0]).abs() <= 5 * error + 1e-3).all())


@torch.no_grad()
def test_moments_stay_finite_however_far_features_go() -> None:
    parameters = torch.randn(4, 3, 1, 6) * 1e8
    assert all(bool(part.isfinite().all()) for part in logistic.moments(parameters, 256))


def test_an_autoencoder_has_no_graph_that_draws() -> None:
    options = {"latent": 2, "width": 8}
    model = families.create("autoencoder", options, shape=(1, 4, 4), levels=5, labels=3, seed=0)
    for role in (Role.GENERATE, Role.SAMPLE, Role.DENSITY, Role.CONDITIONAL):
        with pytest.raises(InvalidInput, match="no such graph"):
            roles.graph_source(role, [model], ())
    assert [spec.name for spec in roles.graph_source(Role.DECODE, [model], ()).outputs] == ["mean"]


RECIPE = """
name = "tiny"
version = "1"
[data]
source = "digits"
splits = { fit = 200, calibrate = 60, validate = 60, test = 100 }
[models.m]
family = "%s"
width = 48
latent = 6
training = { steps = 150, batch = 64, validations = 1 }
[roles]
encode = "m"
decode = "m"
%s
[latent]
attributes = ["slant", "size"]
"""


def built(folder: Path, family: str, more: str = "") -> Engine:
    recipe = recipes.parse(RECIPE % (family, more))
    runs.train_all(recipe, folder / "run")
    build(folder / "run", folder / "bundle", lambda _: None)
    bundle = Bundle.open(folder / "bundle")
    return Engine.load(bundle, device=Device("cpu"), threads=1, max_batch=4)


def test_a_vae_becomes_a_bundle_that_draws_and_has_directions(tmp_path: Path) -> None:
    engine = built(tmp_path, "vae", 'generate = "m"')
    data = recipes.parse(RECIPE % ("vae", 'generate = "m"')).data.load()
    x = data.test.x[:5]

    async def ask() -> tuple[Any, ...]:
        whole = np.concatenate([c.images async for c in engine.generate(None, 5, 3, chunk=5)])
        later = [chunk async for chunk in engine.generate(None, 2, 3, first_index=3, chunk=1)]
        encoded = await engine.encode(x)
        own = await engine.decode(encoded.mean, None, Drawing(2, seed=1))
        moved = await engine.traverse(x, "slant", np.array([0.0, 1.0]), Drawing(2, seed=1))
        return whole, later, encoded, own, moved

    whole, later, encoded, own, moved = asyncio.run(ask())
    engine.close()
    assert np.array_equal(whole[3:], np.concatenate([chunk.images for chunk in later]))
    assert len({picture.tobytes() for picture in whole}) == 5
    assert encoded.log_variance is not None and encoded.mean.shape == (5, 6)
    assert np.array_equal(own.mean, moved.mean[:, 0])
    assert np.array_equal(own.drawn, moved.drawn[:, 0])
    assert engine.manifest.labels == () and engine.manifest.calibration is None
    names = [d.name for d in Bundle.open(tmp_path / "bundle").manifest.latent.directions]  # type: ignore[union-attr]
    assert names == ["slant", "size", *(f"label {i}" for i in range(10))]
    figures = features.evaluate(
        tmp_path / "bundle", data, Sizes((100, 300), 100, traversed=4, draws=1, steps=20)
    )
    assert set(figures["probe"]) == {"features", "pixels", "principal_components"}
    assert figures["probe"]["features"]["300"] > 0.5
    assert set(figures["traversal"]) == {"slant", "size"}


def test_an_autoencoder_becomes_a_bundle_that_cannot_draw(tmp_path: Path) -> None:
    engine = built(tmp_path, "autoencoder")
    x = np.zeros((2, 1, 8, 8), np.uint8)
    assert engine.manifest.deterministic
    assert [m for m in ("Score", "Classify", "Generate", "Complete") if engine.answers(m)] == []
    with pytest.raises(NotAnswered, match="no density graph"):
        _ = engine.detector
    with pytest.raises(NotAnswered):
        asyncio.run(engine.score(x, 0.05))
    with pytest.raises(NotAnswered, match="nothing can be drawn"):
        asyncio.run(engine.traverse(x, "slant", np.zeros(1), Drawing(1)))
    engine.close()
