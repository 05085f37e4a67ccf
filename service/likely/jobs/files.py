"""Files that are whole or not there: written beside, synced, then renamed."""

from __future__ import annotations

import hashlib
import os
import secrets
from contextlib import suppress
from pathlib import Path

PART = ".part"


def write(path: Path, data: bytes) -> None:
    """Lets a file have this content, whatever happens meanwhile: the old one or the new one.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    # A name of its own: a worker taken for dead may still write the same shard.
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART}")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync(path.parent)
    except OSError as error:
        raise OSError(
            error.errno, f"{path} cannot be written: {error.strerror or error}"
        ) from error
    finally:
        with suppress(OSError):
            part.unlink()


def sync(folder: Path) -> None:
    """Lets the names in a folder be on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def clear(folder: Path) -> None:
    """Removes what killed writers left in a folder."""
    for part in folder.glob(f".*{PART}"):
        part.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
