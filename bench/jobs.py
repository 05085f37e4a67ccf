"""Measures the guarantees of batch jobs at full size: `python -m bench.jobs`.

It measures whether killed jobs, on threads and on Ray, resume to the same bytes; how much of the
engine's throughput a job keeps; the false discoveries and the power over a whole job; and the
accuracy of estimated priors.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from likely import bayes
from likely.answers import Pixels
from likely.bundle import Bundle
from likely.engine import Engine
from likely.graphs import Device
from likely.jobs.ledger import MANIFEST
from likely.outliers import benjamini_hochberg

LIKELY = [sys.executable, "-c", "from likely.cli import main; main()", "batch"]
DIGITS = Path("bundles/digits")
FASHION = Path("bundles/fashion_mnist")
JOB_TIMEOUT = 600  # timeout of a job
Doubles = npt.NDArray[np.float64]


def run_job(*arguments: object) -> dict[str, Any]:
    """Runs a job without disturbance; returns its summary."""
    command = [*LIKELY, *map(str, arguments), "--json"]
    ran = subprocess.run(command, capture_output=True, check=True)  # noqa: S603
    summary: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return summary


def kill_repeatedly(
    arguments: Sequence[object], out: Path, times: int, rng: random.Random
) -> list[int]:
    """Starts a job and kills it with SIGKILL, `times` times; the shards done at each kill.

    Each kill comes at a random moment after a randomly chosen shard.
    """
    counts: list[int] = []
    while len(counts) < times:
        job = subprocess.Popen(  # noqa: S603
            [*LIKELY, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        target = count_listed_shards(out) + rng.randint(0, 3)
        end = time.monotonic() + JOB_TIMEOUT
        while count_listed_shards(out) < target and job.poll() is None and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        job.send_signal(signal.SIGKILL)
        job.wait()
        counts.append(count_listed_shards(out))
    return counts


def count_listed_shards(out: Path) -> int:
    """Number of shards that a job's manifest lists."""
    try:
        return len(json.loads((out / MANIFEST).read_bytes())["shards"])
    except FileNotFoundError:
        return 0


def count_shard_files(out: Path) -> int:
    """Number of shard files in a folder; the manifest may list several of them at once, later."""
    return sum(1 for _ in out.glob("part-*"))


def have_same_files(one: Path, other: Path) -> bool:
    """Whether two folders contain the same files, byte for byte."""
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in other.iterdir()) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


def find_actors(driver: int) -> list[int]:
    """The processes of Ray's actors that descend from a driver, from /proc."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
            names[int(folder.name)] = (folder / "cmdline").read_text()
        except OSError:
            continue
        parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])

    def is_descendant(process: int) -> bool:
        while process in parents and process != driver:
            process = parents[process]
        return process == driver

    return [
        pid
        for pid, name in names.items()
        if name.startswith("ray::MapWorker") and is_descendant(pid)
    ]


def run_and_kill_worker(arguments: Sequence[object], out: Path) -> bool:
    """Runs a job on Ray to its end and kills one actor meanwhile; whether the kill succeeded.

    Raises:
        RuntimeError: the job failed.
    """
    job = subprocess.Popen(  # noqa: S603
        [*LIKELY, *map(str, arguments), "--engine", "ray", "--workers", "2"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    end, was_killed = time.monotonic() + JOB_TIMEOUT, False
    while job.poll() is None and time.monotonic() < end:
        if not was_killed and count_shard_files(out) >= 2 and (actors := find_actors(job.pid)):
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(actors[0], signal.SIGKILL)
                was_killed = True
        time.sleep(0.02)
    if job.wait(JOB_TIMEOUT):
        raise RuntimeError(f"the job ended with {job.returncode}")
    return was_killed


def measure_throughput(bundle: Path, x: Pixels, folder: Path, rounds: int) -> dict[str, float]:
    """The throughput of an engine alone and of a job from Parquet to Parquet, in one process.

    Other work on the machine may slow one of them and not the other. Therefore the CPU time of the
    job's own threads, which read, encode and write, is also measured within the run: the rest of
    the run's CPU time is the engine's.
    """
    from likely.jobs.backends import Bundled
    from likely.jobs.columns import Geometry
    from likely.jobs.ledger import Record
    from likely.jobs.making import BATCH, Advance, Maker, Plan
    from likely.jobs.requests import Format, Judgement, Request
    from likely.jobs.running import run, threads, unseen
    from likely.jobs.sources import Input, Pictures

    source = folder / "pictures.parquet"
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(x)
    pq.write_table(pa.table({"image": column}), source, row_group_size=8192)
    opener = Bundled(bundle, "cpu")
    backend = opener.open()
    source_input = Input((source,))
    wall: dict[str, list[float]] = {"engine": [], "job": []}
    cpu: dict[str, list[float]] = {"engine": [], "job": []}
    shares: list[float] = []

    class TimedMaker(Maker):
        """A maker that measures the CPU time of its own threads."""

        own_seconds = 0.0

        def make(self, shard: int, advance: Advance) -> Record:
            began = time.thread_time()
            record = super().make(shard, advance)
            self.own_seconds += time.thread_time() - began
            return record

    for round_number in range(rounds):

        def job(out: Path = folder / f"scores {round_number}") -> None:
            began = time.process_time(), time.thread_time()
            pictures = Pictures(source_input, Geometry(backend.info.shape, backend.info.levels))
            task = Judgement("score", len(pictures), pictures.digest, 0.05)
            plan = Plan(
                Request.of(task, backend.info, Format.PARQUET, 4096), out, opener, source_input
            )
            maker = TimedMaker(plan, backend, pictures)
            run(plan, maker, threads(maker), unseen)
            own_seconds = maker.own_seconds + time.thread_time() - began[1]
            shares.append(1 - own_seconds / (time.process_time() - began[0]))

        def engine() -> None:
            task = Judgement("score", len(x), "", 0.05)
            for at in range(0, len(x), BATCH):
                backend.score(x[at : at + BATCH], task)

        calls: dict[str, Callable[[], None]] = {"engine": engine, "job": job}
        for name, call in calls.items():
            began = time.perf_counter(), time.process_time()
            call()
            wall[name].append(time.perf_counter() - began[0])
            cpu[name].append(time.process_time() - began[1])
    backend.close()
    return {
        "pictures": len(x),
        "engine, pictures a second": len(x) / min(wall["engine"]),
        "job, pictures a second": len(x) / min(wall["job"]),
        "kept, by the clock": min(wall["engine"]) / min(wall["job"]),
        "kept, by processor time": min(cpu["engine"]) / min(cpu["job"]),
        "kept, by threads in one run": min(shares),
    }


def simulate_discoveries(
    usual: Doubles, planted: Doubles, seeds: int, size: int
) -> dict[str, float]:
    """False discovery proportion and power of jobs with 5 % planted outliers, at q = 0.05.

    Args:
        usual: p-values of in-distribution pictures.
        planted: p-values of outliers.
        seeds: number of simulated jobs.
        size: number of pictures of each job.
    """
    proportions, powers = [], []
    planted_count = size // 20
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        usual_drawn = rng.choice(usual, size - planted_count, replace=False)
        rejected = benjamini_hochberg(
            np.concatenate([usual_drawn, rng.choice(planted, planted_count, replace=False)]), 0.05
        )
        false, true = rejected[: size - planted_count].sum(), rejected[size - planted_count :].sum()
        proportions.append(false / max(1, false + true))
        powers.append(true / planted_count)
    return {
        "pictures of a job": size,
        "false discoveries, mean": float(np.mean(proportions)),
        "false discoveries, standard error": float(np.std(proportions) / np.sqrt(seeds)),
        "false discoveries, largest": float(np.max(proportions)),
        "power, mean": float(np.mean(powers)),
        "power, least": float(np.min(powers)),
    }


def simulate_shifted_priors(
    posterior: Doubles, y: npt.NDArray[np.int64], priors: Doubles, seeds: int, size: int
) -> dict[str, float]:
    """How well priors are estimated if one label, each in turn, has half of the pictures.

    Args:
        posterior: posteriors (n, labels) of pictures.
        y: their labels (n,).
        priors: the model's priors (labels,).
        seeds: number of simulated jobs.
        size: number of pictures of each job.
    """
    labels = len(priors)
    errors, before, after = [], [], []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        true = np.full(labels, 0.5 / (labels - 1))
        true[seed % labels] = 0.5
        counts = np.rint(true * size).astype(int)
        drawn = [rng.choice(np.flatnonzero(y == k), n) for k, n in enumerate(counts)]
        rows = np.concatenate(drawn)
        estimate = bayes.estimated_priors(posterior[rows], priors)
        errors.append(np.abs(estimate - counts / counts.sum()).max())
        before.append((posterior[rows].argmax(1) == y[rows]).mean())
        weighed = bayes.reweighted(posterior[rows], priors, estimate)
        after.append((weighed.argmax(1) == y[rows]).mean())
    return {
        "pictures of a job": size,
        "largest error of a prior, mean": float(np.mean(errors)),
        "largest error of a prior, largest": float(np.max(errors)),
        "accuracy before": float(np.mean(before)),
        "accuracy after": float(np.mean(after)),
        "jobs whose accuracy did not fall": float(np.mean(np.array(after) >= np.array(before))),
    }


def measure_fashion(data: Path, others: Path, seeds: int) -> dict[str, Any]:
    """False discoveries and priors, on Fashion-MNIST's test pictures with digits as outliers."""
    opened = Bundle.open(FASHION)
    engine = Engine.load(opened, device=Device("cpu"), threads=2)
    with np.load(data) as arrays, np.load(others) as planted:
        x, y = arrays["x_test"].reshape(-1, 1, 28, 28), arrays["y_test"].astype(np.int64)
        foreign = planted["x_test"].reshape(-1, 1, 28, 28)[:2000]

    async def judged(pictures: Pixels) -> Any:
        return await engine.classify(pictures, 0.05)

    usual = asyncio.run(judged(x))
    p_values = asyncio.run(judged(foreign)).p_value
    engine.close()
    priors = np.array(opened.manifest.priors)
    accepted = usual.p_value > 0.05
    return {
        "discoveries": simulate_discoveries(usual.p_value, p_values, seeds, 5000),
        "priors": simulate_shifted_priors(
            usual.posterior[accepted], y[accepted], priors, seeds, 10_000
        ),
    }


def main() -> None:
    """Measures all figures, in about half an hour, or only the named parts."""
    parser = argparse.ArgumentParser(prog="python -m bench.jobs", description=__doc__)
    parser.add_argument("parts", nargs="*", default=["killed", "ray", "kept", "fashion"])
    parser.add_argument("--each", type=int, default=2000, help="pictures per label [2000]")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--pictures", type=int, default=60_000, help="pictures to score [60000]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--data", type=Path, help="Fashion-MNIST, .npz with x_test and y_test")
    parser.add_argument("--others", type=Path, help="MNIST, in the same form")
    parser.add_argument("--folder", type=Path, default=Path("build/jobs"), help="folder to create")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    arguments = ["generate", "--each", options.each, "--seed", 7, "--shard", 100, "--out"]
    results: dict[str, Any] = {}
    if {"killed", "ray"} & set(options.parts):
        began = time.perf_counter()
        run_job(*arguments, options.folder / "whole")
        results["undisturbed, seconds"] = time.perf_counter() - began
    if "killed" in options.parts:
        out = options.folder / "killed"
        results["kills at shards"] = kill_repeatedly(
            [*arguments, out],
            out,
            options.kills,
            random.Random(1),  # noqa: S311
        )
        run_job(*arguments, out)
        results["killed, and the same"] = have_same_files(options.folder / "whole", out)
    if "ray" in options.parts:
        out = options.folder / "ray"
        results["Ray's worker killed"] = run_and_kill_worker([*arguments, out], out)
        results["Ray's, and the same"] = have_same_files(options.folder / "whole", out)
    if "kept" in options.parts:
        golden = Bundle.open(DIGITS).golden()["density/x"]
        rng = np.random.default_rng(0)
        x = golden[rng.integers(len(golden), size=options.pictures)]
        results["digits"] = measure_throughput(DIGITS, x, options.folder, options.rounds)
    if "fashion" in options.parts:
        results["Fashion-MNIST"] = measure_fashion(options.data, options.others, options.seeds)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
