"""Atomic file writes: a temporary file beside the target is written, synced, then renamed."""

from __future__ import annotations

import hashlib
import os
import secrets
from contextlib import suppress
from pathlib import Path

PART = ".part"
LOST_AND_FOUND = "lost+found"  # a file system's own folder, which only root can read


def write(path: Path, data: bytes) -> None:
    """Writes a file atomically: after a crash it has its old content or the new one.

    Raises:
        OSError: the file cannot be written; the temporary file is removed.
    """
    # The temporary name is unique: a worker presumed dead may still write the same shard.
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
    """Syncs a folder's directory entries to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_temporary_files(folder: Path) -> None:
    """Removes the temporary files that killed writers left in a folder."""
    for part in folder.glob(f".*{PART}"):
        part.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
