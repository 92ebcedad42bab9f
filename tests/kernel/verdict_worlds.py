# Owns: random small worlds around one host h1, from a seed: guests here and elsewhere, shared addresses, prefixes,
# tiers, policies (staged ones, too) with every field, profiles, network sets, host endpoints. Each resource is one that
# an operator may write. Packets between them are verdict_packets.py.
from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

from slash32 import selector as selectors
from slash32.errors import ResourceError
from slash32.model import Endpoint, EndpointKey, SharedAddress
from slash32.net import Address, Prefix, parse_address, parse_prefix
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
from slash32.resources import decode, encode
from slash32.rules import WITH_PORTS
from slash32.verdict import World

HERE, ELSEWHERE = "h1", "h2"
GUESTS = 6  # of h1 at most: vnet1 to vnet6
UP0, UP1, HOST = "up0", "up1", "host"  # besides the taps: two uplinks, and h1 itself
SELECTORS = (
    'role == "web"', 'role == "db"', 'role != "web"', "all()", "has(env)", '!has(env) && role == "web"',
    'env in {"prod", "test"}', 'env not in {"prod"}', 'zone != "a"', 'role starts with "d" || zone == "a"',
)  # fmt: skip
VIP = SharedAddress(parse_address("10.65.9.1"), "vip"), SharedAddress(parse_address("fd00:65:9::1"), "vip")
OWN = parse_address("192.0.2.1"), parse_address("2001:db8:2::1")  # h1's
NEXT = parse_address("192.0.2.2"), parse_address("2001:db8:2::2")  # h2's
STRANGERS = {
    UP0: [*NEXT, *map(parse_address, ("203.0.113.2", "203.0.113.200", "2001:db8::2", "2001:db8::ff:2"))],
    UP1: [*map(parse_address, ("198.51.100.7", "2001:db8:7::7"))],
}
NETS = [*map(parse_prefix, (
    "10.65.0.0/16", "10.65.0.2/32", "10.65.0.0/30", "10.65.0.4/31", "10.66.1.0/26", "10.66.0.0/16", "203.0.113.0/24",
    "203.0.113.128/25", "0.0.0.0/0", "128.0.0.0/1", "192.0.2.0/30", "198.51.100.7/32",
    "fd00:65::/64", "fd00:65::2/128", "fd00:65::/126", "fd00:66:1::/64", "2001:db8::/32", "2001:db8::/64", "::/0",
))]  # fmt: skip
RANGES = [PortRange(*r) for r in (
    (80, 80), (81, 443), (1, 1023), (1024, 19999), (443, 444), (22, 22), (1, 1), (65535, 65535), (8080, 65535),
)]  # fmt: skip
MANY = [PortRange(p, p + p % 3) for p in range(70, 1030, 40)]  # more than one match of iptables takes
SOURCES = [PortRange(*r) for r in ((20000, 20079), (20080, 20160), (1, 1023), (65535, 65535), (20050, 20100))]
KINDS = {1: (8, 13), 58: (128, 139)}  # of ICMP: what begins a flow
BARE = 150, 151  # protocols without ports
T = TypeVar("T")


def key(number: int) -> EndpointKey:
    return EndpointKey(f"00000000-0000-0000-0000-{number:012}", f"52:54:00:00:00:{number:02x}")


def world_of(chance: random.Random) -> World:
    return Maker(chance).world()


class Maker:
    """Of parts of a world."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance

    def often(self, odds: float) -> bool:
        return self.chance.random() < odds

    def some(self, of: list[T], most: int) -> tuple[T, ...]:
        return tuple(self.chance.sample(of, self.chance.randint(1, min(most, len(of)))))

    def world(self) -> World:
        here, away = self.chance.randint(2, 5), self.chance.choice((0, 0, 1, 2))
        endpoints = [self.endpoint(number) for number in range(1, here + 1)]
        endpoints += [self.endpoint(10 + number) for number in range(1, away + 1)]
        places = {e.key: HERE if n < here else ELSEWHERE for n, e in enumerate(endpoints)}
        tiers = [self.tier(name) for name in ("early", "late") if self.often(0.6)]
        names = ["default", "default", *(tier.name for tier in tiers)]
        policies = [self.policy(f"p{n}", names, False) for n in range(self.chance.randint(1, 5))]
        policies += [self.policy(f"p{n}", names, True) for n in range(self.chance.choice((0, 0, 1, 2)))]
        profiles = [self.profile(name) for name in ("one", "two") if self.often(0.8)]
        sets = [self.network_set(name) for name in ("s", "t") if self.often(0.5)]
        hosts = [self.host_endpoint(*each) for each in self.standing()]
        return World(endpoints, policies, profiles, tiers, sets, hosts, places)

    # -- who is there ---------------------------------------------------------------------------------------------

    def labels(self) -> dict[str, str]:
        found = {"role": self.chance.choice(("web", "db", "app"))} if self.often(0.85) else {}
        found |= {"env": self.chance.choice(("prod", "test"))} if self.often(0.4) else {}
        return found | ({"zone": self.chance.choice("ab")} if self.often(0.3) else {})

    def endpoint(self, number: int) -> Endpoint:
        versions = self.chance.choice(((4, 6), (4, 6), (4, 6), (4,), (6,)))
        own: list[Address] = []
        own += [parse_address(f"10.65.0.{number}")] if 4 in versions else []
        own += [parse_address(f"fd00:65::{number:x}")] if 6 in versions else []
        own += [parse_address(f"10.65.1.{number}")] if 4 in versions and self.often(0.15) else []
        behind = [f"10.66.{number}.0/26", f"10.66.{number}.64/26"] if 4 in versions else []
        behind += [f"fd00:66:{number:x}::/64"] if 6 in versions else []
        return Endpoint(
            key(number),
            f"guest{number}",
            self.labels(),
            tuple(self.chance.sample(("one", "two", "none"), self.chance.randint(0, 2))),
            tuple(own),
            tuple(s for s in VIP if len(s.address) in map(len, own)) if self.often(0.2) else (),
            tuple(parse_prefix(p) for p in behind if self.often(0.3)),
        )

    def network_set(self, name: str) -> NetworkSet:
        return NetworkSet(name, self.labels(), self.some(NETS, 4))

    def standing(self) -> Iterator[tuple[str, str]]:
        """Interfaces that are host endpoints, and whose."""
        if self.often(0.55):
            ways = self.chance.choice(((UP0,), ("*",), (UP0, "*"), (UP0, UP1), (UP0, UP1, "*")))
            yield from ((HERE, way) for way in ways)
        if self.often(0.15):
            yield ELSEWHERE, UP0

    def host_endpoint(self, node: str, interface: str) -> HostEndpoint:
        own = OWN if node == HERE else NEXT
        name = f"{node}-{interface if interface != '*' else 'all'}"
        profiles = self.chance.sample(("one", "two"), self.chance.randint(0, 2))
        return HostEndpoint(name, node, interface, self.labels(), own, tuple(profiles))

    # -- policy ---------------------------------------------------------------------------------------------------

    def tier(self, name: str) -> Tier:
        order = self.chance.choice((None, 1.0, 2.0, 2_000_000.0))
        return Tier(name, order, self.chance.choice((Action.DENY, Action.PASS)))

    def policy(self, name: str, tiers: list[str], staged: bool) -> Policy:
        types = self.chance.choice(((Direction.INGRESS,), (Direction.EGRESS,), tuple(Direction)))
        some = {d: self.rules(4) if d in types else () for d in Direction}
        whom = str(selectors.parse(self.chance.choice((*SELECTORS, "all()", "all()", "all()"))))
        order = self.chance.choice((None, 1.0, 1.0, 2.0))
        return Policy(
            name, whom, types, order, some[Direction.INGRESS], some[Direction.EGRESS], self.chance.choice(tiers),
            self.often(0.4), self.often(0.2), staged,
        )  # fmt: skip

    def profile(self, name: str) -> Profile:
        labels = {"env": "prod"} if self.often(0.3) else {"zone": "a"} if self.often(0.3) else {}
        return Profile(name, self.rules(2), self.rules(2), labels)

    def rules(self, most: int) -> tuple[Rule, ...]:
        return tuple(self.rule() for _ in range(self.chance.randint(1, most)))

    def rule(self) -> Rule:
        """Drawn until it is one that is accepted."""
        while True:
            found = self.any_rule()
            if allowed(found):
                return found

    def any_rule(self) -> Rule:
        protocol = self.chance.choice((None, None, None, 6, 6, 17, 17, 1, 1, 58, 58, 132, 136, BARE[0]))
        version = {1: 4, 58: 6}.get(protocol or 0)
        roll = self.chance.random()
        action = Action.ALLOW if roll < 0.55 else Action.DENY if roll < 0.8 else Action.PASS
        return Rule(
            action if self.often(0.93) else Action.LOG,
            protocol,
            self.chance.choice((6, 17, 1, 132)) if protocol is None and self.often(0.25) else None,
            self.chance.choice((4, 6)) if not version and self.often(0.12) else None,
            self.icmp(protocol, 0.45),
            self.icmp(protocol, 0.45),
            self.peer(protocol in WITH_PORTS, RANGES if self.often(0.2) else SOURCES, 0.3),
            self.peer(protocol in WITH_PORTS, RANGES, 0.55),
        )

    def icmp(self, protocol: int | None, odds: float) -> Icmp | None:
        if protocol not in KINDS or not self.often(odds):
            return None
        return Icmp(self.chance.choice(KINDS[protocol]), self.chance.choice((None, 0, 1)))

    def peer(self, ports: bool, ranges: list[PortRange], odds: float) -> Peer:
        def nets(odds: float) -> tuple[Prefix, ...]:
            return self.some(NETS, 3) if self.often(odds) else ()

        def selector(odds: float) -> str | None:
            return str(selectors.parse(self.chance.choice(SELECTORS))) if self.often(odds) else None

        def of(odds: float) -> tuple[PortRange, ...]:
            if not ports or not self.often(odds):
                return ()
            return tuple(MANY) if self.often(0.25) else self.some(ranges, 2)

        return Peer(nets(0.12), nets(0.1), selector(0.25), selector(0.12), of(odds), of(odds / 2))


def allowed(rule: Rule) -> bool:
    """As an operator may write it."""
    try:
        decode(encode(Policy("p", "all()", (Direction.INGRESS,), None, (rule,))))
    except ResourceError:
        return False
    return True


class Spot(NamedTuple):
    """Where a packet may come from or belong: a port of the fabric (or HOST), and the address there."""

    where: str
    address: Address


def tap_of(endpoint: Endpoint) -> str:
    return f"vnet{int(endpoint.key.mac[-2:], 16)}"


def in_charge(world: World, claimants: list[Endpoint]) -> list[Endpoint]:
    """Of those who share an address the one who gets it at h1: one of its own first."""
    order = sorted(claimants, key=lambda e: (world.places[e.key] != HERE, e.key))
    return order[:1]


def spots(world: World) -> list[Spot]:
    found = [Spot(where, address) for where, some in STRANGERS.items() for address in some]
    if any(each.node == HERE for each in world.host_endpoints):
        found += [Spot(HOST, address) for address in OWN]
    for endpoint in world.endpoints:
        where = tap_of(endpoint) if world.places[endpoint.key] == HERE else UP0
        own = [*endpoint.addresses]
        for shared in endpoint.shared:
            sharing = [e for e in world.endpoints if shared in e.shared]
            own += [shared.address] if in_charge(world, sharing) == [endpoint] else []
        own += [prefix.network[:-1] + bytes([prefix.network[-1] + n]) for prefix in endpoint.prefixes for n in (1, 62)]
        found += [Spot(where, address) for address in own]
    return found
