"""Data augmentation: small random moves of pictures, as between two scans of the same thing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from likely.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Moves:
    """How far pictures are moved. Each move is drawn uniformly up to its bound.

    Attributes:
        turn: largest rotation, degrees, either way.
        zoom: largest relative change of size, either way, separately for height and width.
        shear: largest slide of a row against another, as a share of the height, either way.
        shift: largest shift, whole pixels, in each of the four directions.
        flip: whether half of the pictures are mirrored left to right.
        erase: largest share of the picture that a blank rectangle covers.
    """

    turn: float = 0.0
    zoom: float = 0.0
    shear: float = 0.0
    shift: int = 0
    flip: bool = False
    erase: float = 0.0

    def __post_init__(self) -> None:
        for name in ("turn", "shear", "shift"):
            if getattr(self, name) < 0:
                raise InvalidInput(f"moves.{name}", f"{getattr(self, name)} is below 0")
        for name in ("zoom", "erase"):
            if not 0 <= getattr(self, name) < 1:
                raise InvalidInput(f"moves.{name}", f"{getattr(self, name)} is not in [0, 1)")

    def __bool__(self) -> bool:
        return self != NO_MOVES

    def apply(self, x: Tensor) -> Tensor:
        """Returns the pictures x, uint8 (n, c, h, w), each moved separately by torch's generator.

        Levels between pixels are interpolated and rounded. Beyond its edges, a picture continues
        with the levels of the edge.
        """
        return self.interpolate(x.float()).round().to(torch.uint8)

    def interpolate(self, x: Tensor) -> Tensor:
        """Returns the same of float32 x, (n, c, h, w), where nothing is rounded."""
        # Coordinates rounded to bfloat16 would fall between pixels, and blur the pictures.
        with torch.autocast(x.device.type, enabled=False):
            moved = functional.grid_sample(
                x, self._grid(x), padding_mode="border", align_corners=False
            )
            return self._erased(moved) if self.erase else moved

    def _grid(self, x: Tensor) -> Tensor:
        """Where in x each pixel of the moved pictures comes from, (n, h, w, 2), for grid_sample."""
        n, _, height, width = x.shape

        def drawn(bound: float) -> Tensor:
            return (torch.rand(n, device=x.device) * 2 - 1) * bound

        def shift() -> Tensor:
            return torch.randint(-self.shift, self.shift + 1, (n,), device=x.device)

        turn = drawn(math.radians(self.turn))
        cos, sin = torch.cos(turn), torch.sin(turn)
        across, down = 1 + drawn(self.zoom), 1 + drawn(self.zoom)
        if self.flip:
            across = across * torch.where(torch.rand(n, device=x.device) < 0.5, -1.0, 1.0)
        shear = drawn(self.shear)
        # The map from output pixels to input coordinates, in half sides from the centre.
        tall = height / width
        rows = (
            torch.stack([cos * across, (shear - sin * down) * tall, shift() * 2 / width], -1),
            torch.stack([sin * across / tall, cos * down, shift() * 2 / height], -1),
        )
        return functional.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)

    def _erased(self, x: Tensor) -> Tensor:
        """Sets a random rectangle of each picture to the lowest level."""
        n, _, height, width = x.shape
        area, ratio, top, left = torch.rand(4, n, 1, device=x.device)
        stretch = torch.exp((ratio * 2 - 1) * math.log(3) / 2)  # sqrt of height : width, 1:3 to 3:1
        tall = (area * self.erase).sqrt() * stretch * height
        wide = (area * self.erase).sqrt() / stretch * width
        row, column = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
        inside_rows = (row - top * (height - tall)).div(tall).floor() == 0
        inside_columns = (column - left * (width - wide)).div(wide).floor() == 0
        return x * ~(inside_rows[:, None, :, None] & inside_columns[:, None, None, :])


NO_MOVES = Moves()
