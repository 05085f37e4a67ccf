"""Pictures and maps as PNG images inside a page; one pixel of a file is one of a picture."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from PIL import Image

from likely.answers import Pixels

Tiles = npt.NDArray[np.uint8]  # (n, h, w, 1) grey or (n, h, w, 3) colour, of 256 levels

TILE = 60  # approximate width of a picture on the screen, in CSS pixels
WIDEST = 860
MODES = {1: "LA", 3: "RGBA"}
UNKNOWN = (86, 160, 211)  # colour of hidden pixels
TINT = np.array([1.0, 0.83, 0.55])  # multiplies what a model drew, beside what it was given


@dataclass(frozen=True, slots=True)
class Picture:
    """An image of a page.

    Attributes:
        uri: data URI with all of its bytes.
        alt: description of what it shows.
        width: in CSS pixels.
        height: in CSS pixels.
    """

    uri: str
    alt: str
    width: int
    height: int


def tiles(x: Pixels, levels: int) -> Tiles:
    """Converts pictures (n, c, h, w) to 256 levels, in colour if they have three channels.

    Other pictures are grey; of two or four channels the mean is shown.
    """
    shown = np.moveaxis(x.astype(np.float64), 1, -1)
    if x.shape[1] != 3:
        shown = shown.mean(-1, keepdims=True)
    return np.round(shown * (255 / (levels - 1))).astype(np.uint8)


def coloured(values: npt.NDArray[np.floating], colours: str, low: float, high: float) -> Tiles:
    """Colours maps (n, h, w), from low to high, by a colour map of matplotlib."""
    scaled = (values.astype(np.float64) - low) / max(high - low, 1e-12)
    rgb: Tiles = mpl.colormaps[colours](np.clip(scaled, 0, 1), bytes=True)[..., :3]
    return rgb


def hidden(given: Tiles, known: npt.NDArray[np.bool_]) -> Tiles:
    """Returns the tiles (n, h, w, 1 or 3) in colour, blue where `known` (n, h, w) is false."""
    return np.where(known[..., None], _rgb(given), np.array(UNKNOWN, np.uint8))


def tinted(drawn: Tiles, known: npt.NDArray[np.bool_]) -> Tiles:
    """Returns the tiles (n, h, w, 1 or 3) in colour, amber where `known` (n, h, w) is false."""
    amber = np.round(_rgb(drawn) * TINT).astype(np.uint8)
    return np.where(known[..., None], _rgb(drawn), amber)


def sheet(shown: Tiles, alt: str, columns: int, size: int = TILE) -> Picture:
    """Arranges tiles in rows, with a gap between them.

    Args:
        shown: one or more tiles.
        alt: description of what they show.
        columns: tiles in a full row.
        size: approximate size of a tile in CSS pixels; tiles are enlarged by whole numbers.
    """
    n, h, w, channels = shown.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    canvas = np.zeros((rows * (h + 1) - 1, columns * (w + 1) - 1, channels + 1), np.uint8)
    for at, tile in enumerate(shown):
        top, left = at // columns * (h + 1), at % columns * (w + 1)
        canvas[top : top + h, left : left + w, :channels] = tile
        canvas[top : top + h, left : left + w, channels] = 255
    scale = max(1, min(round(size / w), WIDEST // canvas.shape[1]))
    return Picture(_uri(canvas), alt, canvas.shape[1] * scale, canvas.shape[0] * scale)


def ramp(colours: str) -> Picture:
    """A colour map of matplotlib from low to high; a legend explains it."""
    line = coloured(np.linspace(0, 1, 128)[None, None], colours, 0, 1)[0]
    opaque = np.full((1, 128, 1), 255, np.uint8)
    return Picture(_uri(np.concatenate([line, opaque], -1)), "", 160, 10)


def _rgb(shown: Tiles) -> Tiles:
    return np.broadcast_to(shown, (*shown.shape[:3], 3))


def _uri(canvas: npt.NDArray[np.uint8]) -> str:
    file = io.BytesIO()
    mode = MODES[canvas.shape[-1] - 1]
    size = (canvas.shape[1], canvas.shape[0])
    Image.frombytes(mode, size, np.ascontiguousarray(canvas).tobytes()).save(
        file, "PNG", optimize=True
    )
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
