"""Small models of every kind that the package trains, with weights far from nothing."""

import functools
from collections.abc import Callable

import torch

from likely.graphs import Session
from likely_export.autoregressive import Autoregressive, AutoregressiveConfig
from likely_export.pixelcnn import PixelCNN, PixelCNNConfig
from likely_export.pixelrnn import PixelRNN, PixelRNNConfig
from likely_export.roles import GraphSource

Opener = Callable[[GraphSource, int, int], Session]

CONFIGS: dict[str, AutoregressiveConfig] = {
    "grey": PixelCNNConfig((1, 5, 4), 3, channels=6, layers=2, head=8),
    "colour": PixelCNNConfig((3, 4, 3), 4, channels=6, layers=2, head=8, stem=(1, 1, 1)),
    "relu_labels": PixelCNNConfig(
        (1, 4, 5), 5, labels=3, channels=6, layers=2, head=8, gated=False
    ),
    "rows_nibbles": PixelCNNConfig(
        (1, 6, 5), 16, labels=2, channels=6, layers=3, head=8, digits=2, positions=True,
        row_layers=2, row_width=8, row_heads=2, stem=(3, 2, 3), gated=False,
    ),
    "colour_rows": PixelCNNConfig(
        (3, 4, 4), 9, labels=2, channels=6, layers=1, head=8, digits=2, positions=True,
        row_layers=1, row_width=8, row_heads=2,
    ),
    "row_lstm": PixelRNNConfig(
        (1, 4, 5), 5, labels=3, channels=6, layers=2, head=10, stem=(1, 1, 1), kind="row"
    ),
    "diagonal_lstm": PixelRNNConfig(
        (3, 4, 3), 9, labels=2, channels=6, layers=2, head=8, digits=2, stem=(2, 1, 2),
        kind="diagonal",
    ),
    "mixture": PixelCNNConfig(
        (3, 4, 3), 16, labels=2, channels=6, layers=2, head=8, digits=2, logistics=3,
        gated=False,
    ),
}  # fmt: skip


@functools.cache
def model(name: str) -> Autoregressive:
    """A model of that kind in evaluation mode, its weights random but fixed."""
    return randomised(CONFIGS[name])


def untrained(config: AutoregressiveConfig) -> Autoregressive:
    """A model of that shape as training finds it."""
    if isinstance(config, PixelRNNConfig):
        return PixelRNN(config)
    assert isinstance(config, PixelCNNConfig)
    return PixelCNN(config)


def randomised(config: AutoregressiveConfig, scale: float = 0.3) -> Autoregressive:
    """A model whose every weight is drawn anew, so that nothing starts at zero."""
    torch.manual_seed(7)
    net = untrained(config)
    randomise(net, scale)
    return net.eval()


def randomise(model: torch.nn.Module, scale: float = 0.3) -> None:
    """Draws every weight of a model anew."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * scale)


def pictures(config: AutoregressiveConfig, n: int, seed: int = 0) -> torch.Tensor:
    """Pictures of levels at random, uint8 (n, c, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.levels, (n, *config.shape), generator=generator).byte()


def labels(config: AutoregressiveConfig, n: int) -> torch.Tensor | None:
    """Labels in turn, int64 (n,); None where the model takes none."""
    return torch.arange(n) % config.labels if config.labels else None


def gumbel(config: AutoregressiveConfig, n: int, seed: int = 1) -> torch.Tensor:
    """Gumbel noise for the sampler, float32 (n, h, w, c, digits, base)."""
    c, h, w = config.shape
    base = round(config.levels ** (1 / config.digits))
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand((n, h, w, c, config.digits, base), generator=generator)
    return -torch.log(-torch.log(uniform.clamp(1e-9, 1 - 1e-7)))
