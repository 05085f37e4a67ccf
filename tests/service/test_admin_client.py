"""The admin RPCs asked by `AdminClient` and by `likely admin`, of a real server."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner, Result

from likely import (
    AccessDenied,
    AdminClient,
    BundleError,
    InvalidInput,
    LikelyError,
    ModelNotFound,
    Refused,
    SettingsError,
    Unavailable,
    VersionState,
)
from likely.bundle import MANIFEST
from likely.cli import main
from likely.errors import Unauthenticated

if TYPE_CHECKING:
    from tests.conftest import Live, Running, Toy

TOKENS = """
[[token]]
name = "operator"
secret = "operators-secret-of-32-characters"
scopes = ["admin"]

[[token]]
name = "reader"
secret = "readers-secret-of-32-characters--"
scopes = ["score"]
"""


@pytest.fixture(scope="module")
def toys(make_toy: Callable[..., Toy]) -> dict[str, Toy]:
    return {version: make_toy(version=version, seed=int(version)) for version in ("1", "2")}


@pytest.fixture
def live(running: Running, toys: dict[str, Toy]) -> Iterator[Live]:
    with running(admin_port=0, bundles=(toys["1"].path,)) as live:
        yield live


def address(live: Live) -> str:
    return f"127.0.0.1:{live.server.admin_port}"


@pytest.fixture
def admin(live: Live) -> Iterator[AdminClient]:
    with AdminClient(address(live)) as client:
        yield client


@pytest.fixture
def likely(live: Live, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs a subcommand of `likely admin` against the server."""
    for name in os.environ:
        if name.startswith("LIKELY_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("LIKELY_ADDRESS", "127.0.0.1:1")  # of all other commands
    monkeypatch.setenv("LIKELY_ADMIN_ADDRESS", address(live))
    return lambda *args: CliRunner().invoke(main, ["admin", *map(str, args)])


def test_a_release(admin: AdminClient, toys: dict[str, Toy]) -> None:
    (first,) = admin.versions()
    assert (first.name, first.version, first.state) == ("toy", "1", VersionState.SERVING)
    assert (first.folder, first.is_default, first.labels) == (toys["1"].path, True, ())
    admin.set_label("toy", "stable", "1")
    loaded = admin.load(toys["2"].path)
    assert (loaded.version, loaded.is_default) == ("2", False)
    admin.set_label("toy", "stable", "2")
    versions = {version.version: version for version in admin.versions()}
    assert versions["1"] == replace(first, is_default=False)
    assert versions["2"] == replace(loaded, labels=("stable",), is_default=True)
    assert admin.rollback("toy") == replace(first, labels=("stable",))
    assert admin.reset_drift("toy") == "1"
    admin.unload("toy", "2")
    admin.set_label("toy", "stable", None)
    assert admin.versions() == [first]


def test_a_closed_client_says_so(live: Live) -> None:
    for asked in (0, 1):
        client = AdminClient(address(live))
        for _ in range(asked):
            client.versions()
        client.close()
        client.close()
        with pytest.raises(LikelyError, match="this client is closed"):
            client.versions()


def test_what_is_refused_is_told_by_its_error(
    admin: AdminClient, toys: dict[str, Toy], tmp_path: Path
) -> None:
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(BundleError, match="not a bundle"):
        admin.load(tmp_path)
    refused = admin.versions()[-1]
    assert (refused.state, refused.folder) == (VersionState.FAILED, tmp_path)
    assert refused.reason == "manifest" and "not a bundle" in refused.message
    (tmp_path / MANIFEST).unlink()
    assert [version.state for version in admin.versions()] == [VersionState.SERVING]
    with pytest.raises(InvalidInput, match="absolute"):
        admin.load("bundles/toy")
    with pytest.raises(Refused, match="no earlier version"):
        admin.rollback("toy")
    with pytest.raises(ModelNotFound):
        admin.unload("toy", "2")
    admin.set_label("toy", "canary", "1")
    with pytest.raises(Refused, match="canary"):
        admin.unload("toy", "1")


def test_a_value_that_cannot_be_sent_is_named() -> None:
    with AdminClient("127.0.0.1:1") as client:
        asks: list[tuple[str, Callable[[Any], Any]]] = [
            ("folder", lambda name: client.load(f"/{name}")),
            ("model_name", lambda name: client.unload(name, "1")),
            ("model_version", lambda _: client.unload("toy", 1)),  # type: ignore[arg-type]
            ("label", lambda name: client.set_label("toy", name, None)),
            ("model_name", client.rollback),
            ("model_version", lambda name: client.reset_drift("toy", name)),
        ]
        for field, ask in asks:
            with pytest.raises(InvalidInput, match="cannot be sent") as caught:
                ask("\udce9")  # as the shell's words have what is no UTF-8
            assert caught.value.field == field


def test_where_no_admin_port_is(live: Live) -> None:
    with AdminClient("127.0.0.1:1") as client, pytest.raises(Unavailable, match="--admin-port"):
        client.versions()
    with (
        AdminClient(live.address) as client,  # the port of all other RPCs
        pytest.raises(LikelyError, match="no such service"),
    ):
        client.versions()
    with pytest.raises(SettingsError, match="timeout"):
        AdminClient(timeout=0)


def test_a_token_is_shown(running: Running, toys: dict[str, Toy], tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(TOKENS)
    with running(admin_port=0, bundles=(toys["1"].path,), tokens=tokens) as live:
        for token, error in (
            (None, Unauthenticated),
            ("readers-secret-of-32-characters--", AccessDenied),
        ):
            with AdminClient(address(live), token=token) as client, pytest.raises(error):
                client.versions()
        with AdminClient(address(live), token="operators-secret-of-32-characters") as client:
            assert [version.version for version in client.versions()] == ["1"]


def test_a_release_by_commands(likely: Callable[..., Result], toys: dict[str, Toy]) -> None:
    def output_of(*args: object) -> str:
        result = likely(*args)
        assert result.exit_code == 0, result.output
        return result.stdout

    assert json.loads(output_of("load", toys["2"].path, "--json"))["version"] == "2"
    assert output_of("label", "toy", "canary", "2") == "toy 2 is canary\n"
    rows = [json.loads(line) for line in output_of("versions", "--json").splitlines()]
    assert [(row["version"], row["labels"], row["default"]) for row in rows] == [
        ("1", [], False),
        ("2", ["canary"], True),
    ]
    assert output_of("label", "toy", "canary") == "no version of toy is canary\n"
    assert json.loads(output_of("rollback", "toy", "--json"))["labels"] == ["stable"]
    assert output_of("reset-drift", "toy", "2") == "the test for drift of toy 2 begins anew\n"
    assert output_of("unload", "toy", "2") == "toy 2 is served no more\n"
    table = output_of("versions")
    assert "stable" in table and "serving" in table and "yes" in table


def test_a_refusal_by_a_command_is_one_sentence(
    likely: Callable[..., Result], tmp_path: Path
) -> None:
    for args, sentence in (
        (("load", tmp_path), "has no"),
        (("load", "/\udce9"), "folder: '/\\udce9' cannot be sent"),
        (("rollback", "toy"), "no earlier version"),
        (("versions", "--address", "127.0.0.1:1", "--timeout", "5"), "--admin-port"),
    ):
        result = likely(*args)
        assert result.exit_code == 1 and result.stdout == ""
        assert sentence in result.stderr and "Traceback" not in result.stderr
    assert likely("label", "toy", "best", "1").exit_code == 2
