# The runner of `make test`, with small lanes made up here.
from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
PATIENCE = 30.0  # seconds until what should happen is given up
SCRIPT = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
import lanes
names = {name: [name, "-p", "no:cacheprovider", *sys.argv[2:]] for name in ("a", "b")}
sys.exit(lanes.Lanes(names, Path("build"), 0.1).run())
"""
GOOD = "def test_good(): pass\n"
HANGS = """
import os, signal, subprocess, time, pytest
from pathlib import Path
@pytest.fixture
def child():
    child = subprocess.Popen(["sleep", "3600"])
    Path("pids").write_text(f"{os.getpid()} {child.pid}")
    yield
    CLEAN_UP
def test_hangs(child):
    time.sleep(3600)
"""
ORDERLY = 'child.kill(); child.wait(); Path("cleaned").touch()'


def lanes(folder: Path, a: str, b: str) -> Path:
    for name, text in (("a", a), ("b", b)):
        (folder / name).mkdir()
        (folder / name / f"test_of_{name}.py").write_text(text)
    return folder


def started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", SCRIPT, str(TESTS), *arguments]
    return subprocess.Popen(argv, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    process = started(folder, *arguments)
    said, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, said


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_all_well(tmp_path: Path) -> None:
    code, said = run(lanes(tmp_path, GOOD, GOOD))
    assert (code, "FAILED" in said) == (0, False), said
    assert "2 tests, 0 failed" in said
    assert "a/test_of_a.py::test_good PASSED" in (tmp_path / "build/a.log").read_text()


def test_a_failure_is_named_told_in_full_and_counts(tmp_path: Path) -> None:
    bad = GOOD + "def test_bad():\n    print('spoken')\n    assert 6 * 9 == 42\n"
    code, said = run(lanes(tmp_path, bad, GOOD))
    assert code == 1 and "2 of 2, 1 failed" in said and "1 of 1, 0 failed" in said, said
    assert "assert (6 * 9) == 42" in said and "spoken" in said
    assert "FAILED a/test_of_a.py::test_bad   (all of it in build/a.log)" in said


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("import not_there\n", "FAILED b/test_of_b.py (collect)"),
        ("import os\ndef test_ends(): os._exit(3)\n", "FAILED b: pytest ended with 3 at b/test_of_b.py::test_ends"),
        ("import os\ndef test_ends(): os.kill(os.getpid(), 11)\n", "FAILED b: pytest ended with -11 at b/test_of_b.py"),
        (
            "import pytest\n@pytest.fixture\ndef rig():\n    yield\n    assert 0\ndef test_rig(rig): pass\n",
            "FAILED b/test_of_b.py::test_rig (teardown)",
        ),
        # What the lane forked holds its pipe.
        ("import os, time\ndef test_forks(): os.fork() or time.sleep(3600)\n", ""),
    ],
    ids=["import", "exit", "signal", "teardown", "fork"],
)
def test_whatever_goes_wrong_fails(tmp_path: Path, text: str, named: str) -> None:
    code, said = run(lanes(tmp_path, GOOD, text))
    assert (code, named in said) == (1 if named else 0, True), said


def test_arguments_go_to_both(tmp_path: Path) -> None:
    text = GOOD + "def test_bad(): assert 0\n"
    code, said = run(lanes(tmp_path, text, GOOD), "-k", "good")
    assert code == 0 and "2 tests, 0 failed" in said, said
    code, said = run(tmp_path, "-k", "bad")  # none of b
    assert code == 1 and "1 tests, 1 failed" in said, said
    code, said = run(tmp_path, "-k", "neither")
    assert code == 1 and "no test was chosen" in said, said


@pytest.mark.parametrize("bell", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "TERM"])
def test_ended_from_outside_it_leaves_nothing(tmp_path: Path, bell: signal.Signals) -> None:
    process = started(lanes(tmp_path, HANGS.replace("CLEAN_UP", ORDERLY), GOOD))
    until(lambda: (tmp_path / "pids").exists() and len((tmp_path / "pids").read_text().split()) == 2)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert all(map(alive, pids))
    process.send_signal(bell)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "stopping" in said, said
    assert (tmp_path / "cleaned").exists()
    until(lambda: not any(map(alive, pids)))


def test_who_does_not_clean_up_is_ended_at_the_second_bell(tmp_path: Path) -> None:
    process = started(lanes(tmp_path, HANGS.replace("CLEAN_UP", 'Path("waits").touch(); time.sleep(3600)'), GOOD))
    until(lambda: (tmp_path / "pids").exists() and len((tmp_path / "pids").read_text().split()) == 2)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    process.send_signal(signal.SIGINT)
    until((tmp_path / "waits").exists)
    assert all(map(alive, pids))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    until(lambda: not any(map(alive, pids)))


def test_every_test_is_in_one_lane() -> None:
    script = "import sys; sys.path.insert(0, sys.argv[1]); import lanes; print(*sum(lanes.rooms().values(), []))"
    said = subprocess.run([sys.executable, "-c", script, str(TESTS)], capture_output=True, text=True, check=True).stdout
    rooms = [TESTS.parent / name for name in said.split()]
    for path in TESTS.rglob("test_*.py"):
        assert [path.is_relative_to(room) for room in rooms].count(True) == 1, path
