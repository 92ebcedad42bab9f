# Owns: slash32's side of bench.ovn works, at two hosts with two guests each and without OVN; the cage leaves nothing.
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import ovn
from bench.cage import CageError, caged, cpu, memory
from bench.measure import Report, stats

REPO = Path(__file__).resolve().parents[2]
CHANGES = {ovn.JOIN, ovn.ELEMENT, ovn.NEW}
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and taps need root")


def test_our_side_at_two_hosts() -> None:
    run = [sys.executable, "-m", "bench.ovn", "--alone", "--json", "-n", "2", "--chassis", "2", "--ports", "2"]
    done = subprocess.run(run, cwd=REPO, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    times, sizes = map(json.loads, done.stdout.splitlines())
    expected = {f"{cost}{what}, slash32" for what in CHANGES for cost in ("", f"{ovn.CPU}: ", f"{ovn.CENTRE}: ")}
    assert times["seconds"].keys() == expected | {f"{ovn.RESTART}, slash32"}
    assert sizes["bytes"].keys() == {"a host's RSS, slash32", "a host's PSS, slash32"}
    assert all(row["n"] == 2 and row["best"] > 0 for row in (*times["seconds"].values(), *sizes["bytes"].values()))


def _starts_a_daemon(folder: Path) -> Any:
    daemon = subprocess.Popen(["sleep", "7531"], start_new_session=True)
    assert cpu([daemon.pid]) >= 0 and memory([daemon.pid])[0] > 0  # positive control: it ran
    return {"folder": str(folder), "links": [link.name for link in Path("/sys/class/net").iterdir()]}


def test_a_cage_leaves_nothing() -> None:
    said = caged(_starts_a_daemon)
    assert said["links"] == ["lo"]
    assert not Path(said["folder"]).exists()
    running = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert b"sleep\x007531\0" not in running


def _fails(_: Path) -> Any:
    raise ValueError("told to")


def test_what_fails_in_a_cage_fails(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CageError):
        caged(_fails)
    assert "ValueError: told to" in capfd.readouterr().err


def test_the_table() -> None:
    rows = {f"{ovn.JOIN}, {side}": stats([value]) for side, value in (("OVN", 0.2), ("slash32", 0.004))}
    size = {"a host's PSS, slash32": stats([25.0 * (1 << 20)])}
    text = ovn.markdown([Report("10 hosts x 100 guests", rows, {}, {}), Report("10 hosts x 100 guests", size, {}, {})])
    assert "| join a group that policies everywhere use | 200 ms (200), 1 | 4.0 ms (4.0), 1 | 1/50 |" in text
    assert "| memory of a host's agent (PSS) |  | 25 MiB |  |" in text
