"""The demo end to end, as users run it: its exit status, what it leaves behind, and that it can fail."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_lab import traces

from lab import demo, product
from lab.screen import Screen

NAME = "tdemo"
REPO = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "lab.demo", "--name", NAME]
LAB_RACK = [sys.executable, str(REPO / "lab/rack"), "--name", NAME]
LIMIT = 240.0
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a rack needs root")


@pytest.mark.parametrize(
    ("how", "when"),
    [
        (signal.SIGINT, "1. A rack"),
        (signal.SIGTERM, "virsh define, virsh start"),
        (signal.SIGINT, "kill -9: hostd"),
        (signal.SIGKILL, "3. No policy"),
    ],
    ids=lambda value: re.sub(r"\W+", "-", str(getattr(value, "name", value))),
)
def test_an_interrupted_demo_leaves_nothing(how: signal.Signals, when: str) -> None:
    process = subprocess.Popen(COMMAND, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    watchdog = threading.Timer(LIMIT, process.kill)
    watchdog.start()
    seen = ""
    try:
        assert process.stdout
        for line in process.stdout:
            seen += line
            if when in line:
                until = time.monotonic() + 10
                while not traces(NAME) and time.monotonic() < until:
                    time.sleep(0.01)
                assert traces(NAME), "there is something to remove"
                process.send_signal(how)
                break
        rest = process.communicate()[0]
    finally:
        process.kill()
        watchdog.cancel()
    assert when in seen, seen
    if how == signal.SIGKILL:  # it could not clean up: the next command for this rack does
        subprocess.run([*LAB_RACK, "down"], check=True, timeout=LIMIT)
    else:
        assert process.returncode == 130, seen + rest
        assert "interrupted" in rest
    assert traces(NAME) == []


@pytest.mark.parametrize("legacy", ["", "h1"])
def test_the_demo(legacy: str) -> None:
    """Kept, looked around in, and taken down; on either kind of host hostd is killed."""
    command = [*COMMAND, "--keep", *(["--legacy", legacy] if legacy else [])]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=LIMIT, check=False)
    said = done.stdout
    try:
        assert done.returncode == 0, said + done.stderr
        assert [line[0] for line in said.splitlines() if re.match(r"\d\. ", line)] == list("1234567")
        kinds = {legacy or "h2": "iptables-legacy"}
        spoken = [f"{host} filters packets by {kinds.get(host, 'nf_tables')}" for host in ("h1", "h2")]
        assert ", ".join(spoken) in said
        assert re.search(r"revision \d+ live on 2 of 2 hosts in \d[\d.]* ms", said)
        grids = re.findall(r"(\d+) of (\d+) as written in examples/\S+\.matrix", said)
        assert [int(total) for _, total in grids] == [252, 252, 252, 336, 336, 336]
        assert all(good == total for good, total in grids)
        assert "\x1b" not in said
        assert f"lab/rack --name {NAME} down" in said
        listed = subprocess.run(
            [*LAB_RACK, "exec", "h1", "--", "virsh", "list", "--name"], capture_output=True, text=True, check=True
        )
        assert listed.stdout.split() == ["web1"]
    finally:
        subprocess.run([*LAB_RACK, "down"], check=True, timeout=LIMIT)
    assert traces(NAME) == []


def test_a_wrong_cell_fails_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The control: one expectation turned round, and nothing else, is found by the packets."""
    shutil.copytree(REPO / "examples", tmp_path / "examples")
    table = tmp_path / "examples/three-tier.matrix"
    text = re.sub(r"^(app +db +no +no +)yes", r"\1no", table.read_text(), flags=re.M)
    assert text != table.read_text()
    table.write_text(text)
    monkeypatch.setattr(demo, "EXAMPLES", tmp_path / "examples")
    rack = product.new_rack(NAME)
    try:
        shown = demo.Demo(rack, Screen())
        shown.one_rack()
        shown.two_guests()
        shown.three_closed()
        shown.four_policy()
    finally:
        rack.down()
    assert sorted(shown.wrong) == sorted(
        f"{app} -> {db} tcp/5432 by IPv{family}: open, expected closed"
        for app in ("app1", "app2")
        for db in ("db1", "db2")
        for family in (4, 6)
    )
    shown.seven_verdict()
    assert "8 of 504 observations were not as expected" in capsys.readouterr().out

