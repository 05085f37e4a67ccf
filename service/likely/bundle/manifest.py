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
from enum import StrEnum
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from likely.bundle import arrays, scan, signing
from likely.errors import BundleError, NotAnswered, OutOfMemory

MANIFEST = "manifest.json"
LARGEST_MANIFEST = 1 << 20
LARGEST_BUNDLE = 8 << 30
_PACKAGE = Path(__file__).resolve().parents[1]
_LINKS = (errno.ELOOP, errno.ENXIO)  # from a link; from a socket, or a pipe without a writer

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
_FILE_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}(\.[a-z0-9]{1,8}){1,2}$"
FileName = Annotated[str, Field(pattern=_FILE_NAME)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Role(StrEnum):
    """What a graph computes."""

    DENSITY = "density"  # x -> log p(x), surprise, statistics
    CONDITIONAL = "conditional"  # x[, noise] -> log p(x|y) for all labels
    GENERATE = "generate"  # y, noise -> x in one pass (latent-variable models)
    SAMPLE = "sample"  # [y,] noise -> x pixel by pixel (autoregressive models)
    DISCRIMINATE = "discriminate"  # x -> log p(y|x) for all labels, under the manifest's priors
    ENCODE = "encode"  # x[, y] -> mean[ and log-variance] of the latent features
    DECODE = "decode"  # z[, noise][, y] -> mean[, deviation and a draw] of every pixel


# The inputs that a graph of each role must take, further ones that it may take, and the outputs
# that it must give; it may give more.
_PORTS: Mapping[Role, tuple[set[str], set[str], set[str]]] = {
    Role.DENSITY: ({"x"}, set(), {"log_px", "surprise", "statistics"}),
    Role.CONDITIONAL: ({"x"}, {"eps"}, {"log_pxy"}),
    Role.GENERATE: (set(), {"y", "eps", "gumbel"}, {"x"}),
    Role.SAMPLE: ({"gumbel"}, {"y"}, {"x"}),
    Role.DISCRIMINATE: ({"x"}, set(), {"log_pyx"}),
    Role.ENCODE: ({"x"}, {"y"}, {"mean"}),
    Role.DECODE: ({"z"}, {"y", "gumbel"}, {"mean"}),
}


class Kind(StrEnum):
    """The kind of a graph's log-likelihoods."""

    EXACT = "exact"
    ELBO = "elbo"
    IWAE = "iwae"


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorSpec(_Entry):
    """One input or output of a graph; the first axis is the batch."""

    name: str
    dtype: Literal["uint8", "int64", "float32"]
    shape: tuple[int | Literal["batch"], ...]

    def array_shape(self, n: int) -> tuple[int, ...]:
        """The shape for a batch of `n`."""
        return tuple(n if axis == "batch" else axis for axis in self.shape)


class Graph(_Entry):
    """One ONNX file and what it computes."""

    file: FileName
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    kind: Kind | None = None
    importance_samples: int = Field(0, ge=0, le=2**31 - 1)

    def input(self, name: str) -> TensorSpec | None:
        """The input with that name; None if there is none."""
        return next((spec for spec in self.inputs if spec.name == name), None)

    def output(self, name: str) -> TensorSpec | None:
        """The output with that name; None if there is none."""
        return next((spec for spec in self.outputs if spec.name == name), None)


class Label(_Entry):
    """A label and its prior probability."""

    name: str = Field(min_length=1, max_length=64)
    prior: Probability


class Calibration(_Entry):
    """The file of the calibration arrays, and how they are used.

    The posterior is softmax_y(sum_e weights_e log p_e(x|y) / temperature + log p(y)); without
    weights, there is one expert. `statistics` maps each statistic to its number of values.
    """

    file: FileName
    size: int = Field(ge=1)
    temperature: float = Field(1.0, ge=1e-6, allow_inf_nan=False)
    weights: tuple[Probability, ...] = ()
    statistics: dict[str, Annotated[int, Field(ge=1)]] = {}

    @property
    def finest_alpha(self) -> float:
        """The smallest alpha that ranking against `size` scores can guarantee."""
        return 1 / (self.size + 1)


class Direction(_Entry):
    """A direction in the space of latent features, along which one property changes.

    A point of 1 is one standard deviation of an attribute within a label, or the way from the
    mean of all other labels to the label's own mean.
    """

    name: str = Field(min_length=1, max_length=80)
    kind: Literal["attribute", "label"]


class Latent(_Entry):
    """The file of the directions' arrays, and the directions in the order of the arrays."""

    file: FileName
    directions: tuple[Direction, ...]


class FileRecord(_Entry):
    """The size in bytes and the SHA-256 that a file of the bundle must have."""

    size: int = Field(ge=0)
    sha256: Digest


class Manifest(_Entry):
    """Everything about a bundle except the weights."""

    format: Literal[1] = 1
    name: Name
    version: Name
    description: str = Field(max_length=1000)
    shape: tuple[
        Annotated[int, Field(ge=1, le=4)],
        Annotated[int, Field(ge=1, le=1024)],
        Annotated[int, Field(ge=1, le=1024)],
    ]
    levels: int = Field(ge=2, le=256)
    labels: tuple[Label, ...] = ()
    graphs: dict[Role, Graph]
    calibration: Calibration | None = None
    latent: Latent | None = None
    golden: FileName
    parity_nats: float = Field(ge=0, allow_inf_nan=False)  # of every graph, on random pictures
    test_parity_nats: float | None = Field(None, ge=0, allow_inf_nan=False)  # of log p(x)
    decisions_compared: int = Field(0, ge=0)
    decisions_changed: int = Field(0, ge=0)
    recipe: dict[str, Any] = {}
    data_digest: Digest
    files: dict[FileName, FileRecord]

    @model_validator(mode="after")
    def _is_consistent(self) -> Manifest:
        if (Role.DENSITY in self.graphs) != (self.calibration is not None):
            raise ValueError("a density graph and a calibration are there together, or neither")
        if Role.CONDITIONAL in self.graphs and Role.DENSITY not in self.graphs:
            raise ValueError("a conditional graph needs a density graph beside it")
        if not self.graphs:
            raise ValueError("a bundle needs a graph")
        for role, graph in self.graphs.items():
            takes, may, gives = _PORTS[role]
            inputs = {spec.name for spec in graph.inputs}
            if not takes <= inputs <= takes | may:
                raise ValueError(f"the {role} graph cannot take {', '.join(sorted(inputs))}")
            if lacking := sorted(gives - {spec.name for spec in graph.outputs}):
                raise ValueError(f"the {role} graph must give {' and '.join(lacking)}")
        encode, decode = self.graphs.get(Role.ENCODE), self.graphs.get(Role.DECODE)
        if encode and decode and decode.input("y") and not encode.input("y"):
            raise ValueError("a graph that decodes under labels needs one that encodes under them")
        if self.latent and not {Role.ENCODE, Role.DECODE} <= set(self.graphs):
            raise ValueError("directions need a graph that encodes and one that decodes")
        if self.labels and abs(sum(label.prior for label in self.labels) - 1) > 1e-6:
            raise ValueError("the priors of the labels must sum to 1")
        conditional = self.graphs.get(Role.CONDITIONAL)
        evidence = conditional.output("evidence") if conditional else None
        experts = evidence.shape[1] if evidence and len(evidence.shape) > 1 else 0
        weights = self.calibration.weights if self.calibration else ()
        if len(weights) != experts:
            raise ValueError(f"{len(weights)} weights for {experts} experts")
        for role, graph in self.graphs.items():
            if (x := graph.input("x") or graph.output("x")) and x.shape != ("batch", *self.shape):
                raise ValueError(f"x of the {role} graph is {x.shape}, and pictures {self.shape}")
            for name in ("log_pxy", "log_pyx"):
                if (p := graph.output(name)) and p.shape != ("batch", len(self.labels)):
                    raise ValueError(f"{name} of the {role} graph is not a number for every label")
        named = {graph.file for graph in self.graphs.values()}
        named |= {part.file for part in (self.calibration, self.latent) if part}
        named.add(self.golden)
        if missing := named - set(self.files):
            raise ValueError(f"files without a record: {', '.join(sorted(missing))}")
        return self

    @property
    def calibrated(self) -> Calibration:
        """The calibration.

        Raises:
            NotAnswered: the bundle has no density graph, and therefore no calibration.
        """
        if self.calibration is None:
            raise NotAnswered(
                f"model {self.name} has no {Role.DENSITY} graph, so it does not answer this"
            )
        return self.calibration

    def latent_dimensions(self, role: Role = Role.ENCODE) -> int:
        """The number of features that a graph gives or takes; 0 if there is no such graph."""
        graph = self.graphs.get(role)
        if graph is None:
            return 0
        spec = graph.output("mean") if role is Role.ENCODE else graph.input("z")
        return int(spec.shape[-1]) if spec else 0

    def leader(self, role: Role) -> str | None:
        """The name of the (first) model in a role, by the recipe; None if the recipe has none."""
        roles = self.recipe.get("roles")
        named = roles.get(role) if isinstance(roles, dict) else None
        first = next(iter(named), None) if isinstance(named, list | tuple) else named
        return first if isinstance(first, str) else None

    @property
    def deterministic(self) -> bool:
        """Whether features have no variance, or are decoded without a distribution of pictures."""
        encode, decode = self.graphs.get(Role.ENCODE), self.graphs.get(Role.DECODE)
        return bool(
            (encode and not encode.output("log_variance")) or (decode and not decode.output("x"))
        )

    @property
    def dimensions(self) -> int:
        """The number of pixels of a picture times its channels."""
        c, h, w = self.shape
        return c * h * w

    @property
    def priors(self) -> npt.NDArray[np.float64]:
        """p(y) in the labels' order, float64 (labels,)."""
        return np.array([label.prior for label in self.labels])


class Bundle:
    """A folder whose every byte has been checked against its manifest."""

    def __init__(
        self, path: Path, manifest: Manifest, digest: str, outside: frozenset[str]
    ) -> None:
        """A bundle that `open` has verified.

        Args:
            path: the folder.
            manifest: its manifest.
            digest: SHA-256 of the manifest.
            outside: names of the files that hold weights of graphs.
        """
        self.path = path
        self.manifest = manifest
        self.digest = digest
        self._outside = outside

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
        text = _manifest_bytes(path)
        manifest = _parsed(path, text)
        sizes = {name: record.size for name, record in manifest.files.items()}
        if (total := sum(sizes.values())) > LARGEST_BUNDLE:
            raise BundleError(
                f"{path} has {total} bytes of files; at most {LARGEST_BUNDLE} are read", "manifest"
            )
        for name, record in manifest.files.items():
            _check_file(path / name, record)
        scanned = (scan.check_graph(path / g.file, sizes) for g in manifest.graphs.values())
        outside = frozenset[str]().union(*scanned)
        bundle = cls(path, manifest, hashlib.sha256(text).hexdigest(), outside)
        bundle._check_outside()
        return bundle

    def check_again(self) -> None:
        """Checks that the folder still has the bytes that were verified.

        Raises:
            BundleError: a file has changed, or a weights file can be changed by another name.
        """
        if hashlib.sha256(_manifest_bytes(self.path)).hexdigest() != self.digest:
            raise BundleError(f"{self.path} changed while it was opened", "changed")
        for name, record in self.manifest.files.items():
            _check_file(self.path / name, record)
        self._check_outside()

    def graph(self, role: Role) -> Path:
        """The path of the ONNX file of a role."""
        return self.path / self.manifest.graphs[role].file

    def calibration(self) -> dict[str, npt.NDArray[Any]]:
        """The calibration arrays by name."""
        return self._arrays(self.manifest.calibrated.file)

    def latent(self) -> dict[str, npt.NDArray[Any]]:
        """The directions' arrays by name; empty if there are no directions."""
        return self._arrays(self.manifest.latent.file) if self.manifest.latent else {}

    def golden(self) -> dict[str, npt.NDArray[Any]]:
        """The recorded (golden) inputs and outputs, named `role/input` and `role/output`."""
        return self._arrays(self.manifest.golden)

    def weights(self) -> dict[str, bytes]:
        """Reads and verifies the files that hold weights of graphs; their contents by name.

        Raises:
            BundleError: a file has changed since it was verified, or cannot be read now.
            OutOfMemory: there is no memory for the weights.
        """
        found = {}
        for name in self._outside:
            path, record = self.path / name, self.manifest.files[name]
            try:
                with _plain(path) as handle:
                    found[name] = handle.read(record.size + 1)
            except OSError as error:
                raise BundleError.unreadable(path, error) from error
            except MemoryError as error:
                raise OutOfMemory(f"no memory for the weights of {self.path}") from error
            if hashlib.sha256(found[name]).hexdigest() != record.sha256:
                raise BundleError(f"{self.path} changed while it was opened", "changed")
        return found

    def _check_outside(self) -> None:
        for name in self._outside:
            _check_alone(self.path / name)

    def _arrays(self, name: str) -> dict[str, npt.NDArray[Any]]:
        return arrays.read(self.path / name)


def read_manifest(path: Path) -> Manifest:
    """Reads the manifest of a folder, without checking the other files.

    Raises:
        BundleError: there is no valid manifest.
    """
    return _parsed(path, _manifest_bytes(path))


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
        entry.name: _record(entry)
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


def _record(path: Path) -> FileRecord:
    """The size and digest of a file.

    Raises:
        BundleError: a bundle must not contain such a file.
    """
    if not path.is_file():
        raise BundleError(f"{path} cannot be in a bundle: it is not a plain file")
    if not re.fullmatch(_FILE_NAME, path.name):
        raise BundleError(f"{path} cannot be in a bundle: its name is not allowed")
    with path.open("rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        return FileRecord(size=size, sha256=hashlib.file_digest(handle, "sha256").hexdigest())


def _parsed(path: Path, text: bytes) -> Manifest:
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise BundleError(
            f"{path} is not a bundle that this version reads: {where}: {first['msg']}", "manifest"
        ) from error


def _manifest_bytes(path: Path) -> bytes:
    manifest = path / MANIFEST
    if not path.is_dir():
        raise BundleError(f"{path} is not a folder, so it is no bundle", "incomplete")
    try:
        with _plain(manifest) as handle:
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
    most = {MANIFEST: LARGEST_MANIFEST, signing.SIGNATURE: signing.LARGEST_SIGNATURE}
    total = 0
    for entry in path.rglob("*"):
        try:
            found = entry.lstat()
        except OSError as error:
            raise BundleError.unreadable(entry, error) from error
        if not stat.S_ISREG(found.st_mode):
            continue
        name, size = entry.relative_to(path).as_posix(), found.st_size
        total += size
        if size > (limit := most.get(name, LARGEST_BUNDLE)):
            raise BundleError(f"{entry} has {size} bytes; at most {limit} are read", "signature")
        if size != sizes.get(name, size):
            raise BundleError(
                f"{entry} has {size} bytes, so it is not what the manifest names", "signature"
            )
    if total > LARGEST_BUNDLE + sum(most.values()):
        raise BundleError(
            f"{path} has {total} bytes; at most {LARGEST_BUNDLE} are read", "signature"
        )


def _check_file(path: Path, record: FileRecord) -> None:
    try:
        with _plain(path) as handle:
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


def _check_alone(path: Path) -> None:
    """Checks that a file is no hard link, through which the weights could be changed.

    Files of the package may be hard links, because installers link them to their cache.
    """
    if path.stat().st_nlink > 1 and not path.resolve().is_relative_to(_PACKAGE):
        raise BundleError(
            f"{path} is a hard link; weights outside of a graph are files of their own", "link"
        )


def _plain(path: Path) -> BufferedReader:
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
        if error.errno not in _LINKS:
            raise BundleError.unreadable(path, error) from error
    else:
        if stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
            return handle
        handle.close()
    raise BundleError(f"{path} is a link or no plain file; a bundle holds plain files only", "link")
