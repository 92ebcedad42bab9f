# What a comparison of two worlds says, held against the specification: random worlds and random changes, every pair of
# owners, every kind of packet. And the shape of what it says, by hand.
from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from hypothesis import given, seed, settings
from hypothesis import strategies as st

from slash32.classes import Owner
from slash32.compare import Change, Comparison, compare
from slash32.model import Endpoint, EndpointKey, SharedAddress
from slash32.net import Address, format_address, parse_address, parse_prefix, version
from slash32.policy import (
    Action,
    Direction,
    HostEndpoint,
    Icmp,
    NetworkSet,
    Peer,
    Policy,
    PortRange,
    Profile,
    Rule,
    Tier,
)
from slash32.traffic import Traffic
from slash32.verdict import Judge, Packet, World

FULL = os.environ.get("SLASH32_COUNTS") == "full"
SELECTORS = [
    'role == "web"', 'role != "web"', "all()", "has(env)", '!has(env) && role == "db"', 'env starts with "p"',
    'role in {"db", "net"}',
]  # fmt: skip
NETS = [*map(parse_prefix, (
    "10.0.0.0/8", "10.0.0.2/32", "10.0.0.0/30", "10.66.0.0/16", "10.66.1.0/26", "203.0.113.0/24", "0.0.0.0/0",
    "fd00::/16", "fd00::2/128", "fd00::/126", "2001:db8::/32",
))]  # fmt: skip
RANGES = [PortRange(*r) for r in ((80, 80), (81, 443), (1, 1023), (443, 65535))]
PORTS = (0, 22, 79, 80, 81, 443, 444, 1024)
SPOTS = [*map(parse_address, (
    "10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.9", "10.66.1.1", "10.66.2.1", "203.0.113.2", "198.51.100.1",
    "fd00::1", "fd00::2", "fd00::77", "2001:db8::2", "2a00::1", "10.9.0.1",
))]  # fmt: skip


def key(number: int) -> EndpointKey:
    return EndpointKey(f"00000000-0000-0000-0000-{number:012}", f"52:54:00:00:00:{number:02x}")


class Maker:
    """Random worlds and random changes of them."""

    def __init__(self, number: int) -> None:
        self.chance = random.Random(number)

    def likely(self, odds: float) -> bool:
        return self.chance.random() < odds

    def some(self, values: Any, at_most: int = 2) -> tuple[Any, ...]:
        return tuple(self.chance.sample(list(values), self.chance.randint(1, at_most)))

    def labels(self) -> dict[str, str]:
        found = {"role": self.chance.choice(["web", "db", "net", "else"])} if self.likely(0.8) else {}
        return found | ({"env": self.chance.choice(["prod", "test"])} if self.likely(0.4) else {})

    def endpoint(self, number: int) -> Endpoint:
        addresses = [parse_address(f"10.0.0.{number}")] if self.likely(0.9) else []
        addresses += [parse_address(f"fd00::{number}")] if self.likely(0.5) else []
        addresses += [parse_address(f"10.66.1.{number}")] if self.likely(0.2) else []
        shared = (SharedAddress(parse_address("10.9.0.1"), "vip"),) if self.likely(0.5) else ()
        prefixes = self.some(NETS[3:6], 1) if self.likely(0.4) else ()
        profiles = self.some(["one", "two", "missing"]) if self.likely(0.6) else ()
        return Endpoint(key(number), f"vm{number}", self.labels(), profiles, tuple(addresses), shared, prefixes)

    def peer(self, ports: bool) -> Peer:
        return Peer(
            self.some(NETS) if self.likely(0.25) else (),
            self.some(NETS) if self.likely(0.15) else (),
            self.chance.choice(SELECTORS) if self.likely(0.3) else None,
            self.chance.choice(SELECTORS) if self.likely(0.15) else None,
            self.some(RANGES) if ports and self.likely(0.5) else (),
            self.some(RANGES) if ports and self.likely(0.2) else (),
        )

    def rule(self) -> Rule:
        protocol = self.chance.choice([None, 6, 6, 17, 1, 58, 47])
        about: dict[str, Any] = {}
        if protocol in (1, 58) and self.likely(0.7):
            about["icmp"] = Icmp(self.chance.choice([8, 128, 3]), self.chance.choice([None, 0, 1]))
        if protocol in (1, 58) and self.likely(0.3):
            about["not_icmp"] = Icmp(self.chance.choice([8, 128]), self.chance.choice([None, 0]))
        if self.likely(0.15):
            about["not_protocol"] = self.chance.choice([6, 17, 1])
        if self.likely(0.15):
            about["ip_version"] = self.chance.choice([4, 6])
        action = self.chance.choice([Action.ALLOW] * 5 + [Action.DENY] * 3 + [Action.PASS, Action.LOG])
        ports = protocol in (6, 17)
        return Rule(action, protocol, **about, source=self.peer(ports), destination=self.peer(ports))

    def rules(self) -> tuple[Rule, ...]:
        return tuple(self.rule() for _ in range(self.chance.randint(0, 3)))

    def policy(self, name: str) -> Policy:
        types = self.chance.choice([(Direction.INGRESS,), (Direction.EGRESS,), tuple(Direction)])
        return Policy(
            name, self.chance.choice(SELECTORS), types, self.chance.choice([None, 1.0, 2.0]),
            self.rules() if Direction.INGRESS in types else (), self.rules() if Direction.EGRESS in types else (),
            self.chance.choice(["default", "default", "first", "last"]), self.likely(0.5), staged=self.likely(0.15),
        )  # fmt: skip

    def profile(self, name: str) -> Profile:
        return Profile(name, self.rules(), self.rules(), self.labels() if self.likely(0.4) else {})

    def tiers(self) -> list[Tier]:
        actions = [Action.DENY, Action.PASS]
        return [Tier("first", 1.0, self.chance.choice(actions)), Tier("last", None, self.chance.choice(actions))]

    def host_endpoint(self, number: int) -> HostEndpoint:
        addresses = self.some(map(parse_address, (f"10.0.0.{100 + number}", f"fd00::{100 + number}", "10.0.0.99")), 2)
        profiles = self.some(["one", "two"]) if self.likely(0.4) else ()
        interface = self.chance.choice(["*", "eth0"])
        return HostEndpoint(f"he{number}", f"h{number % 2}", interface, self.labels(), addresses, profiles)

    def world(self, hosts: bool) -> World:
        endpoints = [self.endpoint(number) for number in range(1, 5)]
        return World(
            endpoints,
            [self.policy(f"p{n}") for n in range(self.chance.randint(1, 4))],
            [self.profile(name) for name in ("one", "two") if self.likely(0.8)],
            self.tiers(),
            [NetworkSet(f"s{n}", self.labels(), self.some(NETS)) for n in range(self.chance.randint(0, 2))],
            [self.host_endpoint(n) for n in range(self.chance.randint(1, 3))] if hosts else [],
            {e.key: f"h{self.chance.randint(0, 1)}" for e in endpoints if hosts and self.likely(0.9)},
        )

    def changed(self, world: World) -> World:
        """The same, but for one thing or two."""
        for _ in range(self.chance.randint(1, 2)):
            kind = self.chance.choice(["policies"] * 4 + ["profiles", "tiers", "sets", "endpoints", "host", "places"])
            policies = [p for p in world.policies if self.likely(0.6)] or [self.policy("p0")]
            match kind:
                case "policies":
                    world = replace(world, policies=[*policies, self.policy("p9")])
                case "profiles":
                    world = replace(world, profiles=[self.profile("one")])
                case "tiers":
                    world = replace(world, tiers=self.tiers())
                case "sets":
                    world = replace(world, sets=[NetworkSet("s0", self.labels(), self.some(NETS, 3))])
                case "endpoints":
                    gone = self.chance.randint(1, 4)
                    kept = [e for e in world.endpoints if e.key != key(gone)]
                    world = replace(world, endpoints=kept + [self.endpoint(gone)] * self.likely(0.8))
                case "host" if world.host_endpoints:
                    world = replace(world, host_endpoints=[self.host_endpoint(n) for n in (0, 1)])
                case "places" if world.places:
                    world = replace(world, places={**world.places, key(1): "h0", key(2): "h1"})
        return world


def packets(source: Address, destination: Address) -> Iterator[Packet]:
    for protocol in (6, 17):
        for port, sport in product(PORTS, (80, 2000)):
            yield Packet(source, destination, protocol, sport, port)
    for icmp in (Icmp(8, 0), Icmp(8, 1), Icmp(128, 0), Icmp(3, 1), Icmp(135, 0), Icmp(0, 0)):
        yield Packet(source, destination, 1, icmp=icmp)
        yield Packet(source, destination, 58, icmp=icmp)
    yield Packet(source, destination, 47)
    yield Packet(source, destination, 99)


def names(flow: Traffic, packet: Packet) -> bool:
    def inside(ranges: tuple[PortRange, ...], number: int | None) -> bool:
        return not ranges or (number is not None and any(first <= number <= last for first, last in ranges))

    if flow.protocol is None:
        return packet.protocol not in flow.but
    return (
        flow.protocol == packet.protocol
        and inside(flow.ports, packet.destination_port)
        and inside(flow.source_ports, packet.source_port)
        and inside(flow.types, packet.icmp and packet.icmp.type)
        and inside(flow.codes, packet.icmp and packet.icmp.code)
    )


class Answer:
    """What a comparison says, asked for one packet."""

    def __init__(self, said: Comparison) -> None:
        self.said = said
        self.group = {self.identity(o): n for n, g in enumerate(said.found.groups) for o in g.members}
        self.by_pair: dict[tuple[int, int], list[Change]] = {}
        for change in said.changes:
            for pair in product(change.sources, change.destinations):
                self.by_pair.setdefault(pair, []).append(change)

    @staticmethod
    def identity(owner: Owner) -> Any:
        return owner.endpoint.key if owner.endpoint else (owner.kind, owner.region, owner.name)

    def owners(self, worlds: tuple[World, World]) -> dict[Any, list[Address]]:
        """Addresses that stand for each owner: all of its own, and samples of regions."""
        found: dict[Any, list[Address]] = {}
        spots = dict.fromkeys([*SPOTS, *(a for w in worlds for e in w.endpoints for a in e.all_addresses())])
        spots |= dict.fromkeys(a for w in worlds for h in w.host_endpoints for a in h.addresses)
        for address in spots:
            found.setdefault(self.owner_of(worlds, address), []).append(address)
        return found

    def owner_of(self, worlds: tuple[World, World], address: Address) -> Any:
        for world in worlds[::-1]:  # after, then before: who has it names it
            own = [e for e in world.endpoints if address in e.all_addresses()]
            hosts = sorted({h.node for h in world.host_endpoints if address in h.addresses})
            if len(own) == 1:
                return own[0].key
            if own or any(p.contains(address) for e in world.endpoints for p in e.prefixes):
                break
            if hosts and not self._guests(worlds, address):
                return ("host", -1, hosts[0])
        listed = [o for g in self.said.found.groups for o in g.members if o.kind == "address"]

        for owner in listed:
            if owner.name.startswith(format_address(address) + " ("):
                return self.identity(owner)
        region = self.said.found.regions.region_of(address)
        return next(self.identity(o) for g in self.said.found.groups for o in g.members if o.region == region)

    @staticmethod
    def _guests(worlds: tuple[World, World], address: Address) -> bool:
        return any(
            address in e.all_addresses() or any(p.contains(address) for p in e.prefixes)
            for w in worlds for e in w.endpoints
        )  # fmt: skip

    def says(self, pair: tuple[Any, Any], packet: Packet, at_home: bool | None) -> set[bool]:
        """The verdicts after, of changes that name this packet between these two."""
        found = self.by_pair.get((self.group[pair[0]], self.group[pair[1]]), ())
        return {
            change.allowed
            for change in found
            if not change.where or (change.where == "same host") is at_home
            for flow in change.flows
            if flow.version in (None, version(packet.source)) and names(flow.traffic, packet)
        }


def check(before: World, after: World) -> int:
    """How many changes there were."""
    answer, changes = Answer(compare(before, after)), 0
    judges = Judge(before), Judge(after)
    owners = answer.owners((before, after))
    homes = {
        o.name if o.endpoint is None else o.endpoint.key: o.host for g in answer.said.found.groups for o in g.members
    }
    for pair in product(owners, repeat=2):
        if pair[0] == pair[1]:
            continue
        places = [homes.get(who if isinstance(who, EndpointKey) else who[2], "") for who in pair]
        expected: dict[tuple[Any, ...], set[bool]] = {}
        asked: dict[tuple[Any, ...], Packet] = {}
        for source, destination in product(owners[pair[0]], owners[pair[1]]):
            for packet in packets(source, destination) if len(source) == len(destination) else ():
                kind = (len(source), *packet_kind(packet))
                asked.setdefault(kind, packet)
                was, will = (judge.verdict(packet).allowed for judge in judges)
                expected.setdefault(kind, set()).update({will} if was is not will else set())
        for kind, packet in asked.items():
            said = answer.says(pair, packet, bool(places[0]) and places[0] == places[1])
            assert said == expected[kind], (pair, packet, said, expected[kind])
            changes += len(said)
    return changes


def packet_kind(packet: Packet) -> tuple[Any, ...]:
    return (packet.protocol, packet.source_port, packet.destination_port, packet.icmp)


@seed(32)
@settings(max_examples=400 if FULL else 40, deadline=None)
@given(st.integers(0, 1 << 32))
def test_it_says_exactly_what_the_specification_says(number: int) -> None:
    maker = Maker(number)
    before = maker.world(hosts=False)
    check(before, maker.changed(before))


@seed(32)
@settings(max_examples=400 if FULL else 40, deadline=None)
@given(st.integers(0, 1 << 32))
def test_with_host_endpoints_too(number: int) -> None:
    maker = Maker(number)
    before = maker.world(hosts=True)
    check(before, maker.changed(before))


def test_the_worlds_are_worth_comparing() -> None:
    """The control: most changes of worlds change verdicts."""
    makers = [Maker(number) for number in range(12)]
    worlds = [(maker, maker.world(hosts=bool(n % 2))) for n, maker in enumerate(makers)]
    assert sum(check(world, maker.changed(world)) > 0 for maker, world in worlds) >= 6
