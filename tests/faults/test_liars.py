# A registered host that lies: about its name, its addresses, what it has, what it was asked; and floods, and takes
# nothing. It gets what is its own, the others do not notice.
from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from dispatcher_rig import FakeHost, Rack, guest, memory_kib, policy, until
from impostor import Hostile

from slash32 import wire
from slash32.model import Endpoint, SharedAddress
from slash32.net import host_prefix, parse_address, parse_prefix
from slash32.pack import Kind
from slash32.wire import (
    Ack,
    Answer,
    Claim,
    Claimed,
    Delta,
    Expect,
    Hello,
    Ping,
    Pong,
    Refused,
    Release,
    Report,
    Snapshot,
)

FULL = os.environ.get("SLASH32_COUNTS") == "full"
FLOOD = 50_000 if FULL else 3000
WEB = 'role == "web"'
EMPTY = Hello("", 0, 0)


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hostile]:
    """h1's key; h2 is good and has a guest."""
    rack = Rack(tmp_path_factory.mktemp("liars"))
    bad, good = rack.begin(2)
    good.claim(guest(2))
    rack.dispatcher.apply(policy("p", WEB, WEB))
    rack.settle()
    bad.stop()
    found = Hostile(rack, bad)
    yield found
    found.close()
    rack.end()


@pytest.fixture
def liar(town: Hostile) -> Hostile:
    """It begins anew and has nothing."""
    town.anew()
    town.asks()
    host = good(town)
    until(lambda: host.in_sync and set(owners(town).values()) == {"h2"}, [host])
    host.events.clear()
    town.said = len(town.rack.dispatcher.log.read_text())
    town.anew()
    return town


def good(liar: Hostile) -> FakeHost:
    return liar.rack.hosts[1]


def unharmed(liar: Hostile, number: int = 50) -> None:
    """The good host has what it had, and is served."""
    host = good(liar)
    one = guest(number, "web", f"10.65.7.{number}")
    seq = host.claim(one)
    until(lambda: seq in host.answered, [host])
    assert host.in_sync and not host.refused
    held = owners(liar)
    assert held[guest(2).key.uuid] == held[one.key.uuid] == "h2"
    host.release(one.key)
    there = host_prefix(one.addresses[0])
    until(lambda: one.key.uuid not in owners(liar) and there not in host.objects(Kind.ROUTE), [host])
    log = liar.rack.dispatcher.log.read_text()[liar.said :]
    assert "Traceback" not in log and len(log) < 100_000


def owners(liar: Hostile) -> dict[str, str]:
    return {e["uuid"]: e["host"] for e in liar.rack.dispatcher.get("/v1/endpoints")["items"]}


def refusals(liar: Hostile, *endpoints: Endpoint) -> list[str]:
    liar.say(EMPTY, Report(7, endpoints))
    (claimed,) = (m for m in liar.hears(Claimed) if isinstance(m, Claimed))
    return [refusal.message for refusal in claimed.refused]


MINE = guest(9, "web", "10.65.0.9")
STOLEN = {
    "address": replace(MINE, addresses=guest(2).addresses),
    "one of two": replace(MINE, addresses=(*MINE.addresses, *guest(2).addresses)),
    "as shared": replace(MINE, shared=(SharedAddress(guest(2).addresses[0], "vip"),)),
    "a prefix around": replace(MINE, prefixes=(parse_prefix("10.65.0.0/24"),)),
    "exactly that prefix": replace(MINE, prefixes=(parse_prefix("10.65.0.2/32"),)),
    "an address of the fleet": replace(MINE, addresses=(parse_address("192.0.2.3"),)),
}


@pytest.mark.parametrize("what", STOLEN)
def test_it_claims_what_another_has(liar: Hostile, what: str) -> None:
    before = good(liar).objects(Kind.ROUTE)
    said = refusals(liar, STOLEN[what])
    unharmed(liar)
    route = good(liar).objects(Kind.ROUTE)
    assert all(route[prefix] == hops for prefix, hops in before.items()), f"{what}: {said}"
    if what != "a prefix around":  # longest match: its /24 takes nothing from a /32
        assert len(said) == 1
    assert refusals(liar, MINE) == [], "the control: its own it may have"


def test_it_claims_anothers_endpoint(liar: Hostile) -> None:
    """The key of a guest that runs elsewhere, with an address of its own: that guest stays where it is, and so does
    its address."""
    refusals(liar, replace(MINE, key=guest(2).key))
    liar.say(Release(8, guest(2).key), Report(9, ()))
    liar.hears(Claimed)
    unharmed(liar)
    held = {e["uuid"]: (e["host"], e["addresses"]) for e in liar.rack.dispatcher.get("/v1/endpoints")["items"]}
    assert held.get(guest(2).key.uuid) == ("h2", ["10.65.0.2"])


@pytest.mark.parametrize("revision", [10**6, 2**63, 2**64 - 1])
def test_it_acknowledges_what_it_never_got(liar: Hostile, revision: int) -> None:
    """It is thought to have it; nobody else is, and the dispatcher goes on."""
    liar.say(EMPTY, Report(1, ()))
    liar.hears(Claimed)
    good(liar).acknowledges = False
    liar.say(Ack(revision))
    after = liar.rack.dispatcher.apply(policy("q", WEB, f'n == "{time.monotonic_ns()}"'))
    until(lambda: good(liar).replica.revision >= after, [good(liar)])
    assert "h2" in liar.rack.dispatcher.get(f"/v1/revisions/{after}")["pending"]
    assert liar.rack.dispatcher.get("/v1/status")["revision"] < 10**6
    good(liar).acknowledges = True
    assert good(liar).feed
    good(liar).feed.ack(good(liar).replica.revision)
    unharmed(liar)


@pytest.mark.parametrize("epoch", ["", "own", "another", "e" * 64])
@pytest.mark.parametrize("revision", [0, 5, 2**63, 2**64 - 1])
def test_it_lies_about_what_it_has(liar: Hostile, epoch: str, revision: int) -> None:
    """A host that says that it is ahead is left alone with that; what the others get is what they got."""
    said = {"own": good(liar).replica.epoch}.get(epoch, epoch)
    liar.say(Hello(said, revision, 77), Report(1, ()))
    assert any(isinstance(m, Snapshot | Delta | Pong | Refused) for m in liar.hears(Claimed))
    unharmed(liar)
    done = liar.rack.dispatcher.apply(policy("r", WEB, f'n == "{time.monotonic_ns()}"'))
    until(lambda: good(liar).replica.revision >= done, [good(liar)])
    assert good(liar).in_sync and not good(liar).replica.held


def test_it_says_hello_with_anothers_name(liar: Hostile) -> None:
    liar.say(EMPTY._replace(name="h2"), Report(1, (replace(MINE, addresses=guest(2).addresses),)))
    (refused,) = (m for m in liar.hears(Refused) if isinstance(m, Refused))
    assert "h1" in refused.message
    unharmed(liar)
    assert good(liar).feed and not any(type(e).__name__ == "Disconnected" for e in good(liar).events)
    liar.say(EMPTY._replace(name="h1"), Report(2, ()))
    assert liar.hears(Claimed), "the control"


def test_it_answers_what_nobody_asked(liar: Hostile) -> None:
    liar.say(EMPTY, Report(1, ()))
    liar.hears(Claimed)
    for number in (0, 1, 2, 2**31, 2**64 - 1):
        liar.say(Answer(number, '{"nonsense": true}'))
    liar.say(Answer(1, "x" * wire.MAX_ANSWER))
    unharmed(liar)


FLOODS = {
    "claims": [Claim(n, guest(9, "web", f"10.65.9.{n % 250}")) for n in range(500)],
    "refused claims": [Claim(n, guest(300 + n, "web", "10.65.0.2")) for n in range(500)],
    "guests to come": [Expect(n, guest(300 + n, "web", f"10.66.{n // 250}.{n % 250}")) for n in range(500)],
    "releases": [Release(n, guest(n % 3).key) for n in range(500)],
    "hellos": [EMPTY],
    "hellos of another store": [Hello("other", 9, 9)],
    "reports": [Report(1, ()), Report(2, (MINE,))],
    "pings": [Ping()],
    "acks": [Ack(n, (wire.Failure("x", str(n)),)) for n in range(500)],
    "answers": [Answer(1, "{}")],
}


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("kind", FLOODS)
def test_it_floods(liar: Hostile, kind: str, reads: bool) -> None:
    """... and reads what it gets, or nothing at all. Memory is bounded, a good host waits for little of it."""
    process = liar.rack.dispatcher.process
    assert process
    before = memory_kib(process.pid)
    liar.anew(1)
    liar.say(EMPTY, Report(1, (MINE,)))
    most = before
    for number in range(FLOOD):
        liar.say(FLOODS[kind][number % len(FLOODS[kind])])
        while reads and liar.socket.poll(0):
            liar.socket.recv_multipart()
        if number % 1000 == 999:
            unharmed(liar, 60 + number // 1000 % 100)
            most = max(most, memory_kib(process.pid))
    unharmed(liar)
    assert max(most, memory_kib(process.pid)) - before < 64 << 10
    liar.anew()
    liar.asks(12345)


def test_it_reports_as_much_as_it_may(liar: Hostile) -> None:
    """10,000 endpoints of four addresses each, again and again."""
    process = liar.rack.dispatcher.process
    assert process
    before = memory_kib(process.pid)
    many = tuple(
        guest(n, "web", *(f"10.{a}.{n >> 8}.{n & 255}" for a in range(100, 104)))
        for n in range(1000, 1000 + (wire.MAX_REPORT if FULL else 2000))
    )
    for number in range(3):
        liar.anew()
        liar.say(EMPTY, Report(number, many))
        liar.hears(Claimed)
        unharmed(liar, 70 + number)
    until(lambda: good(liar).in_sync, [good(liar)])
    assert len(owners(liar)) == len(many) + 1
    liar.say(Report(9, ()))
    host = good(liar)
    until(lambda: len(owners(liar)) == 1, [host])
    until(lambda: len(host.objects(Kind.ROUTE)) == 1, [host])
    assert memory_kib(process.pid) - before < (400 << 10 if FULL else 120 << 10)


def test_it_never_reads(liar: Hostile) -> None:
    """Its window is full after eight; the changes cost their state, not their number."""
    process = liar.rack.dispatcher.process
    assert process
    liar.anew(1)
    liar.say(EMPTY, Report(1, (MINE,)))
    until(lambda: MINE.key.uuid in owners(liar), [good(liar)])
    sizes, began = [], time.monotonic()
    for number in range(2000 if FULL else 300):
        revision = liar.rack.dispatcher.apply(policy("p", WEB, f'role == "web" || n == "{number % 7}"'))
        until(lambda want=revision: good(liar).replica.revision >= want, [good(liar)])
        if number % 50 == 49:
            sizes.append(memory_kib(process.pid))
    assert sizes[-1] - sizes[0] < 16 << 10, f"{sizes} in {time.monotonic() - began:.0f} s"
    pending = liar.rack.dispatcher.get(f"/v1/revisions/{revision}")["pending"]
    until(lambda: liar.rack.dispatcher.get(f"/v1/revisions/{revision}")["pending"] == ["h1"], [good(liar)])
    assert "h1" in pending
    unharmed(liar)
