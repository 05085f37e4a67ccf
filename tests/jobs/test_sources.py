"""Files of pictures as they come: nested, linked, many, strangely named, broken."""

from __future__ import annotations

import io
import os
import resource
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from likely import levels
from likely.answers import Pixels
from likely.errors import InvalidInput, JobError
from likely.jobs.sources import Input, require_outside_inputs
from tests.jobs.conftest import COLOUR, drawn, encoded, opened


def npy(x: Pixels) -> bytes:
    out = io.BytesIO()
    np.save(out, x)
    return out.getvalue()


def packed(path: Path, members: dict[str, bytes | str]) -> Path:
    """A tar archive of files, and of hard links to others."""
    with tarfile.open(path, "w") as archive:
        for name, given in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(given, str):
                member.type, member.linkname = tarfile.LNKTYPE, given
                archive.addfile(member)
            else:
                member.size = len(given)
                archive.addfile(member, io.BytesIO(given))
    return path


def test_an_array_of_another_shape_is_refused_as_it_is_opened(tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", drawn(25, COLOUR).transpose(0, 2, 3, 1))
    with pytest.raises(InvalidInput, match=r"4 x 5 x 3 .* takes 3 x 4 x 5: move the channels"):
        opened(tmp_path / "in.npy", COLOUR)


def test_folders_that_are_linked_are_read_once_each(tmp_path: Path) -> None:
    (tmp_path / "in" / "b").mkdir(parents=True)
    (tmp_path / "away" / "deep").mkdir(parents=True)
    x = drawn(3)
    np.save(tmp_path / "in" / "b.npy", x[:1])
    np.save(tmp_path / "in" / "b" / "z.npy", x[1:2])
    np.save(tmp_path / "away" / "deep" / "x.npy", x[2:])
    (tmp_path / "in" / "c").symlink_to(tmp_path / "away")
    (tmp_path / "away" / "back").symlink_to(tmp_path / "in")  # around without end
    (tmp_path / "in" / ".hidden").symlink_to(tmp_path / "away")
    read, keys = opened(tmp_path / "in").read(0, 3)
    assert keys == ["b/z.npy[0]", "b.npy[0]", "c/deep/x.npy[0]"]
    assert np.array_equal(read, x[[1, 0, 2]])


@pytest.mark.parametrize("name", ["gone.npy", "disk", "itself"])
def test_a_link_that_leads_nowhere_is_refused(tmp_path: Path, name: str) -> None:
    np.save(tmp_path / "a.npy", drawn(3))
    (tmp_path / name).symlink_to(tmp_path / name if name == "itself" else tmp_path / "nowhere")
    with pytest.raises(JobError, match=f"{name} is a link that leads nowhere"):
        opened(tmp_path)


def test_a_folder_that_cannot_be_read_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", ".c", "lost+found"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "x.npy", drawn(1))
    closed: list[str] = []

    def refusing(real: Callable[..., Any]) -> Callable[..., Any]:
        def read(path: Any = ".") -> Any:
            if Path(path).name in closed:
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        return read

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    closed += [".c", "lost+found"]
    assert len(opened(tmp_path)) == 2
    closed.append("b")
    with pytest.raises(PermissionError, match="/b'"):
        opened(tmp_path)


def test_arrays_are_held_two_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = drawn(60)
    for i in range(0, 60, 3):
        kind = np.uint8 if i % 2 else np.int64
        part = x[i : i + 3].astype(kind)
        if i % 4 == 0:
            np.save(tmp_path / f"{i:02d}.npy", part[:, 0])
        else:
            np.savez_compressed(tmp_path / f"{i:02d}.npz", y=np.zeros(7), images=part)
    read: list[Path] = []
    whole = levels.of_array

    def noted(path: Path, **more: Any) -> Any:
        read.append(path)
        return whole(path, **more)

    monkeypatch.setattr(levels, "of_array", noted)
    pictures = opened(tmp_path)
    assert len(pictures) == 60
    assert not read  # their headers tell how many there are
    assert np.array_equal(pictures.read(0, 60)[0], x)
    assert len(read) == 20
    for start in (54, 56, 59):
        pictures.read(start, 60)
    assert len(read) == 20
    (cache,) = {id(each.cache): each.cache for each in pictures._sources}.values()  # type: ignore[attr-defined]
    assert len(cache._held) == 2
    with ThreadPoolExecutor(8) as pool:
        spans = [(i % 50, i % 50 + 10) for i in range(0, 400, 7)]
        for (start, stop), (found, keys) in zip(
            spans, pool.map(lambda span: pictures.read(*span), spans), strict=True
        ):
            assert np.array_equal(found, x[start:stop])
            assert keys[0] == f"{start // 3 * 3:02d}.np{'zy'[start // 3 * 3 % 4 == 0]}[{start % 3}]"
    assert len(cache._held) == 2


def test_row_groups_are_held_two_at_a_time_of_all_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = drawn(60)
    for i in range(0, 60, 6):
        column = pa.FixedShapeTensorArray.from_numpy_ndarray(x[i : i + 6])
        pq.write_table(pa.table({"x": column}), tmp_path / f"{i:02d}.parquet", row_group_size=3)
    read: list[int] = []
    whole = pq.ParquetFile.read_row_group

    def noted(file: Any, group: int, *more: Any) -> Any:
        read.append(group)
        return whole(file, group, *more)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", noted)
    pictures = opened(tmp_path)
    footers: list[Path] = []
    footer = pq.read_metadata

    def described(path: Path) -> pq.FileMetaData:
        footers.append(path)
        return footer(path)

    monkeypatch.setattr(pq, "read_metadata", described)
    assert np.array_equal(pictures.read(0, 60)[0], x)
    assert read == [0, 1] * 10
    assert len(footers) == 10  # one per file, however many groups it has
    pictures.read(55, 60)
    assert len(read) == 20
    (cache,) = {id(each.cache): each.cache for each in pictures._sources}.values()  # type: ignore[attr-defined]
    with ThreadPoolExecutor(8) as pool:
        spans = [(i % 50, i % 50 + 10) for i in range(0, 400, 7)]
        for (start, stop), (found, keys) in zip(
            spans, pool.map(lambda span: pictures.read(*span), spans), strict=True
        ):
            assert np.array_equal(found, x[start:stop])
            assert keys[0] == f"{start // 6 * 6:02d}.parquet[{start % 6}]"
    assert len(cache._held) == 2


def test_a_file_of_two_names_keeps_both(tmp_path: Path) -> None:
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(drawn(1))
    pq.write_table(pa.table({"x": column}), tmp_path / "a.parquet")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.parquet").symlink_to(tmp_path / "a.parquet")
    _, keys = opened(tmp_path).read(0, 2)
    assert keys == ["a.parquet[0]", "in/b.parquet[0]"]


def test_more_arrays_are_read_than_files_may_be_open(tmp_path: Path) -> None:
    x = drawn(100)
    for i, each in enumerate(x):
        np.save(tmp_path / f"{i:02d}.npy", each[None])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 20, hard))
    try:
        read, _ = opened(tmp_path).read(0, 100)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert np.array_equal(read, x)


def test_levels_beyond_a_byte_are_refused_where_they_lie(tmp_path: Path) -> None:
    x = drawn(9).astype(np.int64)
    x[7, 0, 0, 0] = 256
    np.save(tmp_path / "in.npy", x)
    np.savez(tmp_path / "in.npz", x)
    for name in ("in.npy", "in.npz"):
        with pytest.raises(InvalidInput, match=rf"{name}: values \d+ to 256"):
            opened(tmp_path / name).read(0, 9)


@pytest.mark.parametrize(
    "out", ["in", "in/scores", "in/deep/scores", "link", "in/over", "away/scores"]
)
def test_a_job_within_its_input_is_refused(tmp_path: Path, out: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "away").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "over").symlink_to(tmp_path / "away")
    np.save(tmp_path / "in" / "x.npy", drawn(1))
    with pytest.raises(JobError, match=r"lies within the input .*/in:"):
        require_outside_inputs(Input((tmp_path / "in" / "x.npy", tmp_path / "in")), tmp_path / out)


@pytest.mark.parametrize("out", ["other", "in.scores", "in/.scores", "in/lost+found/scores"])
def test_a_job_beside_its_input_is_none_of_it(tmp_path: Path, out: str) -> None:
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "x.npy", drawn(1))
    require_outside_inputs(Input((tmp_path / "in" / "x.npy", tmp_path / "in")), tmp_path / out)
    require_outside_inputs(Input((tmp_path / "in" / "x.npy",)), tmp_path / "in" / "scores")


def test_names_that_are_no_utf8_are_shown_as_far_as_they_are(tmp_path: Path) -> None:
    x = drawn(4)
    folder = tmp_path / "in"
    folder.mkdir()
    for i, name in enumerate((b"a\xff.npy", b"a\xfe.npy")):
        (folder / os.fsdecode(name)).write_bytes(npy(x[i : i + 1]))
    (folder / os.fsdecode(b"\xe4.png")).write_bytes(encoded(x[2, 0]))
    with tarfile.open(folder / os.fsdecode(b"t\xff.tar"), "w") as archive:
        member = tarfile.TarInfo(os.fsdecode(b"m\xff.NPY"))
        member.size = len(npy(x[3]))
        archive.addfile(member, io.BytesIO(npy(x[3])))
    pictures = opened(folder)
    read, keys = pictures.read(0, 4)
    assert np.array_equal(read, x[[1, 0, 3, 2]])
    assert keys == ["a?.npy[0]", "a?.npy[0]", "m?", "?.png"]
    pa.array(keys)
    before = pictures.digest
    (folder / os.fsdecode(b"a\xff.npy")).rename(folder / os.fsdecode(b"a\xfd.npy"))
    assert opened(folder).digest != before


def encrypted(path: Path) -> None:
    np.savez(path, x=drawn(1))
    data = bytearray(path.read_bytes())
    data[6] |= 1  # of the member's own header, and of the directory's
    data[data.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)


def strangely_packed(path: Path) -> None:
    np.savez(path, x=drawn(1))
    data = bytearray(path.read_bytes())
    data[8] = data[data.index(b"PK\1\2") + 10] = 97
    path.write_bytes(data)


def of_shape(path: Path, *shape: int) -> None:
    out = io.BytesIO()
    form = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, form)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", out.getvalue())


def huge(path: Path) -> None:
    of_shape(path, 2**45, 1, 4, 5)


def below_none(path: Path) -> None:
    of_shape(path, -1, 1, 4, 5)


def none_of_too_many(path: Path) -> None:
    of_shape(path, 0, 2**62, 4, 5)


def corrupt(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x.npy", npy(drawn(9)))
    data = bytearray(path.read_bytes())
    data[50:90] = bytes(40)
    path.write_bytes(data)


def out_of_place(path: Path) -> None:
    np.savez(path, x=drawn(1))
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\5\6") + 19] = 255  # where its directory begins
    path.write_bytes(data)


def half_a_header(path: Path) -> None:
    path.write_bytes(npy(drawn(9)).replace(b"'shape': (9, 1, 4, 5)", b"'shape': (9, 1, 4, 5 "))


def no_array(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", b"words")


@pytest.mark.parametrize(
    "broken",
    [
        encrypted, strangely_packed, huge, below_none, none_of_too_many, corrupt, out_of_place,
        half_a_header, no_array,
    ],
)  # fmt: skip
def test_an_archive_that_cannot_be_read_is_refused(
    tmp_path: Path, broken: Callable[[Path], None]
) -> None:
    broken(tmp_path / "in.npz")
    with pytest.raises(InvalidInput, match=r"no array can be read|not fit in memory"):
        levels.of_array(tmp_path / "in.npz")
    with pytest.raises(InvalidInput, match="no array can be read"):
        opened(tmp_path / "in.npz")


@pytest.mark.parametrize("one_channel", [False, True])
def test_samples_may_be_arrays(tmp_path: Path, one_channel: bool) -> None:
    x = drawn(4)
    arrays = [npy(each[0] if one_channel else each) for each in x]
    packed(tmp_path / "in.tar", {f"{i}.npy": data for i, data in enumerate(arrays)})
    read, keys = opened(tmp_path / "in.tar").read(1, 4)
    assert np.array_equal(read, x[1:])
    assert keys == ["1", "2", "3"]


def test_an_archive_in_an_archive_is_no_picture(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=drawn(1))
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        archive.add(tmp_path / "in.npz", "a.npy")
    with pytest.raises(InvalidInput, match=r"in\.tar:a\.npy: shape"):
        opened(tmp_path / "in.tar").read(0, 1)


def test_an_archive_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    path = packed(tmp_path / "in.tar", {f"{i}.png": encoded(drawn(1)[0, 0]) for i in range(5)})
    data = path.read_bytes()
    assert len(opened(path)) == 5
    path.write_bytes(data[: 10 * 512 + 1024])  # an end marker alone, without what fills a record
    assert len(opened(path)) == 5

    def refused(broken: bytes) -> None:
        path.write_bytes(broken)
        with pytest.raises(InvalidInput, match=r"in\.tar: (no tar|the tar archive is cut off)"):
            opened(path)

    for length in (9 * 512, 9 * 512 + 10, 10 * 512 - 1, 10 * 512, 10 * 512 + 511, 2148):
        refused(data[:length])
    for place in (0, 2 * 512 + 10, 8 * 512 + 10):
        refused(data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :])
    refused(data[: 4 * 512] + bytes(512) + data[5 * 512 :])
    for more in (0, 20, 128, 5000):  # blocks that archives of larger records end with
        refused(data + bytes(more * 512) + data)


def test_hard_links_are_what_they_lead_to(tmp_path: Path) -> None:
    x = drawn(2)
    files = {"a.npy": npy(x[0]), "deep/b.npy": npy(x[1])}
    members: dict[str, bytes | str] = {**files, "c.npy": "a.npy", "d.npy": "c.npy"}
    read, keys = opened(packed(tmp_path / "in.tar", members)).read(0, 4)
    assert np.array_equal(read, x[[0, 1, 0, 0]])
    assert keys == ["a", "deep/b", "c", "d"]
    packed(tmp_path / "in.tar", {"c.npy": "a.npy", **files})
    with pytest.raises(InvalidInput, match=r"in\.tar:c\.npy: neither a plain file nor a hard link"):
        opened(tmp_path / "in.tar")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.FIFOTYPE])
def test_a_picture_that_is_no_file_is_not_passed_over(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(packed(tmp_path / "in.tar", {"a.npy": npy(drawn(1)[0])}), "a") as archive:
        for name, of in (("folder.png", tarfile.DIRTYPE), ("words.txt", kind), ("b.npy", kind)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = of, "a.npy"
            archive.addfile(member)
    with pytest.raises(InvalidInput, match=r"in\.tar:b\.npy: neither a plain file"):
        opened(tmp_path / "in.tar")


def test_a_sample_is_called_by_its_name_up_to_the_first_dot(tmp_path: Path) -> None:
    x, other = drawn(1), npy(drawn(2)[1])
    hidden: dict[str, bytes | str] = {"._7.npy": b"of a file system", ".npy": other}
    members = {"7.mask.npy": other, "7.NPY": npy(x[0]), "7.txt": b"", **hidden}
    read, keys = opened(packed(tmp_path / "in.tar", members)).read(0, 1)
    assert np.array_equal(read, x)
    assert keys == ["7"]
    for name in ("7.2024.npy", "deep/scan.2024.png"):
        packed(tmp_path / "in.tar", {"8.npy": npy(x[0]), name: other})
        with pytest.raises(
            InvalidInput, match=rf"in\.tar:{name}: a name of several dots, and sample"
        ):
            opened(tmp_path / "in.tar")
