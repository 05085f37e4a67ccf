"""The comparison of PixelCNN and PixelRNN names its figures as the evaluation does."""

from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch

from bench import pixelrnn
from likely_export import families, recipes
from likely_export.autoregressive import Autoregressive
from likely_export.optimisers import Training
from likely_export.pixelcnn import PixelCNNConfig


def test_a_figure_given_the_label_is_named_so(tmp_path: Path) -> None:
    data = recipes.load("digits").data.load()
    rows = np.arange(20)
    data = replace(data, validate=data.validate.take(rows), test=data.test.take(rows))
    config = PixelCNNConfig((1, 8, 8), 17, 10, channels=4, layers=1, head=8, label_dropout=0.5)
    found = pixelrnn.train_model(config, data, Training(steps=3, batch=16, validations=1), tmp_path)
    net = cast(Autoregressive, families.restore(tmp_path / "weights.pt"))
    x, y = torch.from_numpy(data.test.x), torch.from_numpy(data.test.y)
    with torch.no_grad():
        expected = -net.log_prob(x).mean().item(), -net.log_prob(x, y).mean().item()
    means = [found[name]["mean"] for name in ("nll_nats", "conditional_nll_nats")]
    assert np.allclose(means, expected, rtol=1e-5) and means[0] != means[1]
    unlabelled = pixelrnn.train_model(
        replace(config, labels=0), data, Training(steps=1, batch=16, validations=1), tmp_path
    )
    assert "nll_nats" in unlabelled and "conditional_nll_nats" not in unlabelled
