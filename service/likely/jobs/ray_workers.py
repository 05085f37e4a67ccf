"""Workers on Ray: a pool of actors, each with its own backend, and one shard per task."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np

from likely.errors import JobError
from likely.jobs.ledger import Record
from likely.jobs.making import Advance, Maker, Plan
from likely.jobs.running import Made, Workers

SHARD_RETRIES = 3  # retries of a shard whose actor died: making it may be what kills actors


class Actor:
    """A maker in a Ray process, which may be on another machine."""

    def __init__(self, plan: Plan) -> None:
        self._maker = Maker.open(plan)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Makes the shards with the given numbers; returns their records."""
        records = [self._maker.make(int(shard), lambda _: None) for shard in batch["shard"]]
        return {
            "shard": batch["shard"],
            "record": np.array([json.dumps(asdict(record)) for record in records]),
        }


def ray_workers(plan: Plan, count: int, threads: int, cards: int = 0) -> Workers:
    """Workers that are Ray actors, on the cluster that RAY_ADDRESS names or on this machine.

    Every actor must see the job's folder, its inputs and its bundle under the same paths. An
    actor that dies is restarted, and its shard is made again, `SHARD_RETRIES` times at most.

    Args:
        plan: the job's plan.
        count: number of actors; 0 for as many as the cores allow. Never more than the cards
            allow: further actors would wait for a card without end.
        threads: cores of each actor.
        cards: GPUs of each actor.

    Raises:
        JobError: Ray is not installed.
    """
    # No usage statistics are sent to Ray's makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise JobError("Ray is not installed; pip install 'likely[ray]'") from error

    def make_shards(missing: list[int], advance: Advance) -> Generator[Made, None, None]:
        if not missing:
            return
        owns_ray = not ray.is_initialized()
        if owns_ray:
            with _keeping_sigterm():
                ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        try:
            yield from _make_on_cluster(missing, advance)
        except ray.exceptions.RayError as error:
            raise JobError(_last_line(error)) from error
        finally:
            if owns_ray:
                ray.shutdown()

    def _make_on_cluster(missing: list[int], advance: Advance) -> Generator[Made, None, None]:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        there = ray.cluster_resources()
        cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        largest = max(cores, default=0)
        if 0 < largest < threads:  # Ray would wait for such a node without end
            raise JobError(f"no node of Ray has {threads} cores: ask for --threads {largest}")
        actors = count or max(1, int(there.get("CPU", 1) // threads))
        if cards:
            actors = min(actors, int(there.get("GPU", 0) // cards))
            if not actors:
                raise JobError("Ray has no GPU: give it one, or ask for --device cpu")
        rows = ray.data.from_items(
            [{"shard": shard} for shard in missing], override_num_blocks=len(missing)
        )
        records = rows.map_batches(
            Actor,
            fn_constructor_args=(plan,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(actors, len(missing))),
            num_cpus=threads,
            num_gpus=cards,
            max_task_retries=SHARD_RETRIES,
        )
        for row in records.iter_rows():
            record = Record(**json.loads(row["record"]))
            advance(record.rows)
            yield int(row["shard"]), record

    return make_shards


@contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Restores the process's SIGTERM handler: Ray installs its own, which prints a stack trace."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _last_line(error: Exception) -> str:
    """The last line of an error raised in a worker: the rest is its traceback."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
