# Owns: each benchmark runs, at a tiny scale, and prints JSON that says what was measured. No time is asserted.
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[2]
TINY = {
    "hook": ["-n", "3"],
    "endpoint": ["-n", "2", "--present", "1,3"],
    "bulk": ["-n", "2", "--members", "300", "--routes", "7"],
    "labels": ["-n", "3", "--present", "20,50", "--selectors", "40"],
    "diff": ["-n", "2", "--endpoints", "60", "--policies", "10"],
    "hostd": ["-n", "2", "--few", "2", "--many", "5"],
    "fanout": ["-n", "1", "--storms", "1", "--hosts", "10", "--endpoints", "200"],
}
FIGURES = {"n", "median", "p99", "best"}


def lines(name: str) -> list[dict[str, Any]]:
    run = [sys.executable, "-m", f"bench.{name}", "--json", *TINY[name]]
    done = subprocess.run(run, cwd=REPO, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode in (0, 1), done.stderr
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and taps need root")
@pytest.mark.parametrize("name", TINY)
def test_prints_what_it_measured(name: str) -> None:
    found = lines(name)
    assert found
    for one in found:
        measured = one.get("seconds") or one["bytes"]
        assert all(row.keys() == FIGURES and row["n"] > 0 and row["median"] > 0 for row in measured.values())
        assert one["bars"].keys() == one["met"].keys() <= one["ratios"].keys()


@pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and taps need root")
def test_a_restart_writes_nothing() -> None:
    (restart,) = (one for one in lines("hostd") if one["name"].startswith("restart"))
    assert restart["ratios"]["operations written"] == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="as the others")
def test_hosts_hear_nothing_of_what_does_not_concern_them() -> None:
    times, sizes = lines("fanout")
    assert {"membership", "policy", "1 % of hosts", "all back", "all back, snapshots"} <= times["seconds"].keys()
    assert times["ratios"]["messages to the uninterested"] == 0 and times["met"]["messages to the uninterested"]
    assert times["ratios"]["uninterested looked at"] > 0
    assert sizes["bytes"]["peak, all back, snapshots"]["median"] > sizes["bytes"]["snapshot"]["median"]
