# Nobody tells of a change of iptables or ipset: what hostd's looks see of it, how dear they are, and what gets through
# until one does, by the sender's clock.
from __future__ import annotations

import logging
import os
import random
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import filters
import pytest
from netns import Namespace, eventually, run
from town import Guest, Town

from hostd.compiler.ruleset import Guard, SetKind, SetSpec
from hostd.daemon import POLL, Daemon
from hostd.dataplane.filter import IPTABLES
from hostd.dataplane.iptables import watch
from hostd.dataplane.iptables.table import IptablesFilter
from slash32.policy import Action, Direction, Peer, Policy, PortRange, Rule

FULL = os.environ.get("SLASH32_COUNTS") == "full"
TRIALS = 20 if FULL else 3
ROUNDS = 3  # of trials, at most, until the bar is met
BAR = 4 * POLL
OPEN, CLOSED = 6001, 6002
# Numbers of nanoseconds, one each half millisecond or so.
SENDER = """
import os, socket, struct, sys, time
os.sched_setaffinity(0, range(os.cpu_count()))
s, to = socket.socket(fileno=int(sys.argv[1])), (sys.argv[2], int(sys.argv[3]))
while True:
    try:
        s.sendto(struct.pack("Q", time.monotonic_ns()), to)
    except OSError:
        pass
    time.sleep(0.0005)
"""


@pytest.fixture
def table(netns: Namespace) -> Iterator[IptablesFilter]:
    made = IptablesFilter(Guard())
    made.load()
    change = made.transaction()
    change.add_set("addr4-x", SetSpec(SetKind.ADDR4, 256), 0)
    change.commit()
    assert not made.changed()
    yield made
    made.close()


DONE = {
    "a member more": "ipset add s32a4-x 10.0.0.1",
    "another set": "ipset create s32a4-y hash:ip",
    "a pair more": "ipset add s32-source4 10.0.0.1,vnet9",
    "a rule less": "iptables-legacy -t raw -D s32-guest 1",
    "a table flushed": "ip6tables-legacy -t security -F",
}


@pytest.mark.parametrize("done", DONE)
def test_what_others_do_is_seen_and_what_we_do_is_not(table: IptablesFilter, done: str) -> None:
    change = table.transaction()
    change.add_members("addr4-x", SetKind.ADDR4, [bytes((10, 0, 0, 9))], 0)
    change.commit()
    assert not table.changed()
    run(*DONE[done].split())
    assert table.changed() and table.changed()
    table.settled()
    assert not table.changed()


def test_what_refers_to_a_set_is_no_change_of_it(table: IptablesFilter) -> None:
    run("iptables-legacy", "-A", "INPUT", "-m", "set", "--match-set", "s32a4-x", "src")
    assert not table.changed()


def test_where_a_look_at_all_sets_is_dear_there_are_fewer(
    table: IptablesFilter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables, and the sets of who may send from where, are looked at every time."""
    monkeypatch.setattr(watch, "_SHARE", 1e-9)
    assert not table.changed()
    run("ipset", "add", "s32a4-x", "10.0.0.1")
    assert not table.changed(), "not now"
    for done in ("a pair more", "a rule less", "a table flushed"):
        run(*DONE[done].split())
        assert table.changed(), done
        table.settled()


# -- what gets through ------------------------------------------------------------------------------------------------


@pytest.fixture
def town(netns: Namespace) -> Iterator[Town]:
    """UDP to db's open port is allowed from web's addresses."""
    filters.chosen = IPTABLES
    try:
        made = Town("web", "db", "other")
    finally:
        filters.chosen = filters.NFTABLES
    from_web = Rule(Action.ALLOW, 17, source=Peer(selector='role == "web"'),
                    destination=Peer(ports=(PortRange(OPEN, OPEN),)))  # fmt: skip
    made.put(
        Policy("db", 'role == "db"', (Direction.INGRESS,), 1, (from_web,), ()),
        Policy("all", "all()", (Direction.EGRESS,), 2, (), (Rule(Action.ALLOW),)),
    )
    yield made
    made.close()


class Knocks:
    """Somebody sends to db what should not arrive: by its own clock."""

    def __init__(self, sender: socket.socket, db: Guest, port: int) -> None:
        self.there = db.socket(6, socket.SOCK_DGRAM)
        self.there.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)
        self.there.bind((db.v6, port))
        words = [sys.executable, "-c", SENDER, str(sender.fileno()), db.v6, str(port)]
        self.process = subprocess.Popen(words, pass_fds=[sender.fileno()])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.there.close()

    def arrived(self) -> list[int]:
        found = []
        while True:
            try:
                found += struct.unpack("Q", self.there.recv(8))
            except BlockingIOError:
                return found


@contextmanager
def knocks(town: Town, table: str) -> Iterator[Knocks]:
    """What this table keeps out, and no other: raw, who says to be web; security, who sends where he may not."""
    web, db, other = town.guests
    mac = run("ip", "-o", "link", "show", f"vnet{other.number}").split("link/ether ")[1][:17]
    with other.space.entered():
        run("ip", "address", "add", f"{web.v6}/128", "dev", "eth0", "nodad")
        run("ip", "neigh", "replace", "fe80::1", "lladdr", mac, "dev", "eth0", "nud", "permanent")
    with other.socket(6, socket.SOCK_DGRAM) as sender:
        sender.bind((web.v6 if table == "raw" else other.v6, 0))
        made = Knocks(sender, db, OPEN if table == "raw" else CLOSED)
        try:
            yield made
        finally:
            made.close()


class Hostd:
    """Its looks at the packet filter, as often as hostd's."""

    def __init__(self, town: Town) -> None:
        self.settler = town.settler
        agent = SimpleNamespace(resync=town.settler.resync)
        self._daemon = cast(Any, SimpleNamespace(
            machine=SimpleNamespace(kernel=town.kernel, packet_filter=IPTABLES), settler=town.settler, agent=agent
        ))  # fmt: skip

    def look(self) -> bool:
        """Whether something was healed."""
        before = self.settler.counters.healed
        time.sleep(POLL)
        Daemon._look_at_filter(self._daemon)
        return self.settler.counters.healed > before


class Leak(NamedTuple):
    seconds: float
    packets: int


def flushed(table: str, after: float = 0.0) -> subprocess.Popen[bytes]:
    commands = "; ".join(f"{command} -t {table} -F" for command in ("ip6tables-legacy", "iptables-legacy"))
    return subprocess.Popen(["sh", "-c", f"sleep {after:.4f}; {commands}"])


def leaked(hostd: Hostd, some: Knocks, table: str) -> Leak:
    """Each look after the flush heals, and what is sent after that does not arrive."""
    assert some.arrived() == [], "closed, as long as nobody flushes"
    flush = flushed(table, random.uniform(0, POLL))
    while flush.poll() is None:
        hostd.look()
    hostd.look()
    healed = time.monotonic_ns()
    assert not hostd.look(), "one look is enough"
    eventually(lambda: time.monotonic_ns() > healed + 20_000_000, "the sender goes on")
    times = some.arrived()
    assert not any(at > healed for at in times), "what leaked goes on"
    return Leak((times[-1] - times[0]) / 1e9 if times else 0.0, len(times))


@pytest.mark.parametrize("table", ["raw", "security"])
def test_what_a_flush_lets_through_until_the_next_look(
    town: Town, table: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    hostd, leaks = Hostd(town), list[Leak]()
    with knocks(town, table) as some:
        while len(leaks) < TRIALS or (median(leaks) > BAR and len(leaks) < ROUNDS * TRIALS):
            leaks.append(leaked(hostd, some, table))
        assert some.process.poll() is None
    print(f"{table}: median {median(leaks):.3f} s, worst {max(leak.seconds for leak in leaks):.3f} s", leaks)
    assert any(leak.packets for leak in leaks), "control: something does get through"
    assert median(leaks) <= BAR, leaks


def median(leaks: list[Leak]) -> float:
    return statistics.median(leak.seconds for leak in leaks)


@pytest.mark.parametrize("table", ["raw", "security"])
def test_control_nobody_looks(town: Town, table: str) -> None:
    with knocks(town, table) as some:
        flushed(table).wait()
        eventually(some.arrived, "it leaks")
        until = time.monotonic_ns() + int(2e9 * POLL)
        eventually(lambda: any(at > until for at in some.arrived()), "and goes on")
    assert town.settler.resync() == []
