# Owns: random small worlds (guests, policies with every field, profiles) and packets between them and strangers, from
# a seed, so that about half of the packets are allowed by the model's word.
from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from slash32 import selector as selectors
from slash32.model import Endpoint, EndpointKey
from slash32.net import Prefix, parse_address, parse_prefix
from slash32.pack import AddressSet
from slash32.policy import Action, Direction, Icmp, Peer, Policy, PortRange, Profile, Rule
from slash32.verdict import Packet, World, effective_labels, verdict

SELECTORS = ('role == "web"', 'role == "db"', 'role != "web"', "all()", "has(env)", '!has(env) && role == "web"')
NETS = [*map(parse_prefix, (
    "10.65.0.0/16", "10.65.0.2/32", "10.65.0.0/30", "10.66.1.0/26", "10.66.0.0/16", "203.0.113.0/24", "0.0.0.0/0",
    "fd00:65::/64", "fd00:65::2/128", "fd00:65::/126", "fd00:66:1::/64", "2001:db8::/32", "::/0",
))]  # fmt: skip
RANGES = [PortRange(*r) for r in ((80, 80), (81, 443), (1, 1023), (1024, 19999), (443, 444))]
PORTS = (79, 80, 81, 442, 443, 444, 445, 1023, 1024, 8080)
FIRST_PORT, PACKETS = 20000, 160  # every packet has a source port, ICMP id or protocol number of its own: a new flow
STRANGERS = [*map(parse_address, ("203.0.113.2", "2001:db8::2"))]
WELL = 0.3, 0.7  # so many of a world's packets are allowed


@dataclass(frozen=True)
class Case:
    """A world and the packets that are sent in it, each with the model's word on it."""

    seed: int
    world: World
    packets: list[tuple[Packet, bool]]

    def sets(self) -> dict[str, AddressSet]:
        """Every selector's members, as the dispatcher hands them out."""
        profiles = {p.name: p for p in self.world.profiles}
        found = {text: AddressSet() for text in SELECTORS}
        for text, members in found.items():
            for endpoint in self.world.endpoints:
                if selectors.parse(text).matches(effective_labels(endpoint, profiles)):
                    members.addresses.update(endpoint.all_addresses())
                    members.prefixes.update(endpoint.prefixes)
        return {str(selectors.parse(text)): members for text, members in found.items()}


def case(seed: int) -> Case:
    """The same for the same seed."""
    chance = random.Random(seed)
    while True:
        world = _world(chance)
        packets = [(p, verdict(world, p).allowed) for p in _packets(chance, world)]
        allowed = sum(word for _, word in packets) / len(packets)
        if WELL[0] <= allowed <= WELL[1]:
            return Case(seed, world, packets)


def key(number: int) -> EndpointKey:
    return EndpointKey(f"00000000-0000-0000-0000-{number:012}", f"52:54:00:00:00:{number:02x}")


def _world(chance: random.Random) -> World:
    endpoints = [_endpoint(chance, number) for number in range(1, chance.randint(3, 6) + 1)]
    policies = [_policy(chance, f"p{n}") for n in range(chance.randint(1, 5))]
    profiles = [_profile(chance, name) for name in ("one", "two") if chance.random() < 0.8]
    return World(endpoints, policies, profiles)


def _endpoint(chance: random.Random, number: int) -> Endpoint:
    labels = {"role": chance.choice(("web", "db", "app"))} | ({"env": "prod"} if chance.random() < 0.5 else {})
    behind = [f"10.66.{number}.0/26", f"10.66.{number}.64/26", f"fd00:66:{number}::/64"]
    return Endpoint(
        key(number),
        f"guest{number}",
        labels,
        tuple(chance.sample(("one", "two", "none"), chance.randint(0, 2))),
        (parse_address(f"10.65.0.{number}"), parse_address(f"fd00:65::{number}")),
        (),
        tuple(parse_prefix(p) for p in behind if chance.random() < 0.4),
    )


def _policy(chance: random.Random, name: str) -> Policy:
    types = chance.choice(((Direction.INGRESS,), (Direction.EGRESS,), tuple(Direction)))
    some = {d: tuple(_rule(chance) for _ in range(chance.randint(1, 4))) if d in types else () for d in Direction}
    order = chance.choice((None, 1, 2, 3))
    whom = str(selectors.parse(chance.choice(SELECTORS)))
    return Policy(name, whom, types, order, some[Direction.INGRESS], some[Direction.EGRESS])


def _profile(chance: random.Random, name: str) -> Profile:
    rules = [tuple(_rule(chance) for _ in range(chance.randint(1, 2))) for _ in Direction]
    return Profile(name, *rules, labels={"env": "prod"} if chance.random() < 0.4 else {})


def _rule(chance: random.Random) -> Rule:
    protocol = chance.choice((None, None, None, 6, 6, 17, 17, 1, 58, 150))
    version = {1: 4, 58: 6}.get(protocol or 0)
    kinds = (8, 13) if protocol == 1 else (128, 139)

    def icmp(odds: float) -> Icmp | None:
        asked = version is not None and chance.random() < odds
        return Icmp(chance.choice(kinds), chance.choice((None, 0, 1))) if asked else None

    ports = protocol in (6, 17)
    return Rule(
        Action.ALLOW if chance.random() < 0.65 else Action.DENY,
        protocol,
        chance.choice((6, 17, 1)) if chance.random() < 0.12 else None,
        chance.choice((4, 6)) if not version and chance.random() < 0.15 else None,
        icmp(0.6),
        icmp(0.4),
        _peer(chance, ports, source=True),
        _peer(chance, ports, source=False),
    )


def _peer(chance: random.Random, ports: bool, source: bool) -> Peer:
    def maybe(odds: float, of: list[Prefix]) -> tuple[Prefix, ...]:
        return tuple(chance.sample(of, chance.randint(1, 3))) if chance.random() < odds else ()

    def ranges(odds: float) -> tuple[PortRange, ...]:
        if not ports or chance.random() >= odds:
            return ()
        if not source:
            return tuple(chance.sample(RANGES, chance.randint(1, 2)))
        first = FIRST_PORT + chance.randrange(PACKETS)
        return (PortRange(first, first + chance.randint(0, PACKETS // 2)),)

    def selector(odds: float) -> str | None:
        return str(selectors.parse(chance.choice(SELECTORS))) if chance.random() < odds else None

    return Peer(maybe(0.15, NETS), maybe(0.15, NETS), selector(0.3), selector(0.2), ranges(0.4), ranges(0.25))


def _packets(chance: random.Random, world: World) -> Iterator[Packet]:
    for number in range(PACKETS):
        version = chance.choice((4, 6))
        places = [_place(chance, world, version) for _ in range(2)]
        while places[0][0] == places[1][0]:  # not to itself
            places[1] = _place(chance, world, version)
        source, destination = places[0][1], places[1][1]
        # Of protocols without ports each is used once: conntrack would take the way back for an answer.
        odd = 143 + number if 143 + number < 253 else 17
        protocol = chance.choice((6, 6, 17, 17, {4: 1, 6: 58}[version], odd))
        packet = Packet(source, destination, protocol)
        if protocol in (6, 17):
            yield replace(packet, source_port=FIRST_PORT + number, destination_port=chance.choice(PORTS))
        elif protocol in (1, 58):
            kind = chance.choice((8, 8, 13) if version == 4 else (128, 128, 139))
            yield replace(packet, icmp=Icmp(kind, chance.choice((0, 0, 1))))
        else:
            yield packet


def _place(chance: random.Random, world: World, version: int) -> tuple[int, bytes]:
    """Who (0: a stranger), and one of its addresses."""
    if chance.random() < 0.12:
        return 0, STRANGERS[version == 6]
    at = chance.randrange(len(world.endpoints))
    endpoint = world.endpoints[at]
    behind = [p for p in endpoint.prefixes if p.version == version]
    if behind and chance.random() < 0.5:
        prefix = chance.choice(behind)
        return at + 1, prefix.network[:-1] + bytes([prefix.network[-1] + chance.randint(1, 60)])
    return at + 1, next(a for a in endpoint.addresses if len(a) == (4 if version == 4 else 16))
