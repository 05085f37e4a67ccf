from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from likely.errors import InvalidInput
from likely_export.moves import NO_MOVES, Moves


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def one_pixel(n: int = 50, size: int = 11) -> Tensor:
    """Pictures uint8 (n, 1, size, size), dark but for the middle."""
    x = torch.zeros(n, 1, size, size, dtype=torch.uint8)
    x[:, :, size // 2, size // 2] = 200
    return x


def test_no_moves_leave_a_picture_as_it_is() -> None:
    x = torch.randint(0, 256, (4, 3, 9, 7), dtype=torch.uint8)
    assert not NO_MOVES
    assert torch.equal(NO_MOVES.apply(x), x)


def test_a_shift_stays_within_its_bound_and_takes_all_ways() -> None:
    moved = Moves(shift=2).apply(one_pixel()).double()[:, 0]
    places = torch.arange(11).double() - 5
    total = moved.sum((1, 2))
    down = (moved.sum(2) * places).sum(1) / total
    across = (moved.sum(1) * places).sum(1) / total
    for way in (down, across):
        assert way.abs().max() <= 2.5 and way.min() < -1 and way.max() > 1


def test_half_the_pictures_are_flipped_and_nothing_else() -> None:
    x = torch.randint(0, 256, (64, 1, 6, 8), dtype=torch.uint8)
    moved = Moves(flip=True).apply(x)
    flipped = (moved == x.flip(-1)).flatten(1).all(1)
    kept = (moved == x).flatten(1).all(1)
    assert torch.all(flipped | kept) and 16 < int(flipped.sum()) < 48


def test_a_turn_keeps_the_middle_and_moves_the_edge() -> None:
    x = one_pixel(20)
    x[:, :, 5] = 200  # a bar through the middle
    moved = Moves(turn=30).apply(x)
    assert torch.all(moved[:, 0, 5, 5] > 150)
    assert (moved[:, 0, 5, 10] < 100).any()


@pytest.mark.parametrize(("height", "width"), [(64, 16), (16, 64), (32, 32)])
def test_angles_are_those_of_the_picture_whatever_its_sides(height: int, width: int) -> None:
    rows, columns = torch.arange(height) - height // 2, torch.arange(width) - width // 2
    upright, level = torch.zeros(2, 40, 1, height, width, dtype=torch.uint8)
    upright[..., width // 2 - 1 : width // 2 + 1] = 200
    level[..., height // 2 - 1 : height // 2 + 1, :] = 200

    def slopes(x: Tensor, places: Tensor, along: Tensor) -> Tensor:
        x = x.double() * (places.abs() <= 6) * (along.abs() <= 5)
        return (x * places * along).sum((1, 2)) / (x * along**2).sum((1, 2))

    for moves, x, places, along, bound in (
        (Moves(turn=20), upright, columns[None], rows[:, None], 0.36),
        (Moves(turn=20), level, rows[:, None], columns[None], 0.36),
        (Moves(shear=0.3), upright, columns[None], rows[:, None], 0.3),
    ):
        found = slopes(moves.apply(x)[:, 0], places, along).abs()
        assert bound * 0.75 < found.max() < bound * 1.1


def test_what_is_erased_is_a_rectangle_of_at_most_that_share() -> None:
    x = torch.full((200, 2, 20, 20), 9, dtype=torch.uint8)
    moved = Moves(erase=0.25).apply(x)
    dark = (moved == 0).numpy()
    assert np.array_equal(dark[:, 0], dark[:, 1])
    assert dark.mean((1, 2, 3)).max() <= 0.3 and dark.mean((1, 2, 3)).mean() > 0.08
    for each in dark[:, 0]:
        rows, columns = each.any(1), each.any(0)
        assert np.array_equal(each, np.outer(rows, columns))


def test_places_are_not_rounded_to_bfloat16() -> None:
    x = torch.randint(0, 256, (20, 1, 28, 28), dtype=torch.uint8)
    for moves in (Moves(shift=1), Moves(turn=10.0, zoom=0.1, shear=0.1)):
        torch.manual_seed(1)
        plain = moves.apply(x)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(moves.apply(x), plain)


def test_the_generator_decides() -> None:
    x = torch.randint(0, 256, (8, 1, 12, 12), dtype=torch.uint8)
    moves = Moves(turn=20, zoom=0.2, shear=0.2, shift=3, flip=True, erase=0.3)
    torch.manual_seed(1)
    first = moves.apply(x)
    assert not torch.equal(moves.apply(x), first)
    torch.manual_seed(1)
    assert torch.equal(moves.apply(x), first)


@pytest.mark.parametrize("name, value", [("turn", -1.0), ("zoom", 1.0), ("erase", 1.5)])
def test_a_bound_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidInput, match=f"moves.{name}"):
        replace(NO_MOVES, **{name: value})
