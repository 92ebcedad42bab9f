# The store in etcd against real etcd: one log for all, whatever happens to its members, to the network and to those who
# write. Reduced counts unless SLASH32_COUNTS=full.
from __future__ import annotations

import asyncio
import itertools
import os
import random
import threading
from collections.abc import AsyncIterator, Callable

import pytest
from etcd_rig import MIB, Etcd, Member, Relay, Replica, contend, peer, same, until

from dispatcher.store.commits import Commit, Failed, Foreign, Landed, Saved, StoreError, Table
from dispatcher.store.etcd import follower
from dispatcher.store.etcd.gateway import Gateway, Pair
from dispatcher.store.etcd.store import EtcdConfig, EtcdStore

FULL = os.environ.get("SLASH32_COUNTS") == "full"


Make = Callable[..., Etcd]
Join = Callable[[EtcdConfig], Replica]


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
        threads = [threading.Thread(target=lambda s=s, found=found: found.append(s.load())) for s in stores]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for store in stores:
            store.close()
        assert len(found) == 2 and len({saved.epoch for saved in found}) == 1


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
    until(one.woken.is_set)  # its Foreign waits to be taken
    assert isinstance(one.propose(peer("one")), Foreign)
    assert one.head() == 1
    assert isinstance(one.propose(peer("one")), Landed)
    same(one, other)
    with pytest.raises(ValueError, match="does not follow"):
        one.store.propose(Commit(4, ()))


# --- members that die, sleep or are cut off --------------------------------------------------------------------------


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


def test_whatever_happens_to_members_there_is_one_log(etcd: Make, replica: Join) -> None:
    """Writers that never stop, and one member after another that is killed, sleeps or is cut off."""
    cluster, chance = etcd(3), random.Random(5)
    urls = list(cluster.endpoints)
    writers = [replica(cluster.config(*urls[n:], *urls[:n])) for n in range(3)]
    over = threading.Event()
    failures: list[BaseException] = []

    def write(name: int, one: Replica) -> None:
        try:
            for n in itertools.count():
                if over.is_set():
                    return
                one.propose(peer(f"{name}-{n}", 2 * MIB if n % 50 == 7 else 100))
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=write, args=pair) for pair in enumerate(writers)]
    for thread in threads:
        thread.start()
    for _ in range(40 if FULL else 6):
        reached = max(one.revision for one in writers) + chance.randrange(20, 100)
        member = chance.choice(cluster.members)
        undo = chance.choice([killed_member, sleeping, cut_off])(cluster, member)
        until(lambda reached=reached: failures or max(one.revision for one in writers) > reached)
        undo()
        cluster.until_healthy()
    over.set()
    for thread in threads:
        thread.join()
    assert not failures
    same(*writers)
    assert writers[0].log == writers[1].log == writers[2].log
    assert len(writers[0].log) == writers[0].revision
    assert all({Landed, Foreign} <= {type(o) for o in one.outcomes} for one in writers)
    same(*writers, replica(cluster.config()))


def killed_member(_: Etcd, member: Member) -> Callable[[], None]:
    member.kill()
    return member.start


def sleeping(_: Etcd, member: Member) -> Callable[[], None]:
    member.pause()
    return member.resume


def cut_off(cluster: Etcd, member: Member) -> Callable[[], None]:
    cluster.cut_off(member)
    return cluster.join


def test_a_watch_that_tells_nothing(etcd: Make, replica: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    watched: list[str] = []

    async def silent(self: Gateway, start: str, end: str) -> AsyncIterator[list[Pair]]:
        watched.append(start)
        await asyncio.sleep(3600)
        yield []

    config = etcd().config()
    writer = replica(config)
    with monkeypatch.context() as patched:
        patched.setattr(Gateway, "watch", silent)
        one = replica(config)
        until(lambda: watched)
        for n in range(5):
            one.follow(writer.commit(peer(f"d{n}")))
        assert len(watched) > 1  # another one was tried, again and again
    same(writer, one)


# --- answers that do not come ----------------------------------------------------------------------------------------


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


# --- etcd's own upkeep -----------------------------------------------------------------------------------------------


def test_compaction_to_the_head_and_defragmentation(etcd: Make, replica: Join) -> None:
    cluster = etcd()
    one, other = replica(cluster.config()), replica(cluster.config())
    for n in range(10):
        one.commit(peer(f"d{n}"))
        cluster.ctl("compact", cluster.revision())
        cluster.ctl("defrag")
    same(one, other)
    same(one, replica(cluster.config()))


def test_a_full_etcd(etcd: Make, replica: Join) -> None:
    cluster = etcd(options=("--quota-backend-bytes", str(8 * MIB)))
    one, filler = replica(cluster.config()), replica(cluster.config(prefix="/filler/"))
    outcome = one.propose(peer("first"))
    while isinstance(outcome, Landed):
        outcome = filler.propose(peer("large", MIB // 2))
    outcome = one.propose(peer("second"))
    assert isinstance(outcome, Failed) and "etcdctl alarm disarm" in outcome.reason and "\n" not in outcome.reason
    assert "etcdctl alarm disarm" in one.store.trouble
    assert one.head() == 1  # reading goes on
    cluster.ctl("del", "--prefix", "/filler/")
    cluster.ctl("compact", cluster.revision())
    cluster.ctl("defrag")
    assert one.store.trouble  # the control: room alone is not enough
    cluster.ctl("alarm", "disarm")
    until(lambda: not one.store.trouble)
    assert isinstance(one.propose(peer("second")), Landed)
