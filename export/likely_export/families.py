"""The model families that a recipe can name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from likely.errors import InvalidInput
from likely_export.autoencoder import Autoencoder, AutoencoderConfig
from likely_export.classifier import Classifier, ClassifierConfig
from likely_export.cvae import CVAE, CVAEConfig
from likely_export.local import LocalConfig, LocalPixelCNN
from likely_export.pixelcnn import PixelCNN, PixelCNNConfig
from likely_export.pixelrnn import PixelRNN, PixelRNNConfig
from likely_export.sketch import Detail, DetailConfig, Sketch, SketchConfig
from likely_export.vae import VAE

GIVEN_BY_DATA = ("shape", "levels", "labels")


@dataclass(frozen=True, slots=True)
class Family:
    """A family of models.

    Attributes:
        config: frozen dataclass that configures a model.
        model: class whose `model(config)` is an `nn.Module` that `train.fit` can train.
        labelled: whether the model is given the data's labels.
        needs_labels: whether the model learns nothing without labels.
    """

    config: type[Any]
    model: type[Any]
    labelled: bool = True
    needs_labels: bool = False


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "pixelcnn": Family(PixelCNNConfig, PixelCNN),
        "cvae": Family(CVAEConfig, CVAE, needs_labels=True),
        "local": Family(LocalConfig, LocalPixelCNN),
        "pixelrnn": Family(PixelRNNConfig, PixelRNN),
        "sketch": Family(SketchConfig, Sketch),
        "detail": Family(DetailConfig, Detail),
        "classifier": Family(ClassifierConfig, Classifier, needs_labels=True),
        "vae": Family(CVAEConfig, VAE, labelled=False),
        "autoencoder": Family(AutoencoderConfig, Autoencoder, labelled=False),
    }
)


def family(name: str) -> Family:
    """Returns the family with this name.

    Raises:
        InvalidInput: there is no such family.
    """
    if name not in FAMILIES:
        raise InvalidInput("family", f"{name!r} is none of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def config(
    name: str, options: Mapping[str, Any], *, shape: tuple[int, int, int], levels: int, labels: int
) -> Any:
    """Returns the config of a model for such data; options that are not given keep their defaults.

    Raises:
        InvalidInput: there is no such family, or its options contradict each other or the data.
    """
    chosen = family(name)
    if chosen.needs_labels and not labels:
        raise InvalidInput("family", f"a {name} needs labels, and the data have none")
    label_count = labels if chosen.labelled else 0
    return chosen.config(shape=shape, levels=levels, labels=label_count, **options)


def create(
    name: str,
    options: Mapping[str, Any],
    *,
    shape: tuple[int, int, int],
    levels: int,
    labels: int,
    seed: int,
) -> nn.Module:
    """Returns an untrained model whose weights are a function of the seed.

    Raises:
        InvalidInput: there is no such family, or its options contradict each other or the data.
    """
    chosen = family(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model: nn.Module = chosen.model(
                config(name, options, shape=shape, levels=levels, labels=labels)
            )
        except InvalidInput:
            raise
        except (ValueError, RuntimeError) as error:  # what modules of torch alone raise
            raise InvalidInput(name, str(error)) from error
    return model


def restore(weights: Path) -> nn.Module:
    """Loads the trained model of a `weights.pt`, in evaluation mode on the CPU.

    Raises:
        InvalidInput: the file does not exist, or its model is of no known family.
    """
    if not weights.is_file():
        raise InvalidInput(str(weights), "is not there: was this model trained to the end?")
    content = torch.load(weights, map_location="cpu", weights_only=True)
    for chosen in FAMILIES.values():
        if chosen.model.__name__ == content["model"]:
            model: nn.Module = chosen.model(chosen.config(**content["config"]))
            model.load_state_dict(content["state"])
            return model.eval()
    raise InvalidInput(str(weights), f"holds a {content['model']}, which is of no known family")
