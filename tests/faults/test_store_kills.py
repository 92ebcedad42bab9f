# The dispatcher is killed at any moment under load, again and again: what was acknowledged is there, nothing is half
# there, revisions never go back, and hosts go on as if nothing had been.
from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable

import pytest
from dispatcher_rig import Rack, turn
from under_load import Load, left_behind

from dispatcher.store.commits import Saved, Table
from slash32.pack import AddressSet, Kind
from slash32.sync import Applied, Held

FULL = os.environ.get("SLASH32_COUNTS") == "full"
KILLS = 200 if FULL else 15


class Killer(threading.Thread):
    """After up to 50 ms; every second time at the next write to the log: about between the write and its answer."""

    def __init__(self, rack: Rack, noise: random.Random, exact: bool) -> None:
        super().__init__()
        self._rack, self._exact = rack, exact
        self._sleep, self._then = noise.random() * 0.05, noise.choice((0.0, 0.0, 0.0002, 0.0005, 0.001, 0.002))

    def run(self) -> None:
        time.sleep(self._sleep)
        if self._exact:
            log = self._rack.dispatcher.database.with_name("d.db-wal")
            before = log.stat().st_mtime_ns
            while log.stat().st_mtime_ns == before:
                pass
            time.sleep(self._then)
        self._rack.dispatcher.kill()


def under(load: Load, killer: threading.Thread) -> None:
    for each in load.appliers:
        each.start()
    killer.start()
    while killer.is_alive():
        for claimer in load.claimers:
            claimer.step()
        turn(load.rack.hosts, 0.001)
    for each in load.appliers:
        each.stop()
    for _ in range(5):  # what was answered before the end
        turn(load.rack.hosts, 0.01)


@pytest.mark.timeout(3600)
def test_what_was_acknowledged_survives_every_kill(rack: Rack) -> None:
    noise = random.Random(4)
    hosts = rack.begin(3)
    load = Load(rack, noise)
    for claimer in load.claimers:
        claimer.step()
    epoch, landed, void = rack.dispatcher.get("/v1/status")["epoch"], 0, 0
    load.settle()
    for number in range(KILLS):
        for host in hosts:
            host.events.clear()
        revisions = [host.replica.revision for host in hosts]
        under(load, Killer(rack, noise, number % 2 == 1))
        sent, before = [a.sent for a in load.appliers], load.acknowledged
        saved = left_behind(rack.dispatcher.database)
        assert load.wrong(saved) == [], f"kill {number}"
        assert saved.epoch == epoch
        landed += load.acknowledged - before
        void += sum(a.sent < n for a, n in zip(load.appliers, sent, strict=True))
        rack.dispatcher.start()
        assert rack.dispatcher.get("/v1/status")["revision"] >= saved.revision
        if number % 4:  # begins anew with what its disk has; else it comes back by itself, less and less in a hurry
            for host in hosts:
                host.restart()
        load.settle()
        for host, revision in zip(hosts, revisions, strict=True):
            applied = [e.revision for e in host.events if isinstance(e, Applied)]
            assert applied == sorted(applied) and host.replica.revision >= revision
            assert not any(isinstance(e, Held) for e in host.events) and host.replica.epoch == epoch
            if host.claims:
                sets = [v for name, v in host.objects(Kind.SET).items() if "applier" in str(name)]
                assert all(isinstance(v, AddressSet) and len(v.prefixes) + len(v.addresses) == 1 for v in sets)
    print(f"{KILLS} kills: {load.acknowledged} groups acknowledged, of the {landed + void} without an answer {landed} "
          f"were wholly there and {void} not at all; revision {load.last}")  # fmt: skip
    assert load.acknowledged > 2 * KILLS and "Traceback" not in rack.dispatcher.log.read_text()
    if FULL:
        assert landed and void, "both kinds of moments were met"


Spoil = Callable[[Saved], object]
SPOILT: dict[str, Spoil] = {
    "half there": lambda saved: saved.records.pop((Table.RESOURCE, ("Profile", "a1"))),
    "acknowledged": lambda saved: [saved.records.pop((Table.RESOURCE, (kind, "a0")))
                                   for kind in ("Profile", "GlobalNetworkSet", "GlobalNetworkPolicy")],
    "granted True": lambda saved: saved.records.pop(next(w for w in saved.records if w[0] is Table.ENDPOINT)),
    "was known": lambda saved: setattr(saved, "revision", saved.revision - 1),
}  # fmt: skip


def test_the_journal_finds_what_is_lost(rack: Rack) -> None:
    """The control: a store that lacks something is told from one that does not."""
    rack.begin(2)
    load = Load(rack, random.Random(5))
    for claimer in load.claimers:
        claimer.step()
    load.settle()
    under(load, Killer(rack, random.Random(6), False))
    while min(a.acknowledged for a in load.appliers) == 0:
        rack.dispatcher.start()
        load.settle()
        under(load, Killer(rack, random.Random(7), False))
        assert load.wrong(left_behind(rack.dispatcher.database)) == []
    rack.dispatcher.start()
    load.settle()
    rack.dispatcher.kill()
    for what, spoil in SPOILT.items():
        saved = left_behind(rack.dispatcher.database)
        journal = [(a.sent, a.acknowledged) for a in load.appliers]
        assert load.wrong(saved) == []
        spoil(saved)
        assert any(what in line for line in load.wrong(saved)), what
        for applier, (sent, acknowledged) in zip(load.appliers, journal, strict=True):
            applier.sent, applier.acknowledged = sent, acknowledged
