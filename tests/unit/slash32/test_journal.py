# What the daemons log: one bounded line whatever is in it, that programs can take apart again.
from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slash32 import journal
from slash32.journal import Lines, fields

REPO = Path(__file__).resolve().parents[3]


def record(message: str, *values: object, level: int = logging.INFO, **extra: Any) -> logging.LogRecord:
    made = logging.getLogger("slash32.test").makeRecord(
        "slash32.test", level, "x.py", 1, message, values, extra.pop("exc_info", None), extra=extra or None
    )
    made.created, made.msecs = 1_700_000_000.25, 250.0
    return made


def test_text_is_for_people_first() -> None:
    line = Lines("text", journald=False).format(record("host %s: connected", "h1", **fields(host="h1", revision=7)))
    assert line == "INFO host h1: connected host=h1 revision=7"
    line = Lines("text", journald=True).format(record("no: %s", 1, level=logging.WARNING, **fields(why='a "b"=c\n')))
    assert line == '<4>no: 1 why="a \\"b\\"=c\\n"'


def test_json_is_one_object() -> None:
    given_fields = fields(host="h1", revision=7, on=True, seconds=0.5, none=None, odd=float("nan"), msg="not this")
    line = Lines("json", journald=False).format(record("host %s: connected", "h1", **given_fields))
    assert json.loads(line) == {
        "ts": "2023-11-14T22:13:20.250Z", "level": "info", "logger": "slash32.test", "msg": "host h1: connected",
        "host": "h1", "revision": 7, "on": True, "seconds": 0.5, "none": None, "odd": "nan",
    }  # fmt: skip


@pytest.mark.parametrize(("level", "prefix"), [(10, "<7>"), (20, "<6>"), (30, "<4>"), (40, "<3>"), (50, "<2>")])
def test_the_journal_hears_the_priority(level: int, prefix: str) -> None:
    for form in journal.FORMATS:
        assert Lines(form, journald=True).format(record("x", level=level)).startswith(prefix)
        assert not Lines(form, journald=False).format(record("x", level=level)).startswith("<")


@given(st.text(), st.text())
def test_hostile_text_stays_one_line(message: str, value: str) -> None:
    made = record("%s", message, **fields(it=value))
    text = Lines("text", journald=False).format(made)
    assert text.isprintable()
    line = Lines("json", journald=False).format(made)
    assert line.isprintable()
    found = json.loads(line)
    assert (found["msg"], found["it"]) == (message, value), "the control: nothing is lost"


def test_lines_are_bounded() -> None:
    many = {f"f{n}": "y" * 10_000 for n in range(1000)}
    made = record("x" * 1_000_000, **fields(**many))
    for form in journal.FORMATS:
        line = Lines(form, journald=False).format(made)
        assert 2000 < len(line) < 12_000
    assert Lines("text", journald=False).format(record("x" * 2000)) == "INFO " + "x" * 2000, "the control: not cut"


def test_an_exception_is_one_line_that_says_where() -> None:
    try:
        raise ValueError("no\nthing")
    except ValueError:
        made = record("oh", level=logging.ERROR, exc_info=sys.exc_info())
    line = Lines("text", journald=False).format(made)
    assert line.startswith('ERROR oh exception="ValueError: no\\nthing [test_journal.py:')
    assert "test_an_exception" in line
    found = json.loads(Lines("json", journald=False).format(made))
    assert found["exception"].startswith("ValueError: no\nthing [test_journal.py")


CHILD = """
import logging, sys, threading
from slash32 import journal
journal.begin(sys.argv[1])
logging.getLogger("slash32.x").warning("said %s", "é", extra=journal.fields(a=1))
thread = threading.Thread(target=lambda: 1 / 0, name="t1")
thread.start()
thread.join()
raise RuntimeError("end")
"""


def child(form: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, form], cwd=REPO, env={**os.environ, **environment}, stderr=subprocess.PIPE,
        text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    return done.stderr.splitlines()


def test_a_process_says_all_of_it_so() -> None:
    lines = child("text")
    assert lines[0] == "WARNING said é a=1"
    assert "ZeroDivisionError" in lines[1] and "thread=t1" in lines[1] and lines[1].startswith("CRITICAL ")
    assert "RuntimeError: end" in lines[2] and len(lines) == 3
    found = [json.loads(line) for line in child("json")]
    assert [each["level"] for each in found] == ["warning", "critical", "critical"]
    assert found[0]["msg"] == "said é" and "RuntimeError" in found[2]["exception"]


def test_only_the_journals_own_stream_gets_priorities(tmp_path: Path) -> None:
    assert not child("text", JOURNAL_STREAM="1:1")[0].startswith("<"), "redirected elsewhere"
    with (tmp_path / "stream").open("w+") as stream:
        found = os.fstat(stream.fileno())
        env = {**os.environ, "JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}
        subprocess.run([sys.executable, "-c", CHILD, "text"], cwd=REPO, env=env, stderr=stream, check=False, timeout=60)
        stream.seek(0)
        lines = stream.read().splitlines()
    assert lines[0] == "<4>said é a=1" and lines[2].startswith("<2>an error")
