import pytest
import torch
from torch.nn import functional

from likely_export.winograd import Pairs, factors, product_inputs, sums

EDGE = torch.zeros(1, 3, 5, dtype=torch.float64)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0])).double()


@pytest.mark.parametrize("w", range(1, 10))
def test_pairs_keep_the_columns(w: int) -> None:
    v = normal(w, 3, 5)
    assert torch.equal(Pairs.from_row(v, EDGE).row(w), v)


@pytest.mark.parametrize("w", range(1, 10))
def test_four_products_are_a_convolution(w: int) -> None:
    """Whatever stands in the column that an odd row has too many."""
    v, kernel, bias = normal(w, 3, 5), normal(3, 5, 4), normal(4)
    columns = Pairs.from_row(v, EDGE)
    if w % 2:
        columns.odd[-1] = 7.0
    both = [each.flatten(0, 1) for each in product_inputs(columns, EDGE, w)]
    found = Pairs(*[part.unflatten(0, (-1, 3)) for part in sums(both, factors(*kernel), bias)])
    expected = functional.conv1d(v.permute(1, 2, 0), kernel.permute(2, 1, 0), bias, padding=1)
    torch.testing.assert_close(found.row(w), expected.permute(2, 0, 1))
