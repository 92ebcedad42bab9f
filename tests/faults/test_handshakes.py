# Thousands of connections that never say who they are, or say it wrong: hosts come in, get and acknowledge meanwhile;
# afterwards the dispatcher is as it was.
from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator

import pytest
import strangers
from dispatcher_rig import FakeHost, Rack, guest, memory_kib, policy, turn
from strangers import Crowd, descriptors

from slash32.pack import Kind

FULL = os.environ.get("SLASH32_COUNTS") == "full"
CROWD = 5000 if FULL else 500
GREETING = strangers.greeting(b"CURVE")
HANDSHAKE = 10.0  # seconds that the dispatcher gives a connection
WEB = 'role == "web"'


@pytest.fixture
def crowd(rack: Rack, many_files: int) -> Iterator[Crowd]:
    assert many_files > CROWD + 500
    found = Crowd(rack.dispatcher.port)
    yield found
    found.leave()


def works(rack: Rack, new: FakeHost, number: int) -> None:
    """A host that was not there comes in, one that was gets what concerns it, both acknowledge."""
    rack.hosts.append(new)
    rack.dispatcher.apply(new.resource())
    new.start()
    rack.until(lambda: new.in_sync)
    revision = rack.dispatcher.apply(policy(f"p{number}", WEB, WEB))
    progress = rack.wait_live(revision)
    assert progress["live"] == len(rack.hosts) and not progress["pending"]
    assert f"p{number}" in rack.hosts[0].objects(Kind.POLICY)


def process_of(rack: Rack) -> int:
    assert rack.dispatcher.process and rack.dispatcher.process.poll() is None
    return rack.dispatcher.process.pid


def test_a_crowd_at_the_door_keeps_nobody_out(rack: Rack, crowd: Crowd) -> None:
    (h1,) = rack.begin(1)
    h1.claim(guest(1))
    rack.settle()
    pid = process_of(rack)
    before = descriptors(pid), memory_kib(pid)
    third = CROWD // 3
    crowd.join(third)  # silent
    crowd.join(third, GREETING[:11])  # a byte a second from now on
    crowd.join(third, GREETING)  # goes no further
    rack.until(lambda: descriptors(pid) >= before[0] + CROWD * 9 // 10)
    slow = crowd.sockets[third : 2 * third]
    began, said = time.monotonic(), 11
    works(rack, FakeHost(rack.dispatcher, "h2"), 1)
    while crowd.alive():
        if time.monotonic() - began > said - 10:
            for one in slow:
                crowd.say(one, GREETING[said : said + 1])
            said += 1
        turn(rack.hosts, 0.05)
        assert time.monotonic() - began < 6 * HANDSHAKE, f"{crowd.alive()} are still there"
    assert said >= 15, "the control: they were slow, and there"
    works(rack, FakeHost(rack.dispatcher, "h3"), 2)
    crowd.leave()
    rack.until(lambda: descriptors(pid) <= before[0] + 8)
    left = []
    for _ in range(12):  # what the allocator keeps serves the next ones, by and large: a leak would be twelve times
        crowd.join(CROWD, GREETING)
        rack.until(lambda: descriptors(pid) >= before[0] + CROWD * 9 // 10)
        crowd.leave()
        rack.until(lambda: descriptors(pid) <= before[0] + 8)
        left.append(memory_kib(pid))
    assert left[-1] - before[1] < (16 << 10) + 35 * CROWD, f"{before[1]} KiB, then {left}"
    log = rack.dispatcher.log.read_text()
    assert len(log) < 20_000 and "Traceback" not in log


@pytest.mark.parametrize("said", strangers.SAID)
def test_who_speaks_otherwise_is_not_heard(rack: Rack, crowd: Crowd, said: str) -> None:
    (h1,) = rack.begin(1)
    h1.claim(guest(1))
    rack.settle()
    pid = process_of(rack)
    before = descriptors(pid)
    crowd.join(30, strangers.SAID[said])
    works(rack, FakeHost(rack.dispatcher, "h2"), 1)
    assert rack.dispatcher.get("/v1/status")["connected"] == 2
    crowd.leave()
    rack.until(lambda: descriptors(pid) <= before + 4)
    log = rack.dispatcher.log.read_text()
    assert len(log) < 20_000 and "Traceback" not in log and "hello with a key" not in log


def test_more_connections_than_descriptors(rack: Rack, crowd: Crowd) -> None:
    """Those that are in stay in; the others come in when there is room."""
    (h1,) = rack.begin(1)
    pid = process_of(rack)
    few, hard = descriptors(pid) + 20, resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (few, hard))
    crowd.join(100)
    rack.until(lambda: descriptors(pid) >= few)
    h1.claim(guest(1))
    crowd.leave()
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
    works(rack, FakeHost(rack.dispatcher, "h2"), 1)
    assert "Traceback" not in rack.dispatcher.log.read_text()
