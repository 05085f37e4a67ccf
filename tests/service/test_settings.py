"""Flags win over the environment, which wins over the file, which wins over the defaults."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import pytest

from likely.errors import SettingsError
from likely.settings import Settings, load


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("LIKELY_"):
            monkeypatch.delenv(name)


def write(folder: Path, text: str) -> Path:
    path = folder / "likely.toml"
    path.write_text(text)
    return path


def test_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "port = 1\nmax_batch = 2\nthreads = 3\n")
    monkeypatch.setenv("LIKELY_PORT", "10")
    monkeypatch.setenv("LIKELY_MAX_BATCH", "20")
    chosen = load({"config": str(path), "port": "100"})
    assert (chosen.port, chosen.max_batch, chosen.threads) == (100, 20, 3)
    assert chosen.images_per_chunk == Settings.model_fields["images_per_chunk"].default


def test_the_environment_may_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIKELY_CONFIG", str(write(tmp_path, "port = 7\n")))
    assert load({}).port == 7


def test_what_is_printed_gives_the_same_settings(tmp_path: Path) -> None:
    chosen = load({"bundles": ("a", "b"), "metrics_port": "off", "default_alpha": 0.01})
    again = load({"config": write(tmp_path, chosen.toml())})
    assert again.model_copy(update={"config": None}) == chosen
    assert tomllib.loads(chosen.toml())["metrics_port"] == "off"


def test_bundles_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, 'bundles = ["c", "d"]\n')
    assert load({"config": path}).bundles == (Path("c"), Path("d"))
    monkeypatch.setenv("LIKELY_BUNDLES", f"a{os.pathsep}b")
    assert load({"config": path}).bundles == (Path("a"), Path("b"))
    assert load({"config": path, "bundles": ("e",)}).bundles == (Path("e"),)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"port": "abc"}, "port = 'abc' is not allowed; it should be a valid integer"),
        ({"port": "65536"}, "port = '65536' .* less than or equal to 65535"),
        ({"metrics_port": "no"}, "metrics_port = 'no' .* 'off'"),
        ({"device": "tpu"}, "device = 'tpu' .*auto"),
        ({"max_batch": -1}, "max_batch = -1 .* greater than or equal to 0"),
        ({"default_alpha": "nan"}, "default_alpha = 'nan'"),
        ({"log_format": "xml"}, "log_format = 'xml' .* 'json' or 'console'"),
        ({"labels": "a:stable=1,a:canary=1,a:stable=2"}, "it should be one version for a:stable"),
        ({"wrong": 1}, "wrong"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(flags: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence) as caught:
        load(flags)
    assert "\n" not in str(caught.value)


def test_a_bad_value_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIKELY_THREADS", "many")
    with pytest.raises(SettingsError, match="threads = 'many'"):
        load({})


@pytest.mark.parametrize("value", ["", ":"])
def test_signatures_are_not_given_up_by_a_variable_without_a_key(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "require_signature = ['key.pub']\n")
    monkeypatch.setenv("LIKELY_REQUIRE_SIGNATURE", value)
    with pytest.raises(SettingsError, match=f"require_signature = '{value}' .* one file at least"):
        load({"config": path})
    with pytest.raises(SettingsError, match="require_signature"):
        load({})
    with pytest.raises(SettingsError, match="require_signature"):
        load({"require_signature": value})


@pytest.mark.parametrize("name", ["config", "watch", "tls_client_ca", "tokens", "jwt_keys"])
def test_an_empty_name_is_no_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"LIKELY_{name.upper()}", "")
    with pytest.raises(SettingsError, match=f"{name} = '' is not allowed; it should be the name"):
        load({})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("prot = 1", "prot, which is no setting; they are bundles"),
        ("config = 'x'", "config, which is no setting"),
        ("port = ", "is not TOML"),
        ("port = 'x'", "port = 'x'"),
        ("a = " + "[" * 20_000, "is not TOML"),
    ],
)
def test_a_bad_file(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        load({"config": write(tmp_path, text)})


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none.toml cannot be read: No such file"):
        load({"config": tmp_path / "none.toml"})


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load({}).port = 3
