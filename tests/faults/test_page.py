"""docs/faults.md and the tests of its lines are in step."""

from __future__ import annotations

import re
from pathlib import Path

LINES = 40


def test_every_line_of_the_page_is_shown_by_a_test_and_every_mark_is_a_line() -> None:
    page = Path("docs/faults.md").read_text()
    lines = [int(number) for number in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)]
    assert lines == list(range(1, LINES + 1))
    marks = {
        int(number)
        for path in Path("tests").rglob("test_*.py")
        for number in re.findall(r"pytest\.mark\.fault\((\d+)\)", path.read_text())
    }
    assert marks == set(lines)
