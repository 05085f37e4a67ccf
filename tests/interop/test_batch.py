"""What the page on batch jobs and the examples of schedules tell is so, and runs."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner

from demo.serving import Served
from likely.cli import main
from likely.cli.batch import batch

pytestmark = pytest.mark.timeout(600)
PAGE = Path("docs/batch.md").read_text()
DEPLOY = Path("deploy/batch").absolute()
COLUMN = re.compile(r"^\| ([a-z, ]+) \| `(\w+)` \| (\S.*?) \| ", re.MULTILINE)


def blocks(language: str) -> list[str]:
    """The page's code blocks in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, stocked: Served) -> Path:
    """Where the page's commands were run, one after the other, but for those that need Ray."""
    where = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        for line in COMMANDS:
            program, *words = shlex.split(line.replace("127.0.0.1:50051", stocked.address))
            assert program == "likely"
            if "ray" in words:
                continue
            found = CliRunner().invoke(main, words)
            assert found.exit_code == 0, (line, found.output)
    return where


def test_the_pages_commands_give_what_they_say(folder: Path) -> None:
    manifests = {
        path.parent.name: json.loads(path.read_bytes()) for path in folder.glob("*/manifest.json")
    }
    assert {name: each["summary"]["pictures"] for name, each in manifests.items()} == {
        "drawn": 300, "checked": 200, "shards": 50, "scores": 300, "rejections": 500, "labels": 50,
        "weighed": 300,
    }  # fmt: skip
    priors = manifests["weighed"]["summary"]["priors"]
    assert sorted(priors, key=priors.get)[-2:] == ["3", "5"]


def test_the_pages_python_runs(folder: Path) -> None:
    (code,) = blocks("python")
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    assert ran.stdout == "b'7'\n(300, 1, 28, 28)\n"


def test_the_commands_that_need_ray_are_right() -> None:
    assert [parsed(shlex.split(line)) for line in COMMANDS if "ray" in line.split()]


@pytest.mark.parametrize(
    ("job", "out"), [("generate", "drawn"), ("score", "rejections"), ("classify", "labels")]
)
def test_the_pages_columns_are_those_of_the_shards(folder: Path, job: str, out: str) -> None:
    rows = [(jobs.split(", "), name, kind) for jobs, name, kind in COLUMN.findall(PAGE)]
    listed = {name: kind for jobs, name, kind in rows if {"all", job} & set(jobs)}
    schema = pq.read_schema(folder / out / "part-00000.parquet")
    assert {field.name: shown(field.type) for field in schema} == listed
    for key in ("model", "version", "digest", "kind", "request"):
        assert f"likely.{key}".encode() in schema.metadata
    assert (b"likely.seed" if job == "generate" else b"likely.alpha") in schema.metadata


def shown(kind: Any) -> str:
    """An Arrow type as the page writes it."""
    name = re.sub(
        r"extension<arrow.(\w+)\[value_type=(\w+), shape=.*", r"\1<\2, [c, h, w]>", str(kind)
    )
    return re.sub(r"<(?:element|item): (\w+)(?: not null)?>\[\d+\]", r"<\1>[labels]", name)


def parsed(words: list[str]) -> dict[str, Any]:
    """What a command of a job says, by the command line's own parser; its inputs need not exist."""
    assert words[:2] == ["likely", "batch"], words
    command = batch.commands[words[2]]
    # Where an example's files are is not here: all that exists stands for them.
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            parameter.type.exists = False  # type: ignore[attr-defined]
    return command.make_context(words[2], words[3:]).params


def test_the_cron_job_is_one(tmp_path: Path) -> None:
    cron_job = yaml.safe_load((DEPLOY / "cronjob.yaml").read_text())
    assert (cron_job["apiVersion"], cron_job["kind"]) == ("batch/v1", "CronJob")
    assert cron_job["spec"]["concurrencyPolicy"] == "Forbid"
    pod = cron_job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "OnFailure"
    assert cron_job["spec"]["timeZone"] == "Etc/UTC"
    (container,) = pod["containers"]
    sources = {variable["name"]: variable["valueFrom"] for variable in container["env"]}
    assert {*sources} == {"JOB", "CORES"}
    # The same for every pod of a job, and another for the next.
    assert "batch.kubernetes.io/job-name" in sources["JOB"]["fieldRef"]["fieldPath"]
    cores = container["resources"]["requests"]["cpu"]
    assert sources["CORES"]["resourceFieldRef"]["resource"] == "requests.cpu"
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}
    (tmp_path / "likely").write_text('#!/bin/sh\nprintf "%s\\n" $PPID "$@"\n')
    (tmp_path / "likely").chmod(0o755)

    def ran(name: str) -> subprocess.CompletedProcess[str]:
        """What the container runs in a job of that name."""
        environment = {"JOB": name, "CORES": cores, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        args = [word.replace("/data/", f"{tmp_path}/data/") for word in container["args"]]
        words = [*container["command"], *args]
        return subprocess.run(words, capture_output=True, text=True, env=environment, check=False)

    incoming = tmp_path / "data" / "incoming" / "2026-02-28"
    incoming.mkdir(parents=True)
    scheduled = int(datetime(2026, 3, 1, 2, 15, tzinfo=UTC).timestamp()) // 60
    for _ in range(2):  # tried again, whenever that is
        parent, *words = ran(f"{cron_job['metadata']['name']}-{scheduled}").stdout.splitlines()
        assert int(parent) == os.getpid()  # no shell stands between: signals reach the job
        found = parsed(["likely", *words])
        assert found["inputs"] == (incoming,)
        assert found["out"] == tmp_path / "data" / "scores" / "2026-02-28"
        assert found["fdr"] == 0.05
        assert found["threads"] == int(cores)
        assert "/data" in mounts
        assert any(found["bundle"].is_relative_to(mount) for mount in mounts)
    incoming.rmdir()  # nothing came that day
    nothing = ran(f"{cron_job['metadata']['name']}-{scheduled}")
    assert (nothing.returncode, nothing.stdout) == (0, "no pictures of 2026-02-28\n")
    for name in ("manual", "2", "manual7", "20260228"):  # begun by hand, and tells no minute
        refused = ran(f"{cron_job['metadata']['name']}-{name}")
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr.endswith(f"-{name}, does not end in the minute of a schedule\n")
    extras = re.search(r"--build-arg EXTRAS=(\S+)", (DEPLOY / "cronjob.yaml").read_text())
    assert extras and {"cpu", "jobs"} <= set(extras[1].split(","))


def test_the_service_runs_a_job() -> None:
    (line,) = re.findall(r"^ExecStart=(.*)$", (DEPLOY / "likely-draw.service").read_text(), re.M)
    shell, flag, script = shlex.split(line)
    assert (shell, flag) == ("/bin/sh", "-c")
    # systemd's own escapes, then what the shell makes of it.
    script = script.replace("$$", "$").replace("%%", "%").replace("exec likely", "echo likely")
    ran = subprocess.run([shell, flag, script], capture_output=True, text=True, check=True)
    found = parsed(shlex.split(ran.stdout))
    assert (found["each"], found["self_check"]) == (1000, True)
    year, week = found["out"].name.removeprefix("drawn-").split("-")
    assert found["seed"] == int(year + week)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_takes_the_units() -> None:
    units = [DEPLOY / "likely-draw.service", DEPLOY / "likely-draw.timer"]
    ran = subprocess.run(
        ["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False
    )
    assert not [line for line in ran.stderr.splitlines() if "likely-draw" in line]
    assert ran.returncode == 0, ran.stderr
    when = re.search(r"OnCalendar=(.*)", units[1].read_text())
    assert when is not None
    subprocess.run(["systemd-analyze", "calendar", when[1]], capture_output=True, check=True)


def test_the_dag_runs_a_job(tmp_path: Path) -> None:
    text = (DEPLOY / "airflow_dag.py").read_text()
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    (operator,) = [each for each in calls if getattr(each.func, "id", "") == "BashOperator"]
    given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in operator.keywords}
    command = given["bash_command"].replace("{{ ds }}", "2026-01-31")
    command = command.replace("/data/", f"{tmp_path}/data/")
    (tmp_path / "likely").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "likely").chmod(0o755)

    def ran() -> str:
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        words = ["bash", "-c", command]
        return subprocess.run(
            words, capture_output=True, text=True, env=environment, check=True
        ).stdout

    assert ran() == "no pictures of 2026-01-31\n"
    incoming = tmp_path / "data" / "incoming" / "2026-01-31"
    incoming.mkdir(parents=True)
    found = parsed(["likely", *ran().splitlines()])
    assert found["inputs"] == (incoming,)
    assert found["estimate_priors"]
    assert found["out"] == tmp_path / "data" / "labels" / "2026-01-31"


def test_airflow_takes_the_dag() -> None:
    models = pytest.importorskip("airflow.models")
    bag = models.DagBag(str(DEPLOY / "airflow_dag.py"), include_examples=False)
    assert not bag.import_errors
    assert list(bag.dags) == ["likely_classify"]
