# Owns: what hosts have been told or are about to be: the committed content, encoded once, and one publisher per host.
# Pure. Follows the registry batch by batch, only after the commit; never looks at the registry itself.
from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from slash32.pack import MASK, AddressSet, Kind, ObjectKey, Value, digest_of, digest_of_members
from slash32.sync import Edit, Position, Publisher
from slash32.wire import Change, Delete, Hello, Members, Put, encode_change

from ..registry.changes import Batch

COMMON = (Kind.HOST, Kind.ROUTE)  # every host needs all of these: they are on one segment
_BLOCK = 256 << 10  # bytes of common objects that are kept joined for snapshots

Frames = list[bytes]


@dataclass(slots=True)
class _Object:
    value: Value | None = None
    digest: int = 0
    pieces: tuple[bytes, ...] | None = None  # encoded whole; None: to be encoded when asked for
    hosts: set[str] = field(default_factory=set)  # who needs it


class Fanout:
    def __init__(self) -> None:
        self.publishers: dict[str, Publisher] = {}
        self._own: dict[str, set[ObjectKey]] = {}  # per host, what it needs of its own
        self._digests: dict[str, int] = {}  # of those
        self._objects: dict[ObjectKey, _Object] = {}
        self._common: dict[ObjectKey, _Object] = {}
        self._common_digest = 0
        self._blocks: list[bytes] | None = None
        self._revision = 0
        self.away: list[str] = []  # whom the last commit concerns, too, and who is not connected here

    def add_host(self, name: str) -> None:
        self.publishers.setdefault(name, Publisher())
        self._own.setdefault(name, set())
        self._digests.setdefault(name, 0)

    def remove_host(self, name: str) -> None:
        for key in self._own.pop(name):
            self._lose(name, key)
        del self.publishers[name], self._digests[name]

    def publish(self, revision: int, batch: Batch) -> list[tuple[str, Frames | None]]:
        """The connected hosts that a commit concerns; None for those where it waits behind the window."""
        first, self._revision = min(self._revision + 1, revision), revision  # one may stand for several
        for name in batch.fresh:
            self.add_host(name)
        common: list[Edit] = []
        mine: dict[str, list[Edit]] = {}
        fresh = {c.key for c in batch.changes if not self._has(c.key)}  # nobody was told of these
        for change in batch.changes:
            edit, grown = self._edit(change)
            if change.key.kind in COMMON:
                common.append(edit)
                self._common_digest = (self._common_digest + grown) & MASK
                continue
            for host in self._objects[change.key].hosts:
                self._digests[host] = (self._digests[host] + grown) & MASK
                mine.setdefault(host, []).append(edit)
        self._interest(batch, mine, fresh)
        for key in [c.key for c in batch.changes if isinstance(c, Delete)]:
            self._tidy(key)
        out: list[tuple[str, Frames | None]] = []
        self.away = [name for name in batch.fresh if name not in mine and not common]  # a new host has nothing yet
        publishers, digests, base = self.publishers, self._digests, self._common_digest
        for host in publishers if common else mine:
            publisher = publishers[host]
            if publisher.live:
                edits = common if host not in mine else mine[host] + common if common else mine[host]
                out.append((host, publisher.push(revision, (digests[host] + base) & MASK, edits, first)))
            else:
                self.away.append(host)
        for name in batch.gone:
            self.remove_host(name)
        return out

    def _edit(self, change: Change) -> tuple[Edit, int]:
        """Takes the change into the content; its bytes, and what it adds to a digest."""
        objects = self._common if change.key.kind in COMMON else self._objects
        known = objects.setdefault(change.key, _Object())
        before = known.digest
        pieces = encode_change(change)
        if isinstance(change, Members):
            assert isinstance(known.value, AddressSet)
            value = known.value
            value.addresses -= change.remove.addresses
            value.prefixes -= change.remove.prefixes
            value.addresses |= change.add.addresses
            value.prefixes |= change.add.prefixes
            grown = digest_of_members(change.name, change.add) - digest_of_members(change.name, change.remove)
            known.digest, known.pieces = (before + grown) & MASK, None
            return Edit(change.key, pieces, len(change.add) + len(change.remove)), grown
        known.value = change.value if isinstance(change, Put) else None
        known.digest = digest_of(*change.key, change.value) if isinstance(change, Put) else 0
        known.pieces = pieces
        if objects is self._common:
            self._blocks = None
            if isinstance(change, Delete):
                del objects[change.key]
        return Edit(change.key, pieces), known.digest - before

    def _has(self, key: ObjectKey) -> bool:
        known = self._objects.get(key)
        return known is not None and known.value is not None

    def _interest(self, batch: Batch, mine: dict[str, list[Edit]], fresh: set[ObjectKey]) -> None:
        for host, key in batch.gained:
            known = self._objects.setdefault(key, _Object())
            known.hosts.add(host)
            self._own[host].add(key)
            self._digests[host] = (self._digests[host] + known.digest) & MASK
            if known.value is not None:
                mine.setdefault(host, []).append(Edit(key, self.whole(key)))
        for host, key in batch.lost:
            known = self._objects[key]
            self._digests[host] = (self._digests[host] - known.digest) & MASK
            self._own[host].discard(key)
            edits = [edit for edit in mine.get(host, []) if edit.key != key]
            if key not in fresh and (known.value is not None or len(edits) != len(mine.get(host, []))):
                edits.append(Edit(key, encode_change(Delete(*key))))
            if edits:
                mine[host] = edits
            else:
                mine.pop(host, None)
            self._lose(host, key)

    def _lose(self, host: str, key: ObjectKey) -> None:
        self._objects[key].hosts.discard(host)
        self._tidy(key)

    def _tidy(self, key: ObjectKey) -> None:
        known = self._objects.get(key)
        if known is not None and known.value is None and not known.hosts:
            del self._objects[key]

    def whole(self, key: ObjectKey) -> tuple[bytes, ...]:
        """The object as it is now, or its Delete."""
        known = (self._common if key.kind in COMMON else self._objects).get(key)
        if known is None or known.value is None:
            return encode_change(Delete(*key))
        if known.pieces is None:
            known.pieces = encode_change(Put(*key, known.value))
        return known.pieces

    def needed(self, host: str, key: ObjectKey) -> tuple[bytes, ...]:
        """The object as it is now for this host, which may need it no more."""
        if key.kind not in COMMON and key not in self._own[host]:
            return encode_change(Delete(*key))
        return self.whole(key)

    def everything(self, host: str) -> Iterator[bytes]:
        """All that the host needs, for a snapshot. Shared bytes: nothing is copied per host."""
        for key in self._own[host]:
            if self._objects[key].value is not None:
                yield from self.whole(key)
        if self._blocks is None:
            self._blocks = list(_joined(piece for key in self._common for piece in self.whole(key)))
        yield from self._blocks

    def digest(self, host: str) -> int:
        return (self._digests[host] + self._common_digest) & MASK

    def open(self, host: str, hello: Hello, epoch: str, revision: int, adopt: bool) -> Frames:
        at = Position(epoch, revision, self.digest(host))
        return self.publishers[host].open(hello, at, lambda: self.everything(host), adopt)


def _joined(pieces: Iterable[bytes]) -> Iterator[bytes]:
    block: list[bytes] = []
    size = 0
    for piece in pieces:
        block.append(piece)
        size += len(piece)
        if size >= _BLOCK:
            yield b"".join(block)
            block, size = [], 0
    if block:
        yield b"".join(block)
