# Owns: what lies under the prefix in etcd: names of keys, bytes of log entries, of chunks and of snapshots. Pure.
#
#   meta                          {"version", "epoch"}, and "moved" where it was given up for another store
#   log/N                         commit N: [nonce, nonce of N - 1, digest, its writes | [chunks, bytes]]
#   chunk/N-NONCE/NUMBER          the writes of a commit that is too big for one request
#   snapshot/N-NONCE/NUMBER       all records as of commit N, compressed, in pieces
#   snapshot/latest               which of them counts: Latest
#
# Numbers of commits have 20 digits, so that keys sort as they do. Every entry names the one before it by its nonce:
# two histories never pass for one.
from __future__ import annotations

import json
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple

import msgpack

from slash32.errors import quoted

from ..commits import Key, Record, Saved, StoreError, Table, decode_record

VERSION = 1
PIECE = 1 << 20  # bytes of a chunk: etcd takes 1.5 MiB a request
SNAPSHOT_PIECE = 64 << 10  # what is made and read while others wait their turn
KEPT = 1000  # entries of the log that are kept behind a snapshot, for replicas that slept a little
_ROWS_AT_ONCE = 256
Rows = dict[tuple[str, Key], bytes]  # (table, key) -> the record's bytes


class Damage(StoreError):
    """What is there was not written by us, or not all of it is there."""


class Moved(Damage):
    """It is in another store now."""


class Keys:
    """Names under one prefix."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.meta = f"{prefix}meta"
        self.latest = f"{prefix}snapshot/latest"

    def log(self, revision: int) -> str:
        return f"{self.prefix}log/{revision:020d}"

    def chunks(self, revision: int, nonce: str = "") -> str:
        """A prefix; without a nonce, everything from this revision on sorts behind it."""
        return f"{self.prefix}chunk/{revision:020d}" + (f"-{nonce}/" if nonce else "")

    def snapshot(self, revision: int, nonce: str = "") -> str:
        return f"{self.prefix}snapshot/{revision:020d}" + (f"-{nonce}/" if nonce else "")

    def all_of(self, room: str) -> str:
        """The prefix of "log", "chunk" or "snapshot"."""
        return f"{self.prefix}{room}/"

    def log_revision(self, key: str) -> int:
        """Raises Damage."""
        digits = key.removeprefix(self.all_of("log"))
        if len(digits) != 20 or not (digits.isascii() and digits.isdigit()):
            raise Damage(f"{quoted(key)} is no entry of a log")
        return int(digits)

    def chunk_owner(self, key: str) -> tuple[int, str]:
        """Revision and nonce of the commit that a chunk belongs to. Raises Damage."""
        name, _, nonce = key.removeprefix(self.all_of("chunk")).split("/")[0].partition("-")
        if not (name.isascii() and name.isdigit() and nonce):
            raise Damage(f"{quoted(key)} is no chunk of a commit")
        return int(name), nonce


def piece(stem: str, number: int) -> str:
    return f"{stem}{number:06d}"


def behind(prefix: str) -> str:
    """The first key that does not begin with `prefix`."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


# --- meta ------------------------------------------------------------------------------------------------------------


def encode_meta(epoch: str, moved: str = "") -> bytes:
    """`moved`: to which store."""
    return json.dumps({"version": VERSION, "epoch": epoch} | ({"moved": moved} if moved else {})).encode()


def decode_meta(data: bytes) -> str:
    """The epoch. Raises Moved, Damage."""
    try:
        found = json.loads(data)
        version, epoch = found["version"], found["epoch"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise Damage(f"meta is {quoted(data.decode('latin-1'), 60)}: this is not a store of slash32") from None
    if version != VERSION or not isinstance(epoch, str) or not epoch:
        raise Damage(f"made by another version of slash32-dispatcher (version {quoted(version, 20)}): upgrade this one")
    if moved := found.get("moved"):
        raise Moved(f"its content was moved to {quoted(str(moved))[1:-1]}: set the store in dispatcher.toml")
    return epoch


# --- the log ---------------------------------------------------------------------------------------------------------


class Chunked(NamedTuple):
    pieces: int
    size: int


class LogEntry(NamedTuple):
    revision: int
    nonce: str
    before: str  # nonce of the entry before it; of the first one: the epoch
    digest: bytes
    body: bytes | Chunked


def digest_of(revision: int, nonce: str, before: str, body: bytes) -> bytes:
    return blake2b(body, digest_size=16, key=f"{revision} {nonce} {before}".encode()[:64]).digest()


def new_entry(revision: int, nonce: str, before: str, body: bytes) -> LogEntry:
    kept: bytes | Chunked = body if len(body) <= PIECE else Chunked(-(-len(body) // PIECE), len(body))
    return LogEntry(revision, nonce, before, digest_of(revision, nonce, before, body), kept)


def pieces(body: bytes) -> Iterator[bytes]:
    view = memoryview(body)
    for start in range(0, len(body), PIECE):
        yield bytes(view[start : start + PIECE])


def encode_entry(entry: LogEntry) -> bytes:
    return bytes(msgpack.packb([entry.nonce, entry.before, entry.digest, entry.body]))


def decode_entry(revision: int, data: bytes) -> LogEntry:
    """Raises Damage."""
    try:
        nonce, before, digest, body = msgpack.unpackb(data)
        if isinstance(body, list):
            body = Chunked(*map(int, body))
        if not (isinstance(nonce, str) and isinstance(before, str) and isinstance(digest, bytes)):
            raise TypeError("wrong types")
        if not isinstance(body, bytes | Chunked):
            raise TypeError("wrong types")
    except (ValueError, TypeError, msgpack.UnpackException):
        raise Damage(f"log entry {revision} cannot be read") from None
    return LogEntry(revision, nonce, before, digest, body)


def check_body(entry: LogEntry, body: bytes) -> bytes:
    """Raises Damage."""
    if digest_of(entry.revision, entry.nonce, entry.before, body) != entry.digest:
        raise Damage(f"log entry {entry.revision} is damaged")
    return body


# --- snapshots -------------------------------------------------------------------------------------------------------


class Latest(NamedTuple):
    revision: int
    tip: str  # nonce of that revision's log entry
    nonce: str  # of the snapshot itself
    pieces: int
    size: int  # bytes of all its pieces
    digest: str


class Position(NamedTuple):
    """How far a log was read."""

    revision: int
    tip: str  # nonce of that entry; before the first one the epoch
    made: int  # etcd's revision that made that entry; before the first one meta


NOTHING = Latest(0, "", "", 0, 0, "")


def encode_latest(latest: Latest) -> bytes:
    return json.dumps(latest._asdict()).encode()


def decode_latest(data: bytes) -> Latest:
    """Raises Damage."""
    try:
        found = Latest(**json.loads(data))
        wrong = [v for v, kind in zip(found, (int, str, str, int, int, str), strict=True) if type(v) is not kind]
        if wrong:
            raise TypeError("wrong types")
    except (ValueError, TypeError, RecursionError):
        raise Damage("snapshot/latest cannot be read") from None
    return found


def freeze(rows: Mapping[tuple[str, Key], bytes]) -> Iterator[bytes]:
    """Compressed pieces of at most SNAPSHOT_PIECE bytes; b"" among them is nothing but a moment for others."""
    squeeze, ready = zlib.compressobj(1), bytearray()
    pack = msgpack.Packer().pack
    for number, ((table, key), body) in enumerate(rows.items()):
        ready += squeeze.compress(pack([table, key, body]))
        while len(ready) >= SNAPSHOT_PIECE:
            yield bytes(ready[:SNAPSHOT_PIECE])
            del ready[:SNAPSHOT_PIECE]
        if number % _ROWS_AT_ONCE == 0:
            yield b""
    ready += squeeze.flush()
    for start in range(0, len(ready), SNAPSHOT_PIECE):
        yield bytes(ready[start : start + SNAPSHOT_PIECE])


@dataclass(slots=True)
class Thawing:
    """The other way: pieces in, rows out."""

    rows: Rows = field(default_factory=dict)
    _inflate: Any = field(default_factory=zlib.decompressobj)
    _unpack: Any = field(default_factory=lambda: msgpack.Unpacker(max_buffer_size=0))
    _digest: Any = field(default_factory=lambda: blake2b(digest_size=16))

    def feed(self, data: bytes) -> None:
        """Raises Damage."""
        self._digest.update(data)
        try:
            self._unpack.feed(self._inflate.decompress(data))
            for table, key, body in self._unpack:
                self.rows[table, tuple(key)] = body
        except (zlib.error, ValueError, TypeError, msgpack.UnpackException):
            raise Damage("the snapshot cannot be read") from None

    def finish(self, digest: str) -> Rows:
        """Raises Damage."""
        if self._digest.hexdigest() != digest or not self._inflate.eof:
            raise Damage("the snapshot is damaged")
        return self.rows


def replay(rows: Rows, revision: int, body: bytes) -> None:
    """One commit's writes upon `rows`; records stay bytes. Raises Damage."""
    try:
        for table, key, record in msgpack.unpackb(body):
            if record is None:
                rows.pop((table, tuple(key)), None)
            else:
                rows[table, tuple(key)] = record
    except (ValueError, TypeError, msgpack.UnpackException):
        raise Damage(f"log entry {revision} cannot be read") from None


def decoded(epoch: str, revision: int, rows: Rows) -> Saved:
    """Empties `rows`: what is read need not be kept twice. Raises StoreError."""
    saved = Saved(epoch, revision)
    records: dict[tuple[Table, Key], Record] = saved.records
    for word, key in sorted(rows):
        body = rows.pop((word, key))
        try:
            table = Table(word)
        except ValueError:
            raise Damage(f"there is a table {quoted(word, 40)}, of a newer slash32-dispatcher: upgrade this") from None
        records[table, key] = decode_record(table, body)
    return saved


# --- when a snapshot is due ------------------------------------------------------------------------------------------

ENTRIES_MOST = 5000
BYTES_LEAST = 4 << 20


class Growth:
    """How much log there is behind the last snapshot."""

    def __init__(self) -> None:
        self._sizes: deque[tuple[int, int]] = deque()
        self._bytes = 0
        self.base = NOTHING

    def add(self, revision: int, size: int) -> None:
        self._sizes.append((revision, size))
        self._bytes += size

    def cut(self, base: Latest) -> None:
        self.base = base
        while self._sizes and self._sizes[0][0] <= base.revision:
            self._bytes -= self._sizes.popleft()[1]

    @property
    def due(self) -> bool:
        return len(self._sizes) >= ENTRIES_MOST or self._bytes > max(BYTES_LEAST, self.base.size)


def size_of(entry: LogEntry) -> int:
    return entry.body.size if isinstance(entry.body, Chunked) else len(entry.body)
