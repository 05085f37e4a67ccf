"""The cache of exports knows its sources."""

from pathlib import Path

import pytest

from bench import exports


def test_a_changed_module_is_exported_afresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report").mkdir()
    for name in ("mixture.py", "report/text.py"):
        (tmp_path / name).write_text("a = 1\n")
    monkeypatch.setattr(exports, "SOURCES", tmp_path)
    seen = {exports.digest("a"), exports.digest("b"), exports.digest("a", "")}
    (tmp_path / "mixture.py").write_text("a = 2\n")
    seen.add(exports.digest("a"))
    assert len(seen) == 4
    assert exports.digest("a") == exports.digest("a")


def test_all_of_the_export_is_digested() -> None:
    names = {path.name for path in exports.SOURCES.rglob("*.py")}
    assert {"autoregressive.py", "mixture.py", "hygiene.py", "roles.py"} <= names
