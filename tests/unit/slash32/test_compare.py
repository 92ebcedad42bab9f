# What a comparison of two worlds says, held against the specification: random worlds and random changes, every pair of
# owners, every kind of packet. And the shape of what it says, by hand.
from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from slash32.classes import Owner
from slash32.compare import Change, Comparison, compare
from slash32.model import Endpoint, EndpointKey, SharedAddress
from slash32.naming import Names
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
from slash32.traffic import Space, Traffic, key_of
from slash32.verdict import Judge, Packet, World

FULL = os.environ.get("SLASH32_COUNTS") == "full"
SELECTORS = [
    'role == "web"', 'role != "web"', "all()", "has(env)", '!has(env) && role == "db"', 'env starts with "p"',
    'role in {"db", "net"}', 'env contains "t" || role ends with "b"',
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
@settings(max_examples=400 if FULL else 20, deadline=None)
@given(st.integers(0, 1 << 32))
def test_it_says_exactly_what_the_specification_says(number: int) -> None:
    maker = Maker(number)
    before = maker.world(hosts=False)
    check(before, maker.changed(before))


@seed(32)
@settings(max_examples=400 if FULL else 20, deadline=None)
@given(st.integers(0, 1 << 32))
def test_with_host_endpoints_too(number: int) -> None:
    maker = Maker(number)
    before = maker.world(hosts=True)
    check(before, maker.changed(before))


def test_the_worlds_are_worth_comparing() -> None:
    """The control: most changes of worlds change verdicts."""
    makers = [Maker(number) for number in range(40)]
    worlds = [(maker, maker.world(hosts=bool(n % 2))) for n, maker in enumerate(makers)]
    changing = sum(bool(compare(world, maker.changed(world)).changes) for maker, world in worlds)
    assert changing >= 16, changing


# --- by hand

IN, OUT = Direction.INGRESS, Direction.EGRESS
OPEN = Profile("open", egress=(Rule(Action.ALLOW),))
TCP = Rule(Action.ALLOW, 6, destination=Peer(ports=(PortRange(5432, 5432),)))
TO_DB = Policy("db", 'role == "db"', (IN,), 1.0, (replace(TCP, source=Peer(selector='role == "web"')),))


def guest(number: int, role: str, *, six: bool = False, **labels: str) -> Endpoint:
    addresses = [parse_address(f"10.1.{number // 250}.{number % 250 + 1}")]
    addresses += [parse_address(f"fd01::{number + 1:x}")] if six else []
    have = {"role": role, **labels}
    return Endpoint(EndpointKey(f"u{number}", ""), f"{role}{number}", have, ("open",), tuple(addresses))


WEBS, DBS = [guest(n, "web", six=True) for n in range(4)], [guest(n, "db", six=True) for n in range(4, 7)]
GUESTS = [*WEBS, *DBS, guest(7, "x")]


def told(said: Comparison) -> list[tuple[bool, str, str, list[Traffic], int]]:
    names = Names(said.found)
    return [
        (c.allowed, names.of(c.sources), names.of(c.destinations), [flow.traffic for flow in c.flows], c.pairs)
        for c in said.changes
    ]


def test_one_policy_one_row() -> None:
    before = World(GUESTS, [], [OPEN])
    after = replace(before, policies=[TO_DB])
    web, db = "role=web (4 endpoints: web0, web1, web2, ...)", "role=db (3 endpoints: db4, db5, db6)"
    only = [Traffic(6, ports=(PortRange(5432, 5432),))]
    assert told(compare(before, after)) == [(True, web, db, only, 12)]
    assert told(compare(after, before)) == [(False, web, db, only, 12)]
    assert compare(after, after).changes == []
    opened = compare(before, after)
    assert (opened.gaining, opened.losing) == (12, 0)


def test_a_pair_is_no_pair_of_one() -> None:
    """Nobody speaks to himself: four guests are twelve pairs, and one alone is none."""
    rule = replace(TCP, source=Peer(selector='role == "web"'))
    policy = Policy("p", 'role == "web"', (IN,), None, (rule,))
    said = compare(World(GUESTS, [], [OPEN]), World(GUESTS, [policy], [OPEN]))
    assert [change.pairs for change in said.changes] == [12]
    alone = [GUESTS[0], GUESTS[-1]]
    assert compare(World(alone, [], [OPEN]), World(alone, [policy], [OPEN])).changes == []


def test_ip_versions_are_told_apart_only_where_they_differ() -> None:
    before, both = World(GUESTS, [], [OPEN]), World(GUESTS, [TO_DB], [OPEN])
    four = replace(TO_DB, ingress=(replace(TO_DB.ingress[0], ip_version=4),))
    (change,) = compare(before, World(GUESTS, [four], [OPEN])).changes
    assert [flow.version for flow in change.flows] == [4]
    (change,) = compare(before, both).changes
    assert [flow.version for flow in change.flows] == [None]


def test_staged_policies_change_no_verdict() -> None:
    before = World(GUESTS, [], [OPEN])
    assert compare(before, replace(before, policies=[replace(TO_DB, staged=True)])).changes == []
    assert compare(before, replace(before, policies=[TO_DB])).changes != []  # the control


def test_the_world_outside_is_named_by_its_prefixes() -> None:
    nets = Peer(nets=(parse_prefix("203.0.113.0/24"),), not_nets=(parse_prefix("203.0.113.64/26"),))
    to_web = Policy("w", 'role == "web"', (IN,), 1.0, (Rule(Action.DENY, source=nets), replace(TCP, ip_version=4)))
    before = World(GUESTS, [], [OPEN])
    (one,) = told(compare(before, replace(before, policies=[to_web])))
    assert one[:2] == (True, "every endpoint (8 endpoints: db4, db5, db6, ...); 203.0.113.64/26; anywhere else (IPv4)")
    assert one[4] == 4 * 3 + 3 * 4 + 4 + 2 * 4  # web, db, x, and two parts of the world outside


def test_hosts_count_where_they_are_the_same() -> None:
    guests = [guest(1, "web"), guest(2, "web"), guest(3, "web")]
    places = {guests[0].key: "h1", guests[1].key: "h1", guests[2].key: "h2"}
    hosts = [HostEndpoint(f"e{n}", f"h{n}", "eth0", {"role": "hv"}) for n in (1, 2)]
    open_ = Policy("open", 'role == "web"', (IN,), 1.0, (Rule(Action.ALLOW),))
    shut = Policy("shut", 'role == "hv"', (OUT,), 1.0, egress=(), apply_on_forward=True)
    before = World(guests, [open_], [OPEN], host_endpoints=hosts, places=places)
    said = compare(before, replace(before, policies=[open_, shut]))
    within = [c for c in said.changes if set(c.destinations) == set(c.sources)]
    assert [(c.allowed, c.where, c.pairs) for c in within] == [(False, "other hosts", 4)]


def test_cost_follows_classes_not_endpoints() -> None:
    guests = [guest(n, ("web", "db", "x")[n % 3], name=f"vm{n}") for n in range(2000)]
    one = Policy("one", 'name == "vm7"', (IN,), 1.0, (replace(TCP, source=Peer(selector='name starts with "vm1"')),))
    before = World(guests, [TO_DB], [OPEN])
    said = compare(before, replace(before, policies=[TO_DB, one]))
    assert len(said.found.groups) < 12
    new = [n for n in range(2000) if str(n).startswith("1") and n % 3]  # those with role web could before
    assert [(c.allowed, c.pairs) for c in said.changes] == [(True, len(new))]


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (Rule(Action.ALLOW), [Traffic(None)]),
        (Rule(Action.ALLOW, not_protocol=6), [Traffic(None, (6,))]),
        (Rule(Action.ALLOW, 47), [Traffic(47)]),
        (Rule(Action.ALLOW, 1, icmp=Icmp(8)), [Traffic(1, types=(PortRange(8, 8),))]),
        (Rule(Action.ALLOW, 1, icmp=Icmp(3, 1)), [Traffic(1, types=(PortRange(3, 3),), codes=(PortRange(1, 1),))]),
        (Rule(Action.ALLOW, 1, not_icmp=Icmp(8)), [Traffic(1, types=(PortRange(0, 7), PortRange(9, 255)))]),
        (
            Rule(
                Action.ALLOW,
                17,
                source=Peer(ports=(PortRange(53, 53),)),
                destination=Peer(not_ports=(PortRange(1, 9),)),
            ),
            [Traffic(17, ports=(PortRange(0, 0), PortRange(10, 65535)), source_ports=(PortRange(53, 53),))],
        ),
        (
            Rule(Action.ALLOW, 132, destination=Peer(ports=(PortRange(80, 81), PortRange(82, 90), PortRange(85, 95)))),
            [Traffic(132, ports=(PortRange(80, 95),))],
        ),
    ],
)
def test_traffic_is_said_as_short_as_it_can_be(rule: Rule, said: list[Traffic]) -> None:
    keys = [key_of(rule), key_of(Rule(Action.DENY, 6, destination=Peer(ports=(PortRange(22, 22),))))]
    space = Space(4, keys)
    assert list(space.describe(space.mask(keys[0]))) == said


def test_a_name_that_is_not_exact_is_not_given() -> None:
    """Labels name a group only if nobody else carries them."""
    guests = [*GUESTS, replace(guest(8, "web"), profiles=())]  # a web that may not speak
    before = World(guests, [], [OPEN])
    ((_, source, *_),) = told(compare(before, replace(before, policies=[TO_DB])))
    assert source == "4 endpoints: web0, web1, web2, ..."
