# The replica protocol over a transport that loses, doubles, reorders and delays, with restarts of both sides at any
# point: in the end the replica is what the publisher has; what waits is bounded; nothing is wiped by accident.
from __future__ import annotations

import os
import random
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from slash32 import wire
from slash32.net import Prefix
from slash32.pack import MASK, AddressSet, Kind, ObjectKey, Value, WireError, digest_of
from slash32.policy import Direction, Policy
from slash32.sync import COALESCE, NO_SESSION, WINDOW, Applied, Edit, Held, NeedSnapshot, Position, Publisher, Replica
from slash32.wire import Ack, Change, Delete, Delta, Hello, Members, Pong, Put, Snapshot

FULL = os.environ.get("SLASH32_COUNTS") == "full"
KEYS = (
    ObjectKey(Kind.POLICY, "p"),
    ObjectKey(Kind.POLICY, "q"),
    ObjectKey(Kind.SET, "all()"),
    ObjectKey(Kind.SET, 'role == "web"'),
    ObjectKey(Kind.HOST, "h1"),
    ObjectKey(Kind.ROUTE, Prefix(b"\x0a\x00\x00\x01", 32)),
)


def value(key: ObjectKey, n: int) -> Value:
    kind = key.kind
    if kind is Kind.POLICY:
        return Policy(str(key.name), f'role == "{n}"', (Direction.INGRESS,))
    if kind is Kind.SET:
        prefixes = {Prefix(b"\x0a\x01\0\0", 16)} if n & 1 else set()
        return AddressSet({bytes((10, 0, 0, b)) for b in range(8) if n >> b & 1}, prefixes)
    return (bytes((192, 0, 2, n)),) if kind is Kind.HOST else (f"h{n}",)


class Source:
    """The dispatcher's content, and the edits that lead from one state to the next."""

    def __init__(self) -> None:
        self.content: dict[ObjectKey, Value] = {}

    def digest(self) -> int:
        return sum(digest_of(*key, v) for key, v in self.content.items()) & MASK

    def change(self, key: ObjectKey, new: Value | None) -> list[Edit]:
        old = self.content.get(key)
        if old == new:
            return []
        change: Change = Delete(*key) if new is None else Put(*key, new)
        members = 0
        if isinstance(old, AddressSet) and isinstance(new, AddressSet):
            add = AddressSet(new.addresses - old.addresses, new.prefixes - old.prefixes)
            remove = AddressSet(old.addresses - new.addresses, old.prefixes - new.prefixes)
            change, members = Members(str(key.name), add, remove), len(add) + len(remove)
        self.content.pop(key, None)
        if new is not None:
            self.content[key] = new
        return [Edit(key, wire.encode_change(change), members)]

    def whole(self, key: ObjectKey) -> tuple[bytes, ...]:
        v = self.content.get(key)
        return wire.encode_change(Delete(*key) if v is None else Put(*key, v))

    def everything(self) -> Iterable[bytes]:
        for key in self.content:
            yield from self.whole(key)


def content(replica: Replica) -> dict[ObjectKey, Value]:
    return {ObjectKey(kind, name): v for kind in Kind for name, v in replica.objects(kind).items()}


class Link(RuleBasedStateMachine):
    """One host, one dispatcher, and what is under way between them."""

    @initialize()
    def begin(self) -> None:
        self.source, self.revision, self.epoch = Source(), 0, "e1"
        self.publisher, self.replica = Publisher(), Replica()
        self.down: list[Sequence[bytes]] = []
        self.up: list[bytes] = [wire.encode_to_dispatcher(self.replica.hello())]
        self.seen: dict[ObjectKey, Value] = {}  # what the outcomes add up to

    def at(self) -> Position:
        return Position(self.epoch, self.revision, self.source.digest())

    def tell(self, frames: Sequence[bytes] | None) -> None:
        if frames is not None:
            self.down.append(frames)

    @rule(key=st.sampled_from(KEYS), n=st.integers(0, 255), gone=st.booleans())
    def commit(self, key: ObjectKey, n: int, gone: bool) -> None:
        edits = self.source.change(key, None if gone else value(key, n))
        if edits:
            self.revision += 1
            self.tell(self.publisher.push(self.revision, self.source.digest(), edits))

    @rule(seed=st.integers(0, 2**16), count=st.integers(5, 40))
    def burst(self, seed: int, count: int) -> None:
        noise = random.Random(seed)
        for _ in range(count):
            self.commit(noise.choice(KEYS), noise.randrange(256), noise.random() < 0.2)

    @precondition(lambda self: self.down)
    @rule(at=st.integers(0, 1000), fate=st.sampled_from(["next", "next", "next", "any", "lost", "twice"]))
    def host_receives(self, at: int, fate: str) -> None:
        index = 0 if fate == "next" else at % len(self.down)
        frames = self.down[index] if fate == "twice" else self.down.pop(index)
        if fate != "lost":
            self.host(frames)

    def host(self, frames: Sequence[bytes]) -> None:
        message = wire.decode_from_dispatcher(frames)
        assert isinstance(message, Snapshot | Delta | Pong)
        for outcome in self.replica.receive(message):
            if isinstance(outcome, NeedSnapshot):
                self.up.append(wire.encode_to_dispatcher(self.replica.hello()))
            elif isinstance(outcome, Applied):
                self.follow(outcome)
                self.up.append(wire.encode_to_dispatcher(Ack(outcome.revision)))

    def follow(self, outcome: Applied) -> None:
        for change in outcome.changes:
            if isinstance(change, Put):
                assert self.seen.get(change.key) != change.value, "a change that changes nothing"
                self.seen[change.key] = change.value.copy() if isinstance(change.value, AddressSet) else change.value
            elif isinstance(change, Delete):
                del self.seen[change.key]
            else:
                members = self.seen[change.key]
                assert isinstance(members, AddressSet)
                assert not change.add.addresses & members.addresses and change.remove.addresses <= members.addresses
                members.addresses = members.addresses - change.remove.addresses | change.add.addresses
                members.prefixes = members.prefixes - change.remove.prefixes | change.add.prefixes

    @precondition(lambda self: self.up)
    @rule(at=st.integers(0, 1000), fate=st.sampled_from(["next", "next", "next", "any", "lost", "twice"]))
    def dispatcher_receives(self, at: int, fate: str) -> None:
        index = 0 if fate == "next" else at % len(self.up)
        frame = self.up[index] if fate == "twice" else self.up.pop(index)
        if fate != "lost":
            self.dispatcher(frame)

    def dispatcher(self, frame: bytes) -> None:
        message = wire.decode_from_host(frame)
        if isinstance(message, Hello):
            self.tell(self.publisher.open(message, self.at(), self.source.everything, False))
        elif not self.publisher.live:
            self.tell(wire.encode_to_host(Pong(NO_SESSION)))
        elif isinstance(message, Ack):
            if self.publisher.ack(message.revision):
                self.tell(self.publisher.resume(self.source.whole))
        else:
            self.tell(wire.encode_to_host(Pong(self.publisher.sent)))

    @rule()
    def ping(self) -> None:
        self.up.append(wire.PING)

    @rule()
    def connection_breaks(self) -> None:
        self.down.clear()
        self.up.clear()
        self.replica.lost()
        self.up.append(wire.encode_to_dispatcher(self.replica.hello()))

    @rule(remembers=st.booleans())
    def host_restarts(self, remembers: bool) -> None:
        self.replica = Replica.load(self.replica.dump()) if remembers else Replica()
        self.seen = self.seen if remembers else {}
        self.connection_breaks()

    @rule()
    def dispatcher_restarts(self) -> None:
        self.publisher = Publisher()
        self.connection_breaks()

    @invariant()
    def bounded(self) -> None:
        if hasattr(self, "publisher"):
            assert len(self.publisher._flight) <= WINDOW
            assert len(self.publisher._pending) <= len(KEYS)
            assert not self.replica.held

    def teardown(self) -> None:
        if not hasattr(self, "publisher"):
            return
        for _ in range(60):
            while self.down or self.up:
                for frames in self.down:
                    self.host(frames)
                self.down.clear()
                up, self.up = self.up, []
                for frame in up:
                    self.dispatcher(frame)
            settled = self.replica.in_sync and self.publisher.has(self.revision)
            if settled and self.replica.digest == self.source.digest():
                break
            self.up.append(wire.PING if self.replica.in_sync else wire.encode_to_dispatcher(self.replica.hello()))
        assert content(self.replica) == self.source.content == self.seen
        assert self.replica.digest == self.source.digest()


def test_any_transport_any_restart() -> None:
    run_state_machine_as_test(
        Link, settings=settings(max_examples=600 if FULL else 100, stateful_step_count=60, deadline=None)
    )


# --- one thing at a time ---------------------------------------------------------------------------------------------


def synced(source: Source, epoch: str = "e1", revision: int = 1) -> tuple[Publisher, Replica]:
    publisher, replica = Publisher(), Replica()
    frames = publisher.open(replica.hello(), Position(epoch, revision, source.digest()), source.everything, False)
    (outcome,) = receive(replica, frames)
    assert isinstance(outcome, Applied) and replica.in_sync
    publisher.ack(revision)
    return publisher, replica


def receive(replica: Replica, frames: Sequence[bytes]) -> list[Applied | Held | NeedSnapshot]:
    message = wire.decode_from_dispatcher(frames)
    assert isinstance(message, Snapshot | Delta | Pong)
    return list(replica.receive(message))


def filled() -> Source:
    source = Source()
    for key in KEYS:
        source.change(key, value(key, 5))
    return source


@pytest.mark.parametrize(
    ("epoch", "revision", "says"),
    [("e2", 50, "another one"), ("e1", 6, "older"), ("e2", 1, "another one")],
)
def test_empty_old_or_other_dispatcher_cannot_wipe(epoch: str, revision: int, says: str) -> None:
    _, replica = synced(filled(), revision=7)
    before = content(replica)
    publisher, other = Publisher(), Source()
    at = Position(epoch, revision, other.digest())
    (outcome,) = receive(replica, publisher.open(replica.hello(), at, other.everything, False))
    assert isinstance(outcome, Held) and says in outcome.reason and replica.held and not replica.in_sync
    assert publisher.held and not publisher.has(revision)
    assert publisher.push(revision + 1, other.digest(), other.change(KEYS[0], value(KEYS[0], 1))) is None
    assert content(replica) == before
    # A delta that fits by chance changes nothing either.
    chance = wire.encode_delta("e1", (7, 8), 0, wire.encode_change(Delete(*KEYS[0])))
    assert receive(replica, chance) == [] and content(replica) == before
    # The positive control: an operator says so.
    at = Position(epoch, revision + 1, other.digest())
    (outcome,) = receive(replica, publisher.open(replica.hello(), at, other.everything, True))
    assert isinstance(outcome, Applied) and content(replica) == other.content and replica.in_sync and not replica.held
    assert (replica.epoch, replica.revision) == (epoch, revision + 1)


def test_same_content_needs_no_snapshot() -> None:
    source = filled()
    publisher, replica = synced(source)
    frames = publisher.open(replica.hello(), Position("e1", 9, source.digest()), source.everything, False)
    assert len(frames) == 1 and len(frames[0]) < 40
    assert receive(replica, frames) == [Applied(9, (), False)]


def test_a_host_that_holds_back_is_let_go_on_though_its_content_is_ours() -> None:
    source = filled()
    publisher, replica = synced(source, revision=7)
    hello = replica.hello()
    (outcome,) = receive(replica, publisher.open(hello, Position("e1", 6, source.digest()), source.everything, False))
    assert isinstance(outcome, Held)
    at = Position("e1", 9, source.digest())  # the old copy has gone on meanwhile
    (outcome,) = receive(replica, publisher.open(hello, at, source.everything, True))
    assert outcome == Applied(9, (), True) and replica.in_sync and not replica.held


def test_snapshot_in_sync_yields_differences_only() -> None:
    source = filled()
    _, replica = synced(source)
    source.change(KEYS[2], value(KEYS[2], 7))
    source.change(KEYS[0], None)
    at = Position("e1", 3, source.digest())
    (outcome,) = receive(replica, Publisher().open(replica.hello(), at, source.everything, False))
    assert isinstance(outcome, Applied) and outcome.snapshot
    assert len(outcome.changes) == 2
    assert Delete(*KEYS[0]) in outcome.changes
    assert Members("all()", AddressSet({b"\x0a\0\0\x01"}), AddressSet()) in outcome.changes


def test_wrong_digest_changes_nothing_and_asks_again() -> None:
    source = filled()
    _, replica = synced(source)
    before = content(replica)
    changes = [wire.encode_change(Delete(*KEYS[0]))[0], wire.encode_change(Put(*KEYS[2], value(KEYS[2], 9)))[0]]
    (outcome,) = receive(replica, wire.encode_delta("e1", (1, 2), 12345, changes))
    assert isinstance(outcome, NeedSnapshot) and content(replica) == before and replica.digest == source.digest()
    replica.hello()
    (outcome,) = receive(replica, wire.encode_snapshot("e1", 3, 12345, False, source.everything()))
    assert isinstance(outcome, NeedSnapshot) and content(replica) == before
    (outcome,) = receive(replica, wire.encode_snapshot("e1", 3, source.digest(), False, source.everything()))
    assert isinstance(outcome, Applied)


def test_window_then_state_not_history() -> None:
    source = filled()
    publisher, replica = synced(source)
    sent = []
    for n in range(2, 5000):
        frames = publisher.push(n, 0, source.change(KEYS[2], value(KEYS[2], n % 256)))
        sent += [frames] if frames else []
    assert len(sent) == WINDOW and publisher.waiting
    assert sum(len(e.pieces[0]) for edits in publisher._pending.values() for e in edits or ()) < 40 * COALESCE
    for n in range(2, 5000):
        publisher.push(5000 + n, source.digest(), source.change(KEYS[0], value(KEYS[0], n % 256)))
    assert set(publisher._pending) == {KEYS[0], KEYS[2]}
    assert publisher.ack(2 + WINDOW - 1)
    frames = publisher.resume(source.whole)
    assert frames is not None and sum(map(len, frames)) < 1000
    assert not publisher._pending and not publisher.waiting
    assert not publisher.has(2 + WINDOW) and publisher.has(2 + WINDOW - 1)
    del replica


def test_a_host_has_a_revision_once_all_of_it_is_acknowledged() -> None:
    source = filled()
    publisher, _ = synced(source)
    assert publisher.has(1) and publisher.has(99)  # 99 does not concern it
    publisher.push(2, source.digest(), source.change(KEYS[0], None))
    assert publisher.has(1) and not publisher.has(2) and not publisher.has(3)
    publisher.ack(2)
    assert publisher.has(2)
    publisher.close()
    assert not publisher.has(1)


def test_dump_is_refused_when_damaged() -> None:
    _, replica = synced(filled())
    dump = replica.dump()
    loaded = Replica.load(dump)
    assert content(loaded) == content(replica) and not loaded.in_sync
    assert (loaded.epoch, loaded.revision, loaded.digest) == (replica.epoch, replica.revision, replica.digest)
    for damaged in (b"", dump[:-1], dump[:40] + bytes([dump[40] ^ 1]) + dump[41:], b"x" + dump):
        with pytest.raises(WireError):
            Replica.load(damaged)


def applied(replica: Replica, frames: Sequence[bytes] | None) -> None:
    assert frames
    (outcome,) = receive(replica, frames)
    assert isinstance(outcome, Applied), "on a perfect transport nothing is ever missed"


@given(st.lists(st.tuples(st.sampled_from(KEYS), st.none() | st.integers(0, 255)), max_size=20), st.randoms())
@settings(max_examples=150, deadline=None)
def test_squashed_and_single_steps_agree(steps: list[tuple[ObjectKey, int | None]], noise: random.Random) -> None:
    """One by one, or coalesced behind a window of one: the same content."""
    source = filled()
    one, replica_one = synced(source)
    late, replica_late = synced(source)
    late.window = 1
    for n, (key, number) in enumerate(steps, 2):
        edits = source.change(key, None if number is None else value(key, number))
        if not edits:
            continue
        frames = one.push(n, source.digest(), edits)
        assert frames
        applied(replica_one, frames)
        one.ack(n)
        frames = late.push(n, source.digest(), edits)
        if frames:
            applied(replica_late, frames)
        if noise.random() < 0.3 and late.ack(replica_late.revision):
            applied(replica_late, late.resume(source.whole))
    while late.ack(replica_late.revision):
        applied(replica_late, late.resume(source.whole))
    assert content(replica_one) == content(replica_late) == source.content
    assert replica_one.digest == replica_late.digest == source.digest()
