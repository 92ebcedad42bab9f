# Owns: the store on one machine: a SQLite file. Touches: that file. A commit is durable before `propose` returns; what
# cannot be written is refused and changes nothing. A file that is damaged, emptied or taken away is never begun anew.
from __future__ import annotations

import json
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgpack

from slash32.errors import quoted

from .commits import (
    ANY,
    Commit,
    Failed,
    Head,
    Holding,
    HostState,
    Key,
    Landed,
    Outcome,
    Record,
    Saved,
    StoreError,
    Table,
    Write,
    decode_record,
    encode_record,
)

_VERSION = "2"
_SCHEMA = """
create table meta (key text primary key, value text not null) without rowid;
create table records (kind text, key text, value blob not null, primary key (kind, key)) without rowid;
"""
_OF_VERSION_1 = "resources, endpoints, hosts, superseded"
_PUT, _DELETE = "insert or replace into records values (?, ?, ?)", "delete from records where kind = ? and key = ?"


class Disk:
    """Opened exclusively: a second dispatcher on the same file is refused."""

    shared = False
    trouble = ""

    def __init__(self, path: Path, epoch: str = "") -> None:
        """Raises StoreError. `epoch`: of a file that is made now; empty: a new one."""
        self.path = path
        self._outcomes: list[Outcome] = []
        self._revision = 0
        with self._clear("cannot be used"):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                self._create(epoch or secrets.token_hex(8))
            self._db = self._open(path)
        stat = path.stat()
        self._file = stat.st_dev, stat.st_ino

    def _create(self, epoch: str) -> None:
        """Whole, under another name: a file that has its name has all it needs."""
        fresh = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        fresh.touch(mode=0o600)  # private before SQLite opens it
        try:
            db = sqlite3.connect(fresh, isolation_level=None)
            try:
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    db.execute(statement)
                meta = {"version": _VERSION, "epoch": epoch, "revision": "0"}
                db.executemany("insert into meta values (?, ?)", list(meta.items()))
            finally:
                db.close()
            fresh.rename(self.path)
        finally:
            fresh.unlink(missing_ok=True)

    def _open(self, path: Path) -> sqlite3.Connection:
        if path.stat().st_size == 0:
            raise StoreError(f"{path}: the database is empty: restore it from a backup; to begin anew, delete it")
        db = sqlite3.connect(path, isolation_level=None, timeout=2.0)
        try:
            self._prepare(db)
        except BaseException:
            db.close()
            raise
        return db

    def _prepare(self, db: sqlite3.Connection) -> None:
        run = db.execute
        run("pragma locking_mode = exclusive")
        run("pragma journal_mode = wal")
        run("pragma synchronous = full")
        (verdict,) = run("pragma quick_check(1)").fetchone()
        if verdict != "ok":
            raise StoreError(f"{self.path}: the database is damaged ({verdict}); restore it from a backup")
        run("begin immediate")
        version = run("select value from meta where key = 'version'").fetchone()
        if version == ("1",):
            _upgrade(db)
        elif version != (_VERSION,):
            said = quoted(str(version[0]) if version else "none", 32)
            raise StoreError(f"{self.path}: made by another version of slash32-dispatcher (schema {said}); upgrade")
        run("insert or replace into meta values ('opened', datetime())")  # finds out now whether it can be written
        run("commit")

    def load(self) -> Saved:
        with self._clear("cannot be read"):
            meta = dict(self._db.execute("select key, value from meta").fetchall())
            saved = Saved(meta["epoch"], int(meta["revision"]))
            self._revision = saved.revision
            moved = meta.get("moved")
            if moved:
                raise StoreError(f"{self.path}: its content was moved to {moved}: set the store in dispatcher.toml")
            for kind, key, value in self._db.execute("select kind, key, value from records order by kind, key"):
                table = Table(kind)
                saved.records[table, tuple(json.loads(key))] = decode_record(table, value)
        return saved

    def propose(self, commit: Commit) -> None:
        try:
            with self._clear("cannot be written"):
                self._commit(commit)
        except StoreError as e:
            self._outcomes.append(Failed(str(e)))
        else:
            self._revision = commit.revision
            self._outcomes.append(Landed(commit.revision))

    def _commit(self, commit: Commit) -> None:
        stat = self.path.stat()
        if (stat.st_dev, stat.st_ino) != self._file:
            raise StoreError(f"{self.path}: the database was replaced by another file: restart slash32-dispatcher")
        run = self._db.execute
        run("begin immediate")
        try:
            for table, key, record in commit.writes:
                _write(self._db, table, key, record)
            run("update meta set value = ? where key = 'revision'", (str(commit.revision),))
            run("commit")
        except BaseException:
            if self._db.in_transaction:
                run("rollback")
            raise

    def ask_head(self) -> None:
        self._outcomes.append(Head(self._revision))

    def take(self) -> list[Outcome]:
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def close(self) -> None:
        self._db.close()

    # -- to another store, and back -------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: Path, saved: Saved) -> None:
        """A new file with this content. Raises StoreError, also where there is one."""
        if path.exists():
            raise StoreError(f"{path}: there is a database already: move it away first")
        part = path.with_name(f".{path.name}.part")
        part.unlink(missing_ok=True)
        disk = cls(part, saved.epoch)
        try:
            writes = tuple(Write(*where, record) for where, record in saved.records.items())
            disk.propose(Commit(saved.revision, writes))
            for outcome in disk.take():
                if isinstance(outcome, Failed):
                    raise StoreError(outcome.reason)
            disk._db.execute("pragma wal_checkpoint(truncate)")
        finally:
            disk.close()
        part.rename(path)

    def moved_to(self, where: str) -> None:
        """It is not opened again: who would, would begin with what was true once. Raises StoreError."""
        with self._clear("cannot be written"):
            self._db.execute("insert or replace into meta values ('moved', ?)", (where,))

    @contextmanager
    def _clear(self, what: str) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, KeyError, ValueError, TypeError, msgpack.UnpackException) as e:
            locked = "locked" in str(e)
            hint = "another dispatcher uses it" if locked else "check its disk, owner and mode, or restore it"
            raise StoreError(f"{self.path}: the database {what} ({_line(e)}): {hint}") from None


def _write(db: sqlite3.Connection, table: Table, key: Key, record: Record | None) -> None:
    name = json.dumps(key, separators=(",", ":"))
    if record is None:
        db.execute(_DELETE, (table.value, name))
    else:
        db.execute(_PUT, (table.value, name, encode_record(record)))


def _upgrade(db: sqlite3.Connection) -> None:
    """From the schema of 0.1.0."""
    for statement in filter(str.strip, _SCHEMA.split(";")):
        if "table meta" not in statement:
            db.execute(statement)
    for kind, name, document in db.execute("select kind, name, document from resources").fetchall():
        resource = decode_record(Table.RESOURCE, document.encode())
        _write(db, Table.RESOURCE, (kind, name), resource)
    for host, body in db.execute("select host, body from endpoints").fetchall():
        holding = decode_record(Table.ENDPOINT, msgpack.packb([host, msgpack.unpackb(body)]))
        assert isinstance(holding, Holding)
        _write(db, Table.ENDPOINT, tuple(holding.endpoint.key), holding)
    for name, addresses, ahead in db.execute("select name, addresses, ahead from hosts").fetchall():
        _write(db, Table.HOST, (name,), HostState(tuple(msgpack.unpackb(addresses)), ahead))
    for (epoch,) in db.execute("select epoch from superseded").fetchall():
        _write(db, Table.SUPERSEDED, (epoch,), ANY)
    for table in _OF_VERSION_1.split(", "):
        db.execute(f"drop table {table}")
    db.execute("update meta set value = ? where key = 'version'", (_VERSION,))


def _line(e: Exception) -> str:
    return " ".join(f"{type(e).__name__}: {e}".split())[:200]
