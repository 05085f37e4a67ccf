"""Answers as Arrow tables, with the schemas of Parquet shards (documented in docs/batch.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from likely.answers import (
    Classifications,
    Doubles,
    Draws,
    LabelRule,
    ModelInfo,
    Scores,
    Verdict,
    verdicts,
)
from likely.jobs.requests import Judgement, Request

VERDICTS = {verdict.value: verdict.name.lower() for verdict in Verdict}
REJECTED = "rejected"
COMPOSED = "composed_log_likelihoods"


def shard_schema(request: Request, info: ModelInfo, *, measured: bool = False) -> pa.Schema:
    """The schema of a job's shards: their columns, and the metadata of the request.

    Args:
        request: the job's request.
        info: description of the job's model.
        measured: whether the schema of measured shards is meant, not that of final ones.
    """
    labels = len(info.labels)
    a_label = pa.list_(pa.float64(), labels)
    columns: dict[str, pa.DataType] = {"index": pa.int64()}
    task = request.task
    if task.kind == "generate":
        columns |= {
            "label": pa.int64(),
            "image": pa.fixed_shape_tensor(pa.uint8(), info.shape),
            "draws": pa.int64(),
            "accepted": pa.bool_(),
        }
    elif task.kind == "score":
        columns |= {
            "key": pa.string(),
            "log_likelihood": pa.float64(),
            "bits_per_dim": pa.float64(),
            "unusualness": pa.float64(),
            "p_value": pa.float64(),
            "verdict": pa.string(),
        }
    else:
        columns |= {
            "key": pa.string(),
            "label": pa.int64(),
            "posterior": a_label,
        }
        if task.rule is LabelRule.DISCRIMINATIVE:
            columns |= {COMPOSED: a_label, "p_value": pa.float64()}
        else:
            columns |= {
                "log_likelihoods": a_label,
                "p_value": pa.float64(),
                "label_p_values": a_label,
                "label_set": pa.list_(pa.bool_(), labels),
            }
        columns["verdict"] = pa.string()
    if isinstance(task, Judgement) and task.fdr is not None and not measured:
        columns[REJECTED] = pa.bool_()
    fields = [
        pa.field(name, kind, nullable=name == "label" and task.kind == "generate")
        for name, kind in columns.items()
    ]
    return pa.schema(fields, request.metadata())


def draws_table(parts: Sequence[Draws], first: int, schema: pa.Schema) -> pa.Table:
    """Draws of consecutive pictures as a table; `first` is the index of the first one."""
    labels = np.concatenate([part.label for part in parts])
    images = np.concatenate([part.images for part in parts])
    return _table(
        schema,
        {
            "index": np.arange(first, first + len(labels)),
            "label": pa.array(labels, pa.int64(), mask=labels < 0),
            "image": pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(images)),
            "draws": np.concatenate([part.draws for part in parts]),
            "accepted": np.concatenate([part.accepted for part in parts]),
        },
    )


def judgements_table(
    answer: Scores | Classifications, first: int, keys: Sequence[str], schema: pa.Schema
) -> pa.Table:
    """Scores or classifications of consecutive pictures as a table.

    `first` is as in `draws_table`.
    """
    columns: dict[str, Any] = {
        "index": np.arange(first, first + len(keys)),
        "key": pa.array(keys, pa.string()),
        "p_value": answer.p_value,
        "verdict": _verdicts(answer.verdict),
    }
    if isinstance(answer, Scores):
        columns |= {
            "log_likelihood": answer.log_px,
            "bits_per_dim": answer.bits_per_dim,
            "unusualness": answer.unusualness,
        }
    else:
        columns |= {
            "label": answer.label,
            "posterior": _rows(answer.posterior),
        }
        if COMPOSED in schema.names:
            columns[COMPOSED] = _rows(answer.composed)
        else:
            columns |= {
                "log_likelihoods": _rows(answer.log_pxy),
                "label_p_values": _rows(answer.label_p_values),
                "label_set": _rows(answer.label_sets),
            }
    return _table(schema, columns)


def final_table(
    measured: pa.Table,
    schema: pa.Schema,
    *,
    rejected: npt.NDArray[np.bool_] | None,
    posterior: Doubles | None,
    min_posterior: float,
) -> pa.Table:
    """The final table of a measured one, with the results that depend on the whole job.

    Args:
        measured: a table from `judgements_table`.
        schema: schema of the final table.
        rejected: bool (n,), which pictures the joint test rejects; None without such a test.
        posterior: (n, labels), under the estimated priors; None if they are not estimated.
        min_posterior: smallest posterior at which a label is assigned.
    """
    columns: dict[str, Any] = {name: measured[name] for name in measured.column_names}
    if rejected is not None:
        columns[REJECTED] = rejected
    if posterior is not None:
        outlier = np.asarray(measured["verdict"]) == VERDICTS[Verdict.OUTLIER]
        columns["posterior"] = _rows(posterior)
        columns["label"] = posterior.argmax(1)
        columns["verdict"] = _verdicts(verdicts(outlier, posterior, min_posterior))
    return _table(schema, columns)


def to_array(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """A column as an array with one row per picture: (n,), (n, labels) or (n, c, h, w)."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # a column without rows has no chunk
        array = pa.concat_arrays([*array.chunks, pa.array([], array.type)])
    if isinstance(array, pa.FixedShapeTensorArray):
        return np.asarray(array.to_numpy_ndarray())
    if pa.types.is_fixed_size_list(array.type):
        flat = array.flatten().to_numpy(zero_copy_only=False)
        return np.asarray(flat).reshape(len(array), array.type.list_size)
    if array.null_count:
        return np.asarray(array.fill_null(-1))
    if pa.types.is_string(array.type):
        return np.array(array.to_pylist(), dtype=np.str_)
    return np.asarray(array.to_numpy(zero_copy_only=False))


def counts(table: pa.Table) -> dict[str, int]:
    """Number of pictures by verdict, of rejected and of accepted ones, and of all draws."""
    tally: Counter[str] = Counter()
    if "verdict" in table.column_names:
        tally.update(dict.fromkeys(VERDICTS.values(), 0))
        tally.update(table["verdict"].to_pylist())
    for name in ("draws", "accepted", REJECTED):
        if name in table.column_names:
            tally[name] = int(to_array(table[name]).sum())
    return dict(tally)


def _verdicts(numbers: npt.NDArray[Any]) -> pa.Array:
    return pa.array([VERDICTS[number] for number in numbers.tolist()], pa.string())


def _rows(values: npt.NDArray[Any]) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _table(schema: pa.Schema, columns: Mapping[str, Any]) -> pa.Table:
    arrays = [columns[name] for name in schema.names]
    return pa.Table.from_arrays(
        [pa.array(a) if isinstance(a, np.ndarray) else a for a in arrays], schema=schema
    )
