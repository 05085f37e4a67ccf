"""`likely batch` as a program: what it says, and what it cannot be asked."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from likely.answers import LabelRule
from likely.cli import main, show
from likely.engine import Engine
from likely.errors import Unavailable
from likely.jobs import backends
from tests.jobs.conftest import contents, table

if TYPE_CHECKING:
    from tests.conftest import Live, Toy

Batch = Callable[..., Result]


@pytest.fixture
def batch(toy: Toy) -> Batch:
    """Runs a job with the toy's bundle."""

    def run(command: str, *words: object) -> Result:
        given = [command, *words, "--bundle", toy.path, "--device", "cpu", "--threads", 1]
        return CliRunner().invoke(main, ["batch", *map(str, given)])

    return run


def test_programs_and_people_are_told_the_same(
    batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--each", 5, "--out", tmp_path / "out")
    result = batch("generate", *words, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {
        "out": str(tmp_path / "out"), "pictures": 15, "accepted": 15, "draws": 15,
        "model": "toy", "version": "1.0",
    }  # fmt: skip
    with monkeypatch.context() as patch:  # a job that is done needs no model
        patch.delattr(Engine, "load")
        shown = batch("generate", *words).stdout
    assert "model toy, version 1.0" in shown
    assert table(tmp_path / "out")["label"].to_pylist() == [0] * 5 + [1] * 5 + [2] * 5


def test_all_options_of_the_connection_reach_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def noted(*args: Any, **more: Any) -> Any:
        made.append((args, more))
        raise Unavailable("enough")

    monkeypatch.setattr(backends, "Client", noted)
    given = {"address": "there:1", "timeout": 7.0, "token": "secret", "server_name": "other"}
    files = {name: tmp_path / name for name in ("ca", "certificate", "key")}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in {**given, **files}.items()]
    flags = ["--tls", "--plaintext-token", "--count=1", f"--out={tmp_path / 'out'}"]
    assert CliRunner().invoke(main, ["batch", "generate", *words, *flags]).exit_code == 1
    ((address,), shown) = made[0]
    assert address == given.pop("address")
    assert shown == {**given, **files, "tls": True, "plaintext_token": True, "retries": False}


def test_a_file_may_hold_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []

    def noted(*args: Any, **more: Any) -> Any:
        token = more["token"]
        shown.append(token() if callable(token) else token)
        raise Unavailable("enough")

    monkeypatch.setattr(backends, "Client", noted)
    (tmp_path / "token").write_text("secret\n")
    words = ["batch", "generate", "--address=127.0.0.1:1", f"--token-file={tmp_path / 'token'}"]
    words += ["--count=1", f"--out={tmp_path / 'out'}"]
    assert CliRunner().invoke(main, words).exit_code == 1
    assert shown == ["secret"]
    result = CliRunner().invoke(main, [*words, "--token=other"])
    assert result.exit_code == 2
    assert "either --token or --token-file" in " ".join(result.stderr.replace("│", " ").split())


def test_a_token_of_the_command_line_goes_before_one_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []

    def noted(*args: Any, **more: Any) -> Any:
        token = more["token"]
        shown.append(token() if callable(token) else token)
        raise Unavailable("enough")

    monkeypatch.setattr(backends, "Client", noted)
    for name in ("named", "other"):
        (tmp_path / name).write_text(f"{name}-in-a-file")
    words = ["batch", "generate", "--address=127.0.0.1:1", "--count=1", f"--out={tmp_path / 'o'}"]

    def run(*more: str, **variables: str) -> int:
        there = {f"LIKELY_{name}": each for name, each in variables.items()}
        return CliRunner().invoke(main, [*words, *more], env=there).exit_code

    named, other = str(tmp_path / "named"), str(tmp_path / "other")
    assert run("--token=named", TOKEN_FILE=other) == 1
    assert run("--token=named", TOKEN="other") == 1
    assert run(f"--token-file={named}", TOKEN="other") == 1
    assert run(f"--token-file={named}", TOKEN="other", TOKEN_FILE=other) == 1
    assert shown == ["named", "named", "named-in-a-file", "named-in-a-file"]
    assert run(TOKEN="other", TOKEN_FILE=other) == 2
    assert run("--token=named", f"--token-file={named}") == 2
    result = CliRunner().invoke(
        main,
        ["health", "--address=127.0.0.1:1"],
        env={"LIKELY_TOKEN": "other", "LIKELY_TOKEN_FILE": other},
    )
    assert result.exit_code == 1  # it shows no token, and nobody answers


def test_the_connections_files_are_named_in_full_to_workers_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []

    def noted(*_: Any, **more: Any) -> Any:
        shown.append(more)
        raise Unavailable("enough")

    monkeypatch.setattr(backends, "Client", noted)
    monkeypatch.chdir(tmp_path)
    words = ["batch", "generate", "--address=127.0.0.1:1", "--count=1", "--out=out"]
    named = {name: f"{name}.pem" for name in ("ca", "certificate", "key")}
    words += [f"--{name}={file}" for name, file in named.items()]
    assert CliRunner().invoke(main, words).exit_code == 1
    assert {name: shown[0][name] for name in named} == {
        name: tmp_path / file for name, file in named.items()
    }


def test_a_folder_that_is_looked_at_is_not_written_into(
    batch: Batch, toy: Toy, tmp_path: Path
) -> None:
    np.save(tmp_path / "in.npy", toy.draw(np.random.default_rng(0), 3))
    result = batch("score", tmp_path, "--out", tmp_path / "scores")
    assert result.exit_code == 1
    assert (
        f"the job's folder {tmp_path / 'scores'} lies within the input {tmp_path}:" in result.stderr
    )
    assert [path.name for path in tmp_path.iterdir()] == ["in.npy"]
    odd = tmp_path / os.fsdecode(b"a\xff.npy")
    (tmp_path / "in.npy").rename(odd)
    (tmp_path / os.fsdecode(b"a\xfe.npz")).write_bytes(b"PK")
    result = batch("score", tmp_path, "--out", tmp_path / ".scores")
    assert (result.exit_code, result.stderr.count("no array can be read")) == (1, 1), result.output
    result = batch("score", odd, "--alpha", 0.1, "--out", tmp_path / ".scores")
    assert result.exit_code == 0, result.output
    assert table(tmp_path / ".scores")["key"].to_pylist() == [f"a?.npy[{i}]" for i in range(3)]


def test_all_options_reach_the_job(batch: Batch, toy: Toy, tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", toy.draw(np.random.default_rng(0), 30))
    result = batch(
        "classify", tmp_path / "in.npy", "--alpha", 0.2, "--guarantee", "pac", "--priors",
        "0.2,0.2,0.6", "--min-posterior", 0.8, "--rule", "discriminative", "--format", "npz",
        "--shard", 7, "--batch", 3, "--workers", 1, "--out", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    request = json.loads((tmp_path / "out" / "manifest.json").read_bytes())["request"]
    task = request["task"]
    assert (request["format"], request["rows"]) == ("npz", 7)
    assert (task["alpha"], task["guarantee"], task["min_posterior"]) == (0.2, 2, 0.8)
    assert (task["priors"], task["rule"]) == ([0.2, 0.2, 0.6], LabelRule.DISCRIMINATIVE)
    assert len(contents(tmp_path / "out")) == 6


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        ((), 2, "one of --labels, --each and --count"),
        (("--each", 1, "--count", 1), 2, "one of --labels, --each and --count"),
        (("--each", 0), 2, "0 is not in the range"),
        (("--count", 1, "--alpha", 0.1), 2, "--alpha needs --self-check"),
        (("--count", 1, "--max-draws", 3), 2, "--max-draws needs --self-check"),
        (("--count", 1, "--address", "127.0.0.1:1"), 2, "either --bundle or --address"),
        (("--count", 1, "--model", "toy"), 2, "need --address"),
        (("--labels", "9=1"), 1, "labels: '9=1' is no LABEL=COUNT; labels are label-0, label-1"),
        (("--count", 1, "--seed", 2**63), 1, "seed: "),
        (("--count", 1, "--temperature", "nan"), 1, "temperature: nan is not in [0, 2]"),
        (("--count", 1, "--self-check", "--alpha", 2), 1, "alpha: 2 is not in [0.005, 1)"),
        (("--count", 10**9, "--shard", 1), 1, "shard: 1 pictures; expected at least 10000"),
    ],
)
def test_what_cannot_be_asked_is_told(
    batch: Batch, tmp_path: Path, words: tuple[object, ...], code: int, sentence: str
) -> None:
    found = batch("generate", *words, "--out", tmp_path / "out")
    assert found.exit_code == code, found.output
    assert sentence in " ".join(found.stderr.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_a_server_is_not_verified_by_keys(batch: Batch, tmp_path: Path) -> None:
    words = ["--address", "127.0.0.1:1", "--public-key", "key.pem", "--out", str(tmp_path / "out")]
    found = CliRunner().invoke(main, ["batch", "generate", "--count", "1", *words])
    assert found.exit_code == 2, found.output
    assert "--public-key needs --bundle" in " ".join(found.stderr.replace("│", " ").split())


def test_ray_itself_chooses_the_card(toy: Toy, tmp_path: Path) -> None:
    words = ["--engine", "ray", "--device", "cuda:1", "--out", str(tmp_path / "out")]
    command = ["batch", "generate", "--count", "1", "--bundle", str(toy.path), *words]
    found = CliRunner().invoke(main, command)
    assert found.exit_code == 2, found.output
    assert "use --device cuda:" in " ".join(found.stderr.replace("│", " ").split())


def test_the_environment_names_a_server_where_no_bundle_is_named(
    batch: Batch, live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIKELY_ADDRESS", "127.0.0.1:1")
    assert batch("generate", "--count", 3, "--out", tmp_path / "bundle").exit_code == 0
    monkeypatch.setenv("LIKELY_ADDRESS", live.address)
    words = ("batch", "generate", "--count", "3", "--out", str(tmp_path / "server"))
    before = live.log.getvalue().count("Generate")
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert live.log.getvalue().count("Generate") > before


@pytest.mark.parametrize("missing", ["pyarrow", "ray"])
def test_an_extra_that_is_missing_is_named(toy: Toy, tmp_path: Path, missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None\nfrom likely.cli import main; main()"
    words = ["batch", "generate", "--count", "1", "--engine", "ray", "--bundle", str(toy.path)]
    command = [sys.executable, "-c", code, *words, "--out", str(tmp_path / "out")]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 1
    extra = {"pyarrow": "jobs", "ray": "ray"}[missing]
    assert f"pip install 'likely[{extra}]'" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_logs_have_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(show, "PROGRESS_SECONDS", 0.0)
    with show.long_bar(1000, 400, "scoring") as advance:
        advance(150)
        advance(150)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("scoring: 550 of 1,000 pictures, ")
    assert "scoring: 700 of 1,000 pictures, " in second and second.endswith(" s left")


def test_a_job_goes_on_though_nobody_can_be_told_how_far_it_is(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "from likely.cli import main, show; show.PROGRESS_SECONDS = 0.0; main()"
    words = ["generate", "--count", "5", "--bundle", toy.path, "--device", "cpu", "--json"]
    command = [sys.executable, "-c", code, "batch", *map(str, words), "--out", str(tmp_path / "o")]
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=full)
    assert ran.returncode == 0
    assert json.loads(ran.stdout)["pictures"] == 5


def test_a_terminal_that_is_gone_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    far, near = pty.openpty()
    with os.fdopen(near, "w", buffering=1) as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        with show.long_bar(2, 0, "scoring") as advance:
            advance(1)
            os.close(far)
            advance(1)
        with pytest.raises(OSError, match="Input/output"):  # nothing of it could be shown
            terminal.write("\n")
        with suppress(OSError):
            terminal.close()
