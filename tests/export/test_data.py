import gzip
import itertools
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from likely.errors import InvalidInput
from likely.levels import brightness, of_image
from likely_export import data, sources
from likely_export.data import PARTS, Sizes, Split, evenly_spaced

SIZES = Sizes(fit=4, calibrate=5, validate=3, test=6)
NO_TEST = Sizes(fit=4, calibrate=5, validate=3)


def pictures(n: int, shape: tuple[int, ...] = (1, 5, 4), seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape)).astype(np.uint8)


def idx(array: npt.NDArray[np.uint8]) -> bytes:
    return (
        b"\0\0\x08"
        + bytes([array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + (array.tobytes())
    )


def rows(split: Split) -> set[bytes]:
    return {picture.tobytes() for picture in split.x}


def test_some_of_many_are_taken_from_all_over_them() -> None:
    assert evenly_spaced(10_000, 2_000).tolist() == list(range(0, 10_000, 5))
    assert (
        evenly_spaced(3_000, 2_000).max() >= 2_998
        and len(set(evenly_spaced(3_000, 2_000))) == 2_000
    )
    assert evenly_spaced(3, 5).tolist() == [0, 1, 2] and not len(evenly_spaced(0, 5))


def test_the_digits_are_divided_into_five_disjoint_parts() -> None:
    whole = sources.read("digits")
    found = data.load("digits", Sizes(160, 260, 120, 300))
    sizes = [len(getattr(found, part)) for part in PARTS]
    assert sizes == [957, 160, 260, 120, 300] and sum(sizes) == len(whole.x)
    assert found.levels == 17 and found.shape == (1, 8, 8) and found.labels == tuple("0123456789")
    for one, other in itertools.combinations(PARTS, 2):
        assert not rows(getattr(found, one)) & rows(getattr(found, other))


@pytest.mark.parametrize("options", [{}, {"binarise": True}])
def test_copies_of_training_pictures_are_counted_where_they_are_held_out(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    x = pictures(40)
    x[20:] = x[:20]
    np.savez(
        tmp_path / "set.npz", x_train=x, y_train=np.zeros(40, int), x_test=x[:7], y_test=[0] * 7
    )
    found = data.load(tmp_path / "set.npz", NO_TEST, **options)
    train = {picture.tobytes() for picture in found.train.unbinarised}
    held = {
        part: [p.tobytes() in train for p in getattr(found, part).unbinarised] for part in PARTS[1:]
    }
    assert found.count_copies() == {part: sum(one) for part, one in held.items()}
    assert found.count_copies()["test"] > 3
    for part in ("fit", "calibrate"):
        seen = {picture.tobytes() for picture in getattr(found, part).unbinarised}
        twice = sum(picture.tobytes() in seen for picture in found.test.unbinarised)
        assert found.count_copies(part, ["test"]) == {"test": twice}
    assert set(data.load("digits", Sizes(160, 260, 120, 300)).count_copies().values()) == {0}


def test_a_division_is_a_function_of_its_seed_and_not_the_order_of_the_file(tmp_path: Path) -> None:
    x, y = pictures(40), np.arange(40) % 2
    np.savez(tmp_path / "set.npz", x=x, y=y)
    first, again, other = (data.load(tmp_path / "set.npz", SIZES, seed=s) for s in (0, 0, 1))
    assert first.digest == again.digest != other.digest
    assert np.array_equal(first.test.x, again.test.x)
    assert not np.array_equal(first.train.x, x[: len(first.train)])
    for split in (getattr(first, part) for part in PARTS):
        for picture, label in zip(split.x, split.y, strict=True):
            assert y[(x == picture).all((1, 2, 3))] == [label]


def test_stretches_keep_together_what_lies_together(tmp_path: Path) -> None:
    x, y = pictures(40), np.arange(40) % 3
    np.savez(tmp_path / "set.npz", x=x, y=y)
    place = {picture.tobytes(): at for at, picture in enumerate(x)}
    starts = set()
    for seed in range(4):
        found = data.load(tmp_path / "set.npz", replace(SIZES, stretches=True), seed=seed)
        taken = []
        for split in (getattr(found, part) for part in PARTS):
            places = [place[picture.tobytes()] for picture in split.x]
            assert np.array_equal(split.y, y[places])
            taken += places
            first = next(p for p in places if (p - 1) % 40 not in places)
            assert set(places) == {(first + k) % 40 for k in range(len(places))}
            starts.add(first)
            assert len(places) < 6 or np.any(np.diff(places) % 40 != 1)  # dealt within a part
        assert sorted(taken) == list(range(40))
    assert len(starts) > len(PARTS)  # another seed begins elsewhere


def test_stretches_of_what_is_sorted_by_label_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", x=pictures(40), y=np.sort(np.arange(40) % 3))
    with pytest.raises(InvalidInput, match=r"no picture of label \d falls to (train|fit|cal)"):
        data.load(tmp_path / "set.npz", replace(SIZES, stretches=True), seed=0)


def test_a_label_that_would_not_be_ranked_is_refused(tmp_path: Path) -> None:
    y = np.zeros(400, np.int64)
    y[:3] = 1
    np.savez(tmp_path / "set.npz", x=pictures(400), y=y)
    with pytest.raises(InvalidInput, match=r"no picture of label 1 .*: make that part larger"):
        data.load(tmp_path / "set.npz", SIZES)


def counted_from_one(folder: Path) -> Path:
    np.savez(folder / "set.npz", x=pictures(60), y=1 + np.arange(60) % 2)
    return folder / "set.npz"


def named_but_not_there(folder: Path) -> Path:
    np.savez(folder / "set.npz", x=pictures(60), y=np.arange(60) % 2, class_names=["a", "b", "c"])
    return folder / "set.npz"


def only_in_the_test_part(folder: Path) -> Path:
    x, y = pictures(60), np.arange(60) % 3
    np.savez(folder / "set.npz", x_train=x, y_train=y % 2, x_test=x, y_test=y)
    return folder / "set.npz"


@pytest.mark.parametrize(
    ("make", "label", "sizes"),
    [
        (counted_from_one, "0", SIZES),
        (named_but_not_there, "c", SIZES),
        (only_in_the_test_part, "2", NO_TEST),
    ],
)
def test_a_label_without_pictures_to_train_on_is_refused_or_held_out(
    tmp_path: Path,
    make: Callable[[Path], Path],
    label: str,
    sizes: Sizes,
) -> None:
    source = make(tmp_path)
    with pytest.raises(InvalidInput, match=f"label {label} has no picture to train on"):
        data.load(source, sizes)
    found = data.load(source, sizes, without=(label,))
    assert len(found.labels) == 2 and label not in found.labels
    assert set(found.train.y) == set(found.test.y) == {0, 1}


def test_npz_files_with_a_test_part_keep_it_whole_and_in_order(tmp_path: Path) -> None:
    arrays = {
        "x_train": pictures(30, (4, 4)),
        "y_train": np.arange(30, dtype=np.uint8) % 2,
        "x_test": pictures(7, (4, 4), seed=1),
        "y_test": np.ones(7, np.uint8),
        "class_names": np.array(["cat", "dog"]),
    }
    np.savez_compressed(tmp_path / "pets.npz", **arrays)  # type: ignore[arg-type]
    found = data.load(tmp_path / "pets.npz", NO_TEST)
    assert (found.name, found.labels, found.levels) == ("pets", ("cat", "dog"), 256)
    assert np.array_equal(found.test.x[:, 0], arrays["x_test"])
    assert found.test.y.dtype == np.int64 and len(found.train) == 30 - 12


def test_a_test_part_of_held_out_labels_alone_is_refused(tmp_path: Path) -> None:
    x, y = pictures(20, (2, 2)), np.arange(20) % 2
    np.savez(tmp_path / "set.npz", x_train=x, y_train=y, x_test=x[:2], y_test=[0, 0])
    with pytest.raises(InvalidInput, match="its test part has no picture"):
        data.load(tmp_path / "set.npz", Sizes(4, 4, 2), without=("0",))


def test_colour_comes_channels_first(tmp_path: Path) -> None:
    x = pictures(20, (6, 5, 3))
    np.savez(tmp_path / "set.npz", x=x, y=np.zeros(20, int))
    assert np.array_equal(sources.read(tmp_path / "set.npz").x, x.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_read_plain_and_gzipped(tmp_path: Path, packed: bool) -> None:
    x, y = pictures(20, (5, 4)), (np.arange(20) % 4).astype(np.uint8)
    for part, array in (("images-idx3", x), ("labels-idx1", y)):
        content = idx(array)
        name = f"train-{part}-ubyte" + (".gz" if packed else "")
        (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
        (tmp_path / name.replace("train", "t10k")).write_bytes(
            gzip.compress(content) if packed else content
        )
    folder = sources.read(tmp_path)
    single = sources.read(next(tmp_path.glob("train-images*")))
    if not packed:
        for path in list(tmp_path.iterdir()):
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        (tmp_path / "._train-images-idx3-ubyte").write_bytes(b"a Mac's")
        assert np.array_equal(sources.read(tmp_path).x, folder.x)
    assert folder.test is not None and single.test is None
    for found in (folder, single):
        assert np.array_equal(found.x[:, 0], x) and np.array_equal(found.y, y)


def test_image_folders_hold_a_subfolder_a_label(tmp_path: Path) -> None:
    x = pictures(6, (3, 5, 4))
    (tmp_path / ".cache").mkdir()
    (tmp_path / "LICENSE.txt").write_text("free")
    for i, picture in enumerate(x):
        folder = tmp_path / ("ape", "bee")[i % 2]
        folder.mkdir(exist_ok=True)
        (folder / ".DS_Store").touch()
        Image.fromarray(picture.transpose(1, 2, 0)).save(folder / f"{i}.png")
    found = sources.read(tmp_path)
    assert found.labels == ("ape", "bee") and np.array_equal(found.y, [0, 0, 0, 1, 1, 1])
    assert np.array_equal(found.x, x[[0, 2, 4, 1, 3, 5]])


@pytest.mark.parametrize("form", ["folder", "whole", "parts"])
def test_pictures_may_have_no_labels(tmp_path: Path, form: str) -> None:
    x = pictures(40, (5, 4))
    source, sizes = tmp_path / "set.npz", SIZES
    if form == "folder":
        source = tmp_path
        (tmp_path / ".DS_Store").touch()
        for i, picture in enumerate(x):
            Image.fromarray(picture).save(tmp_path / f"{i:02}.png")
    elif form == "whole":
        np.savez(source, x=x, scale=np.ones(40), seeds=[1, 2], side=5)
    else:
        np.savez(source, x_train=x, x_test=x[:7])
        sizes = NO_TEST
    assert np.array_equal(sources.read(source).x[:, 0], x)
    found = data.load(source, sizes)
    assert found.labels == () and found.priors.shape == (0,)
    assert not any(getattr(found, part).y.any() for part in PARTS)
    assert len(found.test) == (7 if form == "parts" else 6)
    with pytest.raises(InvalidInput, match="a is none of no labels"):
        data.load(source, sizes, without=("a",))
    with pytest.raises(InvalidInput, match="1 names for the 0"):
        data.load(source, sizes, labels=("a",))


def test_fewer_levels_are_the_nearest() -> None:
    found = data.load("digits", Sizes(160, 260, 120, 300), levels=4)
    assert found.levels == 4 and set(np.unique(found.train.x)) == {0, 1, 2, 3}
    raw = data.load("digits", Sizes(160, 260, 120, 300))
    assert np.array_equal(found.test.x, (raw.test.x * 3 + 8) // 16)


@pytest.mark.parametrize("levels", [2, 3, 4, 8, 16, 64, 200, 255, 256])
def test_a_picture_has_the_same_levels_from_a_data_set_and_from_an_image_file(
    tmp_path: Path, levels: int
) -> None:
    x = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(40, 0)
    y = np.zeros(40, int)
    np.savez(tmp_path / "set.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    found = data.load(tmp_path / "set.npz", NO_TEST, levels=levels).test.x[0]
    Image.fromarray(x[0, 0]).save(tmp_path / "x.png")
    assert np.array_equal(found, of_image(tmp_path / "x.png", "x", 1, levels))
    Image.fromarray(brightness(found[0], levels)).save(tmp_path / "shown.png")
    assert np.array_equal(found, of_image(tmp_path / "shown.png", "x", 1, levels))


@pytest.mark.parametrize(
    ("peak", "options"), [(1, {"levels": 2}), (16, {"levels": 17}), (1, {"binarise": True})]
)
def test_what_has_so_few_levels_already_stays(
    tmp_path: Path, peak: int, options: dict[str, Any]
) -> None:
    x = pictures(40) % (peak + 1)
    y = np.zeros(40, int)
    np.savez(tmp_path / "set.npz", x_train=x, y_train=y, x_test=x // 2, y_test=y)
    found = data.load(tmp_path / "set.npz", NO_TEST, **options)
    assert found.levels == peak + 1 and found.train.grey is None
    assert np.array_equal(found.test.x, x // 2)
    assert rows(found.train) <= {picture.tobytes() for picture in x}


@pytest.mark.parametrize("options", [{"levels": 16}, {"levels": 2}, {"binarise": True}, {}])
def test_what_reaches_less_than_half_of_white_is_not_taken_for_grey(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    np.savez(tmp_path / "set.npz", x=pictures(40) % 17, y=np.zeros(40, int))
    with pytest.raises(InvalidInput, match=r"set: its pixels reach 16 .* levels = 17"):
        data.load(tmp_path / "set.npz", SIZES, **options)
    dark = data.load(tmp_path / "set.npz", SIZES, levels=256)
    assert dark.levels == 256 and dark.train.x.max() == 16


def test_binarisation_is_published_for_held_out_parts_and_fresh_in_training(
    tmp_path: Path,
) -> None:
    x = pictures(30)
    np.savez(tmp_path / "set.npz", x_train=x, y_train=np.zeros(30, int), x_test=x, y_test=[0] * 30)
    found = data.load(tmp_path / "set.npz", NO_TEST, binarise=True)
    u = np.random.Generator(np.random.Philox(key=[20261122, 0])).random(x.shape)
    assert found.levels == 2 and np.array_equal(found.test.x, u * 255 < x)
    train, every = found.train, np.arange(len(found.train))
    draws = [train.redraw(every, np.random.default_rng(seed)) for seed in range(400)]
    assert not np.array_equal(draws[0], draws[1]) and train.grey is not None
    assert np.abs(np.mean(draws, 0) - train.grey / 255).max() < 5 * 0.5 / 20


def test_black_stays_black_and_white_white_when_binarised() -> None:
    ends = np.array([0, 255], np.uint8).repeat(1000)
    drawn = data.bernoulli(ends, 255, np.random.default_rng(0))
    assert np.array_equal(drawn, ends // 255)


def truncated_idx(folder: Path) -> Path:
    (folder / "a-images-idx3-ubyte").write_bytes(idx(pictures(3, (5, 4)))[:-1])
    (folder / "a-labels-idx1-ubyte").write_bytes(idx(np.zeros(3, np.uint8)))
    return folder / "a-images-idx3-ubyte"


def broken_gzip(folder: Path) -> Path:
    (folder / "a-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b nothing")
    (folder / "a-labels-idx1-ubyte.gz").write_bytes(b"")
    return folder / "a-images-idx3-ubyte.gz"


def without_labels(folder: Path) -> Path:
    (folder / "a-images-idx3-ubyte").write_bytes(idx(pictures(3, (5, 4))))
    return folder / "a-images-idx3-ubyte"


def no_zip(folder: Path) -> Path:
    (folder / "set.npz").write_bytes(b"no zip")
    return folder / "set.npz"


def damaged(folder: Path) -> Path:
    np.savez_compressed(folder / "set.npz", x=np.zeros((99, 5, 4), np.uint8), y=np.zeros(99, int))
    content = bytearray((folder / "set.npz").read_bytes())
    start = 30 + sum(struct.unpack("<2H", content[26:30]))  # of what is compressed
    content[start] = 0xFF
    (folder / "set.npz").write_bytes(content)
    return folder / "set.npz"


def encrypted(folder: Path) -> Path:
    np.savez(folder / "set.npz", x=pictures(3), y=[0, 1, 2])
    content = bytearray((folder / "set.npz").read_bytes())
    for header, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(header) + flags] |= 1
    (folder / "set.npz").write_bytes(content)
    return folder / "set.npz"


def one_array(folder: Path) -> Path:
    np.save(folder / "set.npy", pictures(3))
    return (folder / "set.npy").rename(folder / "set.npz")


def pickled(folder: Path) -> Path:
    np.savez(folder / "set.npz", x=np.array([{}], object), y=[0])
    return folder / "set.npz"


def other_names(folder: Path) -> Path:
    np.savez(folder / "set.npz", pictures=pictures(3))
    return folder / "set.npz"


def floats(folder: Path) -> Path:
    np.savez(folder / "set.npz", x=pictures(3) / 255, y=[0, 1, 2])
    return folder / "set.npz"


def negative_label(folder: Path) -> Path:
    np.savez(folder / "set.npz", x=pictures(2), y=[0, -1])
    return folder / "set.npz"


def names_without_labels(folder: Path) -> Path:
    np.savez(folder / "set.npz", x=pictures(2), class_names=["a", "b"])
    return folder / "set.npz"


def labels_by_another_name(folder: Path) -> Path:
    np.savez(folder / "set.npz", x=pictures(3), labels=[0, 1, 0], index=[5, 6, 7])
    return folder / "set.npz"


def labels_in_capitals(folder: Path) -> Path:
    labels = {"Y_train": np.zeros(3, np.uint8), "Y_test": np.zeros(2, np.uint8)}
    np.savez(folder / "set.npz", x_train=pictures(3), x_test=pictures(2), **labels)  # type: ignore[arg-type]
    return folder / "set.npz"


def loose_pictures(folder: Path) -> Path:
    (folder / "a").mkdir()
    for name in ("1.png", "a/0.png"):
        Image.new("L", (4, 4)).save(folder / name)
    return folder


def two_sizes(folder: Path) -> Path:
    for i, size in enumerate([(4, 4), (5, 4)]):
        (folder / "a").mkdir(exist_ok=True)
        Image.new("L", size).save(folder / "a" / f"{i}.png")
    return folder


def palette(folder: Path) -> Path:
    (folder / "a").mkdir()
    Image.new("P", (4, 4)).save(folder / "a" / "0.png")
    return folder


def no_picture(folder: Path) -> Path:
    (folder / "a").mkdir()
    (folder / "a" / "notes.txt").write_text("hello")
    return folder


def empty_subfolder(folder: Path) -> Path:
    (folder / "b").mkdir()
    (folder / "b" / ".DS_Store").touch()
    (folder / "a").mkdir()
    Image.new("L", (4, 4)).save(folder / "a" / "0.png")
    return folder


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (truncated_idx, "59 bytes for the shape"),
        (broken_gzip, "cannot be read"),
        (without_labels, "a-labels-idx1-ubyte"),
        (no_zip, "not a readable .npz"),
        (damaged, "not a readable .npz file: .*decompressing"),
        (encrypted, "not a readable .npz file: .*encrypted"),
        (one_array, "is an .npy file of one array"),
        (pickled, "not a readable .npz"),
        (other_names, "no array x"),
        (floats, "float64"),
        (negative_label, "negative"),
        (names_without_labels, "no array y"),
        (labels_by_another_name, "but labels, index: name them so"),
        (labels_in_capitals, "but Y_train, Y_test: name them so"),
        (loose_pictures, r"such as 1\.png, beside subfolders, such as a, "),
        (two_sizes, "4x5"),
        (palette, "mode P"),
        (no_picture, "not a readable picture"),
        (empty_subfolder, "b: holds no pictures"),
        (lambda folder: folder / "absent.npz", "exists"),
        (lambda folder: folder, "subfolder per label"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, make, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InvalidInput, match=says) as caught:
        sources.read(make(tmp_path))
    assert caught.value.field.startswith(str(tmp_path))


@pytest.mark.parametrize("absent", ["x_train", "y_train", "x_test", "y_test"])
def test_an_npz_file_with_half_a_pair_is_refused(tmp_path: Path, absent: str) -> None:
    arrays = {f"x_{part}": pictures(6) for part in ("train", "test")}
    arrays |= {f"y_{part}": np.zeros(6, np.int64) for part in ("train", "test")}
    np.savez(tmp_path / "set.npz", **{key: a for key, a in arrays.items() if key != absent})  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=f"has no array {absent}: expected"):
        sources.read(tmp_path / "set.npz")


def test_what_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="1797 pictures cannot give"):
        data.load("digits", Sizes(600, 600, 300, 300))
    with pytest.raises(InvalidInput, match=r"splits\.test"):
        data.load("digits", NO_TEST)
    with pytest.raises(InvalidInput, match=r"splits\.fit"):
        Sizes(fit=0, calibrate=1, validate=1)
    with pytest.raises(InvalidInput, match=r"not in \[2, 17\]"):
        data.load("digits", SIZES, levels=18)
    with pytest.raises(InvalidInput, match="4 do not go with binarise"):
        data.load("digits", SIZES, levels=4, binarise=True)
    with pytest.raises(InvalidInput, match="2 names for the 10"):
        data.load("digits", SIZES, labels=("a", "b"))
    x = pictures(20)
    np.savez(tmp_path / "set.npz", x_train=x, y_train=[0] * 20, x_test=x, y_test=[0] * 20)
    with pytest.raises(InvalidInput, match="of its own"):
        data.load(tmp_path / "set.npz", SIZES)
