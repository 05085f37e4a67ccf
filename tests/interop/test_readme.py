"""What the README tells newcomers to type works."""

import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import click
import pytest

from demo.serving import Served
from likely import cli
from likely_export import cli as export_cli

README = Path("README.md").read_text()


def blocks(language: str) -> list[str]:
    """The code blocks in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def test_the_python_session_runs(stocked: Served) -> None:
    (session,) = blocks("python")
    code = session.replace("127.0.0.1:50051", stocked.address)
    assert stocked.address in code
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    (shown,) = blocks("text")
    printed, expected = ran.stdout.splitlines(), shown.splitlines()
    assert printed[0].startswith("(10, 1, 28, 28) ") and expected[0].startswith("(10, 1, 28, 28) ")
    # How many draws and which likelihoods, a machine's arithmetic has a say in; not in these.
    assert printed[2].startswith("[1 1 1 1 1 2 2 2 2 2] [3 3 3 3 3 ")
    assert printed[2][:36] == expected[2][:36] and printed[3:] == expected[3:]
    assert len(printed) == len(expected)


COMMANDS = [line.split("#")[0].split() for block in blocks("sh") for line in block.splitlines()]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_exists(words: list[str]) -> None:
    program, command, *given = words
    if program == "make":
        assert re.search(rf"^{command}:", Path("Makefile").read_text(), re.M)
        return
    group = {"likely": cli.main, "likely-export": export_cli.main}[program]
    found = group.get_command(click.Context(group), command)
    assert found
    with suppress(click.BadParameter):  # the example's folders are not there
        found.make_context(command, given)


def test_every_link_leads_somewhere() -> None:
    """To what git knows: what it ignores lies here, and in no clone."""
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True)
    files = [Path(name) for name in listed.stdout.splitlines()]
    known = {parent for file in files for parent in (file, *file.parents)}
    for document in (file for file in files if file.suffix == ".md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            leads_to = Path(os.path.normpath(document.parent / target))
            assert leads_to in known, f"{document} links to {target}"
