# Clocks jump, of the dispatcher and of a real host: days to and fro, beyond 2038, to 1970. Nothing is decided by the
# time of day: nobody is dropped, nothing is lost, the order is that of revisions; what is shown may be odd.
from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from dispatcher_rig import Dispatcher, FakeHost, Rack, guest, policy
from netns import Namespace
from real_host import RealHost
from under_load import WEB, left_behind

from hostd.session.feed import Disconnected
from slash32.sync import Held

FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1"
JUMPS = {
    "+1d": timedelta(days=1), "-1d": timedelta(days=-1), "@2040-06-01 00:00:00": datetime(2040, 6, 1, tzinfo=UTC),
    "@1970-01-01 00:00:03": datetime(1970, 1, 1, tzinfo=UTC), "@2200-01-01 00:00:00": datetime(2200, 1, 1, tzinfo=UTC),
    "+0": timedelta(),
}  # fmt: skip

pytestmark = [
    pytest.mark.skipif(not Path(FAKETIME).exists(), reason="faketime is not installed"),
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root"),
]


class Clock:
    """The time of day of the processes that are started with it."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "faketime"
        self.jump("+0")

    def jump(self, to: str) -> None:
        part = self._file.with_name("faketime.part")
        part.write_text(to + "\n")
        part.rename(self._file)

    def of(self, command: list[str]) -> list[str]:
        words = {
            "LD_PRELOAD": FAKETIME, "FAKETIME_TIMESTAMP_FILE": str(self._file), "FAKETIME_NO_CACHE": "1", "TZ": "UTC",
            "DONT_FAKE_MONOTONIC": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }  # fmt: skip
        return ["env", *(f"{name}={word}" for name, word in words.items()), *command]


class Odd(Dispatcher):
    def __init__(self, folder: Path, clock: Clock) -> None:
        super().__init__(folder)
        self._clock = clock

    def command(self, verb: str) -> list[str]:
        return self._clock.of(super().command(verb))


class OddHost(RealHost):
    clock: Clock

    def command(self, *verb: str) -> list[str]:
        return self.clock.of(super().command(*verb))


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    return Clock(tmp_path)


@pytest.fixture
def odd(tmp_path: Path, clock: Clock) -> Iterator[Rack]:
    rack = Rack(tmp_path)
    rack.dispatcher = Odd(tmp_path, clock)
    yield rack
    rack.end()


@pytest.fixture
def real(here: Namespace, tmp_path: Path, clock: Clock) -> Iterator[OddHost]:
    folder = tmp_path / "h1"
    folder.mkdir()
    host = OddHost(folder, here)
    host.clock = clock
    yield host
    host.stop()


def _is(said: str, jump: timedelta | datetime) -> bool:
    """The time that is told is that of the clock."""
    expected = datetime.now(UTC) + jump if isinstance(jump, timedelta) else jump
    return abs(datetime.fromisoformat(said) - expected) < timedelta(hours=1)


def _changed(rack: Rack, hosts: list[FakeHost], number: int) -> int:
    revision = rack.dispatcher.apply(policy("p", WEB, f'{WEB} || n == "{number}"'))
    seq = hosts[0].claim(guest(20 + number))
    rack.until(lambda: seq in hosts[0].answered)
    rack.settle()
    return revision


def test_the_clock_jumps(odd: Rack, real: OddHost, clock: Clock) -> None:
    fake, h2, h3 = odd.begin(3)
    fake.stop()
    odd.hosts = [h2, h3]
    shutil.copy(fake.key_file, real.state / "hostd.key")
    config = odd.dispatcher.config
    config.write_text(config.read_text().replace("tcp://127.0.0.1:", "tcp://0.0.0.0:"))
    odd.dispatcher.stop()
    odd.dispatcher.start()
    real.configure(odd.dispatcher.port, odd.dispatcher.public_key)
    real.start()
    h2.claim(guest(2))
    odd.until(lambda: real.status()["in_sync"] and h2.in_sync and h3.in_sync)
    odd.settle()
    for host in odd.hosts:
        host.events.clear()
    connected = odd.dispatcher.log.read_text().count(": connected")
    revisions = []
    for number, (word, jump) in enumerate(JUMPS.items()):
        clock.jump(word)
        revision = _changed(odd, odd.hosts, number)
        revisions.append(revision)
        newest = odd.dispatcher.get(f"/v1/audit?since={revision - 1}")["items"][-1]
        assert newest["revision"] == revision and newest["what"] == "GlobalNetworkPolicy p"
        assert _is(newest["at"], jump), (word, newest)
        shown = odd.dispatcher.get("/v1/hosts")["items"]
        assert all(each["connected"] and each["in_sync"] and each["lag_seconds"] == 0 for each in shown), shown
        assert all(_is(each["last_seen"], jump) for each in shown), (word, shown)
        assert odd.dispatcher.call("GET", "/health") == (200, {"status": "ok", "problems": []})
        assert odd.dispatcher.get("/v1/backup")["revision"] >= revision
    items = [each["revision"] for each in odd.dispatcher.get("/v1/audit?limit=1000")["items"]]
    assert items == sorted(items, reverse=True) and set(revisions) <= set(items)
    assert revisions == sorted(revisions)
    bad = [e for host in odd.hosts for e in host.events if isinstance(e, Disconnected | Held)]
    log = odd.dispatcher.log.read_text()
    assert bad == [] and log.count(": connected") == connected and "silent for" not in log and "Traceback" not in log
    assert real.said("diff").returncode == 0 and "Traceback" not in real.log.read_text()


def test_it_ends_and_begins_at_odd_times(odd: Rack, clock: Clock) -> None:
    hosts = odd.begin(2)
    epoch = odd.dispatcher.get("/v1/status")["epoch"]
    for number, word in enumerate(JUMPS):
        clock.jump(word)
        revision = _changed(odd, hosts, number)
        odd.dispatcher.kill() if number % 2 else odd.dispatcher.stop()
        assert left_behind(odd.dispatcher.database).revision >= revision
        odd.dispatcher.start()
        odd.until(lambda: all(host.in_sync for host in hosts))
        odd.settle()
        status = odd.dispatcher.get("/v1/status")
        assert status["epoch"] == epoch and status["revision"] >= revision and status["held"] == {}
        assert len(odd.dispatcher.get("/v1/endpoints")["items"]) == number + 1
    hosts[1].stop()  # one that is gone: last seen, by a clock that was another one
    odd.until(lambda: odd.dispatcher.get("/v1/status")["connected"] == 1 or _noise(hosts[0]))
    clock.jump("@1970-01-01 00:00:00")
    items = odd.dispatcher.get("/v1/hosts")["items"]
    assert [each["connected"] for each in items] == [True, False]
    assert all(_is(each["last_seen"], datetime(1970, 1, 1, tzinfo=UTC)) for each in items), items


def _noise(host: FakeHost) -> bool:
    """What concerns all: sending finds out who is gone."""
    host.claim(guest(99))
    host.release(guest(99).key)
    return False


def test_the_clock_is_really_another(clock: Clock) -> None:
    """The control; and the clocks that we do decide by stay what they are."""
    clock.jump("@1970-01-02 00:00:00")
    say = "import time; print(int(time.time()), time.monotonic())"
    wall, steady = subprocess.run(
        clock.of(["/usr/bin/python3", "-c", say]), check=True, capture_output=True, text=True
    ).stdout.split()
    with open("/proc/uptime") as file:
        assert abs(float(file.read().split()[0]) - float(steady)) < 60
    assert int(wall) < 2 * 86400
