"""Encodes tables as the bytes of shards; equal tables give equal bytes."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from likely.answers import Pixels
from likely.jobs import tables
from likely.jobs.requests import Format
from likely.levels import brightness


def encode(table: pa.Table, form: Format, levels: int) -> bytes:
    """Encodes a table as a shard.

    Args:
        table: rows and metadata of the shard.
        form: file format.
        levels: number of levels of the pictures, from which a WebDataset's brightness is
            computed.
    """
    out = io.BytesIO()
    if form is Format.PARQUET:
        pq.write_table(table, out, compression="zstd", row_group_size=max(1, len(table)))
    elif form is Format.NPZ:
        arrays = {name: tables.to_array(table[name]) for name in table.column_names}
        np.savez_compressed(out, **arrays, **_metadata_arrays(table))  # type: ignore[arg-type]
    else:
        with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for name, data in _samples(table, levels):
                member = tarfile.TarInfo(name)  # with constant time, owner and permissions
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def _metadata_arrays(table: pa.Table) -> dict[str, Any]:
    """The table's metadata, each entry as an array of one string."""
    metadata = table.schema.metadata or {}
    return {
        key.decode().replace(".", "_"): np.array(value.decode()) for key, value in metadata.items()
    }


def _samples(table: pa.Table, levels: int) -> Iterator[tuple[str, bytes]]:
    """Yields name and content of every file in a WebDataset shard.

    For each picture, `<index>.png` contains its brightness (`.npy` its levels if it has neither
    one channel nor three) and `<index>.cls` its label, if the table has these columns;
    `<index>.json` contains all columns except the picture.
    """
    columns = {name: tables.to_array(table[name]) for name in table.column_names}
    images = columns.pop("image", None)
    for row, index in enumerate(columns["index"].tolist()):
        key = f"{index:012d}"
        if images is not None and images.shape[1] in (1, 3):
            yield f"{key}.png", _png(brightness(images[row], levels))
        elif images is not None:
            yield f"{key}.npy", _npy(images[row])
        if "label" in columns:
            yield f"{key}.cls", str(int(columns["label"][row])).encode()
        values = {name: column[row].tolist() for name, column in columns.items()}
        yield f"{key}.json", json.dumps(values).encode()


def _png(picture: Pixels) -> bytes:
    out = io.BytesIO()
    plane = picture.transpose(1, 2, 0)
    Image.fromarray(plane if len(picture) == 3 else plane[:, :, 0]).save(out, "png")
    return out.getvalue()


def _npy(picture: Pixels) -> bytes:
    out = io.BytesIO()
    np.save(out, picture)
    return out.getvalue()
