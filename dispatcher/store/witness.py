# Owns: whether the SQLite file is the one that this machine's last dispatcher left, or a copy of what it was once: one
# that was copied back, or a disk rolled back, looks as well as the real one. Touches: a note beside the API's socket,
# in /run: it outlives a crash of the dispatcher, and no backup, no disk's snapshot and no boot brings an old one back.
# Where the note does not vouch for the file, its content gets another epoch: a revision never means two things.
from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import time
from pathlib import Path
from typing import Any, NamedTuple

from .commits import Commit, Entry, Landed, Outcome, Saved, Table, Write
from .disk import Disk

log = logging.getLogger("slash32.dispatcher")

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_SIZE = 256  # bytes of a note: written in place, by one call


class Note(NamedTuple):
    """The last that hosts may have been told of."""

    boot: str
    epoch: str
    revision: int


class Witnessed:
    """A Disk (commits.Store) and the note of how far it has got."""

    shared = False

    def __init__(self, disk: Disk, path: Path) -> None:
        self._disk, self._path = disk, path
        self._boot = _BOOT.read_text().strip()
        self._epoch, self._revision = "", 0
        self._fd = -1
        self._outcomes: list[Outcome] = []

    @property
    def trouble(self) -> str:
        return self._disk.trouble

    def load(self) -> Saved:
        """Raises StoreError."""
        saved = self._disk.load()
        why = self._doubt(saved)
        if why and saved.revision > 0:
            self._renew(saved, why)
        self._epoch, self._revision = saved.epoch, saved.revision
        self._begin()
        return saved

    def _doubt(self, saved: Saved) -> str:
        """Why hosts may have been told more of this epoch than the file holds."""
        note = _read(self._path)
        if note is None or note.boot != self._boot:
            return "no dispatcher has used it since this machine was started"
        if note.epoch != saved.epoch:
            return "it is another one than was used here last"
        if saved.revision < note.revision:
            return f"it is an old copy: revision {note.revision} was the last here"
        if saved.revision > note.revision + 1:  # one may have landed before it was noted
            return f"it is not from here: revision {note.revision} was the last here"
        return ""

    def _renew(self, saved: Saved, why: str) -> None:
        old, saved.epoch = saved.epoch, secrets.token_hex(8)
        here = f"{self._disk.path}, revision {saved.revision}"
        key = (f"{saved.revision:020d}", "99999")
        entry = Entry(time.time(), "dispatcher", f"{here}: {why}", "new epoch")
        writes = (Write(Table.SUPERSEDED, (old,), saved.revision), Write(Table.AUDIT, key, entry))
        self._disk.renew(saved.epoch, Commit(saved.revision, writes))
        saved.records |= {(table, key): record for table, key, record in writes if record is not None}
        what = "%s: %s: it goes on as epoch %s, no more %s: hosts that have seen more of that one hold what they have"
        log.warning(what, here, why, saved.epoch, old)

    def propose(self, commit: Commit) -> None:
        self._disk.propose(commit)
        self._outcomes += self._disk.take()
        for outcome in self._outcomes:
            if isinstance(outcome, Landed):  # before anybody is told
                self._revision = outcome.revision
                self._write()

    def ask_head(self) -> None:
        self._disk.ask_head()

    def take(self) -> list[Outcome]:
        outcomes, self._outcomes = self._outcomes + self._disk.take(), []
        return outcomes

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._disk.close()

    # -- the note -------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        fresh = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._write()
            fresh.replace(self._path)  # whoever made the one before
        except OSError as e:
            self._give_up(e)

    def _write(self) -> None:
        if self._fd < 0:
            return
        try:
            os.pwrite(self._fd, _text(Note(self._boot, self._epoch, self._revision)), 0)
        except OSError as e:
            self._give_up(e)

    def _give_up(self, e: OSError) -> None:
        """No note is better than a stale one."""
        with contextlib.suppress(OSError):
            self._path.unlink()
        log.warning("%s: %s: after the next start hosts are given all anew", self._path, e.strerror)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def note_path(socket: Path) -> Path:
    return socket.with_name(f"{socket.name}.last")


def vouch(path: Path, saved: Saved) -> None:
    """For a file that was made from a store that nobody uses any more. Where that fails, hosts are given all anew."""
    note = _text(Note(_BOOT.read_text().strip(), saved.epoch, saved.revision))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(note)
    except OSError as e:
        log.warning("%s: %s: after the next start hosts are given all anew", path, e.strerror)


def _text(note: Note) -> bytes:
    return json.dumps(list(note)).encode().ljust(_SIZE - 1) + b"\n"


def _read(path: Path) -> Note | None:
    try:
        found: Any = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None  # none, or none of ours: it vouches for nothing
    match found:
        case [str(boot), str(epoch), int(revision)]:
            return Note(boot, epoch, revision)
    return None
