# The store in etcd against real etcd: one log for all, whatever happens to its members, to the network and to those who
# write. Reduced counts unless SLASH32_COUNTS=full.
from __future__ import annotations

import asyncio
import itertools
import os
import random
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from etcd_rig import Etcd, Member, Relay, Replica, Tls, peer, until

from dispatcher.commits import Commit, Failed, Foreign, Landed, Replaced, Saved, StoreError, Table
from dispatcher.etcd import entries, follower, outbox, upkeep
from dispatcher.etcd.entries import Keys
from dispatcher.etcd.gateway import Gateway, Pair
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
        until(lambda one=one: not one.store.trouble)


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


# --- big ones --------------------------------------------------------------------------------------------------------

KILLED_BEFORE_THE_TXN = """
import os, sys
sys.path[:0] = [{repo!r}, {here!r}]
from etcd_rig import EtcdConfig, Replica, peer
from dispatcher.etcd.proposal import Carrier
insist = Carrier._insist

async def until_the_txn(self, mine, what, body):
    if what == "kv/txn":
        os.kill(os.getpid(), 9)
    return await insist(self, mine, what, body)

Carrier._insist = until_the_txn
Replica(EtcdConfig({endpoints!r})).propose(peer("big", 3 << 20))
"""


def killed(script: str, cluster: Etcd) -> None:
    text = script.format(repo=str(REPO), here=str(REPO / "tests/contract"), endpoints=cluster.endpoints)
    assert subprocess.run([sys.executable, "-c", text], check=False, timeout=60).returncode == -9


def test_a_big_commit_is_all_there_or_not_at_all(etcd: Make, replica: Join) -> None:
    cluster = etcd()
    one = replica(cluster.config())
    killed(KILLED_BEFORE_THE_TXN, cluster)
    orphans = cluster.keys("/slash32/chunk/")
    assert len(orphans) == 4
    assert one.head() == 0
    same(one, replica(cluster.config()))
    assert cluster.keys("/slash32/chunk/") == orphans  # it may still come
    assert one.commit(peer("big", 3 * MIB)) == 1  # the control
    late = replica(cluster.config())
    same(one, late)
    assert len(late.records) == 1
    until(lambda: len(cluster.keys("/slash32/chunk/")) == 4)  # who starts collects what can no longer come
    assert not set(orphans) & set(cluster.keys("/slash32/chunk/"))
    same(one, replica(cluster.config()))


def test_a_big_commit_that_lost_leaves_nothing(etcd: Make, replica: Join) -> None:
    cluster = etcd()
    both = [replica(cluster.config()), replica(cluster.config())]
    found: list[object] = []
    threads = [threading.Thread(target=lambda r=r: found.append(r.propose(peer("b", 2 * MIB)))) for r in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(type(o).__name__ for o in found) == ["Foreign", "Landed"]
    until(lambda: len(cluster.keys("/slash32/chunk/")) == 3)
    same(*both)


def test_a_dispatcher_that_takes_nothing_is_not_read_for(etcd: Make, replica: Join) -> None:
    config = etcd().config()
    slow, quick = replica(config), replica(config)
    for n in range(30):
        quick.commit(peer(f"d{n}", MIB))
    until(lambda: slow.store._outbox.crowded)
    assert slow.store._outbox._bytes < outbox.MOST + 2 * MIB
    same(quick, slow)


# --- snapshots -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "ENTRIES_MOST", 40)
    monkeypatch.setattr(upkeep, "KEPT", 10)


def kept(cluster: Etcd) -> list[int]:
    return [int(key.split("/")[-1]) for key in cluster.keys("/slash32/log/")]


@pytest.mark.usefixtures("small")
def test_the_log_is_trimmed_behind_a_snapshot(etcd: Make, replica: Join) -> None:
    cluster = etcd()
    both = [replica(cluster.config()), replica(cluster.config())]
    contend(both, 130 if FULL else 65)
    both[0].commit(peer("big", 3 * MIB))
    for n in range(60):
        both[n % 2].commit(peer(f"more-{n}"))
        same(*both)
    until(lambda: len(kept(cluster)) < 60)
    first, *_, last = kept(cluster)
    assert first > 100 and last == both[0].revision
    assert not cluster.keys("/slash32/chunk/")  # the big one's commit is no more
    until(lambda: len({key.split("/")[3] for key in cluster.keys("/slash32/snapshot/0")}) == 1)
    late = replica(cluster.config())
    assert late.revision == last
    same(*both, late)
    assert late.commit(peer("late")) == last + 1
    assert EtcdStore.read(cluster.config()).records == late.records


@pytest.mark.usefixtures("small")
def test_who_slept_through_a_snapshot_is_told_all(etcd: Make, replica: Join) -> None:
    cluster = etcd()
    relay = Relay(cluster.members[0].client_port)
    try:
        config = cluster.config(f"http://127.0.0.1:{relay.port}")
        awake, asleep, briefly = replica(cluster.config()), replica(config), replica(config)
        awake.commit(peer("before"))
        asleep.follow(1)
        relay.swallow = "answers"
        for n in range(70):
            awake.commit(peer(f"d{n}"))
        until(lambda: kept(cluster)[0] > 2)
        relay.heal()
        same(awake, asleep)
        assert any(isinstance(o, Replaced) for o in asleep.outcomes)
        assert not any(isinstance(o, Replaced) for o in awake.outcomes)  # the control
        same(awake, briefly)
        assert isinstance(asleep.propose(peer("after")), Landed)
    finally:
        relay.close()


# --- what is refused -------------------------------------------------------------------------------------------------


def refusal(config: EtcdConfig) -> str:
    with pytest.raises(StoreError) as found:
        EtcdStore(config, lambda: None).load()
    line = str(found.value)
    assert "\n" not in line and config.endpoints[0] in line
    return line


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (("del", "LOG2"), "log entry 2 is missing"),
        (("put", "LOG2", "x"), "log entry 2 cannot be read"),
        (("del", "CHUNK"), "a chunk of log entry 3 is missing"),
        (("put", "CHUNK", "x"), "log entry 3 is damaged"),
        (("put", "/slash32/log/zzz", "x"), "is no entry of a log"),
        (("put", "/slash32/meta", '{"version": 2, "epoch": "e"}'), "another version"),
        (("put", "/slash32/meta", "hello"), "is not a store of slash32"),
        (("del", "/slash32/meta"), "there are keys but no meta"),
        (("put", "/slash32/snapshot/latest", "{}"), "snapshot/latest cannot be read"),
    ],
)
def test_damage_is_refused(etcd: Make, replica: Join, harm: tuple[str, ...], says: str) -> None:
    cluster = etcd()
    one, keys = replica(cluster.config()), Keys("/slash32/")
    for n in range(2):
        one.commit(peer(f"d{n}"))
    one.commit(peer("big", 2 * MIB))
    one.commit(peer("last"))
    one.store.close()
    assert replica(cluster.config()).revision == 4  # the control
    words = {"LOG2": keys.log(2), "CHUNK": cluster.keys("/slash32/chunk/")[1]}
    cluster.ctl(*(words.get(word, word) for word in harm))
    before = cluster.revision()
    assert says in refusal(cluster.config())
    assert cluster.revision() == before  # nothing was written


def test_an_older_copy_or_another_history_is_not_followed(etcd: Make, replica: Join, tmp_path: Path) -> None:
    cluster = etcd()
    one, two = replica(cluster.config()), replica(cluster.config())
    one.commit(peer("a"))
    cluster.ctl("snapshot", "save", str(tmp_path / "copy"))
    one.commit(peer("b"))
    same(one, two)
    for member in cluster.members:
        member.kill()
        cluster.restore(member, tmp_path / "copy")
        member.start()
    until(lambda: "older state" in one.store.trouble)
    failed = one.propose(peer("c"))
    assert isinstance(failed, Failed) and not failed.unknown
    until(lambda: "older state" in two.store.trouble)
    fresh = replica(cluster.config())  # who starts now follows what is there
    assert fresh.revision == 1
    assert fresh.commit(peer("other")) == 2


def test_another_history_of_the_same_length_is_seen(etcd: Make, replica: Join, tmp_path: Path) -> None:
    cluster = etcd()
    one = replica(cluster.config())
    one.commit(peer("a"))
    cluster.ctl("snapshot", "save", str(tmp_path / "copy"))
    one.commit(peer("b"))
    relay = Relay(cluster.members[0].client_port)
    try:
        asleep = replica(cluster.config(f"http://127.0.0.1:{relay.port}"))
        relay.swallow = "answers"
        until(lambda: asleep.store.trouble)
        member = cluster.members[0]
        member.kill()
        cluster.restore(member, tmp_path / "copy")
        member.start()
        cluster.until_healthy()
        fresh = replica(cluster.config())
        assert fresh.commit(peer("not b")) == 2
        relay.heal()
        until(lambda: "history was changed" in asleep.store.trouble)
    finally:
        relay.close()


def test_a_store_that_is_replaced_under_a_dispatcher(etcd: Make, replica: Join) -> None:
    cluster = etcd()
    one = replica(cluster.config())
    one.commit(peer("a"))
    cluster.ctl("del", "--prefix", "/slash32/")
    until(lambda: "no longer the store of epoch" in one.store.trouble)
    assert isinstance(one.propose(peer("b")), Failed)
    assert not cluster.keys("/slash32/")


# --- TLS -------------------------------------------------------------------------------------------------------------


def test_tls(etcd: Make, replica: Join, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tls = Tls(tmp_path / "tls")
    cluster = etcd(tls=tls)
    config = cluster.config()
    assert replica(config).commit(peer("a")) == 1  # the control
    tls.made("stranger", ca="other")
    stranger = (tls.folder / "stranger.pem", tls.folder / "stranger.key")
    where = cluster.endpoints
    assert "etcd_ca" in refusal(EtcdConfig(where, ca=tls.folder / "other.pem", cert=config.cert, key=config.key))
    assert "etcd_cert and etcd_key" in refusal(EtcdConfig(where, ca=tls.ca, cert=stranger[0], key=stranger[1]))
    assert "etcd_cert and etcd_key" in refusal(EtcdConfig(where, ca=tls.ca))
    monkeypatch.setattr(follower, "START", 1.0)
    assert "https://" in refusal(EtcdConfig((where[0].replace("https", "http"),)))
    for wrong in (EtcdConfig(where, ca=tmp_path / "no"), EtcdConfig(where, ca=tls.ca, cert=tls.ca)):
        with pytest.raises(StoreError, match=r"^etcd_(ca|cert or etcd_key): .* cannot be used"):
            EtcdStore(wrong, lambda: None).load()
    plain = etcd()
    assert "give it as http://" in refusal(EtcdConfig((plain.endpoints[0].replace("http", "https"),), ca=tls.ca))


def test_a_certificate_that_is_good_for_servers_only(
    etcd: Make, replica: Join, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """etcd's gateway is a client of etcd, with the certificate of the server."""
    monkeypatch.setattr(follower, "START", 1.0)
    assert "serverAuth, clientAuth" in refusal(etcd(tls=Tls(tmp_path / "half", "serverAuth")).config())
    assert replica(etcd(tls=Tls(tmp_path / "whole")).config()).head() == 0


# --- migration -------------------------------------------------------------------------------------------------------


def saved(revision: int, count: int = 3000) -> Saved:
    """Of some size, so that its snapshot has several pieces."""
    records = {}
    for n in range(count):
        for table, key, record in peer(f"d{n}", 600):
            records[table, key] = record
    return Saved("an-epoch", revision, dict(records))


@pytest.mark.parametrize("revision", [0, 7])
def test_a_content_is_written_and_gone_on_with(etcd: Make, replica: Join, revision: int) -> None:
    cluster, content = etcd(), saved(revision)
    EtcdStore.create(cluster.config(), content)
    one = replica(cluster.config())
    assert (one.epoch, one.revision, one.records) == ("an-epoch", revision, content.records)
    two = replica(cluster.config())
    assert one.commit(peer("next")) == revision + 1
    same(one, two, replica(cluster.config()))
    with pytest.raises(StoreError, match="it is not empty"):
        EtcdStore.create(cluster.config(), content)
    same(one, two)


KILLED_BEFORE_META = """
import os, sys
sys.path[:0] = [{repo!r}, {here!r}]
from test_etcd import saved
from dispatcher.etcd.gateway import Gateway, Pair
from dispatcher.etcd.store import EtcdConfig, EtcdStore
from dispatcher.etcd.content import Content
ask = Content.ask

async def until_the_end(self, what, body, *more):
    if b"an-epoch" in body or b"YW4tZXBvY2g" in body or body.count(b"request_put") > 1:
        os.kill(os.getpid(), 9)
    return await ask(self, what, body, *more)

Content.ask = until_the_end
EtcdStore.create(EtcdConfig({endpoints!r}), saved(7))
"""


def test_half_a_migration_is_no_store(etcd: Make, replica: Join) -> None:
    cluster = etcd()
    killed(KILLED_BEFORE_META, cluster)
    assert len(cluster.keys("/slash32/snapshot/")) > 2
    assert "half a migration" in refusal(cluster.config())
    with pytest.raises(StoreError, match="etcdctl del --prefix /slash32/"):
        EtcdStore.read(cluster.config())
    with pytest.raises(StoreError, match="not empty"):
        EtcdStore.create(cluster.config(), saved(7))
    cluster.ctl("del", "--prefix", "/slash32/")
    with pytest.raises(StoreError, match="there is no store"):
        EtcdStore.read(cluster.config())
    EtcdStore.create(cluster.config(), saved(7))
    assert replica(cluster.config()).revision == 7
