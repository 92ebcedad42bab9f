# One simulated host of `bench.fanout`: what it claims and what it was told, with the real wire and sync code, without a
# kernel. Routes, which are everybody's, are kept and checked by full hosts alone: a thousand tables of 100,000 are a
# thousand machines' memory.
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import zmq

from bench.bare import Message
from bench.served import Fleet
from slash32 import wire
from slash32.keys import KeyPair
from slash32.pack import KINDS, AddressSet, Kind
from slash32.sync import Applied, Replica
from slash32.wire import Delta, Hello, Put, Report, Snapshot

_COMMON = (Kind.HOST, Kind.ROUTE)


class Broken(Exception):
    """A host was told what it cannot apply, or was not let in."""


@dataclass(frozen=True)
class Where:
    """A server, with the public key that hosts expect."""

    name: str  # "dispatcher" or "bare"
    endpoint: str
    key: str


def dealer(context: zmq.Context[zmq.Socket[bytes]], where: Where, keys: KeyPair, name: bytes) -> zmq.Socket[bytes]:
    """As hostd's, but that it tries again every 0.1 s however long: no back-off thins out a storm."""
    s = context.socket(zmq.DEALER)
    s.curve_publickey, s.curve_secretkey = keys.public.encode(), keys.secret.encode()
    s.curve_serverkey = where.key.encode()
    for option, value in (
        (zmq.ROUTING_ID, name), (zmq.LINGER, 0), (zmq.SNDHWM, 1000), (zmq.RCVHWM, 64), (zmq.IMMEDIATE, 1),
        (zmq.HANDSHAKE_IVL, 30_000), (zmq.RECONNECT_IVL, 100), (zmq.HEARTBEAT_IVL, 5_000),
        (zmq.HEARTBEAT_TIMEOUT, 15_000), (zmq.HEARTBEAT_TTL, 15_000), (zmq.IPV6, 1),
    ):  # fmt: skip
        s.setsockopt(option, value)
    return s


class Host:
    def __init__(self, fleet: Fleet, number: int, full: bool) -> None:
        self.number, self.name, self.full = number, fleet.names[number], full
        self.claims = {n: fleet.endpoint(n) for n in fleet.of_host(number)}
        self.replica = Replica()
        self.twin = Replica()  # what the bare line's messages go to

    def hello(self, fresh: bool) -> list[bytes]:
        hello: Hello = (Replica() if fresh else self.replica).hello()._replace(name=self.name)
        report = Report(1, tuple(self.claims.values()))
        return [wire.encode_to_dispatcher(hello), wire.encode_to_dispatcher(report)]

    def begin(self, frames: Message) -> None:
        """A first snapshot. All its objects, or all but the common ones, with the digest it came with."""
        if self.full:
            said = wire.decode_from_dispatcher(frames)
            assert isinstance(said, Snapshot)
            if [o for o in self.replica.receive(said) if not isinstance(o, Applied)] or not self.replica.in_sync:
                raise Broken(f"host {self.name}: the snapshot was not taken")
            return
        said = wire.decode_from_dispatcher([frames[0], *(f for f in frames[1:] if KINDS[f[2]] not in _COMMON)])
        assert isinstance(said, Snapshot)
        _fill(self.replica, [c for c in said.objects if isinstance(c, Put)])
        self.replica.epoch, self.replica.revision, self.replica.digest = said.epoch, said.revision, said.digest
        self.replica.in_sync = True

    def again(self, frames: Message) -> None:
        """The same snapshot once more: it must leave the host where it was."""
        said = header(frames[0])
        if said[1:4] != [self.replica.epoch, self.replica.revision, self.replica.digest]:
            raise Broken(f"host {self.name}: a snapshot of another content than it had")
        self.replica.in_sync = True

    def pair(self) -> None:
        """The twin begins where the replica is, with all but the common objects."""
        self.twin = Replica()
        objects = [Put(k, n, v) for k in Kind if k not in _COMMON for n, v in self.replica.objects(k).items()]
        _fill(self.twin, objects)
        self.twin.epoch, self.twin.revision, self.twin.digest = (
            self.replica.epoch, self.replica.revision, self.replica.digest)  # fmt: skip


def _fill(replica: Replica, objects: Sequence[Put]) -> None:
    for put in objects:
        copy = put.value.copy() if isinstance(put.value, AddressSet) else put.value
        replica._content[put.kind][put.name] = copy


def header(frame: bytes) -> list[Any]:
    unpacker = msgpack.Unpacker()
    unpacker.feed(frame)
    return list(unpacker.unpack())


def take(replica: Replica, frames: Message, name: str) -> int:
    """Applies a delta, as hostd does; the revision to acknowledge."""
    said = wire.decode_from_dispatcher(frames)
    assert isinstance(said, Delta)
    for outcome in replica.receive(said):
        if not isinstance(outcome, Applied):
            raise Broken(f"host {name}: {outcome}")
        return outcome.revision
    if replica.in_sync and replica.revision == said.revision:
        return said.revision
    raise Broken(f"host {name}: a delta from {said.previous} to {said.revision} was not taken at {replica.revision}")
