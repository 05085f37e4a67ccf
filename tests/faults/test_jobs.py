"""Faults of batch jobs: killed anywhere, on a disk that is full or cannot be written."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from bench.jobs import (
    LIKELY,
    count_listed_shards,
    count_shard_files,
    have_same_files,
    kill_repeatedly,
    run_and_kill_worker,
    run_job,
)
from likely.errors import Unavailable
from likely.jobs.backends import Served
from tests.faults.served import first_process, served, wait_until
from tests.jobs.conftest import contents

if TYPE_CHECKING:
    from tests.conftest import Toy

KILLS = 4


def words(toy: Toy, *more: object) -> list[object]:
    """A job of 60 shards."""
    return [
        "generate", "--bundle", toy.path, "--device", "cpu", "--threads", 1,
        "--labels", "0=400,2=800", "--seed", 5, "--shard", 20, *more, "--out",
    ]  # fmt: skip


@pytest.mark.fault(37)
def test_a_job_that_is_killed_anywhere_is_resumed_to_the_same_bytes(
    toy: Toy, tmp_path: Path
) -> None:
    run_job(*words(toy), tmp_path / "whole")
    job = [*words(toy), tmp_path / "killed"]
    at = kill_repeatedly(job, tmp_path / "killed", KILLS, random.Random(37))
    assert any(0 < shards < 60 for shards in at), at
    assert at == sorted(at)
    run_job(*job)
    assert have_same_files(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.fault(37)
def test_a_killed_job_of_two_rounds_is_resumed_to_the_same_bytes(toy: Toy, tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", toy.draw(np.random.default_rng(0), 1200))
    job: list[object] = ["score", tmp_path / "in.npy", "--bundle", toy.path, "--fdr", 0.2]
    job += ["--threads", 1, "--shard", 20, "--batch", 20, "--out"]
    whole, out = tmp_path / "whole", tmp_path / "killed"
    run_job(*job, whole)
    kill_repeatedly([*job, out], out, 2, random.Random(3))
    run_job(*job, out)
    assert have_same_files(whole, out)


@pytest.mark.fault(37)
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_on_ray_survives_its_worker(toy: Toy, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    run_job(*words(toy), tmp_path / "whole")
    for _ in range(3):  # a fast machine may have done the job before the kill
        shutil.rmtree(tmp_path / "ray", ignore_errors=True)
        if run_and_kill_worker([*words(toy), tmp_path / "ray"], tmp_path / "ray"):
            break
    else:
        pytest.fail("no worker was killed")
    assert have_same_files(tmp_path / "whole", tmp_path / "ray")


def told_to_end(toy: Toy, tmp_path: Path, *before: str, more: tuple[object, ...] = ()) -> int:
    """The exit code of a job that hears SIGTERM; then it is resumed to the same bytes."""
    out = tmp_path / "out"
    command = [*before, *LIKELY, *map(str, words(toy, *more)), str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: count_listed_shards(out) >= 2, 120)
    job = process.pid
    if before:
        (job,) = map(int, Path(f"/proc/{job}/task/{job}/children").read_text().split())
    began = time.monotonic()
    os.kill(job, signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert "ended by SIGTERM" in stderr
    assert "Traceback" not in stderr
    assert 2 <= count_listed_shards(out) < 60
    # Ray ends its workers as it likes, and one may write until then; the resumed job clears that.
    assert more or not list(out.glob(".*.part"))
    run_job(*words(toy), out)
    run_job(*words(toy), tmp_path / "whole")
    assert have_same_files(tmp_path / "whole", out)
    return process.returncode


@pytest.mark.fault(37)
def test_a_job_that_is_told_to_end_does_so_and_is_resumed(toy: Toy, tmp_path: Path) -> None:
    assert told_to_end(toy, tmp_path) == -signal.SIGTERM


@pytest.mark.fault(37)
@pytest.mark.slow
def test_so_does_one_on_ray(toy: Toy, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    assert told_to_end(toy, tmp_path, more=("--engine", "ray", "--workers", "1")) == -15


@pytest.mark.fault(37)
def test_so_does_the_first_process_of_a_container(toy: Toy, tmp_path: Path) -> None:
    assert told_to_end(toy, tmp_path, *first_process()) == 128 + signal.SIGTERM


def failed(command: list[object]) -> str:
    """The sentence that a command fails with."""
    ran = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert ran.returncode == 1, ran
    stderr: str = ran.stderr
    assert "Traceback" not in stderr
    return stderr


@pytest.mark.fault(40)
def test_a_full_disk_is_told_and_the_job_resumed(toy: Toy, tmp_path: Path) -> None:
    # No file of the process may grow beyond 8 KiB: a shard fits, and the manifest soon does not.
    out = tmp_path / "out"
    sentence = failed(["bash", "-c", 'ulimit -f 8 && exec "$@"', "job", *LIKELY, *words(toy), out])
    assert f"{out}/manifest.json cannot be written: File too large" in sentence
    assert 0 < count_listed_shards(out) < 60
    assert all(path.suffix != ".part" for path in out.iterdir())
    run_job(*words(toy), out)
    run_job(*words(toy), tmp_path / "whole")
    assert have_same_files(tmp_path / "whole", out)


@pytest.mark.fault(40)
def test_a_folder_that_cannot_be_written_is_told(toy: Toy, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    command = [*LIKELY, *words(toy), closed]
    if os.geteuid() == 0:  # who may write anything, unless that is taken away
        if not shutil.which("setpriv"):
            pytest.skip("setpriv is not installed")
        command = ["setpriv", "--bounding-set=-dac_override", *command]
    assert f"{closed}/manifest.json cannot be written: Permission denied" in failed(command)
    assert contents(closed) == {}
    command[-1] = closed / "deeper"
    assert "Permission denied" in failed(command)


@pytest.mark.timeout(600)
@pytest.mark.fault(37)
def test_a_job_outlives_its_server(tmp_path: Path) -> None:
    asked: list[object] = ["generate", "--each", 20, "--seed", 1, "--shard", 10, "--out"]
    run_job(*asked, tmp_path / "whole")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    out, flags = tmp_path / "out", ("--port", port)
    with served(tmp_path, *flags) as first, ExitStack() as stack:
        job = subprocess.Popen(
            [*LIKELY, *map(str, asked), out, "--address", first.address(), "--patience", "60"],
            stdout=subprocess.DEVNULL,
        )
        stack.callback(job.wait)
        stack.callback(job.kill)
        wait_until(lambda: count_shard_files(out) >= 2, 120)
        first.process.kill()
        first.process.wait()
        assert count_listed_shards(out) < 20
        # While the job goes on asking, the server is begun anew.
        second = stack.enter_context(served(tmp_path, *flags))
        second.address()
        assert job.wait(400) == 0
    assert have_same_files(tmp_path / "whole", out)


def test_patience_ends() -> None:
    with pytest.raises(Unavailable):
        Served("127.0.0.1:1", patience=0.1, timeout=5).open()
