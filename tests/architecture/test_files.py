"""No committed file names a machine's folders or a registry's host."""

import subprocess
from pathlib import Path

import pytest

FOLDERS = ("/work/", "/root/", "/home/", "/tmp/", "/site-packages/")
REGISTRIES = ("pypi.org", "pythonhosted.org", "registry.npmjs.org")


def committed() -> list[Path]:
    """Every file of the tree that git does not ignore, this one left out."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, capture_output=True, check=True).stdout.decode().split("\0")
    paths = [Path(name) for name in names if name]
    return [path for path in paths if path.is_file() and not Path(__file__).samefile(path)]


@pytest.mark.skipif(not Path(".git").exists(), reason="not a git checkout")
def test_no_committed_file_names_a_machine() -> None:
    found = [
        f"{path}: {word}"
        for path in committed()
        for word in (*FOLDERS, *REGISTRIES)
        if word.encode() in path.read_bytes()
    ]
    assert not found
