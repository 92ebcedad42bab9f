# What dies, hangs or is cut off: members of etcd, dispatchers, networks. Applies go on or fail with one clear line,
# what was acknowledged stays, no host loses what it has, and hosts are soon at a dispatcher that has the store.
from __future__ import annotations

import os
import secrets
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from dispatcher_rig import guest, policy
from etcd_rig import Etcd, Replica
from trio import Guest, One, Trio, content

from dispatcher.store.commits import Table, Write
from dispatcher.store.etcd.entries import KEPT
from slash32.net import Prefix
from slash32.policy import NetworkSet

FULL = os.environ.get("SLASH32_COUNTS") == "full"
WITHIN = 10.0  # seconds that a loaded machine may take for what takes two


class Stream:
    """Applies, one after the other, of two policies each, to dispatchers in turn: both are there, or none."""

    def __init__(self, dispatchers: list[One]) -> None:
        self.dispatchers = dispatchers
        self.done: list[int] = []  # numbers that were acknowledged
        self.refused: list[tuple[int, float, Any]] = []
        self._stop = False
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        number = 0
        while not self._stop:
            number += 1
            one = self.dispatchers[number % len(self.dispatchers)]
            documents = [policy(f"p{number}-{half}", f'role == "n{number}"', "all()") for half in "ab"]
            begun = time.monotonic()
            try:
                status, body = one.call("POST", "/v1/apply", {"documents": documents})
            except OSError:
                continue  # it was killed
            if status == 200:
                self.done.append(number)
            else:
                self.refused.append((status, time.monotonic() - begun, body))
            time.sleep(0.01)

    def end(self) -> None:
        self._stop = True
        self._thread.join()

    def go_on(self, trio: Trio, more: int) -> None:
        enough = len(self.done) + more
        trio.until(lambda: len(self.done) > enough)

    def check(self, trio: Trio) -> None:
        """Nothing acknowledged is lost, nothing is half there, what was refused was refused clearly."""
        for one in (one for one in trio.all if one.runs):
            names = {item["metadata"]["name"] for item in one.get("/v1/resources/GlobalNetworkPolicy")["items"]}
            assert all({f"p{n}-a", f"p{n}-b"} <= names for n in self.done)
            assert {name[:-1] + "b" for name in names} <= names and {name[:-1] + "a" for name in names} <= names
        for status, seconds, body in self.refused:
            (line,) = body["errors"]
            assert status == 503 and "etcd" in line and "\n" not in line and len(line) < 1000
            assert seconds < WITHIN


def same_content(trio: Trio) -> None:
    views = [content(one.get("/v1/backup")) for one in trio.all if one.runs]
    assert all(view == views[0] for view in views)


def untouched(trio: Trio) -> Callable[[], None]:
    """From now on, no host gets a snapshot, holds back, or loses an object."""
    before = {host.name: (host.snapshots, host.was_held) for host in trio.hosts}

    def check() -> None:
        for host in trio.hosts:
            assert (host.snapshots, host.was_held) == before[host.name], (host.name, host.events[-12:])

    return check


# --- (2) the leader of etcd ------------------------------------------------------------------------------------------


def test_the_leader_of_etcd_is_killed_under_applies(trio: Trio, cluster: Etcd) -> None:
    for n, host in enumerate(trio.begin(3), 1):
        host.claim(guest(n))
    trio.settle()
    check, stream = untouched(trio), Stream(trio.all)
    try:
        for _ in range(3 if FULL else 1):
            stream.go_on(trio, 20)
            leader = cluster.leader()
            leader.kill()
            stream.go_on(trio, 40)
            leader.start()
            cluster.until_healthy()
    finally:
        stream.end()
    trio.settle()
    stream.check(trio)
    same_content(trio)
    check()


# --- (3) a dispatcher ------------------------------------------------------------------------------------------------


def test_hosts_of_a_killed_dispatcher_are_soon_at_another(trio: Trio) -> None:
    """They have what they had: nothing but a header is sent to them."""
    hosts = trio.begin(12)
    for n, host in enumerate(hosts, 1):
        host.claim(guest(n))
    trio.all[0].apply(policy("p", "all()", 'role == "web"'))
    trio.settle()
    check, times = untouched(trio), []
    for n in range(6 if FULL else 2):
        victim = trio.all[n % 3]
        revision = trio.all[(n + 1) % 3].revision
        lost = [host for host in hosts if host.at is victim]
        others = [one for one in trio.all if one is not victim]
        sent = [one.metric("slash32_dispatcher_delivered_bytes_total") for one in others]
        victim.kill()
        killed = time.monotonic()
        trio.until(lambda others=others: all(host.at in others for host in hosts), WITHIN)
        times += [host.synced[-1][0] - killed for host in lost]
        assert all(host.replica.revision == revision for host in lost), "nothing was committed for that"
        grown = [one.metric("slash32_dispatcher_delivered_bytes_total") for one in others]
        assert sum(grown) - sum(sent) < 400 * (len(lost) + 1)
        for one in others:
            trio.wait_live(one, revision)
            names = {each.name for each in others}
            trio.until(lambda one=one, names=names: {i["dispatcher"] for i in one.get("/v1/hosts")["items"]} <= names)
        victim.start()
        trio.follow(revision)
    check()
    if times:
        print(f"back after: n {len(times)} median {statistics.median(times):.3f} s max {max(times):.3f} s")


def test_a_dispatcher_that_hangs_is_left(trio: Trio) -> None:
    hosts = trio.begin(6)
    for n, host in enumerate(hosts, 1):
        host.claim(guest(n))
    trio.settle()
    check, victim = untouched(trio), trio.all[0]
    lost = [host for host in hosts if host.at is victim]
    victim.pause()
    stopped = time.monotonic()
    trio.until(lambda: all(host.at not in (None, victim) for host in hosts), WITHIN)
    for host in lost:
        print(f"left after {host.synced[-1][0] - stopped:.3f} s")
    revision = trio.all[1].apply(policy("p", "all()", "all()"))
    trio.wait_live(trio.all[2], revision)
    victim.resume()
    trio.wait_live(victim, revision)
    check()


# --- (4) a dispatcher that is cut off --------------------------------------------------------------------------------


@pytest.mark.parametrize("hears", [False, True], ids=["from all", "from etcd only"])
def test_a_dispatcher_without_its_store_sends_hosts_away(trio: Trio, hears: bool) -> None:
    hosts = trio.begin(9)
    for n, host in enumerate(hosts, 1):
        host.claim(guest(n))
    trio.settle()
    check, victim = untouched(trio), trio.all[0]
    lost = [host for host in hosts if host.at is victim]
    for one in trio.all:
        one.cut(etcd=one is victim, others=not hears)
    began = time.monotonic()
    trio.until(lambda: all(host.at not in (None, victim) for host in hosts), WITHIN)
    for host in lost:
        print(f"away and back after {host.synced[-1][0] - began:.3f} s")
    revision = trio.all[1].apply(policy("p", "all()", "all()"))
    trio.until(lambda: all(host.replica.revision == revision for host in hosts))
    status, body = victim.call("POST", "/v1/apply", {"documents": [policy("q", "all()", "all()")]})
    assert status == 503 and "etcd" in body["errors"][0] and len(body["errors"]) == 1
    assert victim.get("/v1/status")["revision"] < revision, "reads work, of what it has"
    for one in trio.all:
        one.heal()
    trio.wait_live(victim, revision)
    same_content(trio)
    check()


def test_one_that_nobody_else_relieves_keeps_its_hosts(trio: Trio) -> None:
    """Two machines are gone, each with its member of etcd: no quorum, and no other dispatcher."""
    hosts = trio.begin(4)
    for n, host in enumerate(hosts, 1):
        host.claim(guest(n))
    revision = trio.settle()
    check, left = untouched(trio), trio.all[0]
    for one in trio.all[1:]:
        one.kill()
    for member in trio.cluster.members[1:]:
        member.pause()
    trio.until(lambda: left.get("/v1/status")["store"] != "ok")
    trio.for_a_while(4.0)  # that is what it is about: whether they stay
    trio.until(lambda: all(host.at is left for host in hosts))
    moves = [len(host.events) for host in hosts]
    trio.for_a_while(2.0)
    assert [len(host.events) for host in hosts] == moves
    assert all(host.replica.revision == revision for host in hosts)
    for member in trio.cluster.members[1:]:
        member.resume()
    trio.until(lambda: left.get("/v1/status")["store"] == "ok")
    trio.wait_live(left, left.apply(policy("p", "all()", "all()")))
    check()


# --- (5) no quorum ---------------------------------------------------------------------------------------------------


def test_without_a_quorum_all_is_as_it_was(trio: Trio, cluster: Etcd) -> None:
    hosts = trio.begin(6)
    for n, host in enumerate(hosts, 1):
        host.claim(guest(n))
    trio.all[0].apply(policy("p", "all()", "all()"))
    revision = trio.settle()
    check = untouched(trio)
    for member in cluster.members[:2]:
        member.pause()
    took = []
    for one in trio.all:
        begun = time.monotonic()
        status, body = one.call("POST", "/v1/apply", {"documents": [policy("q", "all()", "all()")]})
        took.append(time.monotonic() - begun)
        assert status == 503 and len(body["errors"]) == 1 and "etcd" in body["errors"][0], body
    assert max(took) < WITHIN
    print(f"refused after {sorted(took)} s")
    trio.until(lambda: all(one.get("/v1/status")["store"] != "ok" for one in trio.all))
    waits = [host.claim(guest(50 + n)) for n, host in enumerate(hosts)]
    where = [host.at for host in hosts]
    trio.for_a_while(4.0)  # longer than a lost store is borne where another has it
    assert [host.at for host in hosts] == where, "nobody was sent away"
    assert not any(seq in host.answered for host, seq in zip(hosts, waits, strict=True))
    for one in trio.all:
        assert len(one.get("/v1/resources/GlobalNetworkPolicy")["items"]) == 1
        assert one.get("/v1/status")["revision"] == revision
    for host in hosts[:2]:  # a host that begins now has its content, too
        host.restart()
    trio.until(lambda: all(host.in_sync for host in hosts))
    assert all(host.replica.revision == revision for host in hosts)
    for member in cluster.members[:2]:
        member.resume()
    trio.until(lambda: all(one.get("/v1/status")["endpoints"] == 12 for one in trio.all))
    trio.settle()
    assert not any(host.refused for host in hosts)
    same_content(trio)
    check()


# --- (8) compaction and defragmentation ------------------------------------------------------------------------------


def test_compaction_and_defragmentation_under_applies(trio: Trio, cluster: Etcd) -> None:
    for n, host in enumerate(trio.begin(3), 1):
        host.claim(guest(n))
    trio.settle()
    check, stream = untouched(trio), Stream(trio.all)
    try:
        for _ in range(10 if FULL else 3):
            stream.go_on(trio, 10)
            cluster.ctl("compact", cluster.revision(), check=False)
            for member in cluster.members:
                cluster.ctl("defrag", member=member)
    finally:
        stream.end()
    assert not stream.refused
    trio.settle()
    stream.check(trio)
    same_content(trio)
    check()


# --- (9) (11) a dispatcher that is behind ----------------------------------------------------------------------------


def test_one_that_slept_through_more_than_the_log_reads_all_anew(trio: Trio, cluster: Etcd) -> None:
    hosts = trio.begin(4)
    for n, host in enumerate(hosts, 1):
        host.claim(guest(n))
    revision = trio.settle()
    check, victim = untouched(trio), trio.all[0]
    victim.pause()
    for relay in victim.etcd:
        relay.cut()  # or what is on its way stays there for it
    trio.until(lambda: all(host.at not in (None, victim) for host in hosts))
    _commit_many(trio, cluster, revision)
    victim.resume()
    last = trio.all[1].revision
    trio.follow(last)
    assert "behind by more than its log" in victim.log.read_text()
    trio.wait_live(victim, last)
    for one in trio.all[1:]:
        one.pause()
    trio.until(lambda: all(host.at is victim for host in hosts))
    check()
    for one in trio.all[1:]:
        one.resume()
    revision = victim.apply(policy("after", "all()", "all()"))
    for one in trio.all:
        trio.wait_live(one, revision)
    same_content(trio)
    check()


def _commit_many(trio: Trio, cluster: Etcd, revision: int) -> None:
    """More bytes than a log has without a snapshot, and more commits than are kept behind it."""
    quick = Replica(cluster.config(prefix=trio.prefix))
    try:
        for n in range(KEPT + 50):
            quick.commit((Write(Table.SUPERSEDED, (f"epoch{n}",), 1),))
        while cluster.keys(trio.prefix + f"log/{revision + 1:020d}"):
            n += 1
            nets = tuple(Prefix(secrets.token_bytes(4), 32) for _ in range(30_000))
            quick.commit((Write(Table.RESOURCE, ("GlobalNetworkSet", "big"), NetworkSet("big", {}, nets)),))
    finally:
        quick.store.close()
    trio.for_a_while(0.1)


def test_a_host_that_knows_more_waits_and_is_not_held(trio: Trio) -> None:
    hosts = trio.begin(6)
    for n, host in enumerate(hosts, 1):
        host.claim(guest(n))
    trio.settle()
    late = trio.all[0]
    check = untouched(trio)
    late.cut(others=False)
    revision = trio.all[1].apply(policy("p", "all()", "all()"))
    there = [host for host in hosts if host.at is not late]
    trio.until(lambda: all(host.replica.revision == revision for host in there))
    moved: list[Guest] = there[:3]
    for host in moved:  # now it knows no other one
        host.stop()
        host.places = (late.place,)
        host.restart()
    trio.for_a_while(0.5)
    late.heal()
    trio.until(lambda: all(host.in_sync and host.replica.revision >= revision for host in moved))
    trio.until(lambda: all(host.in_sync and host.replica.revision >= revision for host in hosts))
    assert not late.get("/v1/status")["held"]
    check()
