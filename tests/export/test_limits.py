"""What the configs of all families refuse."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from likely.errors import InvalidInput
from likely_export.autoencoder import AutoencoderConfig
from likely_export.classifier import ClassifierConfig
from likely_export.cvae import CVAEConfig
from likely_export.local import LocalConfig
from likely_export.pixelcnn import PixelCNNConfig
from likely_export.pixelrnn import PixelRNNConfig
from likely_export.sketch import DetailConfig, SketchConfig

SHAPE, LEVELS, LABELS = (1, 8, 8), 16, 3
CONFIGS: list[Any] = [
    AutoencoderConfig(SHAPE, LEVELS),
    ClassifierConfig(SHAPE, LEVELS, LABELS),
    CVAEConfig(SHAPE, LEVELS, LABELS),
    LocalConfig(SHAPE, LEVELS),
    PixelCNNConfig(SHAPE, LEVELS, LABELS),
    PixelRNNConfig(SHAPE, LEVELS, LABELS),
    SketchConfig(SHAPE, LEVELS, LABELS),
    DetailConfig(SHAPE, LEVELS, LABELS),
]
SIZES = ("channels", "width", "latent", "head", "depth", "digits", "convolutions", "row_heads")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_sizes_below_one_and_shares_beyond_one_are_refused(config: Any) -> None:
    names = {field.name for field in fields(config)}
    for name in names & set(SIZES):
        several = isinstance(getattr(config, name), tuple)
        with pytest.raises(InvalidInput, match=rf"{name}: .*0\]?; at least 1 is needed"):
            replace(config, **{name: (4, 0) if several else 0})
        if several:
            replace(config, **{name: [4]})  # as a caller in Python may give them
    for share in (-0.1, 1.5):
        for name in names & {"dropout", "label_dropout"}:
            with pytest.raises(InvalidInput, match=rf"{name}: {share} is not in \[0, 1\]"):
                replace(config, **{name: share})
