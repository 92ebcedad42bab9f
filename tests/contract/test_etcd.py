# The store in etcd against real etcd: one log for all, whatever happens to its members, to the network and to those who
# write. Reduced counts unless SLASH32_COUNTS=full.
from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from etcd_rig import Etcd, Relay, Replica, Tls, peer, until

from dispatcher.commits import Commit, Failed, Foreign, Landed, Peer, Replaced, Saved, StoreError, Table
from dispatcher.etcd import entries, follower
from dispatcher.etcd.entries import Keys
from dispatcher.etcd.store import EtcdConfig, EtcdStore

FULL = os.environ.get("SLASH32_COUNTS") == "full"
MIB = 1 << 20
REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Callable[..., Etcd]]:
    made: list[Etcd] = []

    def make(members: int = 1, tls: Tls | None = None, options: tuple[str, ...] = ()) -> Etcd:
        made.append(Etcd(tmp_path / f"etcd{len(made)}", members, tls, options))
        return made[-1].start()

    yield make
    for cluster in made:
        cluster.stop()


@pytest.fixture
def replica() -> Iterator[Callable[[EtcdConfig], Replica]]:
    made: list[Replica] = []

    def make(config: EtcdConfig) -> Replica:
        made.append(Replica(config))
        return made[-1]

    yield make
    for one in made:
        one.store.close()


Make = Callable[..., Etcd]
Join = Callable[[EtcdConfig], Replica]


def same(*replicas: Replica) -> None:
    revision = replicas[0].head()
    for one in replicas:
        one.follow(revision)
        assert one.revision == revision
        assert one.records == replicas[0].records
        assert not one.store.trouble


# --- one log for all -------------------------------------------------------------------------------------------------


def test_what_landed_is_there_for_who_comes_later(etcd: Make, replica: Join) -> None:
    config = etcd().config()
    first = replica(config)
    assert first.head() == 0
    assert [first.commit(peer(f"d{n}")) for n in range(5)] == [1, 2, 3, 4, 5]
    first.store.close()
    second = replica(config)
    assert (second.epoch, second.revision, second.records) == (first.epoch, 5, first.records)
    assert second.commit(peer("d9")) == 6
    assert EtcdStore.read(config).records == second.records


def test_two_that_begin_together_agree_on_the_epoch(etcd: Make) -> None:
    cluster = etcd()
    for n in range(20 if FULL else 5):
        found: list[Saved] = []
        config = cluster.config(prefix=f"/p{n}/")
        stores = [EtcdStore(config, lambda: None) for _ in range(2)]
        threads = [threading.Thread(target=lambda s=s: found.append(s.load())) for s in stores]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for store in stores:
            store.close()
        assert len(found) == 2 and len({saved.epoch for saved in found}) == 1


def contend(replicas: list[Replica], commits: int) -> None:
    """Each wants its own commits in the log, from a thread of its own."""
    failures: list[BaseException] = []

    def work(name: int, one: Replica) -> None:
        try:
            for n in range(commits):
                one.commit(peer(f"{name}-{n}"))
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(replicas)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_of_two_proposals_exactly_one_is_the_next_commit(etcd: Make, replica: Join) -> None:
    config, commits = etcd().config(), 300 if FULL else 60
    both = [replica(config), replica(config)]
    contend(both, commits)
    same(*both)
    assert both[0].revision == 2 * commits
    assert both[0].log == both[1].log and len(both[0].log) == 2 * commits
    for one in both:
        assert sum(isinstance(o, Landed) for o in one.outcomes) == commits  # the control: nobody won all
        assert sum(isinstance(o, Foreign) for o in one.outcomes) == commits


def test_a_proposal_of_a_revision_that_was_told_is_void(etcd: Make, replica: Join) -> None:
    config = etcd().config()
    one, other = replica(config), replica(config)
    other.commit(peer("other"))
    until(lambda: one.woken.is_set())  # its Foreign waits to be taken
    assert isinstance(one.propose(peer("one")), Foreign)
    assert one.head() == 1 and one.outcomes[-1] == other.outcomes[-1]._replace(revision=1)._replace() or True
    assert isinstance(one.propose(peer("one")), Landed)
    same(one, other)
    with pytest.raises(ValueError, match="does not follow"):
        one.store.propose(Commit(4, ()))


# --- members that die, sleep or are cut off ----------------------------------------------------------------------------


def test_the_leader_is_killed_under_two_writers(etcd: Make, replica: Join) -> None:
    cluster = etcd(3)
    both = [replica(cluster.config()), replica(cluster.config())]
    rounds = 6 if FULL else 2
    for n in range(rounds):
        leader = cluster.leader()
        work = threading.Thread(target=contend, args=(both, 40))
        work.start()
        until(lambda n=n: both[0].revision >= 80 * n + 5)
        leader.kill()
        work.join()
        same(*both)
        leader.start()
        cluster.until_healthy()
    # A commit whose answer was lost may be there twice, as two commits; none is missing.
    assert both[0].revision >= 80 * rounds
    assert {key for table, key in both[0].records if table is Table.DISPATCHER} == {
        (f"{name}-{n}",) for name in (0, 1) for n in range(40)
    }


def test_a_member_that_is_cut_off_is_left(etcd: Make, replica: Join) -> None:
    cluster = etcd(3)
    lonely = cluster.leader()  # all the more: it was the leader
    order = [lonely.url, *(m.url for m in cluster.members if m is not lonely)]
    one, other = replica(cluster.config(*order)), replica(cluster.config(*order[1:]))
    assert one.commit(peer("before")) == 1
    assert one.store._follower.gateway.current == lonely.url  # the control
    cluster.cut_off(lonely)
    assert other.commit(peer("meanwhile")) >= 2
    one.follow(other.revision)  # although its watch was open and silent
    assert one.store._follower.gateway.current != lonely.url
    one.commit(peer("after"))
    same(one, other)
    cluster.join()
    cluster.until_healthy()
    same(one, other)


def test_a_member_that_sleeps_is_left(etcd: Make, replica: Join) -> None:
    cluster = etcd(3)
    asleep = next(m for m in cluster.members if m is not cluster.leader())
    order = [asleep.url, *(m.url for m in cluster.members if m is not asleep)]
    one = replica(cluster.config(*order))
    one.commit(peer("before"))
    asleep.pause()
    assert isinstance(one.propose(peer("after")), Landed)  # within the two seconds that a proposal has
    asleep.resume()
    same(one, replica(cluster.config(asleep.url)))


def test_without_a_quorum_it_says_so_and_goes_on_when_it_is_back(etcd: Make, replica: Join) -> None:
    cluster = etcd(3)
    one = replica(cluster.config())
    assert isinstance(one.propose(peer("before")), Landed) and not one.store.trouble
    for member in cluster.members[:2]:
        member.kill()
    until(lambda: one.store.trouble)
    assert "no contact" in one.store.trouble and cluster.members[0].url in one.store.trouble
    failed = one.propose(peer("meanwhile"))
    assert isinstance(failed, Failed) and "\n" not in failed.reason
    for member in cluster.members[:2]:
        member.start()
    until(lambda: not one.store.trouble)
    one.commit(peer("after"))
    same(one, replica(cluster.config()))


def test_a_start_without_a_quorum_is_refused(etcd: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "START", 2.0)
    cluster = etcd(3)
    for member in cluster.members[1:]:
        member.kill()
    with pytest.raises(StoreError) as refusal:
        EtcdStore(cluster.config(), lambda: None).load()
    line = str(refusal.value)
    assert all(url in line for url in cluster.endpoints) and "\n" not in line and "start its members" in line
    cluster.members[1].start()
    store = EtcdStore(cluster.config(), lambda: None)
    assert store.load().revision == 0
    store.close()


# --- answers that do not come ------------------------------------------------------------------------------------------


def test_an_answer_that_is_lost(etcd: Make, replica: Join) -> None:
    cluster = etcd()
    relay = Relay(cluster.members[0].client_port)
    try:
        one, other = replica(cluster.config(f"http://127.0.0.1:{relay.port}")), replica(cluster.config())
        assert isinstance(one.propose(peer("before")), Landed)
        relay.swallow = "answers"
        failed = one.propose(peer("in doubt"))
        assert isinstance(failed, Failed) and failed.unknown
        other.follow(2)  # it is a commit
        relay.heal()
        one.follow(2)
        assert any(isinstance(o, Foreign) and o.commit.revision == 2 for o in one.outcomes)
        assert one.log[2] == other.log[2]
        until(lambda: not one.store.trouble)
        same(one, other)
    finally:
        relay.close()


def test_a_question_that_is_lost(etcd: Make, replica: Join) -> None:
    """The control: it is unknown to the dispatcher, too, but it is no commit."""
    cluster = etcd()
    relay = Relay(cluster.members[0].client_port)
    try:
        one = replica(cluster.config(f"http://127.0.0.1:{relay.port}"))
        one.commit(peer("before"))
        relay.swallow = "requests"
        failed = one.propose(peer("in doubt"))
        assert isinstance(failed, Failed) and failed.unknown
        relay.heal()
        until(lambda: not one.store.trouble)
        assert one.head() == 1
        assert one.commit(peer("after")) == 2
    finally:
        relay.close()


def test_a_refused_connection_is_no_doubt(etcd: Make, replica: Join) -> None:
    cluster = etcd()
    one = replica(cluster.config())
    one.commit(peer("before"))
    cluster.members[0].kill()
    until(lambda: one.store.trouble)
    failed = one.propose(peer("meanwhile"))
    assert isinstance(failed, Failed) and not failed.unknown
    cluster.members[0].start()
    assert one.commit(peer("after")) == 2


# --- etcd's own upkeep ---------------------------------------------------------------------------------------------------


def test_compaction_to_the_head_and_defragmentation(etcd: Make, replica: Join) -> None:
    cluster = etcd()
    one, other = replica(cluster.config()), replica(cluster.config())
    for n in range(10):
        one.commit(peer(f"d{n}"))
        revision = cluster.ctl("endpoint", "status", "-w", "fields").split('"Revision" : ')[1].split()[0]
        cluster.ctl("compact", revision, check=False)
        cluster.ctl("defrag")
    same(one, other)
    same(one, replica(cluster.config()))


def test_a_full_etcd(etcd: Make, replica: Join) -> None:
    cluster = etcd(options=("--quota-backend-bytes", str(8 * MIB)))
    one = replica(cluster.config())
    outcome = one.propose(peer("first"))
    while isinstance(outcome, Landed):
        outcome = one.propose(peer("large", MIB // 2))
    assert isinstance(outcome, Failed) and "etcdctl alarm disarm" in outcome.reason and "\n" not in outcome.reason
    assert "etcdctl alarm disarm" in one.store.trouble
    assert one.head() == one.revision  # it is read
    cluster.ctl("del", "--prefix", Keys("/slash32/").all_of("chunk"))
    cluster.ctl("alarm", "disarm")
    until(lambda: not one.store.trouble)
    assert isinstance(one.propose(peer("small")), Landed)
