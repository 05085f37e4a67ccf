"""The bundle: the folder that training produces and a server serves.

A bundle contains `manifest.json`, ONNX graphs and `.npz` arrays. The manifest is
written last and by rename, so a folder without one is no bundle. It names every
other file with its size and SHA-256, so a folder that fails a check is refused
before anything in it is opened.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy.typing as npt
from pydantic import ValidationError

from likely.bundle import arrays, scan, signing
from likely.bundle.manifest import FILE_NAME, FileRecord, Manifest, Role
from likely.errors import BundleError, OutOfMemory

MANIFEST = "manifest.json"
LARGEST_MANIFEST = 1 << 20
LARGEST_BUNDLE = 8 << 30
_PACKAGE = Path(__file__).resolve().parents[1]
# From a link; from a socket, or a pipe without a writer.
_NOT_PLAIN_ERRNOS = (errno.ELOOP, errno.ENXIO)


class Bundle:
    """A folder whose every byte has been checked against its manifest."""

    def __init__(
        self, path: Path, manifest: Manifest, digest: str, weight_files: frozenset[str]
    ) -> None:
        """A bundle that `open` has verified.

        Args:
            path: the folder.
            manifest: its manifest.
            digest: SHA-256 of the manifest.
            weight_files: names of the files that hold weights of graphs.
        """
        self.path = path
        self.manifest = manifest
        self.digest = digest
        self._weight_files = weight_files

    @classmethod
    def open(cls, path: Path, trusted: Sequence[Path] = ()) -> Bundle:
        """Opens and verifies the bundle in a folder.

        Args:
            path: the folder.
            trusted: PEM files of keys or certificates; if there are any, one of them must have
                signed the folder.

        Raises:
            BundleError: the bundle is not valid; the message names the first fault.
            SettingsError: a trusted key cannot be used.
        """
        if trusted:
            _check_sizes(path)
            signing.verify(path, trusted)
        text = _read_manifest_bytes(path)
        manifest = _parse_manifest(path, text)
        sizes = {name: record.size for name, record in manifest.files.items()}
        if (total := sum(sizes.values())) > LARGEST_BUNDLE:
            raise BundleError(
                f"{path} has {total} bytes of files; at most {LARGEST_BUNDLE} are read", "manifest"
            )
        for name, record in manifest.files.items():
            _check_file(path / name, record)
        scanned = (scan.check_graph(path / g.file, sizes) for g in manifest.graphs.values())
        weight_files = frozenset[str]().union(*scanned)
        bundle = cls(path, manifest, hashlib.sha256(text).hexdigest(), weight_files)
        bundle._check_weight_files()
        return bundle

    def check_again(self) -> None:
        """Checks that the folder still has the bytes that were verified.

        Raises:
            BundleError: a file has changed, or a weights file can be changed by another name.
        """
        if hashlib.sha256(_read_manifest_bytes(self.path)).hexdigest() != self.digest:
            raise BundleError(f"{self.path} changed while it was opened", "changed")
        for name, record in self.manifest.files.items():
            _check_file(self.path / name, record)
        self._check_weight_files()

    def graph(self, role: Role) -> Path:
        """The path of the ONNX file of a role."""
        return self.path / self.manifest.graphs[role].file

    def calibration(self) -> dict[str, npt.NDArray[Any]]:
        """The calibration arrays by name."""
        return self._read_arrays(self.manifest.calibrated.file)

    def latent(self) -> dict[str, npt.NDArray[Any]]:
        """The directions' arrays by name; empty if there are no directions."""
        return self._read_arrays(self.manifest.latent.file) if self.manifest.latent else {}

    def golden(self) -> dict[str, npt.NDArray[Any]]:
        """The recorded (golden) inputs and outputs, named `role/input` and `role/output`."""
        return self._read_arrays(self.manifest.golden)

    def weights(self) -> dict[str, bytes]:
        """Reads and verifies the files that hold weights of graphs; their contents by name.

        Raises:
            BundleError: a file has changed since it was verified, or cannot be read now.
            OutOfMemory: there is no memory for the weights.
        """
        contents = {}
        for name in self._weight_files:
            path, record = self.path / name, self.manifest.files[name]
            try:
                with _open_plain(path) as handle:
                    contents[name] = handle.read(record.size + 1)
            except OSError as error:
                raise BundleError.unreadable(path, error) from error
            except MemoryError as error:
                raise OutOfMemory(f"no memory for the weights of {self.path}") from error
            if hashlib.sha256(contents[name]).hexdigest() != record.sha256:
                raise BundleError(f"{self.path} changed while it was opened", "changed")
        return contents

    def _check_weight_files(self) -> None:
        for name in self._weight_files:
            _check_not_hard_linked(self.path / name)

    def _read_arrays(self, name: str) -> dict[str, npt.NDArray[Any]]:
        return arrays.read(self.path / name)


def read_manifest(path: Path) -> Manifest:
    """Reads the manifest of a folder, without checking the other files.

    Raises:
        BundleError: there is no valid manifest.
    """
    return _parse_manifest(path, _read_manifest_bytes(path))


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> Manifest:
    """Records every file of a folder, and writes the manifest last, by rename.

    Args:
        folder: contains the graphs and arrays, and nothing else.
        manifest: the manifest's fields except `files`.

    Raises:
        BundleError: the folder contains something that a bundle must not contain.
    """
    temporary = folder / f".{MANIFEST}"
    files = {
        entry.name: _make_record(entry)
        for entry in sorted(folder.iterdir())
        if entry.name not in (MANIFEST, signing.SIGNATURE, temporary.name)
    }
    checked = Manifest.model_validate({**manifest, "files": files})
    text = json.dumps(checked.model_dump(mode="json"), indent=1) + "\n"
    try:
        with temporary.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(folder / MANIFEST)
    finally:
        temporary.unlink(missing_ok=True)
    return checked


def _make_record(path: Path) -> FileRecord:
    """The size and digest of a file.

    Raises:
        BundleError: a bundle must not contain such a file.
    """
    if not path.is_file():
        raise BundleError(f"{path} cannot be in a bundle: it is not a plain file")
    if not re.fullmatch(FILE_NAME, path.name):
        raise BundleError(f"{path} cannot be in a bundle: its name is not allowed")
    with path.open("rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        return FileRecord(size=size, sha256=hashlib.file_digest(handle, "sha256").hexdigest())


def _parse_manifest(path: Path, text: bytes) -> Manifest:
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise BundleError(
            f"{path} is not a bundle that this version reads: {where}: {first['msg']}", "manifest"
        ) from error


def _read_manifest_bytes(path: Path) -> bytes:
    manifest = path / MANIFEST
    if not path.is_dir():
        raise BundleError(f"{path} is not a folder, so it is no bundle", "incomplete")
    try:
        with _open_plain(manifest) as handle:
            text = handle.read(LARGEST_MANIFEST + 1)
    except FileNotFoundError:
        raise BundleError(
            f"{path} has no {MANIFEST}, so it is no bundle (or not yet whole)", "incomplete"
        ) from None
    if len(text) > LARGEST_MANIFEST:
        raise BundleError(
            f"{manifest} is too long; at most {LARGEST_MANIFEST} bytes are read", "manifest"
        )
    return text


def _check_sizes(path: Path) -> None:
    """Checks the sizes of all files, before verifying the signature hashes their contents.

    Raises:
        BundleError: a file does not have the size that the manifest says, or a file or the
            folder is too large.
    """
    try:
        sizes = {name: record.size for name, record in read_manifest(path).files.items()}
    except BundleError:  # raised again after the signature is verified
        sizes = {}
    limits = {MANIFEST: LARGEST_MANIFEST, signing.SIGNATURE: signing.LARGEST_SIGNATURE}
    total = 0
    for entry in path.rglob("*"):
        try:
            status = entry.lstat()
        except OSError as error:
            raise BundleError.unreadable(entry, error) from error
        if not stat.S_ISREG(status.st_mode):
            continue
        name, size = entry.relative_to(path).as_posix(), status.st_size
        total += size
        if size > (limit := limits.get(name, LARGEST_BUNDLE)):
            raise BundleError(f"{entry} has {size} bytes; at most {limit} are read", "signature")
        if size != sizes.get(name, size):
            raise BundleError(
                f"{entry} has {size} bytes, so it is not what the manifest names", "signature"
            )
    if total > LARGEST_BUNDLE + sum(limits.values()):
        raise BundleError(
            f"{path} has {total} bytes; at most {LARGEST_BUNDLE} are read", "signature"
        )


def _check_file(path: Path, record: FileRecord) -> None:
    try:
        with _open_plain(path) as handle:
            size = os.fstat(handle.fileno()).st_size
            if size != record.size:
                raise BundleError(
                    f"{path} has {size} bytes where the manifest says {record.size}: truncated?",
                    "truncated",
                )
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
    except FileNotFoundError:
        raise BundleError(
            f"{path} is missing although the manifest names it", "incomplete"
        ) from None
    if digest != record.sha256:
        raise BundleError(
            f"{path} does not have the SHA-256 that the manifest names: altered", "digest"
        )


def _check_not_hard_linked(path: Path) -> None:
    """Checks that a file is no hard link, through which the weights could be changed.

    Files of the package may be hard links, because installers link them to their cache.
    """
    if path.stat().st_nlink > 1 and not path.resolve().is_relative_to(_PACKAGE):
        raise BundleError(
            f"{path} is a hard link; weights outside of a graph are files of their own", "link"
        )


def _open_plain(path: Path) -> BufferedReader:
    """Opens a file without following a link or waiting for a pipe.

    Raises:
        BundleError: it is not a plain file, or cannot be read.
        FileNotFoundError: there is no such file.
    """
    try:
        handle = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno not in _NOT_PLAIN_ERRNOS:
            raise BundleError.unreadable(path, error) from error
    else:
        if stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
            return handle
        handle.close()
    raise BundleError(f"{path} is a link or no plain file; a bundle holds plain files only", "link")
