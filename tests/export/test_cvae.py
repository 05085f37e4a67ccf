import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from likely.bundle import Role
from likely.errors import InvalidInput
from likely_export import cvae as cvae_module
from likely_export import graphs, roles
from likely_export.cvae import CVAE, Conditional, CVAEConfig, Encode, Generate

SOFTMAX = CVAEConfig((1, 3, 2), 5, 3, latent=4, width=16, importance_samples=7)
LOGISTIC = replace(SOFTMAX, shape=(3, 4, 4), levels=64, logistics=2, depth=2)
PRIOR = replace(LOGISTIC, shape=(1, 4, 4), label_prior=True, convolutions=(4,), convolution_depth=2)
BINARY = CVAEConfig((1, 2, 2), 2, 2, latent=1, width=8)

every_head = pytest.mark.parametrize("config", [SOFTMAX, LOGISTIC, BINARY, PRIOR])


def cvae(config: CVAEConfig, seed: int = 0, spread: float = 1.0) -> CVAE:
    torch.manual_seed(seed)
    model = CVAE(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(spread)
    return model


def pictures(config: CVAEConfig, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    x = torch.randint(0, config.levels, (n, *config.shape), generator=generator)
    return x.to(torch.uint8), torch.randint(0, config.labels, (n,), generator=generator)


def noise(config: CVAEConfig, n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, config.latent, generator=torch.Generator().manual_seed(seed))


@every_head
def test_a_pixels_levels_sum_to_one(config: CVAEConfig) -> None:
    log_probs = cvae(config).log_probs(noise(config, 5, 1)[:, 0], torch.zeros(5).long())
    assert log_probs.shape == (5, *config.shape, config.levels)
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(()), atol=1e-5)


@every_head
def test_log_weights_are_what_their_definition_says(config: CVAEConfig) -> None:
    model, (x, y), eps = cvae(config), pictures(config, 6), noise(config, 6, 3)
    mean, log_variance = model.encode(x, y)
    posterior = torch.distributions.Normal(mean[:, None], (log_variance / 2).exp()[:, None])
    z = posterior.loc + posterior.scale * eps
    centre = model.sample_prior(torch.zeros(6, config.latent), y)
    assert config.label_prior == bool(centre.any())
    prior = torch.distributions.Normal(centre, torch.ones(()))
    for k in range(3):
        table = model.log_probs(z[:, k], y)
        log_pxz = table.gather(-1, x.long()[..., None]).flatten(1).sum(1)
        log_ratio = (prior.log_prob(z[:, k]) - posterior.log_prob(z)[:, k]).sum(-1)
        assert torch.allclose(model.log_weights(x, y, eps)[:, k], log_pxz + log_ratio, atol=1e-3)


@pytest.mark.parametrize("side", [28, 29, 31])  # 784 = 112 * 7; squares of primes
@pytest.mark.parametrize("odds", [0.0, 0.4, -30.0, 300.0, -4000.0])
def test_two_levels_of_many_pixels_neither_overflow_nor_vanish(side: int, odds: float) -> None:
    config = replace(BINARY, shape=(1, side, side))
    model, (x, y), eps = cvae(config), pictures(config, 2), noise(config, 2, 1)
    with torch.no_grad():
        model.decoder_out.bias.view(-1, 2)[:, 1] += odds
        mean, log_variance = model.encode(x, y)
        z = mean + (log_variance / 2).exp() * eps[:, 0]
        logits = model.double().decode(z.double()[:, None], y)[:, 0]
        log_probs = torch.log_softmax(logits, -1).gather(-1, x.long().flatten(1)[..., None])
        hidden = model.float()._hidden(z[:, None], y)
        found = model._log_likelihood(hidden, x.flatten(1)[:, None])
    assert found.isfinite().all()
    assert torch.allclose(found[:, 0].double(), log_probs.flatten(1).sum(1), rtol=1e-6, atol=1e-3)


def test_two_levels_of_many_pixels_do_not_round_under_mixed_precision() -> None:
    config = replace(BINARY, shape=(1, 28, 28))
    model, x = cvae(config), torch.ones(2, 1, 28, 28, dtype=torch.uint8)
    hidden = torch.ones(2, 1, config.width).bfloat16().requires_grad_()
    with torch.no_grad():
        model.decoder_out.bias.view(-1, 2)[:, 1] += 5.0  # sums of thousands that nearly cancel
    found = model._log_likelihood(hidden.float(), x.flatten(1)[:, None])
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model._log_likelihood(hidden, x.flatten(1)[:, None])
    assert torch.equal(mixed, found)
    (exact,) = torch.autograd.grad(found.sum(), hidden)
    (rounded,) = torch.autograd.grad(mixed.sum(), hidden)
    assert torch.equal(exact, rounded)


@every_head
def test_heads_are_in_float32_under_mixed_precision(config: CVAEConfig) -> None:
    model, (x, y), eps = cvae(config), pictures(config, 3), noise(config, 3, 2)
    hidden = torch.randn(3, 2, config.width).bfloat16()
    found = model._log_likelihood(hidden.float(), x.flatten(1)[:, None])
    dtypes = []
    model.decoder_out.register_forward_hook(lambda *seen: dtypes.append(seen[2].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model._log_likelihood(hidden, x.flatten(1)[:, None])
        assert model.log_weights(x, y, eps).dtype == torch.float32
    assert torch.equal(mixed, found) and set(dtypes) <= {torch.float32}


@every_head
def test_the_bound_rises_with_its_samples(config: CVAEConfig) -> None:
    model, (x, y) = cvae(config, spread=2.0), pictures(config, 20)
    with torch.no_grad():
        weights = model.log_weights(x, y, noise(config, 20, 1024))
    bounds = [
        (weights.unflatten(1, (-1, k)).logsumexp(2) - math.log(k)).mean(1) for k in (1, 4, 32, 1024)
    ]
    assert torch.equal(bounds[0], model.elbo(x, y, noise(config, 20, 1024)))
    means = [bound.mean().item() for bound in bounds]
    assert means == sorted(means) and means[-1] - means[0] > 0.01


def test_the_bound_converges_to_log_p_and_that_sums_to_one_over_all_pictures() -> None:
    model = cvae(BINARY, spread=1.5)
    every = torch.tensor(list(itertools.product((0, 1), repeat=4)), dtype=torch.uint8)
    x = every.view(16, 1, 2, 2)
    nodes, shares = np.polynomial.hermite_e.hermegauss(80)
    z = torch.from_numpy(nodes).float()[:, None]
    for label in range(BINARY.labels):
        y = torch.full((16,), label)
        with torch.no_grad():
            tables = model.log_probs(z, torch.full((80,), label)).flatten(1, 3)
            log_pxz = tables[:, torch.arange(4), every.long()].sum(-1)  # (80, 16)
            px = (torch.from_numpy(shares / math.sqrt(2 * math.pi)) @ log_pxz.double().exp()).log()
            bound = model.iwae(x, y, noise(BINARY, 16, 50_000))
        assert px.exp().sum().item() == pytest.approx(1, abs=1e-6)
        assert torch.allclose(bound.double(), px, atol=0.02)
        assert bound.exp().sum().item() == pytest.approx(1, abs=0.01)


@every_head
def test_training_reaches_every_weight(config: CVAEConfig) -> None:
    model, (x, y) = cvae(replace(config, training_samples=2)).train(), pictures(config, 64)
    objective = model.objective(x, y)
    assert objective.shape == (64,) and objective.isfinite().all()
    objective.mean().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name


def test_evaluation_is_the_same_at_every_call_and_leaves_the_global_generator_alone() -> None:
    model, (x, y) = cvae(SOFTMAX), pictures(SOFTMAX, 9)
    before = torch.get_rng_state()
    assert torch.equal(model.evaluate(x, y), model.evaluate(x, y))
    assert torch.equal(torch.get_rng_state(), before)


@every_head
def test_evaluation_takes_no_more_at_once_than_memory_may_hold(
    config: CVAEConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (x, y) = cvae(config), pictures(config, 9)
    whole, bound = model.evaluate(x, y), model.iwae
    seen: list[int] = []

    def iwae(x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
        seen.append(len(x))
        return bound(x, y, eps)

    monkeypatch.setattr(model, "iwae", iwae)
    each = config.importance_samples * model.decoder_out.out_features
    for at_once, rows in ((4 * each, [4, 4, 1]), (1, [1] * 9)):
        monkeypatch.setattr(cvae_module, "OUTPUTS_PER_STEP", at_once)
        seen.clear()
        assert torch.allclose(model.evaluate(x, y), whole, atol=1e-4) and seen == rows


@every_head
def test_all_labels_at_once_are_the_labels_one_by_one(config: CVAEConfig) -> None:
    model, (x, _), eps = cvae(config), pictures(config, 5), noise(config, 5, 7)
    together = Conditional(model)(x, eps)
    assert together.shape == (5, config.labels)
    for label in range(config.labels):
        alone = model.iwae(x, torch.full((5,), label), eps)
        assert torch.allclose(together[:, label], alone, atol=1e-4)


def test_drawn_levels_are_as_frequent_as_they_are_probable() -> None:
    model, n = cvae(SOFTMAX, spread=2.0), 4000
    y, z = torch.ones(n).long(), noise(SOFTMAX, 1, 1)[0].expand(n, -1)
    uniform = torch.rand(n, 3, 2, 1, 5, generator=torch.Generator().manual_seed(1))
    drawn = Generate(model)(y, z, -(-uniform.log()).log())
    assert drawn.dtype == torch.uint8 and drawn.shape == (n, *SOFTMAX.shape)
    frequencies = torch.stack([(drawn == level).float().mean(0) for level in range(5)], -1)
    assert torch.allclose(frequencies, model.log_probs(z[:1], y[:1])[0].exp(), atol=0.04)


@pytest.mark.parametrize(
    ("config", "role"),
    [
        (SOFTMAX, Role.CONDITIONAL),
        (LOGISTIC, Role.CONDITIONAL),
        (SOFTMAX, Role.GENERATE),
        (LOGISTIC, Role.GENERATE),
        (LOGISTIC, Role.ENCODE),
        (PRIOR, Role.CONDITIONAL),
        (PRIOR, Role.GENERATE),
        (PRIOR, Role.ENCODE),
    ],
)
def test_graphs_pass_the_parity_gate(config: CVAEConfig, role: Role, opened: Any) -> None:
    model = cvae(config)
    session = opened(roles.graph_source(role, [model], ()), config.levels, config.labels)
    module: Any = {"conditional": Conditional, "generate": Generate, "encode": Encode}[role](model)
    source = roles.graph_source(role, [model], ())
    for n in (1, 3, 64):
        feeds = graphs.example(source.inputs, n, config.levels, config.labels, seed=n)
        expected = module(*map(torch.from_numpy, feeds.values()))
        found = session.run(feeds, [spec.name for spec in source.outputs])
        for value, got in zip(expected if role == Role.ENCODE else (expected,), found, strict=True):
            assert np.abs(value.detach().numpy().astype(float) - got).max() <= 1e-3


def test_with_labels_in_the_prior_only_the_prior_tells_them_apart() -> None:
    model, (x, _), eps = cvae(PRIOR), pictures(PRIOR, 4), noise(PRIOR, 4, 5)
    labels = torch.arange(PRIOR.labels)
    weights = model.log_weights_of_features(
        model.features(x)[:, None], x.flatten(1)[:, None, None], labels, eps[:, None]
    )
    mean, log_variance = model.encode(x, labels[:1])
    z = mean[:, None] + (log_variance / 2).exp()[:, None] * eps
    away = (z[:, None] - model.centre.weight[:, None]).square().sum(-1) / 2
    assert torch.allclose(weights[:, :1] - weights, away - away[:, :1], atol=1e-3)


@pytest.mark.parametrize("field", ["latent", "importance_samples", "depth"])
def test_sizes_of_zero_are_refused(field: str) -> None:
    with pytest.raises(InvalidInput, match=field):
        replace(SOFTMAX, **{field: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["labels", "logistics"])
def test_fewer_than_none_are_refused(field: str) -> None:
    with pytest.raises(InvalidInput, match=f"{field}: -1; at least 0 is needed"):
        replace(SOFTMAX, **{field: -1})  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [0, -1])
def test_convolutions_of_no_channels_are_refused(channels: int) -> None:
    with pytest.raises(InvalidInput, match=r"convolutions: .*; at least 1 is needed"):
        replace(SOFTMAX, convolutions=(4, channels))
