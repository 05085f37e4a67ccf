"""Random pictures: their content does not affect the speed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from likely import codec
from likely.answers import Pixels
from likely.bundle import Bundle
from likely.v1.scoring_pb2 import ScoreRequest, ScoreStreamRequest

SEED = 0


def random_pictures(shape: tuple[int, ...], levels: int) -> Pixels:
    """Pictures of that shape (n, c, h, w), with uniformly distributed levels."""
    return np.random.default_rng(SEED).integers(0, levels, shape, np.uint8)


def bundle_pictures(bundle: Path, n: int) -> Pixels:
    """n pictures for the bundle in that folder, uint8 (n, c, h, w)."""
    manifest = Bundle.open(bundle).manifest
    return random_pictures((n, *manifest.shape), manifest.levels)


def write_request(bundle: Path, n: int, into: Path, *, stream: bool = False) -> Path:
    """Writes the bytes of a request to score n pictures, or of a ScoreStream message, to a file."""
    name = Bundle.open(bundle).manifest.name
    asked = ScoreRequest(model_name=name, images=codec.images(bundle_pictures(bundle, n)))
    message = ScoreStreamRequest(sequence_id=1, request=asked) if stream else asked
    path = into / f"{name}-{n}{'-stream' if stream else ''}.bin"
    path.write_bytes(message.SerializeToString())
    return path
