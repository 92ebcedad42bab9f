# What the store keeps in etcd: big commits, snapshots, what is refused as damaged or as another history, TLS, and
# contents that are moved there.
from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from etcd_rig import MIB, Etcd, Relay, Replica, Tls, contend, peer, same, until

from dispatcher.store.commits import Failed, Landed, Replaced, Saved, StoreError
from dispatcher.store.etcd import entries, follower, outbox, upkeep
from dispatcher.store.etcd.entries import Keys
from dispatcher.store.etcd.store import EtcdConfig, EtcdStore

FULL = os.environ.get("SLASH32_COUNTS") == "full"
REPO = Path(__file__).resolve().parents[2]
Make = Callable[..., Etcd]
Join = Callable[[EtcdConfig], Replica]


# --- big ones --------------------------------------------------------------------------------------------------------

KILLED_BEFORE_THE_TXN = """
import os, sys
sys.path[:0] = [{repo!r}, {here!r}]
from etcd_rig import EtcdConfig, Replica, peer
from dispatcher.store.etcd.proposal import Carrier
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
from test_etcd_content import saved
from dispatcher.store.etcd.gateway import Gateway, Pair
from dispatcher.store.etcd.store import EtcdConfig, EtcdStore
from dispatcher.store.etcd.content import Content
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
