# From one packet filter to the other on a live host, both ways: no packet is lost, none gets by, nothing stays behind.
# After every single change of the kernel the whole is looked at.
from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import filters
import pytest
from netns import eventually, run
from town import Session, Town

from hostd.change.plan import Limits
from hostd.change.settle import Settler
from hostd.compiler.ruleset import Guard
from hostd.config import Config
from hostd.dataplane import host
from hostd.dataplane.filter import IPTABLES, NFTABLES
from hostd.dataplane.host import Machine
from hostd.dataplane.iptables import restore
from hostd.dataplane.iptables.sets import Sets
from hostd.dataplane.nft.transaction import Transaction
from slash32.policy import Action, Direction, Peer, Policy, Rule
from tests.scenes import FULL

KINDS = (NFTABLES, IPTABLES)


@contextlib.contextmanager
def town_with(kind: str) -> Iterator[Town]:
    """web may send UDP to db, other may not; TCP is everybody's."""
    filters.chosen = kind
    try:
        made = Town("web", "db", "other")
    finally:
        filters.chosen = NFTABLES
    tcp = Rule(Action.ALLOW, 6)
    from_web = Rule(Action.ALLOW, 17, source=Peer(selector='role == "web"'))
    try:
        made.put(
            Policy("db", 'role == "db"', (Direction.INGRESS,), 1, (from_web, tcp), ()),
            Policy("all", "all()", (Direction.EGRESS,), 2, (), (Rule(Action.ALLOW),)),
        )
        yield made
    finally:
        made.close()


def machine_of(kind: str, state: Path) -> Machine:
    return Machine(Config(host="h", state_dir=state, packet_filter=kind, table_owner="no"))


def settler_of(machine: Machine, made: Town) -> Settler:
    return Settler(machine.kernel, made.scene.fresh(), Limits(Guard().group_base), ("vnet",))


class Witness:
    """New flows at every step: web to db passes, other to db does not."""

    def __init__(self, town: Town) -> None:
        self.web, self.db, self.other = town.guests
        self.looks, self.port = 0, itertools.count(6000)

    def hears(self, sender: int) -> bool:
        guest = (self.web, self.db, self.other)[sender]
        port = next(self.port)
        there, here = self.db.socket(4, socket.SOCK_DGRAM), guest.socket(4, socket.SOCK_DGRAM)
        with there, here:
            there.bind((self.db.v4, port))
            here.sendto(b"x", (self.db.v4, port))
            try:
                return bool(there.recv(10))
            except BlockingIOError:
                return False

    def look(self) -> None:
        self.looks += 1
        assert self.hears(0), f"step {self.looks}: what policy allows is lost"
        assert not self.hears(2), f"step {self.looks}: what policy forbids gets by"


def watched(patch: pytest.MonkeyPatch, look: Callable[[], None]) -> None:
    def after(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def wrapped(*args: object) -> object:
            found = real(*args)
            look()
            return found

        patch.setattr(owner, name, wrapped)

    after(Sets, "carry_out")
    after(restore, "write")
    after(Transaction, "commit")


@pytest.mark.usefixtures("netns")
@pytest.mark.parametrize("kinds", [KINDS, KINDS[::-1]], ids=" to ".join)
def test_switching_on_a_live_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, str]) -> None:
    monkeypatch.setattr(host, "chosen", lambda setting: setting)
    with town_with(kinds[0]) as made:
        sessions = [Session(made.guests[0], made.guests[1], 80 + version, version) for version in (4, 6)]
        witness = Witness(made)
        witness.look()
        groups = run("ip", "-o", "link", "show", "type", "veth")
        made.kernel.close()
        with monkeypatch.context() as patch:
            watched(patch, witness.look)
            machine = machine_of(kinds[1], tmp_path)
            assert machine.follows
            machine.prepare()
            settler = settler_of(machine, made)
            assert settler.resync() == []
            assert machine.supplant() and not machine.supplant()
        assert witness.looks > 6
        assert all(session.lives() for session in sessions)
        assert run("ip", "-o", "link", "show", "type", "veth") == groups, "no tap has changed its group"
        before = settler.counters.writes
        assert machine.kernel.table.stands() and settler.resync() == [] and settler.counters.writes == before
        nothing_of(kinds[0])
        assert not machine_of(kinds[1], tmp_path).follows
        for session in sessions:
            session.close()
        made.kernel = machine.kernel


class Flood:
    """Numbered datagrams from web to db, without pause, from another CPU where there is one. Nobody answers: each is
    asked about anew."""

    def __init__(self, town: Town, port: int = 7000) -> None:
        web, db, _ = town.guests
        self.there, self._here = db.socket(4, socket.SOCK_DGRAM), web.socket(4, socket.SOCK_DGRAM)
        self.there.setsockopt(socket.SOL_SOCKET, 33, 1 << 30)  # SO_RCVBUFFORCE
        self.there.bind((db.v4, port))
        self._here.connect((db.v4, port))
        self._stop, self.arrived = mmap.mmap(-1, 1), list[int]()
        self._child = os.fork()
        if not self._child:
            with contextlib.suppress(BaseException):
                os.sched_setaffinity(0, {max(range(os.cpu_count() or 1))})
                self._run()
            os._exit(0)

    def _run(self) -> None:
        parent = os.getppid()
        for number in itertools.count():
            if self._stop[0] or os.getppid() != parent:
                return
            self._here.send(number.to_bytes(4, "big"))
            until = time.perf_counter() + 2e-5
            while time.perf_counter() < until:
                pass

    def __enter__(self) -> Flood:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop[0] = 1
        os.waitpid(self._child, 0)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.arrived.append(int.from_bytes(self.there.recv(4), "big"))
        self.there.close()
        self._here.close()


@pytest.mark.usefixtures("netns")
def test_not_one_of_many_packets_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of those that are just being asked about when the other goes."""
    monkeypatch.setattr(host, "chosen", lambda setting: setting)
    with town_with(KINDS[0]) as made, Flood(made) as flood:
        eventually(lambda: select.select([flood.there], [], [], 0)[0], "the first arrives")
        for kind in KINDS[::-1] * (20 if FULL else 4):
            made.kernel.close()
            machine = machine_of(kind, tmp_path)
            machine.prepare()
            assert settler_of(machine, made).resync() == [] and machine.supplant()
            made.kernel = machine.kernel
    assert len(flood.arrived) > 1000
    assert flood.arrived == list(range(flood.arrived[0], flood.arrived[0] + len(flood.arrived)))


def nothing_of(kind: str) -> None:
    if kind == NFTABLES:
        assert "slash32" not in run("nft", "list", "ruleset")
        return
    for command in ("iptables-legacy-save", "ip6tables-legacy-save"):
        assert "s32" not in run(command) and "host-in" not in run(command)
    assert not run("ipset", "list", "-name")


@pytest.mark.usefixtures("netns")
def test_half_a_switch_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """hostd dies before the old one goes."""
    monkeypatch.setattr(host, "chosen", lambda setting: setting)
    with town_with(NFTABLES) as made:
        made.kernel.close()
        for _ in range(2):
            machine = machine_of(IPTABLES, tmp_path)
            machine.prepare()
            machine.kernel.close()
        witness = Witness(made)
        witness.look()
        machine = machine_of(IPTABLES, tmp_path)
        machine.prepare()
        assert settler_of(machine, made).resync() == [] and machine.supplant()
        witness.look()
        nothing_of(NFTABLES)
        made.kernel = machine.kernel


@pytest.mark.usefixtures("netns")
def test_what_is_flushed_is_healed() -> None:
    """As hostd does it: it looks several times a second, and reads again what differs."""
    with town_with(IPTABLES) as made:
        witness, table = Witness(made), made.kernel.table
        session = Session(made.guests[0], made.guests[1], 80, 4)
        witness.look()
        assert not table.changed()
        for table_name in ("raw", "mangle", "security"):
            for command in ("iptables-legacy", "ip6tables-legacy"):
                run(command, "-t", table_name, "-F")
        assert witness.hears(2), "the control: it is open"
        assert table.changed()
        assert made.settler.resync() == []
        witness.look()
        assert session.lives() and not table.changed()
        run("ipset", "flush")
        assert not witness.hears(0), "the control: nobody's address is known"
        assert table.changed()
        assert made.settler.resync() == [] and not table.changed()
        witness.look()
        session.close()
