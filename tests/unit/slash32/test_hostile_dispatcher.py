# Frames of a dispatcher that are not what they should be: one line of refusal, or a replica that is what its digest
# says; where anything is wrong with a message, nothing of it is taken.
from __future__ import annotations

import os
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slash32 import wire
from slash32.net import parse_address, parse_prefix
from slash32.pack import MASK, AddressSet, Kind, digest_of
from slash32.policy import Action, Direction, HostEndpoint, Policy, Profile, Rule, Tier
from slash32.sync import Applied, Held, NeedSnapshot, Replica
from slash32.wire import Delete, Delta, Members, Pong, Put, Snapshot, WireError

COUNT = 20_000 if os.environ.get("SLASH32_COUNTS") == "full" else 600
LONGEST = 500  # characters of what is said about a frame


def addresses(*numbers: int) -> AddressSet:
    return AddressSet({bytes((10, 65, 0, n)) for n in numbers}, {parse_prefix("10.66.0.0/26")})


PUTS = (
    Put(Kind.POLICY, "p", Policy("p", "all()", (Direction.INGRESS,), 1.0, (Rule(Action.ALLOW, 6),))),
    Put(Kind.STAGED, "p", Policy("p", "all()", (Direction.INGRESS,), staged=True)),
    Put(Kind.TIER, "app", Tier("app", 5.0, Action.PASS)),
    Put(Kind.PROFILE, "q", Profile("q", (Rule(Action.DENY),), (), {"zone": "a"})),
    Put(Kind.HOSTENDPOINT, "e", HostEndpoint("e", "h1", "eth0", {"a": "b"})),
    Put(Kind.SET, "all()", addresses(1, 2, 3)),
    Put(Kind.HOST, "h1", (parse_address("192.0.2.1"),)),
    Put(Kind.ROUTE, parse_prefix("10.65.0.1/32"), ("h1",)),
)
CHANGES = (
    Put(Kind.POLICY, "p", Policy("p", 'role == "db"', (Direction.EGRESS,))),
    Put(Kind.PROFILE, "new", Profile("new")),
    Delete(Kind.TIER, "app"),
    Delete(Kind.HOST, "nobody"),
    Delete(Kind.ROUTE, parse_prefix("10.65.0.1/32")),
    Members("all()", addresses(4), addresses(1)),
    Members("has(new)", addresses(5), AddressSet()),
    Put(Kind.SET, "all()", addresses(9)),
)


def digest(replica: Replica) -> int:
    """Of what is really there."""
    return sum(digest_of(kind, name, value) for kind in Kind for name, value in replica.objects(kind).items()) & MASK


def replica() -> Replica:
    found = Replica()
    found.hello()
    taken = found.receive(Snapshot("e", 7, sum(digest_of(*put) for put in PUTS) & MASK, False, PUTS))
    assert isinstance(taken[0], Applied) and digest(found) == found.digest
    return found


def after(changes: tuple[wire.Change, ...]) -> int:
    """The digest once these are taken."""
    found = replica()
    found._apply(changes)
    return found.digest


def messages() -> list[wire.FromDispatcher]:
    right = after(CHANGES)
    return [
        Delta("e", 7, 8, right, CHANGES),
        Delta("e", 7, 9, after(CHANGES[:1]), CHANGES[:1]),
        Delta("e", 6, 8, right, CHANGES),
        Delta("e", 7, 8, right ^ 1, CHANGES),
        Delta("other", 7, 8, right, CHANGES),
        Snapshot("e", 8, sum(digest_of(*put) for put in PUTS[:3]) & MASK, False, PUTS[:3]),
        Snapshot("e", 8, 7, False, PUTS[:3]),
        Snapshot("e", 6, sum(digest_of(*put) for put in PUTS) & MASK, False, PUTS),
        Snapshot("other", 8, sum(digest_of(*put) for put in PUTS) & MASK, False, PUTS),
        Snapshot("other", 1, sum(digest_of(*put) for put in PUTS) & MASK, True, PUTS),
        Snapshot("e", 9, sum(digest_of(*p) for p in PUTS[:3]) & MASK, False, (*PUTS[:3], Delete(Kind.SET, "all()"))),
        Snapshot("e", 9, sum(digest_of(*p) for p in PUTS[:3]) & MASK, False, (*PUTS[:3], CHANGES[5])),
        Pong(7),
        Pong(8),
    ]


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=20),
    st.binary(max_size=20), st.just([]), st.just({}), st.lists(st.integers(0, 300), max_size=3),
    st.sampled_from(["p", "all()", "h1", "e", bytes(4), bytes(17), 10 ** 18, "x" * 70_000, "a\nb", "\x1b[2J"]),
)  # fmt: skip


def altered(data: st.DataObject, item: Any) -> Any:
    """One place of it, however deep, is another."""
    if not isinstance(item, list) or not item or data.draw(st.integers(0, 5)) == 0:
        return data.draw(ODD)
    at = data.draw(st.integers(0, len(item) - 1))
    what = data.draw(st.sampled_from(["deeper", "deeper", "deeper", "drop", "twice", "swap"]))
    if what == "deeper":
        return [*item[:at], altered(data, item[at]), *item[at + 1 :]]
    if what == "drop":
        return item[:at] + item[at + 1 :]
    if what == "twice":
        return [*item[: at + 1], item[at], *item[at + 1 :]]
    return [*item[at:], *item[:at]]


def mangled(data: st.DataObject, frames: list[bytes]) -> list[bytes]:
    whole = b"".join(frames)
    if data.draw(st.booleans()):
        unpacker = msgpack.Unpacker()
        unpacker.feed(whole)
        found = altered(data, list(unpacker))
        whole = b"".join(map(msgpack.packb, found if isinstance(found, list) else [found])) or b"\0"
    else:
        raw = bytearray(whole)
        for _ in range(data.draw(st.integers(1, 3))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        whole = bytes(raw[: data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))])
    cut = data.draw(st.integers(0, len(whole)))
    return data.draw(st.sampled_from([[whole], [whole[:cut], whole[cut:]], [whole, b""], [whole, whole], []]))


def position(found: Replica) -> tuple[object, ...]:
    """All of it, frozen: sets change in place."""
    frozen = {
        (kind, name): frozenset(value.addresses | value.prefixes) if isinstance(value, AddressSet) else value
        for kind in Kind
        for name, value in found.objects(kind).items()
    }
    return found.epoch, found.revision, found.digest, frozen


@given(st.data())
@settings(max_examples=COUNT, deadline=None)
def test_nothing_of_a_wrong_message_is_taken(data: st.DataObject) -> None:
    frames = mangled(data, wire.encode_to_host(data.draw(st.sampled_from(messages()))))
    found = replica()
    before = position(found)
    try:
        message = wire.decode_from_dispatcher(frames)
    except WireError as error:
        line = str(error)
        assert line.isprintable() and len(line) < LONGEST, line
        return
    if not isinstance(message, Snapshot | Delta | Pong):
        return
    outcomes = found.receive(message)
    assert digest(found) == found.digest, "it is what it says"
    if not any(isinstance(outcome, Applied) for outcome in outcomes):
        assert position(found) == before
        assert all(isinstance(outcome, NeedSnapshot | Held) for outcome in outcomes)
    again = Replica.load(found.dump())
    assert position(again) == position(found), "what it has taken, a restart finds again"


@pytest.mark.parametrize("number", range(14))
def test_the_controls(number: int) -> None:
    """As they are, these are taken, or refused for what is wrong with them."""
    message = wire.decode_from_dispatcher(wire.encode_to_host(messages()[number]))
    assert isinstance(message, Snapshot | Delta | Pong)
    found = replica()
    before = position(found)
    kinds = [type(outcome) for outcome in found.receive(message)]
    taken = number in (0, 1, 5, 9)
    assert (kinds == [Applied]) == taken and (position(found) != before) == taken
    assert digest(found) == found.digest
