# Owns: whether the write-ahead log that an ended process left beside a SQLite file is whole. Touches: reads that file.
# SQLite ends at the first frame that is damaged, as if nothing had been after it, and then deletes the log: what was
# committed would be gone without a word. Of a commit that was never finished there is no trace that others follow.
from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

_MAGIC = (0x377F0682, 0x377F0683)  # checksums of little-endian, big-endian words
_HEADER, _FRAME = 32, 24
_MASK = 0xFFFFFFFF
Sums = tuple[int, int]


class _Frame(NamedTuple):
    good: bool
    ours: bool  # of this log, and not of what the file was used for before
    commits: bool


def log_of(database: Path) -> Path:
    return database.with_name(database.name + "-wal")


def damage(log: Path) -> str:
    """What is wrong with it, or nothing. Raises OSError."""
    if not log.exists():
        return ""
    broken = committed = False
    with log.open("rb") as file:
        head = file.read(_HEADER)
        if len(head) < _HEADER or (not any(head) and not any(file.read(_FRAME))):
            return ""
        try:
            frames = _frames(file, head)
        except ValueError:
            return f"{log.name} has a damaged header"
        for number, frame in enumerate(frames, 1):
            if broken and committed and frame.ours:
                return f"{log.name} is damaged before frame {number}, and commits follow"
            broken = broken or not frame.good
            committed = committed or (broken and frame.ours and frame.commits)
    return ""


def _frames(file: BinaryIO, head: bytes) -> Iterator[_Frame]:
    """Raises ValueError for a header that is none."""
    magic, _, size, _, salt1, salt2, *sums = struct.unpack(">8I", head)
    order = "<" if magic == _MAGIC[0] else ">"
    if magic not in _MAGIC or _sum(order, head[:24], (0, 0)) != tuple(sums):
        raise ValueError("not a log")
    return _walk(file, order, size or 65536, (salt1, salt2))


def _walk(file: BinaryIO, order: str, size: int, salts: Sums) -> Iterator[_Frame]:
    file.seek(24)
    first, second = struct.unpack(">2I", file.read(8))
    before, good = (int(first), int(second)), True
    while len(frame := file.read(_FRAME + size)) == _FRAME + size:
        _, pages, salt1, salt2, sum1, sum2 = struct.unpack(">6I", frame[:_FRAME])
        ours = (salt1, salt2) == salts
        if good:
            before = _sum(order, frame[_FRAME:], _sum(order, frame[:8], before))
            good = ours and before == (sum1, sum2)
        yield _Frame(good, ours, pages > 0)


def _sum(order: str, data: bytes, before: Sums) -> Sums:
    """As SQLite's file format has it."""
    one, two = before
    words = iter(struct.unpack(f"{order}{len(data) // 4}I", data))
    for word in words:
        one = (one + word + two) & _MASK
        two = (two + next(words) + one) & _MASK
    return one, two
