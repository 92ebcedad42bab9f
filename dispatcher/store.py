# Owns: the dispatcher's memory on disk, one SQLite file. Touches: that file. Everything of one batch is one durable
# commit, made before anybody is told. Raises StoreError, one line; nothing here is retried.
from __future__ import annotations

import json
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack

from slash32.errors import Slash32Error
from slash32.model import Endpoint, EndpointKey
from slash32.net import Address
from slash32.pack import pack_endpoint, unpack_endpoint

_VERSION = "1"
_SCHEMA = """
create table meta (key text primary key, value text not null) without rowid;
create table resources (kind text, name text, document text not null, primary key (kind, name)) without rowid;
create table endpoints (uuid text, mac text, host text not null, body blob not null, primary key (uuid, mac))
  without rowid;
create table hosts (name text primary key, addresses blob, ahead integer) without rowid;
create table superseded (epoch text primary key) without rowid;
"""


class StoreError(Slash32Error):
    """One line: file, what is wrong, what to do."""


@dataclass(slots=True)
class Saved:
    """What a store held when it was opened."""

    epoch: str
    revision: int
    resources: list[Mapping[str, Any]] = field(default_factory=list)
    endpoints: list[tuple[str, Endpoint]] = field(default_factory=list)
    addresses: dict[str, tuple[Address, ...]] = field(default_factory=dict)  # next hops that hosts reported
    ahead: dict[str, int] = field(default_factory=dict)  # hosts that were seen beyond this store's revision
    superseded: set[str] = field(default_factory=set)  # epochs that an operator gave up for this one


Write = tuple[str, tuple[Any, ...]]


def put_resource(kind: str, name: str, document: Mapping[str, Any]) -> Write:
    return "insert or replace into resources values (?, ?, ?)", (kind, name, json.dumps(document))


def delete_resource(kind: str, name: str) -> Write:
    return "delete from resources where kind = ? and name = ?", (kind, name)


def put_endpoint(host: str, endpoint: Endpoint) -> Write:
    body = msgpack.packb(pack_endpoint(endpoint))
    return "insert or replace into endpoints values (?, ?, ?, ?)", (*endpoint.key, host, body)


def delete_endpoint(key: EndpointKey) -> Write:
    return "delete from endpoints where uuid = ? and mac = ?", tuple(key)


def put_host(name: str, addresses: tuple[Address, ...], ahead: int | None) -> Write:
    """What a host said of itself; `ahead`: the revision at which it was seen beyond ours."""
    return "insert or replace into hosts values (?, ?, ?)", (name, msgpack.packb(list(addresses)), ahead)


def delete_host(name: str) -> Write:
    return "delete from hosts where name = ?", (name,)


def supersede(epoch: str) -> Write:
    return "insert or ignore into superseded values (?)", (epoch,)


class Store:
    """Opened exclusively: a second dispatcher on the same file is refused."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._clear("cannot be used"):
            path.parent.mkdir(parents=True, exist_ok=True)
            # The descriptor must exist and be private before SQLite opens it.
            path.touch(mode=0o600, exist_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None, timeout=2.0)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise

    def _prepare(self) -> None:
        run = self._db.execute
        run("pragma locking_mode = exclusive")
        run("pragma journal_mode = wal")
        run("pragma synchronous = full")
        (verdict,) = run("pragma quick_check(1)").fetchone()
        if verdict != "ok":
            raise StoreError(f"{self.path}: the database is damaged ({verdict}); restore it from a backup")
        run("begin immediate")
        if not run("select name from sqlite_master where type = 'table'").fetchall():
            for statement in filter(str.strip, _SCHEMA.split(";")):
                run(statement)
            fresh = {"version": _VERSION, "epoch": secrets.token_hex(8), "revision": "0"}
            self._db.executemany("insert into meta values (?, ?)", list(fresh.items()))
        run("insert or replace into meta values ('opened', datetime())")  # finds out now whether it can be written
        run("commit")
        version = run("select value from meta where key = 'version'").fetchone()
        if version != (_VERSION,):
            raise StoreError(f"{self.path}: made by another version of slash32-dispatcher (schema {version}); upgrade")

    def load(self) -> Saved:
        with self._clear("cannot be read"):
            run = self._db.execute
            meta = dict(run("select key, value from meta").fetchall())
            saved = Saved(meta["epoch"], int(meta["revision"]))
            saved.resources = [json.loads(d) for (d,) in run("select document from resources order by kind, name")]
            rows = run("select host, body from endpoints order by uuid, mac")
            saved.endpoints = [(host, unpack_endpoint(msgpack.unpackb(body))) for host, body in rows]
            for name, addresses, ahead in run("select name, addresses, ahead from hosts"):
                saved.addresses[name] = tuple(msgpack.unpackb(addresses))
                if ahead is not None:
                    saved.ahead[name] = ahead
            saved.superseded = {epoch for (epoch,) in run("select epoch from superseded")}
            return saved

    def commit(self, revision: int, writes: Iterable[Write]) -> None:
        """All or nothing, on the platter when it returns."""
        with self._clear("cannot be written"):
            self._db.execute("begin immediate")
            try:
                for statement, values in writes:
                    self._db.execute(statement, values)
                self._db.execute("update meta set value = ? where key = 'revision'", (str(revision),))
                self._db.execute("commit")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("rollback")
                raise

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _clear(self, what: str) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, KeyError, ValueError, TypeError, msgpack.UnpackException) as e:
            locked = "locked" in str(e)
            hint = "another dispatcher uses it" if locked else "check its disk, owner and mode, or restore it"
            raise StoreError(f"{self.path}: the database {what} ({_line(e)}): {hint}") from None


def _line(e: Exception) -> str:
    return " ".join(f"{type(e).__name__}: {e}".split())[:200]
