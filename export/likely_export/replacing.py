"""Replaces a bundle's folder at once, by a new folder that was filled beside it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from likely.bundle import LARGEST_MANIFEST, MANIFEST
from likely.bundle.signing import SIGNATURE
from likely.errors import BundleError

_KEYS = {"format", "graphs", "files"}  # of a manifest, of whatever version


@contextmanager
def rewriting(bundle: Path) -> Iterator[Path]:
    """Yields a copy of a bundle to write to, which replaces the bundle if all goes well.

    Raises:
        BundleError: the bundle is signed.
    """
    check_unsigned(bundle)
    with replacing(bundle) as folder:
        shutil.copytree(bundle, folder, dirs_exist_ok=True)
        yield folder


def check_unsigned(bundle: Path) -> None:
    """Raises if a bundle has a signature, which any change would invalidate.

    Raises:
        BundleError: it is signed.
    """
    if (bundle / SIGNATURE).exists():
        raise BundleError(
            f"{bundle} is signed, and {SIGNATURE} would not hold for what is written to it: "
            "take the signature away first, and sign it again afterwards",
            "signature",
        )


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Yields a new folder, which replaces `out` if all goes well.

    The old folder is set aside until the new one is in place, so that at least one of them survives
    however the process ends.

    Raises:
        BundleError: `out` contains something other than a bundle.
    """
    if out.exists() and not _is_replaceable(out):
        raise BundleError(f"{out} exists and is no bundle; it is not replaced")
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    staging.chmod(0o755)
    try:
        yield staging
        _exchange(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _is_replaceable(out: Path) -> bool:
    """Whether it is a bundle, even if damaged or of another version, or an empty folder."""
    return out.is_dir() and (_is_bundle(out) or not any(out.iterdir()))


def _is_bundle(folder: Path) -> bool:
    """Whether its manifest is that of a bundle; web apps, for example, use the same file name."""
    try:
        with (folder / MANIFEST).open("rb") as handle:
            document = json.loads(handle.read(LARGEST_MANIFEST + 1))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and document.keys() >= _KEYS


def _exchange(new: Path, old: Path) -> None:
    """Puts a folder in the place of another, if that exists; on failure, the old one stays."""
    aside = new.with_name(f"{new.name}-old")
    if old.exists():
        old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        if aside.exists():
            aside.rename(old)
        raise
    shutil.rmtree(aside, ignore_errors=True)
