# SIGTERM in the middle of everything: who waits is told, what was acknowledged is there, and nobody who is stuck keeps
# the dispatcher from ending.
from __future__ import annotations

import os
import random
import socket
import threading
import time
from typing import Any

import pytest
from dispatcher_rig import Rack, guest, policy, turn
from under_load import WEB, Load, left_behind

FULL = os.environ.get("SLASH32_COUNTS") == "full"
STOPS = 25 if FULL else 4


def stuck(rack: Rack) -> list[socket.socket]:
    """Clients that say half of it, or take nothing of what they asked for."""
    words = (
        b"", b"GET /v1/sta", b"POST /v1/apply HTTP/1.1\r\nHost: d\r\nContent-Length: 1000\r\n\r\n{",
        b"GET /v1/watch HTTP/1.1\r\nHost: d\r\n\r\n", b"GET /v1/backup HTTP/1.1\r\nHost: d\r\n\r\n" * 50,
    )  # fmt: skip
    found = []
    for word in words * 3:
        s = socket.socket(socket.AF_UNIX)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2304)
        s.settimeout(10)
        s.connect(str(rack.dispatcher.socket))
        s.sendall(word)
        found.append(s)
    return found


class Waiter(threading.Thread):
    """`apply --wait`: for a host that does not acknowledge."""

    def __init__(self, rack: Rack, revision: int) -> None:
        super().__init__()
        self._rack, self._revision = rack, revision
        self.answer: tuple[int, Any] | None = None
        self.start()

    def run(self) -> None:
        self.answer = self._rack.dispatcher.call("GET", f"/v1/revisions/{self._revision}?wait=15")


@pytest.mark.timeout(1200)
def test_a_stop_under_load(rack: Rack) -> None:
    noise = random.Random(9)
    h1, h2, deaf = rack.begin(3)
    for n, host in enumerate((h1, h2, deaf), 1):
        host.claim(guest(n))
    rack.settle()
    load = Load(rack, noise)
    load.claimers = load.claimers[:2]
    refusals = 0
    for number in range(STOPS):
        deaf.acknowledges = False
        revision = rack.dispatcher.apply(policy("waited-for", WEB, f'n == "{number}"'))
        waiter = Waiter(rack, revision)
        rack.hosts = [h1, h2]  # the third takes nothing from here on
        for n in range(200):
            rack.dispatcher.apply(policy("bulk", WEB, f'{WEB} && n == "{n}" && x == "{"x" * 200}"'))
        clients = stuck(rack)
        for each in load.appliers:
            each.start()
        end = time.monotonic() + 0.05 + noise.random() * 0.1
        while time.monotonic() < end:
            for claimer in load.claimers:
                claimer.step()
            turn(rack.hosts, 0.001)
        assert rack.dispatcher.stop() == 0, "within ten seconds"
        for each in load.appliers:
            each.stop()
        waiter.join(20)
        assert waiter.answer == (503, {"errors": ["the dispatcher is stopping"]}), waiter.answer
        for _ in range(5):
            turn(rack.hosts, 0.01)
        assert load.wrong(left_behind(rack.dispatcher.database)) == [], f"stop {number}"
        said = [(status, line) for a in load.appliers for status, body in a.refused for line in body["errors"]]
        assert all(status == 503 and line.startswith("the dispatcher is stopping") for status, line in said), said
        refusals += len(said)
        for client in clients:
            client.close()
        for each in load.appliers:
            each.refused.clear()
        rack.dispatcher.start()
        rack.hosts, deaf.acknowledges = [h1, h2, deaf], True
        rack.until(lambda: all(host.in_sync and host.feed and host.feed.connected for host in rack.hosts))
        for claimer in load.claimers:
            claimer.settled()
        rack.settle()
    print(f"{STOPS} stops: {load.acknowledged} groups acknowledged, {refusals} refused because it was stopping")
    assert load.acknowledged > STOPS and "Traceback" not in rack.dispatcher.log.read_text()
