import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import autoregressive
import numpy as np
import pytest
import torch
from autoregressive import CONFIGS, Opener

from likely.errors import InvalidInput
from likely_export import families, roles
from likely_export.autoregressive import AutoregressiveConfig
from likely_export.heads import PixelHead
from likely_export.moves import Moves
from likely_export.pixelcnn import PixelCNNConfig
from likely_export.pixelrnn import PixelRNNConfig
from likely_export.statistics import STATISTICS

EVERY = pytest.mark.parametrize("name", CONFIGS)
NAMES = tuple(name for name, each in STATISTICS.items() if each.needs is None)


@pytest.mark.parametrize(
    ("family", "options", "says"),
    [
        ("pixelcnn", {"digits": 0}, "digits: 0; at least 1"),
        ("pixelcnn", {"channels": 0}, "channels: 0; at least 1"),
        ("pixelcnn", {"logistics": -1}, "logistics: -1; at least 0 is needed"),
        ("pixelcnn", {"stem": (0, 0, 0)}, r"stem: \[0, 0, 0\]; at least \[1, 0, 1\]"),
        ("pixelcnn", {"row_layers": 1, "row_width": 30}, "row_width: 30 is no multiple of 4"),
        ("pixelcnn", {"row_layers": 1, "row_heads": 0}, "row_heads: 0; at least 1"),
        ("pixelrnn", {"layers": 0}, "layers: 0; at least 1"),
        ("local", {"digits": 0}, "digits: 0; at least 1"),
    ],
)
def test_options_of_which_no_model_can_be_made_are_named(
    family: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidInput, match=says):
        families.create(family, options, shape=(1, 3, 3), levels=4, labels=2, seed=0)


@EVERY
def test_every_digit_has_a_distribution(name: str) -> None:
    config = CONFIGS[name]
    log_probs = autoregressive.model(name).log_probs(autoregressive.pictures(config, 3))
    c, h, w = config.shape
    assert log_probs.shape[:-1] == (3, h, w, c * config.digits)
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(()), atol=1e-5)


@EVERY
def test_no_pixel_sees_itself_or_what_follows(name: str) -> None:
    model, config = autoregressive.model(name), CONFIGS[name]
    x, y = autoregressive.pictures(config, 1), autoregressive.labels(config, 1)
    before = model.log_probs(x, y)
    c, h, w = config.shape
    for order, (i, j, k) in enumerate(itertools.product(range(h), range(w), range(c))):
        changed = x.clone()
        changed[0, k, i, j] = (int(x[0, k, i, j]) + 1) % config.levels
        moved = (model.log_probs(changed, y) - before).abs().amax(-1).flatten()
        own = order * config.digits
        assert torch.all(moved[: own + 1] == 0), f"{name}: pixel {i, j}, channel {k}"
        if order < c * h * w - 1 and k == c - 1 and j < w - 1:
            assert moved[own + config.digits] > 0, "the next pixel must see this one"


@EVERY
def test_no_pixel_sees_itself_or_what_follows_in_onnx(name: str, opened: Opener) -> None:
    model, config = autoregressive.model(name), CONFIGS[name]
    session = opened(roles.density(model, NAMES), config.levels, config.labels)
    c, h, w = config.shape
    x = autoregressive.pictures(config, 1).numpy()
    positions = list(itertools.product(range(h), range(w), range(c)))
    changed = np.repeat(x, len(positions), 0)
    for row, (i, j, k) in enumerate(positions):
        changed[row, k, i, j] = (int(x[0, k, i, j]) + 1) % config.levels
    (before,) = session.run({"x": np.repeat(x, len(positions), 0)}, ["surprise"])
    (after,) = session.run({"x": changed}, ["surprise"])
    moved = (after != before).transpose(0, 2, 3, 1).reshape(len(positions), -1)
    for row in range(len(positions)):
        assert not moved[row, :row].any()
        assert moved[row, row:].any()


def every(shape: tuple[int, int, int], levels: int) -> np.ndarray:
    """All pictures of that shape, uint8 (levels ** (c * h * w), c, h, w)."""
    size = int(np.prod(shape))
    found = list(itertools.product(range(levels), repeat=size))
    return np.array(found, np.uint8).reshape(-1, *shape)


@pytest.mark.parametrize(
    "config",
    [
        PixelCNNConfig((1, 2, 2), 2, channels=4, layers=2, head=4),
        PixelCNNConfig((3, 2, 1), 2, labels=2, channels=4, layers=1, head=4, positions=True),
        PixelCNNConfig(
            (1, 3, 3), 2, labels=2, channels=4, layers=2, head=4, gated=False,
            row_layers=1, row_width=8, row_heads=2,
        ),
        PixelRNNConfig((1, 3, 3), 2, channels=4, layers=2, head=4, kind="row"),
        PixelRNNConfig((3, 2, 2), 2, channels=4, layers=2, head=4, kind="diagonal"),
        PixelCNNConfig((3, 1, 2), 4, channels=4, layers=1, head=4, digits=2),
        PixelCNNConfig((3, 1, 2), 4, channels=4, layers=1, head=4, digits=2, logistics=3),
    ],
    ids=["grey", "colour", "rows", "row_lstm", "diagonal_lstm", "colour_digits", "mixture"],
)  # fmt: skip
def test_probabilities_of_all_pictures_sum_to_one_in_onnx(
    config: AutoregressiveConfig, opened: Opener
) -> None:
    model = autoregressive.randomised(config, 1.0)
    everything = every(config.shape, config.levels)
    session = opened(roles.density(model, NAMES), config.levels, config.labels)
    (log_px,) = session.run({"x": everything}, ["log_px"])
    assert np.exp(log_px.astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)
    assert np.ptp(log_px) > 0.5, "the model must prefer some pictures"
    if config.labels:
        session = opened(roles.conditional(model), config.levels, config.labels)
        (log_pxy,) = session.run({"x": everything}, ["log_pxy"])
        assert np.exp(log_pxy.astype(np.float64)).sum(0) == pytest.approx(1, abs=1e-5)


@EVERY
def test_surprise_sums_to_the_log_likelihood(name: str) -> None:
    model, config = autoregressive.model(name), CONFIGS[name]
    x, y = autoregressive.pictures(config, 4), autoregressive.labels(config, 4)
    surprise = model.surprise(x, y)
    assert surprise.shape == x.shape
    assert torch.allclose(surprise.sum((1, 2, 3)), -model.log_prob(x, y))


def binary(name: str) -> AutoregressiveConfig:
    """The same for pictures of two levels, labels never withheld."""
    return replace(CONFIGS[name], levels=2, digits=1, label_dropout=0.0)


@EVERY
def test_a_pixel_yet_to_be_drawn_costs_the_mean_of_what_its_draws_cost(name: str) -> None:
    config = binary(name)
    model = autoregressive.randomised(config)
    x, y = autoregressive.pictures(config, 4), autoregressive.labels(config, 4)
    chances = torch.rand(x.shape, generator=torch.Generator().manual_seed(3))
    mean = model.head.expected(model.log_probs(x, y), chances)
    for place in itertools.product(*map(range, config.shape)):
        at: Any = (slice(None), *place)
        for level in (0, 1):
            drawn = x.clone()
            drawn[at] = level
            weight = chances[at] if level else 1 - chances[at]
            mean[at] -= weight * model.surprise(drawn, y)[at]
    assert mean.abs().max() < 1e-5
    objective = model.expected_objective(x, torch.zeros(4).long() if y is None else y, chances)
    expected = model.head.expected(model.log_probs(x, y), chances)
    assert torch.allclose(objective, expected.sum((1, 2, 3)))


@EVERY
def test_the_coins_of_a_draw_spread_its_objective_less_where_they_are_averaged(name: str) -> None:
    config = binary(name)
    model = autoregressive.randomised(config, 0.1)
    generator = torch.Generator().manual_seed(3)
    chances = torch.rand(config.shape, generator=generator).expand(2000, *config.shape)
    x = torch.bernoulli(chances, generator=generator).byte()
    y = torch.zeros(len(x)).long()
    drawn, mean = model.objective(x, y), model.expected_objective(x, y, chances)
    assert mean.std() < 0.8 * drawn.std()
    error = (drawn - mean).std() / len(x) ** 0.5
    assert (drawn - mean).mean().abs() < 4 * error


def moved(config: AutoregressiveConfig, **options: Any) -> AutoregressiveConfig:
    """The same with two labels, some of which are withheld, and moves."""
    return replace(config, labels=2, label_dropout=0.25, moves=Moves(flip=True), **options)


@EVERY
def test_half_of_the_pictures_are_moved_and_marked_and_labels_of_some_withheld(name: str) -> None:
    model = autoregressive.untrained(moved(CONFIGS[name]))
    x = autoregressive.pictures(model.config, 1).expand(4000, -1, -1, -1)
    y = torch.arange(4000) % 2
    augmented, marked = model.augment(x, y)
    changed = (augmented != x).flatten(1).any(1)
    assert torch.equal(augmented[changed], x[changed].flip(-1))
    assert not (changed & (marked < 3)).any()  # what is moved is marked; half of that is flipped
    shares = torch.bincount(marked, minlength=6) / 4000  # 0, 1, none, and the same moved
    assert torch.allclose(shares, torch.tensor([3, 3, 2, 3, 3, 2]) / 16, atol=0.03)
    assert torch.all((marked % 3 == y) | (marked % 3 == 2))
    assert abs(changed.float().mean() - 0.25) < 0.03


@EVERY
def test_what_is_learnt_of_moved_pictures_alone_is_not_the_density(name: str) -> None:
    plain = autoregressive.randomised(replace(CONFIGS[name], labels=2))
    model = autoregressive.untrained(moved(CONFIGS[name]))
    model.load_state_dict(plain.state_dict(), strict=False)  # all but what is added for moves
    x, y = autoregressive.pictures(model.config, 4), torch.tensor([0, 1, 2, 1])
    own = [weight for key, weight in model.named_parameters() if key.endswith("label.moved")]
    assert own and not any(weight.abs().sum() for weight in own)
    model.train()
    model.loss(x, y + 3).sum().backward()
    with torch.no_grad():
        for weight in own:
            assert weight.grad is not None and weight.grad.abs().sum() > 0
            weight.add_(1.0)
    assert not torch.allclose(model.loss(x, y + 3), model.loss(x, y))
    assert torch.allclose(model.loss(x, y), -plain.log_prob(x, y))
    model.eval()
    assert torch.allclose(model.log_prob(x, y), plain.log_prob(x, y))


@EVERY
def test_the_coins_of_moved_pictures_are_thrown_anew(name: str) -> None:
    model = autoregressive.randomised(moved(CONFIGS[name], levels=2, digits=1))
    model.train()
    x = autoregressive.pictures(model.config, 1).expand(64, -1, -1, -1)
    y = torch.arange(64) % 2
    torch.manual_seed(0)
    drawn = model.objective(x, y)
    torch.manual_seed(0)
    assert torch.allclose(model.expected_objective(x, y, x.float()), drawn)  # of certain coins
    assert len(drawn.unique()) == 9  # of a label, another or none; not moved, moved, and flipped


@EVERY
@pytest.mark.parametrize("offset", [0, 5], ids=["as_they_come", "moved"])
def test_a_wrong_label_is_contrasted_with_the_own_where_that_is_known(
    name: str, offset: int
) -> None:
    config = moved(CONFIGS[name], contrast=0.5)
    config = replace(config, labels=4)
    model = autoregressive.randomised(config, 0.1).train()
    plain = autoregressive.randomised(replace(config, contrast=0.0), 0.1).train()
    x, y = autoregressive.pictures(config, 50), torch.arange(50) % 5  # the last is none
    given = torch.stack([plain.loss(x, torch.full((50,), offset + label)) for label in range(5)])
    own = given[y, torch.arange(50)]
    shares = model.loss(x, y + offset) - own
    possible = 0.5 * 3 * torch.nn.functional.softplus(own - given[:4])
    possible[y.clamp(max=3), torch.arange(50)] = torch.nan  # never its own
    known = y < 4
    assert not shares[~known].any()
    found = torch.isclose(shares, possible, rtol=1e-3, atol=1e-3)[:, known]
    assert found.any(0).all() and found.any(1).all()


@EVERY
def test_the_contrast_is_of_coins_as_they_fell(name: str) -> None:
    config = moved(CONFIGS[name], levels=2, digits=1)
    model = autoregressive.randomised(replace(config, contrast=0.5), 0.1).train()
    plain = autoregressive.randomised(config, 0.1).train()
    x, y = autoregressive.pictures(config, 20), torch.arange(20) % 2
    fair, certain = torch.full(x.shape, 0.5), x.float()
    shares = [model.loss(x, y, chances) - plain.loss(x, y, chances) for chances in (fair, certain)]
    assert torch.allclose(shares[0], shares[1], rtol=1e-3, atol=1e-3) and shares[0].min() > 0


def test_a_contrast_needs_another_label() -> None:
    with pytest.raises(InvalidInput, match="contrast: needs two labels; there are 1"):
        replace(CONFIGS["grey"], labels=1, contrast=1.0)
    with pytest.raises(InvalidInput, match="contrast: -1; at least 0"):
        replace(CONFIGS["grey"], labels=2, contrast=-1)


def test_without_labels_moved_pictures_could_not_be_told_apart() -> None:
    with pytest.raises(InvalidInput, match="moves: need labels, among which moved pictures are"):
        replace(CONFIGS["grey"], labels=0, moves=Moves(shift=1))


@EVERY
def test_gradient_reaches_every_parameter(name: str) -> None:
    config = CONFIGS[name]
    model = autoregressive.untrained(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    x, y = autoregressive.pictures(config, 8), autoregressive.labels(config, 8)
    model.log_prob(x, y).sum().backward()
    for parameter, weight in model.named_parameters():
        if weight.numel():  # a head of one digit has no embedding
            assert weight.grad is not None and weight.grad.abs().sum() > 0, parameter


@EVERY
def test_a_batch_is_its_pictures_one_by_one(name: str) -> None:
    model, config = autoregressive.model(name), CONFIGS[name]
    x, y = autoregressive.pictures(config, 5), autoregressive.labels(config, 5)
    alone = [model.log_prob(x[k : k + 1], None if y is None else y[k : k + 1]) for k in range(5)]
    assert torch.allclose(model.log_prob(x, y), torch.cat(alone), atol=1e-4)


@EVERY
def test_matrices_are_weights_of_the_model_named_once(name: str) -> None:
    model = autoregressive.model(name)
    own = {id(weight) for weight in model.parameters()}
    found = [id(weight) for weight in model.matrices()]
    assert set(found) <= own and len(found) == len(set(found))


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if config.labels])
def test_withheld_labels_give_the_marginal_model(name: str) -> None:
    model, config = autoregressive.model(name), CONFIGS[name]
    x = autoregressive.pictures(config, 5)
    null = torch.full((5,), model.null_label)
    assert torch.equal(model.log_prob(x), model.log_prob(x, null))
    assert not torch.allclose(model.log_prob(x), model.log_prob(x, torch.zeros(5).long()))


def test_levels_that_are_no_power_are_refused() -> None:
    with pytest.raises(ValueError, match="17 levels cannot be written with 2 equal digits"):
        PixelHead(8, 1, 17, digits=2)


def test_export_leaves_no_trace_of_the_machine(tmp_path: Path) -> None:
    from likely_export import graphs

    path = tmp_path / "density.onnx"
    graphs.write(roles.density(autoregressive.model("grey"), NAMES), path, 3, 0)
    content = path.read_bytes()
    for trace in (str(Path(graphs.__file__).parent), "site-packages", "likely_export", ".py"):
        assert trace.encode() not in content
