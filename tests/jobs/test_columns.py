"""Columns of pictures: nested lists, tensors, bytes; each is the model's, or told by its row."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from likely.errors import InvalidInput
from likely.jobs.columns import Geometry
from tests.jobs.conftest import COLOUR, GREY, drawn, encoded, opened


def parquet(path: Path, column: Any, rows: int = 10) -> Path:
    pq.write_table(pa.table({"image": column}), path, row_group_size=rows)
    return path


def lists(depth: int, kind: Callable[[pa.DataType], pa.DataType] = pa.list_) -> pa.DataType:
    made = pa.uint8()
    for _ in range(depth):
        made = kind(made)
    return made


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list], ids=["list", "large"])
@pytest.mark.parametrize("geometry", [GREY, COLOUR], ids=["grey", "colour"])
def test_lists_are_read_as_they_are_nested(
    tmp_path: Path, geometry: Geometry, kind: Callable[[pa.DataType], pa.DataType]
) -> None:
    x = drawn(25, geometry)
    forms = [x, x.reshape(25, -1), *([x[:, 0]] if geometry is GREY else [])]
    for form in forms:
        column = pa.array(form.tolist(), lists(form.ndim - 1, kind))
        read, _ = opened(parquet(tmp_path / "in.parquet", column), geometry).read(3, 23)
        assert np.array_equal(read, x[3:23])
    fixed = pa.array(x.tolist(), pa.list_(pa.list_(pa.list_(pa.uint8(), 5), 4), len(x[0])))
    read, _ = opened(parquet(tmp_path / "in.parquet", fixed), geometry).read(0, 25)
    assert np.array_equal(read, x)


def test_lists_of_another_nesting_are_refused_by_their_row(tmp_path: Path) -> None:
    x = drawn(25, COLOUR)
    last = x.transpose(0, 2, 3, 1).tolist()  # as many numbers, in another order

    def refused(rows: list[Any], sentence: str, geometry: Geometry = COLOUR) -> None:
        path = parquet(tmp_path / "in.parquet", pa.array(rows))
        with pytest.raises(InvalidInput, match=sentence):
            opened(path, geometry).read(0, len(rows))

    refused(last, r"\[0\]: 4 x 5 x 3 .* takes 3 x 4 x 5: move the channels")
    refused([*x[:17].tolist(), *last[17:]], r"\[17\]: 4 x 5 x 3 .*: move the channels")
    refused(x[:, 0].tolist(), "lists within 1 other lists; 2 or none", COLOUR)
    refused(x.reshape(25, 3, 20).tolist(), "lists within 1 other lists")
    refused(x[:, :, None].tolist(), "lists within 3 other lists")
    y = drawn(25)[:, 0]
    flat = y.reshape(25, -1).tolist()
    refused(
        [*flat[:12], [*flat[12], 1], flat[13][:-1], *flat[14:]],
        r"\[12\]: a list of 21; expected 20 levels",
        GREY,
    )
    turned = [*y[:12].tolist(), y[12].reshape(5, 4).tolist(), *y[13:].tolist()]
    refused(turned, r"\[12\]: 1 x 5 x 4 .* takes 1 x 4 x 5", GREY)
    ragged = y[12].tolist()
    ragged[0].append(ragged[1].pop())
    refused([*y[:12].tolist(), ragged], r"\[12\]: a list of 6; expected one of 5", GREY)
    refused([*y[:12].tolist(), [None, *ragged[1:]]], r"\[12\]: .* empty", GREY)
    refused([*flat[:12], [None, *flat[12][1:]]], r"\[12\]: .* empty", GREY)
    refused([*flat[:12], [0.5, *flat[12][1:]]], "double; expected integers", GREY)


def test_a_struct_without_bytes_is_refused(tmp_path: Path) -> None:
    rows = [{"bytes": encoded(drawn(1)[0, 0]), "path": "a"}, {"bytes": None, "path": "b"}]
    with pytest.raises(InvalidInput, match=r"\[1\]: .* empty"):
        opened(parquet(tmp_path / "in.parquet", pa.array(rows))).read(0, 2)


def test_tensors_of_another_shape_are_refused_as_a_file_is_opened(tmp_path: Path) -> None:
    x = np.ascontiguousarray(drawn(25, COLOUR).transpose(0, 2, 3, 1))
    path = parquet(tmp_path / "in.parquet", pa.FixedShapeTensorArray.from_numpy_ndarray(x))
    with pytest.raises(InvalidInput, match=r"4 x 5 x 3 .* takes 3 x 4 x 5: move the channels"):
        opened(path, COLOUR)


@pytest.mark.parametrize("written", ["by pyarrow", "as Arrow says"])
def test_tensors_may_say_how_they_are_turned(tmp_path: Path, written: str) -> None:
    x = drawn(4, COLOUR)
    last = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    kind = pa.fixed_shape_tensor(pa.uint8(), (4, 5, 3), permutation=(2, 0, 1))
    flat = pa.array(last.reshape(4, -1).tolist(), kind.storage_type)
    column = pa.ExtensionArray.from_storage(kind, flat)
    if written == "by pyarrow":
        column = pa.FixedShapeTensorArray.from_numpy_ndarray(last.transpose(0, 3, 1, 2))
    read, _ = opened(parquet(tmp_path / "in.parquet", column, 3), COLOUR).read(0, 4)
    assert np.array_equal(read, x)


def test_an_error_counts_rows_from_the_files_first(tmp_path: Path) -> None:
    images = [encoded(drawn(1)[0, 0])] * 100
    images[77] = encoded(np.zeros((9, 9), np.uint8))
    pictures = opened(parquet(tmp_path / "in.parquet", pa.array(images), 25))
    with pytest.raises(InvalidInput, match=r"in\.parquet\[77\]: 1 x 9 x 9"):
        pictures.read(0, 100)


@pytest.mark.parametrize("form", ["png", "jpeg", "gif", "webp", "bmp", "tiff"])
def test_an_image_of_as_many_bytes_as_a_picture_is_an_image(tmp_path: Path, form: str) -> None:
    more = {"lossless": True} if form == "webp" else {}
    out = io.BytesIO()
    Image.fromarray(np.full((3, 1), 85, np.uint8)).save(out, form, **more)
    image = out.getvalue()
    while len(image) % 3:  # what follows an image's end is not looked at
        image += b"\0"
    if form == "bmp":
        image = image[:2] + struct.pack("<I", len(image)) + image[6:]
    geometry = Geometry((1, len(image) // 3, 3), 256)
    with pytest.raises(InvalidInput, match=r"\[0\]: 1 x 3 x 1"):
        opened(parquet(tmp_path / "in.parquet", pa.array([image])), geometry).read(0, 1)


def test_bytes_of_one_length_by_their_type_are_levels(tmp_path: Path) -> None:
    x = drawn(3)
    x[1, 0, 0, :3] = (0xFF, 0xD8, 0xFF)  # as a JPEG file begins
    rows = pa.array([each.tobytes() for each in x], pa.binary(x[0].size))
    read, _ = opened(parquet(tmp_path / "in.parquet", rows)).read(0, 3)
    assert np.array_equal(read, x)


def test_image_files_of_one_length_by_their_type_are_image_files(tmp_path: Path) -> None:
    x = drawn(1)
    image = encoded(x[0, 0])
    rows = pa.array([image] * 3, pa.binary(len(image)))
    read, _ = opened(parquet(tmp_path / "in.parquet", rows)).read(0, 3)
    assert np.array_equal(read, np.repeat(x, 3, 0))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    ("begins", "is_image"),
    [(b"MM\0*", True), (b"II*\0", True), (b"GIF87a", True), (b"GIF89a", True), (b"RIFF", False)],
)
def test_levels_are_an_image_file_where_they_begin_as_one(
    tmp_path: Path, begins: bytes, is_image: bool
) -> None:
    x = drawn(1)
    value = begins + x.tobytes()[len(begins) :]
    pictures = opened(parquet(tmp_path / "in.parquet", pa.array([value])))
    if is_image:
        with pytest.raises(InvalidInput, match=r"in\.parquet\[0\]: .*image"):
            pictures.read(0, 1)
    else:
        assert pictures.read(0, 1)[0].tobytes() == value


def test_a_tensor_with_an_empty_level_is_refused(tmp_path: Path) -> None:
    flat: list[int | None] = [*drawn(3).flatten().tolist()]
    flat[2 * 20 + 7] = None
    storage = pa.FixedSizeListArray.from_arrays(pa.array(flat, pa.uint8()), 20)
    kind = pa.fixed_shape_tensor(pa.uint8(), (1, 4, 5))
    column = pa.ExtensionArray.from_storage(kind, storage)
    with pytest.raises(InvalidInput, match=r"in\.parquet\[2\]: some of its levels are empty"):
        opened(parquet(tmp_path / "in.parquet", column)).read(0, 3)


@pytest.mark.parametrize(
    ("keys", "called"),
    [
        (pa.array(["a", None, "c"]), ["a", "in.parquet[1]", "c"]),
        (pa.array([b"a", b"b\xff", None]), ["a", "b\N{REPLACEMENT CHARACTER}", "in.parquet[2]"]),
        (pa.array([b"ab", b"cd", b"ef"], pa.binary(2)), ["ab", "cd", "ef"]),
        (pa.array(["a", None, "a"]).dictionary_encode(), ["a", "in.parquet[1]", "a"]),
        (pa.array([7, None, 9]), ["7", "in.parquet[1]", "9"]),
    ],
)
def test_keys_are_texts_numbers_or_none(tmp_path: Path, keys: Any, called: list[str]) -> None:
    rows = pa.array(drawn(3)[:, 0].tolist())
    pq.write_table(
        pa.table({"image": rows, "key": keys}), tmp_path / "in.parquet", row_group_size=2
    )
    assert opened(tmp_path / "in.parquet").read(0, 3)[1] == called


@pytest.mark.parametrize(
    "keys",
    [
        pa.array([{"a": 1}] * 3),
        pa.array([["a"]] * 3),
        pa.FixedShapeTensorArray.from_numpy_ndarray(drawn(3)),
    ],
)
def test_keys_that_are_nested_are_refused_as_a_file_is_opened(tmp_path: Path, keys: Any) -> None:
    rows = pa.array(drawn(3)[:, 0].tolist())
    pq.write_table(pa.table({"image": rows, "key": keys}), tmp_path / "in.parquet")
    with pytest.raises(InvalidInput, match=r"in\.parquet: column key is of .* a text or a number"):
        opened(tmp_path / "in.parquet")


@pytest.mark.parametrize("names", [["image", "image", "key"], ["image", "key", "key"]])
def test_of_columns_of_one_name_none_is_taken(tmp_path: Path, names: list[str]) -> None:
    kinds = {"image": pa.array(drawn(3)[:, 0].tolist()), "key": pa.array(["a", "b", "c"])}
    columns = [kinds[name] for name in names]
    pq.write_table(pa.table(columns, names=names), tmp_path / "in.parquet")
    with pytest.raises(InvalidInput, match=r"in\.parquet: several columns (image|key)"):
        opened(tmp_path / "in.parquet")


def test_levels_that_begin_like_a_bitmap_are_levels(tmp_path: Path) -> None:
    x = drawn(3)
    x[:, 0, 0, :2] = (*b"BM",)
    image = Image.fromarray(drawn(1)[0, 0])
    out = io.BytesIO()
    image.save(out, "png")
    rows = [*(each.tobytes() for each in x), out.getvalue()]
    read, _ = opened(parquet(tmp_path / "in.parquet", pa.array(rows))).read(0, 4)
    assert np.array_equal(read, [*x, np.asarray(image)[None]])
