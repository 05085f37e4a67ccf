import pytest
import torch
from torch.nn import functional

from likely_export.winograd import Pairs, factors, seen, sums


def row(w: int, n: int = 3, channels: int = 5) -> torch.Tensor:
    return torch.randn(w, n, channels, generator=torch.Generator().manual_seed(w)).double()


@pytest.mark.parametrize("w", range(1, 10))
def test_pairs_keep_the_columns(w: int) -> None:
    assert torch.equal(Pairs.of(row(w)).row(w), row(w))


@pytest.mark.parametrize("w", range(1, 10))
@pytest.mark.parametrize("outside", [0.0, 7.0], ids=["blank", "marked"])
def test_four_products_are_a_convolution(w: int, outside: float) -> None:
    """Whatever stands in the column that an odd row has too many."""
    v, edge = row(w), torch.zeros(1, 3, 5).double()
    kernel, bias = torch.randn(3, 5, 4).double(), torch.randn(4).double()
    columns = Pairs.of(v)
    if w % 2:
        columns.odd[-1] = outside
    both = [each.flatten(0, 1) for each in seen(columns, edge, w)]
    found = Pairs(*[part.unflatten(0, (-1, 3)) for part in sums(both, factors(*kernel), bias)])
    padded = v.permute(1, 2, 0)
    expected = functional.conv1d(padded, kernel.permute(2, 1, 0), bias, padding=1)
    torch.testing.assert_close(found.row(w), expected.permute(2, 0, 1))
