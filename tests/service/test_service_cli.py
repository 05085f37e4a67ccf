"""The command line, against a real server and as a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from likely import Client, levels, machine
from likely.bundle import MANIFEST
from likely.cli import main, show
from likely.cli.serve import CLIENT_VARIABLES, FLAGS
from likely.errors import InvalidInput
from likely.settings import Settings
from tests.faults.history import events

if TYPE_CHECKING:
    from tests.conftest import Live, Running, Toy

COMMAND = [sys.executable, "-c", "from likely.cli import main; main()"]


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("LIKELY_"):
            monkeypatch.delenv(name)


@pytest.fixture
def likely(live: Live, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs a command against the live server."""
    monkeypatch.setenv("LIKELY_ADDRESS", live.address)
    return lambda *args: CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture
def array(toy: Toy, tmp_path: Path) -> Path:
    """Six pictures as an array."""
    path = tmp_path / "six.npy"
    np.save(path, toy.draw(np.random.default_rng(1), 6))
    return path


def lines(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def failed(result: Result, code: int = 1) -> str:
    assert result.exit_code == code
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


def test_score_tells_programs(likely: Callable[..., Result], array: Path, toy: Toy) -> None:
    rows = lines(likely("score", array, "--json", "--alpha", 0.1))
    assert [row["picture"] for row in rows] == [f"{array}[{i}]" for i in range(6)]
    log_px = [row["log_likelihood"] for row in rows]
    assert np.allclose(log_px, toy.log_px(np.load(array)), atol=1e-4)
    assert {(row["model"], row["version"], row["alpha"]) for row in rows} == {("toy", "1.0", 0.1)}
    assert all(
        row["verdict"] == ("outlier" if row["p_value"] <= 0.1 else "accepted") for row in rows
    )


def test_score_tells_people(likely: Callable[..., Result], array: Path) -> None:
    result = likely("score", array)
    assert result.exit_code == 0
    assert "p value" in result.stdout
    assert "model toy, version 1.0, alpha 0.05" in result.stdout


@pytest.mark.parametrize("name", ["map.npz", "MAP.NPZ", "map.png"])
def test_surprise_maps_are_written(
    likely: Callable[..., Result], array: Path, toy: Toy, tmp_path: Path, name: str
) -> None:
    out = tmp_path / name
    lines(likely("score", array, "--surprise", out, "--json"))
    if name.lower().endswith(".npz"):
        with np.load(out) as arrays:
            assert np.allclose(arrays["surprise"], toy.surprise(arrays["x"]), atol=1e-5)
    else:
        with Image.open(out) as image:
            assert image.size == (4 * 4 - 1, 3 * 4 - 1)  # six pictures, each beside its map


def test_classify(likely: Callable[..., Result], array: Path) -> None:
    rows = lines(likely("classify", array, "--json", "--priors", "0,0,1"))
    assert {row["label"] for row in rows} == {"label-2"}
    assert rows[0]["posteriors"] == {"label-0": 0, "label-1": 0, "label-2": 1}
    assert "posterior" in likely("classify", array).stdout


def test_classify_by_either_rule(likely: Callable[..., Result], array: Path, toy: Toy) -> None:
    alone = lines(likely("classify", array, "--json", "--rule", "discriminative"))
    both = lines(likely("classify", array, "--json", "--rule", "discriminative", "--both"))
    assert "log_likelihoods" not in alone[0] and "log_likelihoods" in both[0]
    posterior = [list(row["posteriors"].values()) for row in alone]
    assert np.allclose(posterior, np.exp(toy.log_pyx(np.load(array))), atol=1e-5)
    assert all(len(row["composed_log_likelihoods"]) == 3 for row in both)
    assert "is not one of" in failed(likely("classify", array, "--rule", "other"), 2)


def test_images_become_levels(likely: Callable[..., Result], toy: Toy, tmp_path: Path) -> None:
    x = toy.draw(np.random.default_rng(2), 1)
    np.savez(tmp_path / "one.npz", images=x, other=np.zeros(3))
    bright = Image.fromarray(x[0, 0] * 85)
    bright.save(tmp_path / "grey.png")
    bright.convert("RGB").save(tmp_path / "colour.png")
    bright.convert("RGBA").save(tmp_path / "opaque.png")
    names = ("one.npz", "grey.png", "colour.png", "opaque.png")
    rows = lines(likely("score", *(tmp_path / name for name in names), "--json"))
    assert len({row["log_likelihood"] for row in rows}) == 1
    assert rows[1]["picture"] == str(tmp_path / "grey.png")


def test_what_a_camera_adds_to_its_picture_is_no_picture(tmp_path: Path) -> None:
    several = [Image.new("L", (3, 3), shade) for shade in (255, 0)]
    several[0].save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=several[1:])
    assert (levels.of_image(tmp_path / "x.jpg", "x", 1, 4) == 3).all()


def test_files_that_do_not_fit_are_named(likely: Callable[..., Result], tmp_path: Path) -> None:
    Image.new("L", (28, 30)).save(tmp_path / "large.png")
    sentence = failed(likely("score", tmp_path / "large.png"))
    assert "large.png: 1 x 30 x 28" in sentence
    assert "takes 1 x 3 x 3" in sentence
    Image.new("I;16", (3, 3)).save(tmp_path / "deep.png")
    assert "deep.png: mode I;16" in failed(likely("score", tmp_path / "deep.png"))
    clear = Image.new("LA", (3, 3), (0, 0))  # black ink that is nowhere
    clear.save(tmp_path / "clear.png")
    assert "clear.png: is transparent in places" in failed(likely("score", tmp_path / "clear.png"))
    clear.convert("P").save(tmp_path / "few.gif", transparency=0)
    assert "few.gif: is transparent in places" in failed(likely("score", tmp_path / "few.gif"))
    several = [Image.new("L", (3, 3), shade) for shade in (0, 255)]
    for name in ("pages.tiff", "frames.gif"):
        several[0].save(tmp_path / name, save_all=True, append_images=several[1:])
        assert f"{name}: holds 2 pictures" in failed(likely("score", tmp_path / name))
        whole = (tmp_path / name).read_bytes()
        for end in range(len(whole) // 2, len(whole)):  # cut off anywhere, it is told in words
            (tmp_path / name).write_bytes(whole[:end])
            with suppress(InvalidInput):
                levels.of_image(tmp_path / name, name, 1, 4)
    (tmp_path / "text.png").write_text("no picture")
    assert "neither an image nor" in failed(likely("score", tmp_path / "text.png"))
    (tmp_path / "text.npy").write_text("no array")
    sentence = failed(likely("score", tmp_path / "text.npy"))
    assert "text.npy: no array can be read" in sentence and "pickle" not in sentence
    np.save(tmp_path / "objects.npy", np.array([{}, 1]), allow_pickle=True)
    assert "allow_pickle" not in failed(likely("score", tmp_path / "objects.npy"))
    np.save(tmp_path / "floats.npy", np.zeros((1, 3, 3)))
    sentence = failed(likely("score", tmp_path / "floats.npy"))
    assert "floats.npy: type float64" in sentence and "multiply by the top level" in sentence
    np.save(tmp_path / "last.npy", np.zeros((2, 3, 3, 1), np.uint8))
    assert "move the channels" in failed(likely("score", tmp_path / "last.npy"))
    assert "does not exist" in failed(likely("score", tmp_path / "none.png"), 2)
    few = np.zeros((3, 3, 3), np.uint8)
    np.save(tmp_path / "few.npy", few)
    few[1, 2, 0] = 4
    np.save(tmp_path / "level.npy", few)
    sentence = failed(likely("score", tmp_path / "few.npy", tmp_path / "level.npy"))
    assert "level.npy[1]: level 4 at channel 0, row 2, column 0 is not in [0, 4)" in sentence


def test_errors_of_the_server_are_sentences(likely: Callable[..., Result], array: Path) -> None:
    assert "alpha: 1e-09 is not in" in failed(likely("score", array, "--alpha", 1e-9))
    assert "no model other; served are toy@1.0" in failed(
        likely("score", array, "--model", "other")
    )
    assert "'a,b' is no list of numbers" in failed(likely("classify", array, "--priors", "a,b"))
    assert "No such option" in failed(likely("score", array, "--nonsense"), 2)


@pytest.mark.parametrize("label", ["1", "label-1"])
def test_generate_writes_arrays(
    likely: Callable[..., Result], live: Live, tmp_path: Path, label: str
) -> None:
    out = tmp_path / "drawn.npz"
    rows = lines(
        likely("generate", "--label", label, "--count", 9, "--seed", 3, "--out", out, "--json")
    )
    row = {"out": str(out), "pictures": 9, "seed": 3, "draws": 9, "accepted": 9}
    assert rows == [{**row, "model": "toy", "version": "1.0"}]
    with np.load(out) as arrays, Client(live.address) as client:
        drawn = client.generate(9, label=1, seed=3)
        assert np.array_equal(arrays["x"], drawn.images)
        assert set(arrays["y"]) == {1}


def test_generate_by_acceptance_tells_its_draws(
    likely: Callable[..., Result], live: Live, tmp_path: Path
) -> None:
    words = ("--label", 2, "--count", 9, "--seed", 3, "--acceptance", "--max-draws", 4)
    (row,) = lines(likely("generate", *words, "--out", tmp_path / "kept.npz", "--json"))
    with Client(live.address) as client:
        kept = client.generate(9, label=2, seed=3, acceptance=True, max_draws=4)
    assert (row["draws"], row["accepted"]) == (kept.draws.sum(), kept.accepted.sum())
    assert row["draws"] > 9 > row["accepted"]


def test_generate_writes_pictures(likely: Callable[..., Result], tmp_path: Path) -> None:
    assert likely("generate", "--count", 9, "--out", tmp_path / "grid.png").exit_code == 0
    with Image.open(tmp_path / "grid.png") as image:
        assert image.size == (11, 11)
    for name in ("lossy.jpg", "grid"):
        (tmp_path / "grid").mkdir(exist_ok=True)
        (tmp_path / "grid" / "other").touch()
        message = failed(likely("generate", "--count", 1, "--out", tmp_path / name))
        assert ("neither in .png nor in .npz" in message) == (name == "lossy.jpg")
        assert ("is not empty" in message) == (name == "grid")
    more = ("--count", 3, "--first-index", 5, "--label", 2)
    assert likely("generate", *more, "--out", tmp_path / "folder").exit_code == 0
    names = [path.name for path in sorted((tmp_path / "folder").iterdir())]
    assert names == [f"00000{i}-label2.png" for i in (5, 6, 7)]
    assert "none of label-0" in failed(
        likely("generate", "--label", "seven", "--out", tmp_path / "x.png")
    )


def test_a_folder_that_is_not_there_is_told_before_anything_is_asked(
    likely: Callable[..., Result], live: Live, array: Path, tmp_path: Path
) -> None:
    out, before = tmp_path / "none" / "x.png", live.log.getvalue()
    for command in (
        ("generate", "--count", 1, "--out", out),
        ("score", array, "--surprise", out),
        ("traverse", array, "--direction", "brightness", "--out", out),
    ):
        assert f"there is no folder {out.parent}" in failed(likely(*command))
    assert live.log.getvalue() == before
    assert likely("generate", "--count", 1, "--out", out.with_suffix("")).exit_code == 0


def test_what_would_do_nothing_is_wrong_usage(
    likely: Callable[..., Result], array: Path, tmp_path: Path
) -> None:
    out = ("--count", 1, "--out", tmp_path / "x.png")
    message = failed(likely("generate", "--alpha", 0.1, *out), 2)
    assert "--alpha needs --self-check" in message
    message = failed(likely("generate", "--max-draws", 3, *out), 2)
    assert "--max-draws needs --self-check or --acceptance" in message
    assert likely("generate", "--max-draws", 3, "--self-check", *out).exit_code == 0
    assert "--both needs --json" in failed(likely("classify", array, "--both"), 2)
    assert "neither in .png" in failed(likely("score", array, "--surprise", tmp_path / "m.jpg"))


def test_a_folder_stands_for_its_pictures(
    likely: Callable[..., Result], array: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "a folder without pictures" in failed(likely("score", folder))
    array.rename(folder / "b.npy")
    Image.new("L", (3, 3)).save(folder / "a.png")
    for name in (".c.png", "notes.txt"):
        (folder / name).write_text("none")
    rows = lines(likely("score", folder, "--json"))
    assert [row["picture"] for row in rows[:2]] == [str(folder / "a.png"), f"{folder / 'b.npy'}[0]"]
    assert len(rows) == 7


def test_no_label_is_shown_of_what_is_not_accepted(
    likely: Callable[..., Result], array: Path
) -> None:
    words = ("classify", array, "--min-posterior", 0.999)
    verdicts = [row["verdict"] for row in lines(likely(*words, "--json"))]
    assert all("label" in row for row in lines(likely(*words, "--json")))
    shown = likely(*words).stdout
    assert {"ambiguous"} <= set(verdicts)
    assert shown.count("\N{EN DASH}") == len(verdicts) - verdicts.count("accepted")


def test_a_command_that_is_none_is_guessed(likely: Callable[..., Result]) -> None:
    assert "No such command 'scor'. Did you mean score?" in failed(likely("scor"), 2)


def test_a_reader_that_has_enough_ends_a_command_silently(live: Live, array: Path) -> None:
    words = ["score", str(array), "--json", "--address", live.address]
    ran = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert ran.stdout is not None and ran.stderr is not None
    ran.stdout.close()
    with ran.stderr:
        assert not re.findall(rb"^(?:Error|Traceback).*", ran.stderr.read(), re.MULTILINE)
    assert ran.wait(60) == 1


def test_models(likely: Callable[..., Result], live: Live) -> None:
    (row,) = lines(likely("models", "--json"))
    assert row["digest"] == live.server.registry.find("toy").digest
    assert row["execution_providers"] == ["CPUExecutionProvider"]
    assert "toy" in likely("models").stdout


def test_a_table_is_shown_where_output_lacks_its_signs(live: Live) -> None:
    environment = {**os.environ, "LIKELY_ADDRESS": live.address, "PYTHONIOENCODING": "cp1252"}
    ran = subprocess.run([*COMMAND, "models"], capture_output=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    assert b"alpha ?" in ran.stdout


@pytest.mark.parametrize("encoding", ["utf-8:strict", "utf-8:surrogateescape"])
def test_a_name_that_is_no_utf8_is_shown_as_far_as_it_is(
    live: Live, tmp_path: Path, encoding: str
) -> None:
    Image.new("L", (3, 3)).save(tmp_path / os.fsdecode(b"\xe9t\xe9.png"))
    variables = {"LIKELY_ADDRESS": live.address, "PYTHONIOENCODING": encoding, "COLUMNS": "500"}
    ran = subprocess.run(
        [*COMMAND, "score", tmp_path],
        capture_output=True,
        env={**os.environ, **variables},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert (b"/?t?.png" if "strict" in encoding else b"/\xe9t\xe9.png") in ran.stdout


def test_what_a_table_is_of_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    show.rows([{"picture": 50 * "x"}], False, {"written to": "[red]x[/red] [/a] :pen:.png"})
    assert "written to [red]x[/red] [/a] :pen:.png" in capsys.readouterr().out


def test_what_cannot_be_written_is_one_sentence(live: Live) -> None:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run(
            [*COMMAND, "models", "--address", live.address, "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            env=buffered,
            text=True,
            check=False,
        )
    assert ran.returncode == 1
    assert ran.stderr.startswith("Error: [Errno 28]")
    assert ran.stderr.count("\n") == 1


def test_a_table_of_models_fits_a_narrow_terminal(
    likely: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = likely("models").stdout.splitlines()
    assert max(map(len, shown)) <= 80
    words = " ".join(shown).split()
    for name in ("version", "answers", "Score", "Interpolate", "Complete"):
        assert name in words  # none is folded
    assert "ScoreStream" not in words


def test_doctor_opens_a_real_session(likely: Callable[..., Result], toy: Toy) -> None:
    rows = {row["what"]: row for row in lines(likely("doctor", "--bundle", toy.path, "--json"))}
    assert rows["what runs with device auto"]["found"].startswith("toy@1.0 on ")
    assert {row["state"] for row in rows.values()} == {"ok"}
    assert rows["python"]["found"] == sys.version.split()[0]


def test_the_runtime_reports_to_nobody(toy: Toy, tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path)}  # where it keeps what it would send
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    command = [sys.executable, "-m", "likely", "doctor", "--bundle", str(toy.path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(tmp_path.rglob("*onnxruntime*")) == []


def test_doctor_tells_what_is_broken(
    likely: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = likely("doctor", "--bundle", tmp_path, "--json")
    assert broken.exit_code == 1
    last = json.loads(broken.stdout.splitlines()[-1])
    assert last["state"] == "broken"
    assert "no manifest.json" in last["found"]
    both = {"onnxruntime": "1.22", "onnxruntime-gpu": "1.22"}
    monkeypatch.setattr(machine, "runtimes", lambda: both)
    conflict = likely("doctor")
    assert conflict.exit_code == 1
    assert "overwrite each other" in " ".join(conflict.stdout.split())
    monkeypatch.setattr(machine, "runtimes", dict)
    assert likely("doctor").exit_code == 1  # the server's packages are there, no runtime is


def test_every_setting_is_a_flag() -> None:
    assert {*FLAGS, "bundles", "reflection", "tracing"} == set(Settings.model_fields)


def test_print_config_shows_what_wins(
    likely: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LIKELY_ADDRESS")
    monkeypatch.setenv("LIKELY_MAX_BATCH", "8")
    monkeypatch.setenv("LIKELY_THREADS", "3")
    (tmp_path / "l.toml").write_text("threads = 2\nmax_batch = 4\nimages_per_chunk = 9\n")
    result = likely(
        "serve", "--print-config", "--config", tmp_path / "l.toml", "--max-batch", 32,
        "--no-reflection", "--bundle", "a", "--bundle", "b",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    shown = tomllib.loads(result.stdout)
    assert (shown["max_batch"], shown["threads"], shown["images_per_chunk"]) == (32, 3, 9)
    assert shown["reflection"] is False
    assert shown["bundles"] == ["a", "b"]
    assert shown["port"] == 50051


def test_every_variable_of_a_command_is_known() -> None:
    def read(command: click.Command) -> Iterator[str]:
        for each in command.params:
            yield from [each.envvar] if isinstance(each.envvar, str) else ()
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                found = command.get_command(context, name)
                assert found is not None
                yield from read(found)

    assert {*read(main)} <= {*CLIENT_VARIABLES}


def test_a_variable_that_is_no_setting_is_told_at_the_start(
    likely: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LIKELY_BUNDLE", "LIKELY_PROT", "LIKELY_X", "LIKELY_TOKEN", "LIKELY_DEVICE",
                 "LIKELY_SERVICE_HOST", "LIKELY_PORT_50051_TCP_ADDR"):  # fmt: skip
        monkeypatch.setenv(name, "cpu")
    monkeypatch.setattr("likely.processes.supervisor.serve", lambda settings: None)
    result = likely("serve", "--log-format", "json")
    assert result.exit_code == 0, result.output
    events = [json.loads(line) for line in result.stderr.splitlines()]
    assert {event["event"] for event in events} == {"unknown variable"}
    assert [(event["variable"], event["nearest"]) for event in events] == [
        ("LIKELY_BUNDLE", "LIKELY_BUNDLES"), ("LIKELY_PROT", "LIKELY_PORT"), ("LIKELY_X", None),
    ]  # fmt: skip


def test_what_kubernetes_sets_for_a_service_is_no_setting(
    likely: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    for service in ("LIKELY", "LIKELY_METRICS", "LIKELY_ADMIN", "LIKELY_X"):
        link = "tcp://10.0.0.1:9464"
        for name, value in {
            "SERVICE_HOST": "10.0.0.1",
            "SERVICE_PORT": "9464",
            "SERVICE_PORT_GRPC": "9464",
            "PORT": link,
            "PORT_9464_TCP": link,
            "PORT_9464_TCP_PORT": "9464",
        }.items():
            monkeypatch.setenv(f"{service}_{name}", value)
    monkeypatch.setattr("likely.processes.supervisor.serve", lambda settings: None)
    result = likely("serve", "--log-format", "json")
    assert result.exit_code == 0, result.output
    (event,) = (json.loads(line) for line in result.stderr.splitlines())
    assert event["variables"] == ["LIKELY_ADMIN_PORT", "LIKELY_METRICS_PORT", "LIKELY_PORT"]
    printed = likely("serve", "--print-config").stdout
    assert "\nport = 50051" in printed and "\nmetrics_port = 9464" in printed


def test_a_label_of_no_version_is_told_with_an_example(likely: Callable[..., Result]) -> None:
    message = failed(likely("serve", "--labels", "digits=3", "--print-config"))
    assert "it should be MODEL:stable=VERSION or" in message and "digits:stable=1.0" in message


def test_a_bad_flag_is_one_sentence(likely: Callable[..., Result]) -> None:
    sentence = failed(likely("serve", "--port", "x"))
    assert sentence == (
        "Error: port = 'x' is not allowed; it should be a valid integer, "
        "unable to parse string as an integer\n"
    )


@pytest.mark.parametrize("missing", ["onnxruntime", "pydantic_settings"])
def test_without_a_runtime_the_extras_are_named(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; {COMMAND[2]}"
    ran = subprocess.run(
        [sys.executable, "-c", code, "serve"], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 1
    assert "'likely[cpu]'" in ran.stderr
    assert "'likely[gpu]'" in ran.stderr
    assert "'likely[cuda]'" in ran.stderr
    assert "Traceback" not in ran.stderr


def harm(folder: Path) -> Path:
    (folder / MANIFEST).write_text("{}")
    return folder


def test_a_bad_bundle_ends_serve_with_one_sentence(make_toy: Callable[..., Toy]) -> None:
    foreign = harm(make_toy().path)
    ran = subprocess.run(
        [*COMMAND, "serve", "--bundle", foreign, "--port", "0", "--metrics-port", "0",
         "--log-level", "error", "--log-format", "json"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 1
    # Nor is anything logged; what others write to stderr, gRPC itself say, is not ours.
    sentences = [
        line for line in ran.stderr.splitlines() if line.startswith(("Error", "Traceback"))
    ]
    assert len(sentences) == 1
    assert sentences[0].startswith(f"Error: {foreign} is not a bundle that this version reads")
    assert events(ran.stderr) == []


@contextmanager
def serving(toy: Toy) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A `likely serve` of its own, and its log's line that says where."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", *COMMAND[1:], "serve", "--bundle", toy.path,
         "--port", "0", "--metrics-port", "0", "--log-format", "json"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        said = (event for line in process.stderr for event in events(line))
        yield process, next(event for event in said if event["event"] == "serving")
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_answers_and_ends_well_when_told(toy: Toy, number: int) -> None:
    with serving(toy) as (process, where):
        with Client(f"127.0.0.1:{where['port']}") as client:
            assert client.model().name == "toy"
        process.send_signal(number)
        assert process.wait(30) == 0
        assert process.stderr is not None
        logged = [event["event"] for event in events(process.stderr.read())]
    assert logged[-2:] == ["draining", "ended"]


PATIENT = ("--timeout", "30")


def test_health_is_one_word_or_one_sentence(
    likely: Callable[..., Result], live: Live, running: Running
) -> None:
    ready = likely("health", *PATIENT, "--address", live.address)
    assert (ready.exit_code, ready.output) == (0, "SERVING\n")
    with running(load=False) as loading:
        assert "not serving yet" in failed(likely("health", *PATIENT, "--address", loading.address))
    assert "no likely server answers" in failed(likely("health", "--address", "127.0.0.1:1"))
    assert "is no address" in failed(likely("health", "--address", "http://127.0.0.1:1"))
    assert "--token" not in likely("health", "--help").output


def test_health_of_one_model(likely: Callable[..., Result]) -> None:
    assert likely("health", *PATIENT, "--model", "toy").output == "SERVING\n"
    assert "no model other is served" in failed(likely("health", *PATIENT, "--model", "other"))
    assert "is no UTF-8" in failed(likely("health", "--model", "\udce9"))
    assert "longer than 64 bytes" in failed(likely("health", "--model", 65 * "x"))
    assert "timeout = nan is not allowed" in failed(likely("health", "--timeout", "nan"))


@pytest.mark.parametrize("seconds", ["0", "-1", "inf", "1e300"])
def test_no_time_is_wrong_usage(likely: Callable[..., Result], array: Path, seconds: str) -> None:
    for command in (("health",), ("score", array), ("models",)):
        assert "--timeout" in failed(likely(*command, "--timeout", seconds), 2)


@pytest.mark.parametrize("address", ["", " "])
def test_an_empty_address_is_wrong_usage(
    likely: Callable[..., Result], array: Path, tmp_path: Path, address: str
) -> None:
    job = ("batch", "score", array, "--out", tmp_path / "out")
    for command in (("health",), ("score", array), ("admin", "versions"), job):
        assert "it is empty" in failed(likely(*command, "--address", address), 2)
    assert not (tmp_path / "out").exists()
