"""The model of neighbours only: a true density that sees nothing else."""

import itertools

import numpy as np
import pytest
import torch
from autoregressive import CONFIGS, Opener
from autoregressive import model as pixelcnn

from likely_export import roles
from likely_export.cvae import CVAE, CVAEConfig
from likely_export.local import LocalConfig, LocalPixelCNN
from likely_export.statistics import STATISTICS


def local(shape: tuple[int, int, int], levels: int, digits: int = 1) -> LocalPixelCNN:
    torch.manual_seed(3)
    model = LocalPixelCNN(LocalConfig(shape, levels, channels=24, digits=digits)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape) * 0.3)
    return model


@pytest.mark.parametrize(("levels", "digits"), [(2, 1), (4, 2)])
def test_probabilities_of_all_pictures_sum_to_one(levels: int, digits: int) -> None:
    model = local((1, 2, 2), levels, digits)
    every = torch.tensor(list(itertools.product(range(levels), repeat=4)), dtype=torch.uint8)
    total = model.log_prob(every.view(-1, 1, 2, 2)).double().exp().sum()
    assert float(total.detach()) == pytest.approx(1, abs=1e-5)


def test_a_pixel_sees_its_four_neighbours_before_it_and_no_other() -> None:
    model, shape = local((1, 5, 6), 7), (1, 5, 6)
    x = torch.randint(0, 7, (1, *shape), generator=torch.Generator().manual_seed(0)).byte()
    before = model.log_probs(x)[0, :, :, 0]
    for i, j in itertools.product(range(5), range(6)):
        changed = x.clone()
        changed[0, 0, i, j] = (int(x[0, 0, i, j]) + 1) % 7
        moved = (model.log_probs(changed)[0, :, :, 0] - before).abs().amax(-1) > 0
        seen = {(i, j + 1), (i + 1, j - 1), (i + 1, j), (i + 1, j + 1)}
        inside = {(a, b) for a, b in seen if a < 5 and 0 <= b < 6}
        assert {tuple(place) for place in moved.nonzero().tolist()} == inside


@pytest.mark.parametrize("name", ["relu_labels", "rows_nibbles", "colour_rows"])
def test_every_statistic_leaves_the_graph_as_torch_gives_it(name: str, opened: Opener) -> None:
    config = CONFIGS[name]
    torch.manual_seed(5)
    cvae = CVAE(CVAEConfig(config.shape, config.levels, config.labels, latent=3, width=8)).eval()
    companions = [local(config.shape, config.levels, config.digits), cvae]
    source = roles.density(pixelcnn(name), tuple(STATISTICS), companions)
    session = opened(source, config.levels, config.labels)  # with the parity gate
    assert [spec.name for spec in session.spec.outputs][-1] == "label"
    assert sum(source.widths.values()) == session.spec.outputs[2].shape[1]
    x = np.zeros((2, *config.shape), np.uint8)
    found = session.run({"x": x}, ["statistics", "label"])
    assert np.all(np.isfinite(found[0])) and np.all(found[1] < config.labels)
