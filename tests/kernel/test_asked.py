# A real hostd in a network namespace of its own, asked over HTTP how it is.
from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from netns import Namespace

from hostd.reporting import metrics
from tests.exposition import Samples, asked, measured_at, value

REPO = Path(__file__).resolve().parents[2]
PORT = 9533  # in a namespace of its own
NOBODY = 9  # nothing listens there


class Hostd:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, **settings: object) -> None:
        (self.folder / "run").mkdir()
        given = {
            "host": "h1", "libvirt": ["test:///default"], "metrics_listen": f"http://127.0.0.1:{PORT}",
            "log_format": "json", "state_dir": str(self.folder / "state"), "run_dir": str(self.folder / "run"),
        } | settings  # fmt: skip
        config = self.folder / "hostd.toml"
        config.write_text("".join(f"{key} = {json.dumps(setting)}\n" for key, setting in given.items()))
        with (self.folder / "log").open("wb") as log:
            argv = [sys.executable, "-m", "hostd", "run", "--config", str(config)]
            self.process = subprocess.Popen(argv, cwd=REPO, stderr=log)

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(20)

    def ask(self, path: str) -> tuple[int, str]:
        return asked(PORT, path)

    def metrics(self) -> Samples:
        return measured_at(PORT, metrics.FAMILIES)

    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in (self.folder / "log").read_text().splitlines()]


@pytest.fixture
def hostd(netns: Namespace, tmp_path: Path) -> Iterator[Hostd]:
    os.environ.pop("JOURNAL_STREAM", None)
    made = Hostd(tmp_path)
    yield made
    made.stop()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            if condition():
                return
        except (ConnectionError, http.client.HTTPException):
            pass
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_host_that_is_well(hostd: Hostd) -> None:
    hostd.start()
    until(lambda: hostd.ask("/health")[0] == 200)
    assert json.loads(hostd.ask("/health")[1]) == {"status": "ok", "problems": []}
    found = hostd.metrics()
    assert value(found, "slash32_hostd_libvirt_connected", driver="test") == 1
    assert value(found, "slash32_hostd_libvirt_scan_duration_seconds_count", driver="test") >= 1
    assert value(found, "slash32_hostd_resync_duration_seconds_count") >= 1
    assert value(found, "slash32_hostd_kernel_failures") == value(found, "slash32_hostd_problems") == 0
    assert value(found, "slash32_process_resident_memory_bytes") > 1 << 20
    assert hostd.ask("/")[0] == 404


def test_one_that_is_not(hostd: Hostd) -> None:
    """Its dispatcher is not there; and somebody takes its table away, which it puts back."""
    hostd.start(dispatcher=f"tcp://127.0.0.1:{NOBODY}", dispatcher_key="x" * 40)
    until(lambda: hostd.ask("/health")[0] == 503)
    problems = json.loads(hostd.ask("/health")[1])["problems"]
    assert len(problems) == 1 and problems[0].startswith("no dispatcher: ")
    found = hostd.metrics()
    assert value(found, "slash32_hostd_connected") == value(found, "slash32_hostd_in_sync") == 0
    healed = value(found, "slash32_hostd_healed_total")
    subprocess.run(["nft", "delete", "table", "arp", "slash32"], check=True)
    until(lambda: value(hostd.metrics(), "slash32_hostd_healed_total") > healed)


def test_its_log_is_json(hostd: Hostd) -> None:
    hostd.start()
    until(lambda: hostd.ask("/health")[0] == 200)
    lines = hostd.lines()
    assert lines and all({"ts", "level", "msg"} <= line.keys() for line in lines)
    assert any(str(line["msg"]).startswith("in step with the kernel") for line in lines)
