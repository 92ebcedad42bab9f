# The store on one machine: what was committed is there after any end, what was not is not; a file that is no store, or
# not the one it was, is refused, and nothing begins empty by accident.
from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path

import msgpack
import pytest

from dispatcher.store import disk
from dispatcher.store.commits import (
    ANY,
    Commit,
    Entry,
    Failed,
    Head,
    Holding,
    HostState,
    Key,
    Landed,
    Peer,
    Record,
    StoreError,
    Table,
    Write,
    decode_record,
    decode_writes,
    encode_record,
    encode_writes,
)
from dispatcher.store.disk import Disk
from slash32.model import Endpoint, EndpointKey
from slash32.net import parse_address
from slash32.pack import pack_endpoint
from slash32.policy import Profile

KEY = EndpointKey("00000000-0000-0000-0000-000000000001", "52:54:00:00:00:01")
ENDPOINT = Endpoint(KEY, "web1", {"role": "web"}, ("default",), (parse_address("10.65.0.2"),))
RECORDS: dict[tuple[Table, Key], Record] = {
    (Table.RESOURCE, ("Profile", "p")): Profile("p", labels={"a": "1"}),
    (Table.ENDPOINT, tuple(KEY)): Holding("h1", ENDPOINT),
    (Table.HOST, ("h1",)): HostState((parse_address("192.0.2.1"),), 7, "burnt", "k" * 40),
    (Table.SUPERSEDED, ("abc",)): ANY,
    (Table.DISPATCHER, ("d1",)): Peer("tcp://192.0.2.9:5532", "x" * 40),
    (Table.AUDIT, ("0" * 20, "00001")): Entry(1.5, "root", "Profile p", "created"),
}
WRITES = tuple(Write(*where, record) for where, record in RECORDS.items())


def commit(store: Disk, revision: int, writes: tuple[Write, ...] = WRITES) -> None:
    store.propose(Commit(revision, writes))
    assert store.take() == [Landed(revision)]


def refusal(store: Disk, revision: int, writes: tuple[Write, ...] = WRITES) -> str:
    store.propose(Commit(revision, writes))
    (failed,) = store.take()
    assert isinstance(failed, Failed) and not failed.unknown
    return failed.reason


def test_what_is_committed_is_there_again(tmp_path: Path) -> None:
    store = Disk(tmp_path / "d.db")
    first = store.load()
    assert (first.revision, first.records) == (0, {}) and len(first.epoch) == 16
    commit(store, 1)
    store.close()
    store = Disk(tmp_path / "d.db")
    saved = store.load()
    assert (saved.epoch, saved.revision, saved.records) == (first.epoch, 1, RECORDS)
    store.ask_head()
    assert store.take() == [Head(1)] and store.take() == []
    commit(store, 2, tuple(Write(*where, None) for where in RECORDS))
    assert store.load().records == {}


def test_bytes_of_records() -> None:
    for (table, _), record in RECORDS.items():
        assert decode_record(table, encode_record(record)) == record
        with pytest.raises(StoreError, match=f"table {table.value} cannot be read"):
            decode_record(table, b"\xc1")
    gone = (*WRITES, Write(Table.HOST, ("h2",), None))
    assert decode_writes(encode_writes(gone)) == gone
    with pytest.raises(StoreError, match="a commit cannot be read"):
        decode_writes(encode_writes(gone)[:-1])


def test_a_commit_is_all_or_nothing(tmp_path: Path) -> None:
    store = Disk(tmp_path / "d.db")
    broken = Write(Table.HOST, ("h2",), HostState(("not bytes",)))  # type: ignore[arg-type]
    store._db.execute(
        "create trigger t before insert on records when new.key = '[\"h2\"]' begin select raise(abort, 'no'); end"
    )
    assert "cannot be written" in refusal(store, 1, (*WRITES, broken))
    saved = store.load()
    assert (saved.revision, saved.records) == (0, {})
    commit(store, 1)
    assert store.load().revision == 1


def test_another_store_has_another_epoch(tmp_path: Path) -> None:
    assert Disk(tmp_path / "a.db").load().epoch != Disk(tmp_path / "b.db").load().epoch


def test_durable_settings(tmp_path: Path) -> None:
    store = Disk(tmp_path / "d.db")
    assert store._db.execute("pragma synchronous").fetchone() == (2,)
    assert store._db.execute("pragma journal_mode").fetchone() == ("wal",)
    assert (tmp_path / "d.db").stat().st_mode & 0o077 == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.db", "d.db-wal"]


def test_a_file_that_was_taken_away_takes_no_commits(tmp_path: Path) -> None:
    store = Disk(tmp_path / "d.db")
    commit(store, 1)
    (tmp_path / "d.db").rename(tmp_path / "elsewhere.db")
    assert "No such file" in refusal(store, 2)
    assert "the database is gone, but its d.db-wal is there" in line(tmp_path / "d.db")
    Disk(tmp_path / "x.db").close()
    (tmp_path / "x.db").rename(tmp_path / "d.db")
    assert "replaced by another file" in refusal(store, 2)
    (tmp_path / "elsewhere.db").rename(tmp_path / "d.db")
    commit(store, 2)


def test_a_log_that_was_taken_away_takes_no_commits(tmp_path: Path) -> None:
    store = Disk(tmp_path / "d.db")
    commit(store, 1)
    (tmp_path / "d.db-wal").unlink()
    assert "d.db-wal: No such file" in refusal(store, 2)
    store.close()
    assert Disk(tmp_path / "d.db").load().revision == 1


def _scribble(path: Path, at: int, what: bytes = b"\xa5" * 64) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(what)


def test_what_others_write_while_it_runs_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "d.db"
    store = Disk(path)
    saved = store.load()
    commit(store, 1)
    os.utime(path)
    commit(store, 2)  # the control: touched, and whole
    store._inspected = -1000.0
    os.truncate(path, 0)
    for revision in (3, 4):
        assert "truncated by another program" in refusal(store, revision)
    assert store.trouble and store.load().epoch == saved.epoch
    store.close()


def test_a_scribbled_database_is_noticed_while_it_runs(tmp_path: Path) -> None:
    path = tmp_path / "d.db"
    store = Disk(path)
    commit(store, 1)
    store._db.execute("pragma wal_checkpoint(truncate)").fetchall()
    store._marks = store._look()
    _scribble(path, path.read_bytes().index(b"burnt"), b"BURNT")
    assert "not those that were written" in refusal(store, 2)
    store.close()
    with pytest.raises(StoreError, match="not those that were written"):
        Disk(path).load()


def _killed(tmp_path: Path, commits: int) -> Path:
    """What a process that ended without a word leaves."""
    store = Disk(tmp_path / "d.db")
    for revision in range(1, commits + 1):
        commit(store, revision, (Write(Table.HOST, (f"h{revision}",), HostState(fenced=f"why {revision}")),))
    (tmp_path / "left").mkdir()
    for name in ("d.db", "d.db-wal"):
        (tmp_path / "left" / name).write_bytes((tmp_path / name).read_bytes())
    store.close()
    return tmp_path / "left" / "d.db"


@pytest.mark.parametrize(("at", "said"), [(5, "damaged header"), (60, "commits follow"), (-9000, "commits follow")])
def test_a_log_that_is_damaged_is_not_cut_short(tmp_path: Path, at: int, said: str) -> None:
    path = _killed(tmp_path, 20)
    log = path.with_name("d.db-wal")
    whole = path.read_bytes(), log.read_bytes()
    _scribble(log, at % len(whole[1]))
    for _ in range(2):  # it is still there to be looked at
        assert said in line(path)
    path.write_bytes(whole[0])
    log.write_bytes(whole[1])
    assert Disk(path).load().revision == 20


def test_a_commit_that_was_not_finished_is_not_damage(tmp_path: Path) -> None:
    path = _killed(tmp_path, 20)
    log = path.with_name("d.db-wal")
    os.truncate(log, log.stat().st_size - 100)
    assert Disk(path).load().revision == 19


def test_a_log_beside_an_older_copy(tmp_path: Path) -> None:
    """SQLite takes it, and has pages of two times then."""
    path, log = tmp_path / "d.db", tmp_path / "d.db-wal"
    store, copies = Disk(path), list[bytes]()
    names = [f"h{n}" for n in range(400)]
    for revision in range(1, 4):
        what = names if revision == 1 else names[revision * 100 : revision * 100 + 20]
        writes = (Write(Table.HOST, (name,), HostState(fenced=f"{revision}" * 100)) for name in what)
        commit(store, revision, tuple(writes))
        if revision < 3:
            store._db.execute("pragma wal_checkpoint(truncate)").fetchall()
            store._marks = store._look()
            copies.append(path.read_bytes())
    assert len(copies[0]) == len(copies[1])
    left = log.read_bytes()
    store.close()
    for copy, whole in zip(copies, (False, True), strict=True):
        path.write_bytes(copy)
        log.write_bytes(left)
        store = Disk(path)
        if whole:  # the control: the one it belongs to
            assert store.load().revision == 3
        else:
            with pytest.raises(StoreError, match="not those that were written"):
                store.load()
        store.close()


def test_a_failure_passes_when_it_is_looked_at_again(tmp_path: Path) -> None:
    store = Disk(tmp_path / "d.db")
    store._db.execute("pragma query_only = on")
    assert "readonly" in refusal(store, 1)
    store.ask_head()
    failed, head = store.take()
    assert isinstance(failed, Failed) and head == Head(0)
    store._db.execute("pragma query_only = off")
    store.ask_head()
    assert store.take() == [Head(0)]
    commit(store, 1)


def test_a_whole_content_moves(tmp_path: Path) -> None:
    store = Disk(tmp_path / "d.db")
    commit(store, 1)
    saved = store.load()
    Disk.create(tmp_path / "e.db", saved)
    with pytest.raises(StoreError, match="there is a database already"):
        Disk.create(tmp_path / "e.db", saved)
    assert Disk(tmp_path / "e.db").load() == saved
    store.moved_to("etcd")
    store.close()
    with pytest.raises(StoreError, match="was moved to etcd"):
        Disk(tmp_path / "d.db").load()


def test_what_0_1_0_left(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "d.db") as db:
        db.executescript("""
            create table meta (key text primary key, value text not null) without rowid;
            create table resources (kind text, name text, document text not null, primary key (kind, name))
              without rowid;
            create table endpoints (uuid text, mac text, host text not null, body blob not null,
              primary key (uuid, mac))
              without rowid;
            create table hosts (name text primary key, addresses blob, ahead integer) without rowid;
            create table superseded (epoch text primary key) without rowid;
            insert into meta values ('version', '1'), ('epoch', 'e1'), ('revision', '9');
            insert into superseded values ('abc');
        """)
        document = {"apiVersion": "slash32/v1", "kind": "Profile", "metadata": {"name": "p"}, "spec": {}}
        db.execute("insert into resources values ('Profile', 'p', ?)", (json.dumps(document),))
        body = msgpack.packb(pack_endpoint(ENDPOINT))
        db.execute("insert into endpoints values (?, ?, 'h1', ?)", (*KEY, body))
        db.execute("insert into hosts values ('h1', ?, 7)", (msgpack.packb([parse_address("192.0.2.1")]),))
    db.close()
    for _ in range(2):
        store = Disk(tmp_path / "d.db")
        saved = store.load()
        assert (saved.epoch, saved.revision) == ("e1", 9)
        assert saved.records == {
            (Table.RESOURCE, ("Profile", "p")): Profile("p"),
            (Table.ENDPOINT, tuple(KEY)): Holding("h1", ENDPOINT),
            (Table.HOST, ("h1",)): HostState((parse_address("192.0.2.1"),), 7),
            (Table.SUPERSEDED, ("abc",)): ANY,
        }
        store.close()


def line(path: Path) -> str:
    with pytest.raises(StoreError) as caught:
        Disk(path)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text and len(text) < 500
    return text


def test_damage_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "d.db"
    path.write_text("this is not a database, it is a letter to a friend" * 100)
    assert "not a database" in line(path)
    store = Disk(tmp_path / "e.db")
    commit(store, 1)
    store.close()
    whole = (tmp_path / "e.db").read_bytes()
    (tmp_path / "e.db").write_bytes(whole[: len(whole) // 2])
    assert "damaged" in line(tmp_path / "e.db") or "malformed" in line(tmp_path / "e.db")
    (tmp_path / "e.db").write_bytes(b"")
    assert "is empty" in line(tmp_path / "e.db")


def test_another_version_and_another_program(tmp_path: Path) -> None:
    store = Disk(tmp_path / "d.db")
    store.close()
    with sqlite3.connect(tmp_path / "d.db") as db:
        db.execute("update meta set value = '99' where key = 'version'")
    assert "version" in line(tmp_path / "d.db")
    with sqlite3.connect(tmp_path / "x.db") as db:
        db.execute("create table cats (name text)")
    assert "cannot be used" in line(tmp_path / "x.db")


def test_one_dispatcher_at_a_time(tmp_path: Path) -> None:
    store = Disk(tmp_path / "d.db")
    assert "another dispatcher" in line(tmp_path / "d.db")
    store.close()
    Disk(tmp_path / "d.db").close()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be used" in line(tmp_path / "file" / "d.db")
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        assert "cannot be used" in line(tmp_path / "locked" / "d.db")


def test_two_first_starts_at_once_make_one_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, token = tmp_path / "s.db", disk.secrets.token_hex

    def another_first(count: int) -> str:
        monkeypatch.setattr(disk.secrets, "token_hex", token)
        Disk(path, "an-epoch").close()
        return token(count)

    monkeypatch.setattr(disk.secrets, "token_hex", another_first)
    with pytest.raises(StoreError, match="another process has just made it"):
        Disk(path, "another-epoch")
    store = Disk(path, "a-third")
    assert store.load().epoch == "an-epoch"
    store.close()
    assert {each.name for each in tmp_path.iterdir()} <= {"s.db", "s.db-wal", "s.db-shm"}
