# Owns: the replica protocol, without I/O. `Publisher` is the dispatcher's side of one host's stream, `Replica` the
# host's side. State, not events: whatever is lost, doubled or late, a snapshot heals; nothing is wiped by accident.
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

import msgpack

from slash32 import wire
from slash32.net import Address
from slash32.pack import MASK, AddressSet, Kind, Name, ObjectKey, Value, WireError, digest_of, digest_of_members
from slash32.wire import Change, Delete, Delta, Hello, Members, Pong, Put, Snapshot

WINDOW = 8  # unacknowledged messages per host
COALESCE = 1024  # members of one set that wait behind the window; beyond that the whole set is sent
NO_SESSION = MASK  # the revision in a Pong that says: say Hello again
_MAGIC = b"slash32 replica 1\n"


# --- the host's side -------------------------------------------------------------------------------------------------


class Applied(NamedTuple):
    """The replica is now at `revision`; `changes` are the differences only, sets that existed as Members."""

    revision: int
    changes: tuple[Change, ...]
    snapshot: bool


class NeedSnapshot(NamedTuple):
    """Something was missed: send `Replica.hello()`."""

    reason: str


class Held(NamedTuple):
    """The dispatcher's content was refused: it is older than ours or of another store. An operator decides."""

    reason: str


Outcome = Applied | NeedSnapshot | Held


class Replica:
    """What the dispatcher has told this host. Values are the replica's own: read them, never write them."""

    def __init__(self) -> None:
        self.epoch = ""
        self.revision = 0
        self.digest = 0
        self.in_sync = False  # within this session
        self.held = ""  # why the dispatcher's content is refused
        self._content: dict[Kind, dict[Name, Value]] = {kind: {} for kind in Kind}

    def objects(self, kind: Kind) -> Mapping[Name, Value]:
        return self._content[kind]

    def get(self, key: ObjectKey) -> Value | None:
        return self._content[key.kind].get(key.name)

    def hello(self, addresses: Sequence[Address] = ()) -> Hello:
        """Opens a session, or asks for a snapshot within one."""
        self.in_sync, self.held = False, ""
        return Hello(self.epoch, self.revision, self.digest, tuple(addresses))

    def lost(self) -> None:
        """The connection is gone."""
        self.in_sync = False

    def receive(self, message: Snapshot | Delta | Pong) -> list[Outcome]:
        match message:
            case Snapshot():
                return self._snapshot(message)
            case Delta():
                return self._delta(message)
            case Pong(revision):
                return self._need("a message was lost") if revision != self.revision else []

    def _need(self, reason: str) -> list[Outcome]:
        asked, self.in_sync = not self.in_sync, False
        return [] if asked else [NeedSnapshot(reason)]

    def _snapshot(self, s: Snapshot) -> list[Outcome]:
        ours = self.epoch in ("", s.epoch)
        if not s.adopt and not (ours and s.revision >= self.revision):
            if ours and self.in_sync:
                return []  # an old one, late
            self.held = (
                f"the dispatcher is at revision {s.revision}, older than this host's {self.revision}"
                if ours
                else f"the dispatcher's store is another one (epoch {s.epoch}, this host has {self.epoch})"
            )
            self.in_sync = False
            return [Held(self.held)]
        content = {change.key: change for change in _merged(s.objects)}
        puts = [put for put in content.values() if isinstance(put, Put)]
        if len(puts) < len(content) or sum(digest_of(*put) for put in puts) & MASK != s.digest:
            self.in_sync = True  # so that it is asked for again
            return self._need("a snapshot's digest is wrong")
        gone = [ObjectKey(k, n) for k, names in self._content.items() for n in names if ObjectKey(k, n) not in content]
        changes = [*self._apply([Delete(*key) for key in gone]), *self._apply(content.values())]
        self.epoch, self.revision, self.digest = s.epoch, s.revision, s.digest
        self.in_sync, self.held = True, ""
        return [Applied(s.revision, tuple(c for c, _ in changes), True)]

    def _delta(self, d: Delta) -> list[Outcome]:
        if self.held or d.epoch != self.epoch:
            return []
        if d.previous != self.revision:
            return [] if d.revision <= self.revision else self._need("a message was lost")
        before = self.digest
        done = self._apply(_merged(d.changes))
        if self.digest != d.digest:
            self._apply([undo for _, undo in reversed(done)])
            self.digest = before
            self.in_sync = True
            return self._need("a digest is wrong")
        self.revision, self.in_sync = d.revision, True
        return [Applied(d.revision, tuple(c for c, _ in done), False)]

    def _apply(self, changes: Iterable[Change]) -> list[tuple[Change, Change]]:
        """What really changed, each with its inverse."""
        return [pair for change in changes if (pair := self._change(change)) is not None]

    def _change(self, change: Change) -> tuple[Change, Change] | None:
        names = self._content[change.key.kind]
        old = names.get(change.name)
        if isinstance(old, AddressSet):
            if isinstance(change, Members):
                return self._members(change.name, old, change.add, change.remove)
            if isinstance(change, Put) and isinstance(new := change.value, AddressSet):
                return self._members(str(change.name), old, _minus(new, old), _minus(old, new))
        if isinstance(change, Members):
            change = Put(Kind.SET, change.name, _minus(change.add, change.remove))
        new_value = change.value if isinstance(change, Put) else None
        if new_value == old:
            return None
        undo: Change = Delete(*change.key) if old is None else Put(*change.key, old)
        if old is not None:
            self.digest = (self.digest - digest_of(*change.key, old)) & MASK
            del names[change.name]
        if new_value is not None:
            self.digest = (self.digest + digest_of(*change.key, new_value)) & MASK
            names[change.name] = new_value
        return change, undo

    def _members(self, name: str, old: AddressSet, add: AddressSet, remove: AddressSet) -> tuple[Change, Change] | None:
        add, remove = _minus(add, old), _both(_minus(remove, add), old)
        if not add and not remove:
            return None
        old.addresses -= remove.addresses
        old.addresses |= add.addresses
        old.prefixes -= remove.prefixes
        old.prefixes |= add.prefixes
        self.digest = (self.digest + digest_of_members(name, add) - digest_of_members(name, remove)) & MASK
        return Members(name, add, remove), Members(name, remove, add)

    def replay(self, previous: int, revision: int, changes: bytes) -> None:
        """What an `Applied` said before this process, from the disk. Raises WireError where it does not follow."""
        if previous != self.revision:
            raise WireError(f"it follows revision {previous}, not {self.revision}")
        self._apply(_merged(wire.decode_changes(changes)))
        self.revision = revision

    def dump(self) -> bytes:
        """For the disk: everything, with a checksum."""
        parts: list[bytes] = [msgpack.packb([self.epoch, self.revision, self.digest])]
        for kind, names in self._content.items():
            for name, value in names.items():
                parts += wire.encode_change(Put(kind, name, value))
        body = b"".join(parts)
        return _MAGIC + blake2b(body, digest_size=16).digest() + body

    @classmethod
    def load(cls, data: bytes) -> Replica:
        """Raises WireError, one line, for anything but an intact dump."""
        start = len(_MAGIC) + 16
        body = data[start:]
        if data[: len(_MAGIC)] != _MAGIC:
            raise WireError("the saved state is of another version or not ours")
        if blake2b(body, digest_size=16).digest() != data[len(_MAGIC) : start]:
            raise WireError("the saved state is damaged")
        (epoch, revision, digest), changes = wire.decode_stream(body)
        self = cls()
        for change in _merged(changes):
            if not isinstance(change, Put):
                raise WireError("the saved state is damaged")
            self._content[change.kind][change.name] = change.value
        self.epoch, self.revision, self.digest = epoch, revision, digest
        return self


def _merged(changes: Iterable[Change]) -> Iterator[Change]:
    """A big set comes as a Put and Members: make them one Put again."""
    held: Put | None = None
    for change in changes:
        if isinstance(change, Members) and held is not None and held.key == change.key:
            assert isinstance(held.value, AddressSet)
            held.value.addresses |= change.add.addresses
            held.value.prefixes |= change.add.prefixes
            held.value.addresses -= change.remove.addresses
            held.value.prefixes -= change.remove.prefixes
            continue
        if held is not None:
            yield held
        held = None
        if isinstance(change, Put) and isinstance(change.value, AddressSet):
            held = Put(change.kind, change.name, change.value.copy())
        else:
            yield change
    if held is not None:
        yield held


def _minus(a: AddressSet, b: AddressSet) -> AddressSet:
    return AddressSet(a.addresses - b.addresses, a.prefixes - b.prefixes)


def _both(a: AddressSet, b: AddressSet) -> AddressSet:
    return AddressSet(a.addresses & b.addresses, a.prefixes & b.prefixes)


# --- the dispatcher's side -------------------------------------------------------------------------------------------


class Edit(NamedTuple):
    """An encoded change of one object; `members` > 0: a change of so many members, 0: it replaces the object."""

    key: ObjectKey
    pieces: tuple[bytes, ...]
    members: int = 0


class Position(NamedTuple):
    epoch: str
    revision: int
    digest: int


class Publisher:
    """One host's stream: a window of unacknowledged messages; behind it changes coalesce per object."""

    __slots__ = ("_flight", "_pending", "_waiting", "epoch", "held", "live", "sent", "window")

    def __init__(self, window: int = WINDOW) -> None:
        self.window = window
        self.live = False  # a session is open and the host takes our content
        self.held = ""  # a session is open and the host refuses our content: why
        self.epoch = ""
        self.sent = 0  # the revision the host has when it has received everything sent
        self._flight: deque[tuple[int, int]] = deque()  # first and last commit that each unacknowledged message carries
        self._pending: dict[ObjectKey, list[Edit] | None] = {}  # None: the whole object, as it is when its turn comes
        self._waiting: tuple[int, int, int] | None = None  # first and last commit that is pending, digest after it

    def open(self, hello: Hello, at: Position, whole: Callable[[], Iterable[bytes]], adopt: bool) -> list[bytes]:
        """Answers a Hello: nothing but a header where the host is up to date, else a snapshot."""
        self.close()
        self.epoch, self.sent = at.epoch, at.revision
        same = hello.epoch == at.epoch and hello.revision <= at.revision
        if not adopt and not same and hello.epoch:
            ahead = f"it is at revision {hello.revision} of this store, which is at {at.revision}"
            self.held = ahead if hello.epoch == at.epoch else f"it follows another store (epoch {hello.epoch})"
            return wire.encode_snapshot(*at, False, whole())
        self.live = True
        self._flight.append((0, at.revision))
        if same and not adopt and hello.digest == at.digest:  # who holds back hears nothing but a whole state
            return wire.encode_delta(at.epoch, (hello.revision, at.revision), at.digest, ())
        return wire.encode_snapshot(*at, adopt, whole())

    def close(self) -> None:
        self.live, self.held, self._waiting = False, "", None
        self._flight.clear()
        self._pending.clear()

    def push(self, revision: int, digest: int, edits: Sequence[Edit], first: int = 0) -> list[bytes] | None:
        """A commit that concerns this host; the frames to send now, if the window is open. It may be all from `first`
        on."""
        if not self.live:
            return None
        if self._waiting is not None or len(self._flight) >= self.window:
            self._coalesce(revision, digest, edits, first or revision)
            return None
        previous, self.sent = self.sent, revision
        self._flight.append((first or revision, revision))
        pieces = edits[0].pieces if len(edits) == 1 else [piece for edit in edits for piece in edit.pieces]
        return wire.encode_delta(self.epoch, (previous, revision), digest, pieces)

    def _coalesce(self, revision: int, digest: int, edits: Sequence[Edit], first: int) -> None:
        first = first if self._waiting is None else self._waiting[0]
        self._waiting = (first, revision, digest)
        for edit in edits:
            before = self._pending.get(edit.key, [])
            if edit.members == 0 or before is None or edit.members + sum(e.members for e in before) > COALESCE:
                self._pending[edit.key] = None
            else:
                self._pending[edit.key] = [*before, edit]

    def ack(self, revision: int) -> bool:
        """True where something is waiting that may go now: call `resume`."""
        flight = self._flight
        while flight and flight[0][1] <= revision:
            flight.popleft()
        return self._waiting is not None and len(flight) < self.window

    def resume(self, whole: Callable[[ObjectKey], Sequence[bytes]]) -> list[bytes] | None:
        """`whole` gives an object as it is now (or its Delete)."""
        if self._waiting is None or len(self._flight) >= self.window:
            return None
        first, last, digest = self._waiting
        pieces = [piece for key, edits in self._pending.items() for piece in self._pieces(key, edits, whole)]
        self._pending.clear()
        self._waiting = None
        previous, self.sent = self.sent, last
        self._flight.append((first, last))
        return wire.encode_delta(self.epoch, (previous, last), digest, pieces)

    @staticmethod
    def _pieces(
        key: ObjectKey, edits: list[Edit] | None, whole: Callable[[ObjectKey], Sequence[bytes]]
    ) -> Iterable[bytes]:
        return whole(key) if edits is None else (piece for edit in edits for piece in edit.pieces)

    @property
    def waiting(self) -> bool:
        """Something is behind the window."""
        return self._waiting is not None

    @property
    def unsettled(self) -> int | None:
        """The oldest commit that this host has not acknowledged; None when it has all that concerns it."""
        if self._flight:
            return self._flight[0][0]
        return None if self._waiting is None else self._waiting[0]

    def has(self, revision: int) -> bool:
        """The host's kernel has everything of `revision` that concerns it."""
        return self.live and ((oldest := self.unsettled) is None or oldest > revision)
