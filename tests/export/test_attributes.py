"""Attributes follow what is done to pictures; directions find what was put into features."""

from __future__ import annotations

import numpy as np
import pytest

from likely.answers import Pixels
from likely_export import directions
from likely_export.attributes import ATTRIBUTES, measured
from likely_export.features import probe


def bar(*, lean: float = 0.0, width: float = 3.0, tall: float = 8.0) -> Pixels:
    """A bar on 28 x 28 pixels, leaning so many columns to the right a row upwards."""
    rows, columns = np.mgrid[:28, :28] - 13.5
    along, off = np.abs(rows), np.abs(columns + lean * rows)
    ink = np.clip(width / 2 - off + 0.5, 0, 1) * np.clip(tall - along + 0.5, 0, 1)
    x: Pixels = (255 * ink).astype(np.uint8)[None]
    return x


def of_bars(name: str, **each: list[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    ((key, values),) = each.items()
    return measured(name, np.stack([bar(**{key: value}) for value in values]), 256)


def test_slant_is_what_the_bar_leans() -> None:
    leans = [-0.5, -0.2, 0.0, 0.3, 0.6]
    assert of_bars("slant", lean=leans) == pytest.approx(leans, abs=0.05)


def test_stroke_grows_with_the_bar_s_width() -> None:
    widths = [2.0, 2.5, 3.0, 4.0, 5.0]
    found = of_bars("stroke", width=widths)
    assert np.all(np.diff(found) > 0)
    assert found == pytest.approx(widths, rel=0.35)


def test_size_grows_with_the_bar_s_height() -> None:
    heights = [4.0, 6.0, 8.0, 11.0]
    assert np.all(np.diff(of_bars("size", tall=heights)) > 0)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_attribute_knows_no_place_and_blank_pictures_have_none(name: str) -> None:
    x = np.stack([bar(lean=0.2), np.roll(bar(lean=0.2), 3, axis=2), np.zeros_like(bar())])
    first, moved, blank = measured(name, x, 256)
    assert moved == pytest.approx(first, rel=1e-6) and blank == 0


def test_where_there_is_one_label_and_no_attribute_there_is_no_direction() -> None:
    z = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    assert directions.find_directions(z, np.zeros(20, np.int64), ("p",), {}) == ([], {})


def test_directions_find_what_was_put_in_and_leave_labels_alone() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 4000)
    a = rng.normal(size=4000) + 0.8 * y  # one that labels differ in, too
    means = 3 * rng.normal(size=(3, 6))
    way = rng.normal(size=6)
    z = means[y] + 2 * (a - 0.8 * y)[:, None] * way + rng.normal(size=(4000, 6))
    entries, arrays = directions.find_directions(z.astype(np.float32), y, ("p", "q", "r"), {"a": a})
    assert [entry["name"] for entry in entries] == ["a", "label p", "label q", "label r"]
    assert (arrays["steps"] * arrays["probes"]).sum(1) == pytest.approx(1)
    place = z @ arrays["probes"].T + arrays["offsets"]
    for label in range(3):
        assert place[y == label, 0].mean() == pytest.approx(0, abs=0.05)
        assert np.corrcoef(place[y == label, 0], a[y == label])[0, 1] > 0.7
        assert place[y == label, 1 + label].mean() == pytest.approx(1, abs=1e-5)
        assert place[y != label, 1 + label].mean() == pytest.approx(0, abs=1e-5)


def test_a_probe_learns_what_is_linear_and_nothing_else() -> None:
    rng = np.random.default_rng(1)
    y, held = rng.integers(0, 3, 500), rng.integers(0, 3, 300)
    centres = 4 * rng.normal(size=(3, 5))
    z, far = (centres[k] + rng.normal(size=(len(k), 5)) for k in (y, held))
    assert probe(z, y, far, held, (100, 500))[500] > 0.95
    noise = rng.normal(size=(500, 5))
    assert probe(noise, y, rng.normal(size=(300, 5)), held, (500,))[500] < 0.5


def test_a_direction_that_labels_leave_no_room_for_is_not_kept_apart() -> None:
    rng = np.random.default_rng(2)
    y = rng.integers(0, 3, 3000)
    a = rng.normal(size=3000)
    # Labels differ along the very way that the attribute moves features.
    z = np.stack([4.0 * y + a, rng.normal(size=3000)], 1) + 0.1 * rng.normal(size=(3000, 2))
    _, arrays = directions.find_directions(z.astype(np.float32), y, ("p", "q", "r"), {"a": a})
    assert arrays["steps"][0, 0] == pytest.approx(1, abs=0.1)


def test_nothing_is_found_of_what_stands_still() -> None:
    rng = np.random.default_rng(0)
    y, moving = np.arange(20) % 2, rng.normal(size=(20, 3)).astype(np.float32)
    still, a = np.full((20, 3), np.float32(0.1)), rng.normal(size=20)
    assert directions.find_directions(still, y, ("p", "q"), {"a": a}) == ([], {})
    entries, _ = directions.find_directions(moving, y, ("p", "q"), {"a": np.full(20, 0.3), "b": a})
    assert [entry["name"] for entry in entries] == ["b", "label p", "label q"]
    entries, arrays = directions.find_directions(
        moving[:2], y[:2], ("p", "q"), {"a": a[:2]}
    )  # one of each
    assert [entry["name"] for entry in entries] == ["label p", "label q"]
    assert all(np.isfinite(array).all() for array in arrays.values())
