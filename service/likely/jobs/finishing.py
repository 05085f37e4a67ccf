"""The second round of a job, which needs all pictures: joint rejection and estimated priors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from likely import bayes
from likely.answers import Accepted, Doubles, ModelInfo, Verdict
from likely.jobs import tables
from likely.jobs.ledger import Ledger
from likely.jobs.making import write_shard
from likely.jobs.requests import Judgement
from likely.outliers import benjamini_hochberg


def finish(ledger: Ledger, info: ModelInfo) -> dict[str, Any]:
    """Makes the missing final shards from the measured ones; returns entries for the summary.

    Benjamini and Hochberg's procedure uses the p-values of all pictures. The priors are estimated
    from the pictures that are not rejected at alpha, because an outlier has no label. The former
    needs 8 bytes of memory per picture, the latter 8 bytes per picture and label.

    Args:
        ledger: the job's ledger; all measured shards must be done.
        info: description of the job's model.

    Raises:
        OSError: a shard cannot be read or written.
    """
    task = ledger.request.task
    assert isinstance(task, Judgement)
    entries: dict[str, Any] = {}
    rejected, priors = None, None
    if task.fdr is not None:
        p_values = np.concatenate([columns["p_value"] for columns in _columns(ledger, "p_value")])
        rejected = benjamini_hochberg(p_values, task.fdr)
        largest = p_values[rejected].max(initial=0.0)
        entries["fdr"] = {"rate": task.fdr, "largest_p_value": float(largest)}
    if task.estimate_priors:
        priors = bayes.estimated_priors(_accepted_posteriors(ledger), np.array(info.priors))
        entries["priors"] = dict(zip(info.labels, priors.tolist(), strict=True))
    schema = tables.shard_schema(ledger.request, info)
    for shard in ledger.missing():
        measured = pq.read_table(ledger.path(shard, measured=True), partitioning=None)
        start, stop = ledger.request.span(shard)
        table = tables.final_table(
            measured,
            schema,
            rejected=None if rejected is None else rejected[start:stop],
            posterior=None if priors is None else _posterior(measured, info, priors),
            min_posterior=task.min_posterior,
        )
        ledger.add(
            shard, write_shard(ledger.path(shard), table, ledger.request.format, info.levels)
        )
    return entries


def _accepted_posteriors(ledger: Ledger) -> Doubles:
    """The posteriors (n, labels) of the pictures that are not outliers."""
    posteriors, n = np.empty((0, 0)), 0
    for columns in _columns(ledger, "posterior", "verdict"):
        kept: Accepted = columns["verdict"] != tables.VERDICTS[Verdict.OUTLIER]
        part = columns["posterior"][kept]
        if not n:
            posteriors = np.empty((ledger.request.task.total, part.shape[1]))
        posteriors[n : n + len(part)] = part
        n += len(part)
    return posteriors[:n]


def _posterior(measured: pa.Table, info: ModelInfo, priors: Doubles) -> Doubles:
    return bayes.reweighted(tables.to_array(measured["posterior"]), np.array(info.priors), priors)


def _columns(ledger: Ledger, *names: str) -> Iterator[dict[str, Any]]:
    """These columns of every measured shard, in the order of the shards."""
    for shard in range(ledger.request.shards):
        path = ledger.path(shard, measured=True)
        table = pq.read_table(path, columns=list(names), partitioning=None)
        yield {name: tables.to_array(table[name]) for name in names}
