# The store: what was committed is there after any end, what was not is not; a file that is no store is refused.
from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest

from dispatcher import store as disk
from dispatcher.store import Store, StoreError
from slash32.model import Endpoint, EndpointKey
from slash32.net import parse_address

KEY = EndpointKey("00000000-0000-0000-0000-000000000001", "52:54:00:00:00:01")
ENDPOINT = Endpoint(KEY, "web1", {"role": "web"}, ("default",), (parse_address("10.65.0.2"),))
WRITES = [
    disk.put_resource("Profile", "p", {"a": 1}),
    disk.put_endpoint("h1", ENDPOINT),
    disk.put_host("h1", (parse_address("192.0.2.1"),), 7),
    disk.supersede("abc"),
]


def test_what_is_committed_is_there_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "d.db")
    first = store.load()
    assert (first.revision, first.resources, first.endpoints) == (0, [], []) and len(first.epoch) == 16
    store.commit(1, WRITES)
    store.close()
    store = Store(tmp_path / "d.db")
    saved = store.load()
    assert (saved.epoch, saved.revision) == (first.epoch, 1)
    assert saved.resources == [{"a": 1}] and saved.endpoints == [("h1", ENDPOINT)]
    assert saved.addresses == {"h1": (parse_address("192.0.2.1"),)}
    assert saved.ahead == {"h1": 7} and saved.superseded == {"abc"}
    gone = [disk.delete_resource("Profile", "p"), disk.delete_endpoint(KEY), disk.delete_host("h1")]
    store.commit(2, gone)
    saved = store.load()
    assert (saved.revision, saved.resources, saved.endpoints, saved.addresses) == (2, [], [], {})


def test_a_commit_is_all_or_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "d.db")
    with pytest.raises(StoreError, match="cannot be written"):
        store.commit(1, [*WRITES, ("insert into nowhere values (1)", ())])
    saved = store.load()
    assert (saved.revision, saved.resources, saved.endpoints) == (0, [], [])
    store.commit(1, WRITES)
    assert store.load().revision == 1


def test_another_store_has_another_epoch(tmp_path: Path) -> None:
    assert Store(tmp_path / "a.db").load().epoch != Store(tmp_path / "b.db").load().epoch


def test_durable_settings(tmp_path: Path) -> None:
    store = Store(tmp_path / "d.db")
    assert store._db.execute("pragma synchronous").fetchone() == (2,)
    assert store._db.execute("pragma journal_mode").fetchone() == ("wal",)
    assert (tmp_path / "d.db").stat().st_mode & 0o077 == 0


def line(path: Path) -> str:
    with pytest.raises(StoreError) as caught:
        Store(path)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text and len(text) < 500
    return text


def test_damage_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "d.db"
    path.write_text("this is not a database, it is a letter to a friend" * 100)
    assert "not a database" in line(path)
    store = Store(tmp_path / "e.db")
    store.commit(1, WRITES)
    store.close()
    whole = (tmp_path / "e.db").read_bytes()
    (tmp_path / "e.db").write_bytes(whole[: len(whole) // 2])
    assert "damaged" in line(tmp_path / "e.db") or "malformed" in line(tmp_path / "e.db")


def test_another_version_and_another_program(tmp_path: Path) -> None:
    store = Store(tmp_path / "d.db")
    store.close()
    with sqlite3.connect(tmp_path / "d.db") as db:
        db.execute("update meta set value = '99' where key = 'version'")
    assert "version" in line(tmp_path / "d.db")
    with sqlite3.connect(tmp_path / "x.db") as db:
        db.execute("create table cats (name text)")
    assert "cannot be used" in line(tmp_path / "x.db")


def test_one_dispatcher_at_a_time(tmp_path: Path) -> None:
    store = Store(tmp_path / "d.db")
    assert "another dispatcher" in line(tmp_path / "d.db")
    store.close()
    Store(tmp_path / "d.db").close()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be used" in line(tmp_path / "file" / "d.db")
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        assert "cannot be used" in line(tmp_path / "locked" / "d.db")
