# Owns: hostd's last state on disk: one file, a base followed by what changed since. Touches: that file.
#
# A record is written before the kernel is changed, so that a hostd that is killed starts again with nothing older than
# what it enforced. It is not forced to the platter each time: after a power cut the kernel is empty, too, and the
# dispatcher's word decides.
from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

_MAGIC = b"slash32-hostd 1\n"
_HEAD = struct.Struct(">II")  # length, crc32 of the payload
_COMPACT_AT = 4 << 20  # bytes of changes before a new base is written


class Journal:
    """`load`, then `append`; `rebase` when `full`. Raises OSError where the disk does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1
        self._appended = 0

    def load(self) -> list[bytes]:
        """The records that are whole, oldest first; a torn tail (power cut) ends the list. Missing file: none."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        return list(_records(data)) if data.startswith(_MAGIC) else []

    @property
    def full(self) -> bool:
        return self._fd < 0 or self._appended > _COMPACT_AT

    def rebase(self, records: list[bytes]) -> None:
        """Replace the file, atomically, by these records."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".new")
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write(fd, _MAGIC + b"".join(_frame(r) for r in records))
            os.fsync(fd)
            fresh.replace(self.path)
        except OSError:
            os.close(fd)
            raise
        self.close()
        self._fd, self._appended = fd, 0

    def append(self, record: bytes) -> None:
        framed = _frame(record)
        _write(self._fd, framed)
        self._appended += len(framed)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _frame(record: bytes) -> bytes:
    return _HEAD.pack(len(record), zlib.crc32(record)) + record


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _records(data: bytes) -> Iterator[bytes]:
    at = len(_MAGIC)
    while at + _HEAD.size <= len(data):
        length, crc = _HEAD.unpack_from(data, at)
        record = data[at + _HEAD.size : at + _HEAD.size + length]
        if len(record) != length or zlib.crc32(record) != crc:
            return
        yield record
        at += _HEAD.size + length
