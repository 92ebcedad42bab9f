# Clocks jump. On a host nothing is decided by the time of day: hostd and the hooks do not even ask for it.
from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
WALL = {
    "time", "time_ns", "localtime", "gmtime", "strftime", "ctime", "asctime", "mktime", "CLOCK_REALTIME", "datetime",
    "utcnow", "today", "st_mtime", "st_ctime", "st_atime", "getmtime", "getctime", "clock_settime",
}  # fmt: skip
SOURCES = sorted(path for room in ("hostd", "hooks") for path in (REPO / room).rglob("*.py"))


def wall_clocks(text: str) -> list[str]:
    """What tells the time of day: attributes, and names that are imported or called."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and node.attr in WALL:
            found.append(node.attr)
        elif isinstance(node, ast.ImportFrom):
            found += [alias.name for alias in node.names if alias.name in WALL]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name == "datetime"]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPO)))
def test_nothing_on_a_host_asks_for_the_time_of_day(path: Path) -> None:
    assert wall_clocks(path.read_text()) == []


@pytest.mark.parametrize(
    "text",
    ["import time\ntime.time()", "from time import time", "import datetime", "import os\nos.stat('x').st_mtime",
     "import time\nclock = time.time"],
)  # fmt: skip
def test_the_control(text: str) -> None:
    assert wall_clocks(text)
    assert not wall_clocks(text.replace("time.time", "time.monotonic")) or "time.time" not in text
