# Owns: the store on one machine: a SQLite file. Touches: that file. A commit is durable before `propose` returns; what
# cannot be written is refused and changes nothing. A file that is damaged or emptied, or of which only a part is left,
# is never begun anew: a sum over all records, in the file, tells whether they are what was written.
from __future__ import annotations

import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgpack

from slash32.errors import quoted

from .commits import (
    Commit,
    Failed,
    Head,
    Landed,
    Outcome,
    Saved,
    StoreError,
    Table,
    Write,
    decode_record,
)
from .rows import META, RECORDS, VERSION, digest_of, hash_of, write
from .upgrade import upgrade
from .wal import damage, log_of

_POSITION = "insert or replace into meta values ('revision', ?), ('digest', ?)"
_PROBE = "x" * (64 << 10)  # as much as commits may take: a full disk often has a page left
_MASK = (1 << 64) - 1
_INSPECT = 60.0  # seconds between two looks at everything where only the times of the files are odd


class _Mark(NamedTuple):
    """What another program that writes there changes."""

    file: tuple[int, int]  # device, inode
    size: int
    written: int


class Disk:
    """Opened exclusively: a second dispatcher on the same file is refused."""

    shared = False

    def __init__(self, path: Path, epoch: str = "") -> None:
        """Raises StoreError. `epoch`: of a file that is made now; empty: a new one."""
        self.path, self.trouble = path, ""
        self._log = log_of(path)
        self._outcomes: list[Outcome] = []
        self._revision = 0
        self._epoch = ""
        self._sum: int | None = None  # of all records
        self._failed = False  # the last thing that was to be written
        self._inspected = -_INSPECT
        with self._clear("cannot be used"):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                self._nothing_left()
                self._create(epoch or secrets.token_hex(8))
            self._db = self._open(path)
            self._marks = self._look()

    def _nothing_left(self) -> None:
        if self._log.exists():
            what = f"the database is gone, but its {self._log.name} is there"
            raise StoreError(f"{self.path}: {what}: restore it from a backup; to begin anew, delete that, too")

    def _create(self, epoch: str) -> None:
        """Whole, under another name: a file that has its name has all it needs."""
        fresh = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        fresh.touch(mode=0o600)  # private before SQLite opens it
        try:
            db = sqlite3.connect(fresh, isolation_level=None)
            try:
                for statement in (META, RECORDS):
                    db.execute(statement)
                meta = {"version": VERSION, "epoch": epoch, "revision": "0"}
                db.executemany("insert into meta values (?, ?)", list(meta.items()))
            finally:
                db.close()
            _named(fresh, self.path)
        finally:
            fresh.unlink(missing_ok=True)

    def _open(self, path: Path) -> sqlite3.Connection:
        if path.stat().st_size == 0:
            raise StoreError(f"{path}: the database is empty: restore it from a backup; to begin anew, delete it")
        if found := damage(self._log):
            raise StoreError(f"{path}: the database is damaged ({found}): restore it from a backup")
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
        self._check_pages(db)
        run("begin immediate")
        version = run("select value from meta where key = 'version'").fetchone()
        if version == ("1",):
            upgrade(db)
        elif version != (VERSION,):
            said = quoted(str(version[0]) if version else "none", 32)
            raise StoreError(f"{self.path}: made by another version of slash32-dispatcher (schema {said}); upgrade")
        run("insert or replace into meta values ('opened', datetime())")  # finds out now whether it can be written
        run("commit")

    def _check_pages(self, db: sqlite3.Connection) -> None:
        (verdict,) = db.execute("pragma quick_check(1)").fetchone()
        if verdict != "ok":
            raise StoreError(f"{self.path}: the database is damaged ({quoted(verdict, 200)}): restore it from a backup")

    def load(self) -> Saved:
        with self._clear("cannot be read"):
            meta = self._meta()
            saved = Saved(meta["epoch"], int(meta["revision"]))
            moved = meta.get("moved")
            if moved:
                raise StoreError(f"{self.path}: its content was moved to {moved}: set the store in dispatcher.toml")
            self._check_content(meta)
            self._revision = saved.revision
            for kind, key, value in self._rows():
                table = Table(kind)
                saved.records[table, tuple(json.loads(key))] = decode_record(table, value)
        return saved

    def _meta(self) -> dict[str, str]:
        return dict(self._db.execute("select key, value from meta").fetchall())

    def _rows(self) -> Iterable[tuple[str, str, bytes]]:
        return self._db.execute("select kind, key, value from records order by kind, key")

    def _check_content(self, meta: dict[str, str]) -> None:
        """SQLite knows its pages, and not what stood in them. Also a log that belongs to another copy ends here."""
        self._epoch = meta["epoch"]
        self._sum = sum(hash_of(*row) for row in self._rows()) & _MASK
        known = meta.get("digest")  # the first files had none
        if known is not None and known != digest_of(meta["epoch"], int(meta["revision"]), self._sum):
            raise StoreError(
                f"{self.path}: the database is damaged (its records are not those that were written): "
                f"restore it from a backup, without a {self._log.name}"
            )

    def propose(self, commit: Commit) -> None:
        self._failed = True
        try:
            with self._clear("cannot be written"):
                self._guard()
                self._commit(commit)
        except StoreError as e:
            self._outcomes.append(Failed(str(e), unknown=_may_have_landed(e.__cause__)))
        else:
            self._failed = False
            self._revision = commit.revision
            self._outcomes.append(Landed(commit.revision))

    def renew(self, epoch: str, commit: Commit) -> None:
        """Takes another epoch, at the same revision. Raises StoreError."""
        with self._clear("cannot be written"):
            self._commit(commit, epoch)

    def _commit(self, commit: Commit, epoch: str = "") -> None:
        """`epoch`: its new one."""
        run = self._db.execute
        if self._sum is None:
            self._check_content(self._meta())
        assert self._sum is not None
        found = self._sum
        run("begin immediate")
        try:
            for table, key, record in commit.writes:
                found += write(self._db, table, key, record)
            if epoch:
                run("update meta set value = ? where key = 'epoch'", (epoch,))
            epoch = epoch or self._epoch
            run(_POSITION, (str(commit.revision), digest_of(epoch, commit.revision, found & _MASK)))
            run("commit")
        except BaseException:
            if self._db.in_transaction:
                run("rollback")
            raise
        self._sum, self._epoch = found & _MASK, epoch
        self._marks = self._look()

    # -- others who write there -----------------------------------------------------------------------------------

    def _look(self) -> tuple[_Mark | None, ...]:
        return _mark(self.path), _mark(self._log)

    def _guard(self) -> None:
        """Raises StoreError, OSError, sqlite3.Error where what would be committed would not be there again."""
        if self.trouble:
            raise StoreError(self.trouble)
        found = self._look()
        if found == self._marks:
            return
        for path, before, now in zip((self.path, self._log), self._marks, found, strict=True):
            if before is None:
                continue
            if now is None:
                raise StoreError(
                    f"{path}: No such file: it was taken away while it was used: `slash32 backup` has what is in it; "
                    f"bring it back, or restart slash32-dispatcher and restore"
                )
            if now.file != before.file:
                raise StoreError(f"{path}: the database was replaced by another file: restart slash32-dispatcher")
            if now.size < before.size:
                self._spoilt(f"{path.name} was truncated by another program")
        if time.monotonic() - self._inspected >= _INSPECT:
            self._inspect()
            self._inspected = time.monotonic()
        self._marks = self._look()

    def _inspect(self) -> None:
        """Somebody else has written, or the file system has odd clocks: is all what it was?"""
        before = self._sum
        try:
            self._db.execute("pragma shrink_memory")  # what is in memory says nothing of the disk
            self._check_pages(self._db)
            self._check_content(self._meta())
            if before not in (None, self._sum):
                raise StoreError("its records are others")
            self._db.execute("pragma wal_checkpoint(truncate)").fetchall()
        except (StoreError, sqlite3.DatabaseError, ValueError, KeyError) as e:
            if getattr(e, "sqlite_errorname", "").startswith(("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY")):
                raise  # that can pass
            self._spoilt(" ".join(str(e).split())[:200].removeprefix(f"{self.path}: "))

    def _spoilt(self, why: str) -> None:
        self.trouble = (
            f"{self.path}: the database was damaged while it was used ({why}): `slash32 backup` has what was in it; "
            f"delete the file, restart slash32-dispatcher and restore"
        )
        raise StoreError(self.trouble)

    def ask_head(self) -> None:
        """Where the last commit could not be written, it finds out whether the next one could."""
        if self._failed:
            try:
                with self._clear("cannot be written"):
                    self._guard()
                    self._db.execute("insert or replace into meta values ('probe', ?)", (_PROBE,))
                    self._db.execute("delete from meta where key = 'probe'")
                    self._marks = self._look()
            except StoreError as e:
                self._outcomes.append(Failed(str(e)))
            else:
                self._failed = False
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
        if path.exists() or log_of(path).exists():
            raise StoreError(f"{path}: there is a database already, or its log: move both away first")
        part = path.with_name(f".{path.name}.part")
        for left in (part, log_of(part)):
            left.unlink(missing_ok=True)
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
        _named(part, path)

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
            raise StoreError(f"{self.path}: the database {what} ({_line(e)}): {hint}") from e


def _mark(path: Path) -> _Mark | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return _Mark((found.st_dev, found.st_ino), found.st_size, found.st_mtime_ns)


def _may_have_landed(cause: BaseException | None) -> bool:
    """It was written, and nobody knows whether that is durable."""
    return getattr(cause, "sqlite_errorname", "") == "SQLITE_IOERR_FSYNC"


def _line(e: Exception) -> str:
    return " ".join(f"{type(e).__name__}: {e}".split())[:200]


def _named(made: Path, path: Path) -> None:
    """From now on, and after a power cut, it has this name. Raises StoreError where another was first, OSError."""
    try:
        os.link(made, path)
    except FileExistsError:
        raise StoreError(f"{path}: another process has just made it: look which dispatcher runs") from None
    made.unlink()
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
