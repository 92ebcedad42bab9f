# Owns: what a commit is (writes of typed records, and their bytes) and what a store must do with it. Pure.
# A store is an ordered log of commits, numbered by revision; whoever applies all of them has the same content.
from __future__ import annotations

import enum
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import msgpack

from slash32 import resources
from slash32.errors import Slash32Error
from slash32.model import Endpoint, EndpointKey
from slash32.net import Address
from slash32.pack import WireError, pack_endpoint, unpack_endpoint

AUDIT_KEPT = 10_000  # entries; the oldest go
ANY = (1 << 63) - 1  # revision: whatever it is


class StoreError(Slash32Error):
    """One line: which store, what is wrong, what to do."""


class Table(enum.StrEnum):
    RESOURCE = "resource"  # (kind, name) -> Resource
    ENDPOINT = "endpoint"  # (uuid, mac) -> Holding
    EXPECTED = "expected"  # (host, uuid, mac) -> Coming
    HOST = "host"  # (name) -> HostState
    SUPERSEDED = "superseded"  # (epoch) -> int: hosts of that store, up to this revision, are to follow this one
    DISPATCHER = "dispatcher"  # (name) -> Peer
    AUDIT = "audit"  # (revision as 20 digits, number as 4 digits) -> Entry


class Holding(NamedTuple):
    """A live claim."""

    host: str
    endpoint: Endpoint


class Coming(NamedTuple):
    """A guest that is on its way to a host by live migration; whose it is says the table of endpoints."""

    endpoint: Endpoint


class HostState(NamedTuple):
    """What is known of a host beside its resource."""

    addresses: tuple[Address, ...] = ()  # next hops that it reported
    ahead: int | None = None  # it was seen at this revision, beyond ours: this store is an old copy
    fenced: str = ""  # an operator's reason: nothing it claims is granted
    next_key: str = ""  # a key (Z85) it may connect with, too, and that replaces its present one when it does


class Peer(NamedTuple):
    """A dispatcher of this store."""

    address: str  # tcp://ADDRESS:PORT, where hosts and other dispatchers connect
    public_key: str  # Z85


class Entry(NamedTuple):
    """Who changed what. `at`: Unix time, seconds, as the dispatcher's clock had it: never used to decide anything."""

    at: float
    who: str  # "root (unix socket)", "token ci-deploy from 10.0.0.9", ...
    what: str  # "GlobalNetworkPolicy web"
    change: str  # created | configured | deleted | fenced | ...


Record = resources.Resource | Holding | Coming | HostState | Peer | Entry | int
Key = tuple[str, ...]


class Write(NamedTuple):
    """`record` None: it is gone."""

    table: Table
    key: Key
    record: Record | None


class Commit(NamedTuple):
    """All or nothing."""

    revision: int
    writes: tuple[Write, ...]


@dataclass(slots=True)
class Saved:
    """The content of a store at a revision."""

    epoch: str
    revision: int
    records: dict[tuple[Table, Key], Record] = field(default_factory=dict)


# --- a store ---------------------------------------------------------------------------------------------------------


class Landed(NamedTuple):
    """The proposal is the commit of that revision, durably."""

    revision: int


class Foreign(NamedTuple):
    """Another dispatcher's commit, the next one after all that were told. A proposal of that revision is void."""

    commit: Commit


class Replaced(NamedTuple):
    """Too much was missed: this is all there is now. A proposal is void."""

    saved: Saved


class Failed(NamedTuple):
    """The proposal was not made a commit, one line says why. `unknown`: it may be one after all; then it comes as
    Foreign."""

    reason: str
    unknown: bool = False


class Head(NamedTuple):
    """Answers `ask_head`: the last revision there was when it was asked; all of it was told before."""

    revision: int


Outcome = Landed | Foreign | Replaced | Failed | Head


class Store(Protocol):
    """Used by one thread. Nothing blocks but `load` and what `propose` of a local disk takes."""

    shared: bool  # other dispatchers may commit, too

    @property
    def trouble(self) -> str:
        """Why it takes no proposals now, one line; empty: it does."""

    def load(self) -> Saved:
        """Once, first. Raises StoreError."""

    def propose(self, commit: Commit) -> None:
        """To be the next commit. One at a time: `take` has its Landed, Failed, or what makes it void."""

    def ask_head(self) -> None:
        """`take` has a Head in time, or none while the store cannot be reached."""

    def take(self) -> list[Outcome]:
        """What has come since, in order. The `wake` that the store was made with was called when something came."""

    def close(self) -> None: ...


# --- bytes -----------------------------------------------------------------------------------------------------------


def encode_record(record: Record) -> bytes:
    match record:
        case Holding(host, endpoint):
            found: Any = [host, pack_endpoint(endpoint)]
        case Coming(endpoint):
            found = pack_endpoint(endpoint)
        case HostState(addresses, ahead, fenced, next_key):
            found = [list(addresses), ahead, fenced, next_key]
        case Peer() | Entry():
            found = list(record)
        case int():
            found = record
        case _:
            return json.dumps(resources.encode(record), separators=(",", ":")).encode()
    return bytes(msgpack.packb(found))


def decode_record(table: Table, data: bytes) -> Record:
    """Raises StoreError, one line."""
    try:
        if table is Table.RESOURCE:
            return resources.decode(json.loads(data), stored=True)
        raw = msgpack.unpackb(data)
        match table:
            case Table.ENDPOINT:
                host, endpoint = raw
                return Holding(str(host), unpack_endpoint(endpoint))
            case Table.EXPECTED:
                return Coming(unpack_endpoint(raw))
            case Table.HOST:
                addresses, ahead, fenced, next_key = raw
                return HostState(tuple(addresses), ahead, str(fenced), str(next_key))
            case Table.DISPATCHER:
                return Peer(*map(str, raw))
            case Table.AUDIT:
                at, *words = raw
                return Entry(float(at), *map(str, words))
            case Table.SUPERSEDED:
                return int(raw)
    except (ValueError, TypeError, msgpack.UnpackException, WireError, Slash32Error) as e:
        raise StoreError(f"a record of table {table.value} cannot be read ({' '.join(str(e).split())[:200]})") from None


def encode_writes(writes: Sequence[Write]) -> bytes:
    rows = [[w.table.value, list(w.key), None if w.record is None else encode_record(w.record)] for w in writes]
    return bytes(msgpack.packb(rows))


def decode_writes(data: bytes) -> tuple[Write, ...]:
    """Raises StoreError, one line."""
    try:
        rows = [(Table(table), tuple(map(str, key)), body) for table, key, body in msgpack.unpackb(data)]
    except (ValueError, TypeError, msgpack.UnpackException) as e:
        raise StoreError(f"a commit cannot be read ({' '.join(str(e).split())[:200]})") from None
    return tuple(Write(t, key, None if body is None else decode_record(t, body)) for t, key, body in rows)


def endpoint_key(key: Key) -> EndpointKey:
    return EndpointKey(*key)
