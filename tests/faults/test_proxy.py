# Hosts that reach the dispatcher through somebody who loses, doubles, cuts, swaps and flips what they say: whatever a
# host holds at any moment is what some revision had, and in the end all hold what a host would get that knew nothing.
from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from dispatcher_rig import FakeHost, Rack, document, guest, policy, turn, until
from proxy import FAULTS, Proxy

from hostd.session.dealer import Place
from hostd.session.feed import Disconnected
from slash32.pack import Kind, ObjectKey, Value
from slash32.sync import Applied, Outcome, Replica
from slash32.wire import Delta, Pong, Snapshot

FULL = os.environ.get("SLASH32_COUNTS") == "full"
SEEDS = range(20 if FULL else 2)
ROUNDS = 120 if FULL else 40
NAMES = ("one", "two", "three")
WEB = 'role == "web"'


class Versions:
    """What each revision said: all policies carry its number as their order, and so does the set's one address."""

    def __init__(self) -> None:
        self.orders: list[tuple[int, float]] = []  # by revision

    def documents(self, number: int) -> list[dict[str, Any]]:
        made = [policy(name, WEB, WEB) for name in NAMES]
        for one in made:
            one["spec"]["order"] = number
        nets = document("GlobalNetworkSet", "numbers", nets=[f"10.9.{number >> 8}.{number & 255}/32"])
        nets["metadata"]["labels"] = {"role": "web"}
        return [*made, nets]

    def at(self, revision: int) -> float:
        return next(order for since, order in reversed(self.orders) if since <= revision)

    def check(self, replica: Replica) -> None:
        """All of one revision, or nothing yet."""
        found = {found.order for name in NAMES if (found := replica.get(ObjectKey(Kind.POLICY, name))) is not None}  # type: ignore[union-attr]
        if not found:
            return
        assert len(found) == 1 and len(replica.objects(Kind.POLICY)) == len(NAMES), f"parts of revisions: {found}"
        (order,) = found
        members = replica.get(ObjectKey(Kind.SET, WEB))
        numbers = [p for p in members.prefixes if p.address[:2] == b"\x0a\x09"]  # type: ignore[union-attr]
        numbers = [int.from_bytes(p.address[2:]) for p in numbers] or [
            int.from_bytes(a[2:]) for a in members.addresses if a[:2] == b"\x0a\x09"  # type: ignore[union-attr]
        ]
        assert numbers == [order], f"{numbers} with {order}"
        assert order == self.at(replica.revision), f"revision {replica.revision} had {self.at(replica.revision)}"


class Watched(Replica):
    versions: Versions

    def receive(self, message: Snapshot | Delta | Pong) -> list[Outcome]:
        outcomes = super().receive(message)
        if any(isinstance(outcome, Applied) for outcome in outcomes):
            self.versions.check(self)
        return outcomes


def watched(versions: Versions) -> Replica:
    replica = Watched()
    replica.versions = versions
    return replica


@pytest.fixture
def proxies() -> Iterator[list[Proxy]]:
    made: list[Proxy] = []
    yield made
    for one in made:
        one.close()


def behind(host: FakeHost, *proxies: Proxy) -> None:
    host.places = tuple(Place(f"tcp://127.0.0.1:{one.port}", host.dispatcher.public_key) for one in proxies)


def happened(proxies: list[Proxy]) -> Counter[str]:
    return sum((proxy.done for proxy in proxies), start=Counter())


def content(replica: Replica) -> dict[Kind, dict[Any, Value]]:
    return {kind: dict(replica.objects(kind)) for kind in Kind}


def fresh(host: FakeHost) -> dict[Kind, dict[Any, Value]]:
    """What it would get that knew nothing, on a good line."""
    host.stop()
    host.places = (Place(f"tcp://127.0.0.1:{host.dispatcher.port}", host.dispatcher.public_key),)
    host.replica = Replica()
    host.start()
    until(lambda: host.in_sync, [host])
    return content(host.replica)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_line_is_so_bad_that_a_host_holds_what_no_revision_had(
    rack: Rack, proxies: list[Proxy], seed: int
) -> None:
    noise, versions = random.Random(seed), Versions()
    hosts = rack.begin(4)
    for number, host in enumerate(hosts, 1):
        host.claim(guest(number))
    rack.settle()
    for host in hosts[1:]:  # the first has a good line
        host.stop()
        host.replica = watched(versions)
        proxies += [Proxy(rack.dispatcher.port, seed * 10 + len(proxies)) for _ in range(2)]
        behind(host, *proxies[-2:])
        host.start()
    versions.orders.append((0, 0))
    versions.orders.append((rack.dispatcher.apply(*versions.documents(1)), 1))
    rack.settle()
    for host in hosts:
        host.events.clear()
    for proxy in proxies:
        proxy.odds = 0.15
    for number in range(2, 40 * ROUNDS):
        if number > ROUNDS and set(FAULTS) <= set(happened(proxies)):
            break
        revision = rack.dispatcher.get("/v1/status")["revision"] + 1
        versions.orders.append((revision, number))  # before anybody can hear of it
        assert rack.dispatcher.apply(*versions.documents(number)) == revision
        for _ in range(noise.randrange(4)):
            turn(hosts, 0.02)
    for proxy in proxies:
        proxy.calm()
    rack.until(lambda: all(host.in_sync for host in hosts))
    rack.settle()
    assert set(FAULTS) <= set(happened(proxies)), f"the control: {happened(proxies)}"
    assert any(isinstance(e, Disconnected) for host in hosts[1:] for e in host.events)
    assert not any(isinstance(e, Disconnected) for e in hosts[0].events), "the good line was not touched"
    for host in hosts:
        assert host.objects(Kind.POLICY)["one"].order == versions.orders[-1][1]  # type: ignore[union-attr]
        held = content(host.replica)
        assert held == fresh(host)
    assert rack.dispatcher.process and rack.dispatcher.process.poll() is None
    assert "Traceback" not in rack.dispatcher.log.read_text()


def test_the_check_of_revisions_can_fail(rack: Rack) -> None:
    versions = Versions()
    (host,) = rack.begin(1)
    host.claim(guest(1))
    versions.orders += [(0, 0), (rack.dispatcher.apply(*versions.documents(1)), 1)]
    rack.settle()
    versions.check(host.replica)
    rack.dispatcher.apply({**versions.documents(2)[0]})
    rack.settle()
    with pytest.raises(AssertionError, match="parts of revisions"):
        versions.check(host.replica)
    rack.dispatcher.apply(*versions.documents(2))
    rack.settle()
    with pytest.raises(AssertionError, match="had 1"):
        versions.check(host.replica)


@pytest.mark.parametrize("seed", SEEDS)
def test_claims_and_releases_arrive_whatever_the_line_does(rack: Rack, proxies: list[Proxy], seed: int) -> None:
    noise = random.Random(seed)
    hosts = rack.begin(3)
    rack.dispatcher.apply(policy("p", WEB, WEB))
    for host in hosts[1:]:
        host.stop()
        proxies += [Proxy(rack.dispatcher.port, seed * 7 + len(proxies), 0.2) for _ in range(2)]
        behind(host, *proxies[-2:])
        host.start()
    for round_ in range(40 * ROUNDS):
        if round_ > ROUNDS and happened(proxies)["drop"] and happened(proxies)["flip"]:
            break
        host = noise.choice(hosts)
        number = 100 * hosts.index(host) + noise.randrange(1, 40)
        one = guest(number, "web", f"10.65.{number >> 8}.{number & 255}")
        if one.key in host.claims and round_ % 3:
            host.release(one.key)
        else:
            host.claim(one)
        turn(hosts, 0.02)
    for proxy in proxies:
        proxy.calm()
    rack.until(lambda: all(host.in_sync for host in hosts))
    wanted = {(host.name, *key) for host in hosts for key in host.claims}
    assert wanted
    rack.until(lambda: held(rack) == wanted)
    rack.settle()
    assert not any(host.refused for host in hosts)
    for host in hosts:
        found = content(host.replica)
        assert found == fresh(host)
        assert len(found[Kind.ROUTE]) == len(wanted)
    assert happened(proxies)["drop"] and happened(proxies)["flip"], "the control"


def held(rack: Rack) -> set[tuple[str, str, str]]:
    return {(e["host"], e["uuid"], e["mac"]) for e in rack.dispatcher.get("/v1/endpoints")["items"]}


def test_a_line_that_hangs_is_left_for_another(rack: Rack, proxies: list[Proxy]) -> None:
    """Nothing is closed, nothing comes any more: the host finds out by itself, and so does the dispatcher."""
    h1, _ = rack.begin(2)
    h1.stop()
    proxies += [Proxy(rack.dispatcher.port, 1), Proxy(rack.dispatcher.port, 2)]
    behind(h1, *proxies)
    h1.start()
    rack.until(lambda: h1.in_sync)
    used = next(proxy for proxy in proxies if proxy.connections)
    other = next(proxy for proxy in proxies if proxy is not used)
    used.hang()
    h1.claims[guest(1).key] = guest(1)
    revision = rack.dispatcher.apply(policy("p", WEB, WEB))
    rack.until(lambda: h1.in_sync and other.connections and h1.replica.revision > revision)
    assert used.done["hang"], "the control"
    rack.settle()
    assert held(rack) == {("h1", *guest(1).key)} and set(h1.objects(Kind.POLICY)) == {"p"}


def test_who_flips_bits_is_noticed_at_once(rack: Rack, proxies: list[Proxy]) -> None:
    """CURVE: not one flipped bit reaches the protocol; the connection ends instead."""
    (h1,) = rack.begin(1)
    h1.stop()
    proxies += [Proxy(rack.dispatcher.port, number, 0.0, ("flip",)) for number in (1, 2)]
    behind(h1, *proxies)
    h1.start()
    rack.until(lambda: h1.in_sync)
    h1.events.clear()
    used = next(proxy for proxy in proxies if proxy.connections)
    used.odds = 1.0
    h1.claim(guest(1))
    rack.until(lambda: used.done["flip"] and any(isinstance(e, Disconnected) for e in h1.events))
    for proxy in proxies:
        proxy.calm()
    rack.until(lambda: h1.in_sync and held(rack) == {("h1", *guest(1).key)})
    for words in ("not msgpack", "unknown form", "Traceback"):
        assert words not in rack.dispatcher.log.read_text()
