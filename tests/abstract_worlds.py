# Owns: random worlds around one host, as the model sees them and as that host is told of them, and the host's abstract
# packet filter asked about packets as the skeleton asks it.
from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from hypothesis import strategies as st

from hostd.compiler.calc import Calculation
from hostd.compiler.desired import Desired
from hostd.compiler.ruleset import (
    HOST_FORWARD_IN,
    HOST_FORWARD_OUT,
    HOST_FROM_GUESTS,
    HOST_IN,
    HOST_OUT,
    HOST_TO_GUESTS,
)
from hostd.compiler.world import World as Told
from hostd.revocation.judge import Judgement, View, Ways, judge
from hostd.state import Carrier, Local, Locals, Phase
from slash32 import selector as selectors
from slash32.model import Endpoint
from slash32.net import Address, Prefix, parse_address, parse_prefix
from slash32.pack import AddressSet
from slash32.policy import Direction, Icmp, NetworkSet, Peer, Policy, PortRange, Rule
from slash32.verdict import Packet, World, effective_labels
from tests.scenes import (
    ACTIONS,
    HERE,
    POLICIES,
    PROFILES,
    ROLES,
    SELECTORS,
    TIERS,
    Rules,
    host_endpoints,
    key,
    policies,
    profiles,
    tiers,
)

GUESTS = 3  # the last one is another host's
HOST = parse_address("192.0.2.1"), parse_address("2001:db8::1")
BEHIND = [(parse_prefix(f"10.66.{n}.0/26"), parse_prefix(f"fd66:0:0:{n}::/64")) for n in range(GUESTS)]
NETS = [*map(parse_prefix, ("203.0.113.0/24", "203.0.113.7", "10.66.0.0/16", "10.65.0.1", "2001:db8:7::/48"))]
STRANGERS = [*map(parse_address, ("203.0.113.7", "203.0.113.8", "198.51.100.1", "2001:db8:7::1", "2001:db8:8::1"))]
INTERFACES = ("eth0", "eth1", "eth2")
IN, OUT = Direction.INGRESS, Direction.EGRESS


def addresses_of(number: int) -> tuple[Address, Address]:
    return parse_address(f"10.65.0.{number + 1}"), parse_address(f"fd00:65::{number + 1:x}")


def _peers() -> st.SearchStrategy[dict[str, object]]:
    """One condition of a rule's peer."""
    nets = st.lists(st.sampled_from([parse_prefix("10.0.0.0/8"), parse_prefix("fd00::/8"), *NETS]), min_size=1,
                    max_size=2, unique=True).map(tuple)  # fmt: skip
    whom = st.sampled_from(SELECTORS)
    return st.one_of(
        st.fixed_dictionaries({"nets": nets}), st.fixed_dictionaries({"not_nets": nets}),
        st.fixed_dictionaries({"selector": whom}), st.fixed_dictionaries({"not_selector": whom}),
    )  # fmt: skip


RANGES = (PortRange(80, 80), PortRange(1, 79), PortRange(443, 444))
PORTS = st.lists(st.sampled_from(RANGES), min_size=1, max_size=2).map(tuple)
ICMP = st.builds(Icmp, st.sampled_from([0, 8, 128]), st.none() | st.sampled_from([0, 1]))
CONDITIONS: st.SearchStrategy[dict[str, object]] = st.one_of(
    st.just({}), st.just({}), st.fixed_dictionaries({"source": _peers()}),
    st.fixed_dictionaries({"destination": _peers()}), st.fixed_dictionaries({"ip_version": st.sampled_from([4, 6])}),
    st.fixed_dictionaries({"protocol": st.sampled_from([1, 6, 17, 58, 150])}),
    st.fixed_dictionaries({"protocol": st.sampled_from([1, 58])}),
    st.fixed_dictionaries({"not_protocol": st.sampled_from([1, 6, 17, 58, 150])}),
    st.fixed_dictionaries({"protocol": st.just(6), "destination": st.fixed_dictionaries({"ports": PORTS})}),
    st.fixed_dictionaries({"protocol": st.just(17), "destination": st.fixed_dictionaries({"not_ports": PORTS})}),
    st.fixed_dictionaries({"protocol": st.sampled_from([1, 58]), "icmp": ICMP}),
    st.fixed_dictionaries({"protocol": st.sampled_from([1, 58]), "not_icmp": ICMP}),
)  # fmt: skip


@st.composite
def simple(draw: st.DrawFn) -> Rule:
    """At most two conditions: most of them match something."""
    fields = draw(CONDITIONS) | draw(CONDITIONS) if draw(st.integers(0, 3)) else {}
    peers = {side: Peer(**fields.pop(side, {})) for side in ("source", "destination")}  # type: ignore[arg-type]
    return Rule(draw(st.sampled_from(ACTIONS)), **fields, **peers)  # type: ignore[arg-type]


SOME: Rules = st.lists(simple(), min_size=1, max_size=3).map(tuple)


@st.composite
def applying(draw: st.DrawFn, name: str, *, staged: bool = False) -> Policy:
    """To somebody at least, mostly."""
    found = draw(policies(name, staged, SOME))
    return replace(found, selector="all()") if draw(st.booleans()) else found


@st.composite
def guests(draw: st.DrawFn, number: int) -> Endpoint:
    labels = {"role": role} if (role := draw(st.sampled_from(ROLES))) else {}
    asked = tuple(draw(st.lists(st.sampled_from(PROFILES), max_size=2, unique=True)))
    behind = BEHIND[number] if draw(st.booleans()) else ()
    return Endpoint(key(number), f"guest{number}", labels, asked, addresses_of(number), (), behind)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """No two host endpoints for one interface: which of them counts is nobody's business here."""
    hosts = [draw(host_endpoints(name)) for name in ("e", "f") if draw(st.integers(0, 2))]
    hosts = list({each.interface: replace(each, addresses=HOST) for each in hosts}.values())
    sets = st.builds(
        NetworkSet, st.just("s"), st.sampled_from([{}, {"role": "web"}, {"env": "x"}]),
        st.lists(st.sampled_from(NETS), max_size=2, unique=True).map(tuple),
    )  # fmt: skip
    return World(
        [draw(guests(number)) for number in range(GUESTS)],
        [draw(applying(name)) for name in POLICIES[: draw(st.integers(1, 4))]]
        + [draw(applying(name, staged=True)) for name in POLICIES[: draw(st.integers(0, 3))]],
        [draw(profiles(name, SOME)) for name in PROFILES if draw(st.booleans())],
        [draw(tiers(name)) for name in TIERS if draw(st.booleans())],
        draw(st.lists(sets, max_size=2)),
        hosts,
        {key(number): HERE if number < GUESTS - 1 else "h2" for number in range(GUESTS)},
    )


@lru_cache
def _traffic(version: int) -> tuple[Packet, ...]:
    nobody = bytes(4 if version == 4 else 16)
    plain = [Packet(nobody, nobody, 150), Packet(nobody, nobody, 0)]
    ports = itertools.product((6, 17), (80, 2000), (79, 80, 443, 444, 445, 22))
    icmp = 1 if version == 4 else 58
    asked = itertools.product((0, 8, 128, 135), (0, 1, 2))
    return (
        *plain,
        *(Packet(nobody, nobody, p, source, destination) for p, source, destination in ports),
        *(Packet(nobody, nobody, icmp, icmp=Icmp(*each)) for each in asked),
        *(Packet(nobody, nobody, 59 - icmp, icmp=Icmp(kind, 0)) for kind in (0, 8, 8, 128)),  # the other family's
    )


def packets(seed: int, count: int) -> Iterator[Packet]:
    chance = random.Random(seed)
    behind = [prefix.network[:-1] + b"\x09" for pair in BEHIND for prefix in pair]
    places = [*itertools.chain(*map(addresses_of, range(GUESTS))), *HOST, *STRANGERS, *behind]
    for _ in range(count):
        version = chance.choice((4, 6))
        source, destination = (
            chance.choice([a for a in places if len(a) == (4 if version == 4 else 16)]) for _ in range(2)
        )
        ways = {end: chance.choice(INTERFACES) for end in ("out_interface", "in_interface")}
        yield replace(chance.choice(_traffic(version)), source=source, destination=destination, **ways)


def members(world: World) -> dict[str, AddressSet]:
    """Of every selector, as the dispatcher hands them out."""
    known = {profile.name: profile for profile in world.profiles}
    found = {text: AddressSet() for text in SELECTORS}
    for text, value in found.items():
        chosen = selectors.parse(text)
        for guest in world.endpoints:
            if chosen.matches(effective_labels(guest, known)):
                value.addresses.update(guest.all_addresses())
                value.prefixes.update(guest.prefixes)
        for host in world.host_endpoints:
            if chosen.matches(effective_labels(host, known)):
                value.addresses.update(host.addresses)
        for net in itertools.chain(*(each.nets for each in world.sets if chosen.matches(each.labels))):
            if net.length == 8 * len(net.network):
                value.addresses.add(net.network)
            else:
                value.prefixes.add(net)
    return found


def told(world: World) -> Told:
    def named(items: object) -> dict[str, object]:
        return {item.name: item for item in items}  # type: ignore[attr-defined]

    return Told(
        named(p for p in world.policies if not p.staged),  # type: ignore[arg-type]
        named(world.profiles),  # type: ignore[arg-type]
        members(world),
        tiers=named(world.tiers),  # type: ignore[arg-type]
        staged=named(p for p in world.policies if p.staged),  # type: ignore[arg-type]
        host_endpoints=named(e for e in world.host_endpoints if e.node == HERE),  # type: ignore[arg-type]
    )


def local(number: int, guest: Endpoint) -> Local:
    return Local(guest, "qemu", Phase.LIVE, Carrier(f"vnet{number}", 100 + number), guest)


@dataclass
class Filter:
    """The host's packet filter."""

    desired: Desired

    def __post_init__(self) -> None:
        self._sets = {name: [*self.desired.members(name)] for name in self.desired.sets}
        self.view = View(self.desired.chains, self._contains)

    @classmethod
    def of(cls, world: World) -> Filter:
        here = [local(n, guest) for n, guest in enumerate(world.endpoints) if world.places[guest.key] == HERE]
        return cls(Calculation.build(HERE, told(world), Locals({x.endpoint.key: x for x in here})).desired)

    def _contains(self, name: str, address: Address) -> bool:
        return any(
            m.contains(address) if isinstance(m, Prefix) else m == address for m in self._sets[name]
        )

    def _judged(self, chain: str, packet: Packet) -> Judgement:
        return judge(self.view, chain, packet, Ways(packet.in_interface or "", packet.out_interface or ""))

    def ask(self, world: World, packet: Packet) -> dict[str, Judgement]:
        """By the fields of slash32.verdict.Verdict: what this host is asked about the packet, and answers."""
        source, destination = (self._tap(world, a) for a in (packet.source, packet.destination))
        own = [address in HOST and bool(world.host_endpoints) for address in (packet.source, packet.destination)]
        here = [source is not None or own[0], destination is not None or own[1]]
        chains: dict[str, str] = {}
        if source is not None:
            chains["egress"] = self.desired.taps[source].chains.egress
        if destination is not None:
            chains["ingress"] = self.desired.taps[destination].chains.ingress
        if all(here):
            if source is not None and own[1]:
                chains["host_ingress"] = HOST_FROM_GUESTS
            if own[0] and destination is not None:
                chains["host_egress"] = HOST_TO_GUESTS
        elif here[0]:
            chains["host_egress"] = HOST_OUT if own[0] else HOST_FORWARD_OUT
        elif here[1]:
            chains["host_ingress"] = HOST_IN if own[1] else HOST_FORWARD_IN
        return {end: self._judged(chain, packet) for end, chain in chains.items()}

    def _tap(self, world: World, address: Address) -> int | None:
        found = (
            ifindex for ifindex, tap in self.desired.taps.items()
            if address in tap.addresses or any(p.contains(address) for p in tap.prefixes)
        )  # fmt: skip
        return next(found, None)
