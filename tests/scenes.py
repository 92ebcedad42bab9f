# Owns: random lives of one host: what the dispatcher sends (through a real replica), what runs here, and the
# calculation that follows it step by step. Shared by the unit and the kernel tests of hostd's core.
from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

from hypothesis import strategies as st

from hostd.compiler.absorb import absorb
from hostd.compiler.calc import Calculation
from hostd.compiler.desired import Desired, Dirty
from hostd.compiler.world import world_of
from hostd.state import Carrier, Local, Locals, Phase
from slash32.model import Endpoint, EndpointKey, SharedAddress
from slash32.net import host_prefix, parse_address, parse_prefix
from slash32.pack import MASK, AddressSet, Kind, ObjectKey, Value, digest_of
from slash32.policy import Action, Direction, HostEndpoint, Icmp, Peer, Policy, PortRange, Profile, Rule, Tier
from slash32.sync import Applied, Replica
from slash32.wire import Change, Delete, Delta, Members, Put, Snapshot

FULL = os.environ.get("SLASH32_COUNTS") == "full"
HERE = "h1"
SELECTORS = ('role == "web"', 'role == "db"', "all()", 'has(env)')
ROLES = ("web", "db", "")
POLICIES, PROFILES = ("a", "b", "long.name-of.a-policy", "z"), ("p", "q")
TIERS, HOST_ENDPOINTS = ("early", "late"), ("e", "f", "g")
GUESTS = 4
ADDRESSES4 = [parse_address(f"10.65.0.{n}") for n in range(1, 9)]
ADDRESSES6 = [parse_address(f"fd00:65::{n:x}") for n in range(1, 9)]
PREFIXES = [parse_prefix(p) for p in ("10.66.0.0/26", "10.66.0.64/26", "10.66.0.0/24", "fd66::/64", "fd66:0:0:1::/64")]
NEXT_HOPS = [*map(parse_address, ("192.0.2.1", "192.0.2.2", "2001:db8::1"))]
STEPS = (0, 3, 127, 128, 129, 130, 513)  # sizes of sets around those at which the kernel's set is made anew


def many(count: int, version: int = 4) -> set[bytes]:
    return {parse_address(f"10.{70 + n // 60000}.{n // 250 % 240}.{n % 250}" if version == 4 else f"fd00:70::{n:x}")
            for n in range(count)}  # fmt: skip


def key(number: int) -> EndpointKey:
    return EndpointKey(f"00000000-0000-0000-0000-{number:012}", f"52:54:00:00:00:{number:02x}")


# -- values ---------------------------------------------------------------------------------------------------------


@st.composite
def peers(draw: st.DrawFn, ports: bool) -> Peer:
    nets = st.lists(st.sampled_from([*map(parse_prefix, ("10.0.0.0/8", "0.0.0.0/0", "fd00::/8")), *PREFIXES]),
                    max_size=2, unique=True)  # fmt: skip
    ranges = st.lists(st.sampled_from([PortRange(80, 80), PortRange(1, 1023), PortRange(443, 444)]), max_size=2)
    return Peer(
        nets=tuple(draw(nets)),
        not_nets=tuple(draw(nets)),
        selector=draw(st.none() | st.sampled_from(SELECTORS)),
        not_selector=draw(st.none() | st.sampled_from(SELECTORS)),
        ports=tuple(draw(ranges)) if ports else (),
        not_ports=tuple(draw(ranges)) if ports else (),
    )


ACTIONS = (*Action, Action.ALLOW, Action.DENY)


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    protocol = draw(st.sampled_from([None, 1, 6, 17, 58]))
    ports = protocol in (6, 17)
    icmps = st.none() | st.builds(Icmp, st.sampled_from([0, 8, 128]), st.none() | st.sampled_from([0, 1]))
    return Rule(
        draw(st.sampled_from(ACTIONS)),
        protocol,
        draw(st.sampled_from([None, None, 17])),
        draw(st.sampled_from([None, None, 4, 6])),
        draw(icmps) if protocol in (1, 58) else None,
        draw(icmps) if protocol in (1, 58) else None,
        draw(peers(ports)),
        draw(peers(ports)),
    )


Rules = st.SearchStrategy[tuple[Rule, ...]]
RULES: Rules = st.lists(rules(), max_size=2).map(tuple)


@st.composite
def policies(draw: st.DrawFn, name: str, staged: bool = False, some: Rules = RULES) -> Policy:
    """As resources.py lets them through: rules only of the directions that the types name."""
    types = tuple(draw(st.sampled_from([(Direction.INGRESS,), (Direction.EGRESS,), tuple(Direction)])))
    ingress = draw(some) if Direction.INGRESS in types else ()
    egress = draw(some) if Direction.EGRESS in types else ()
    asked = draw(st.sampled_from(SELECTORS)), types, draw(st.sampled_from([None, 1.0, 2.0]))
    tier = draw(st.sampled_from(["default", *TIERS]))
    return Policy(name, *asked, ingress, egress, tier, draw(st.booleans()), draw(st.booleans()), staged)


@st.composite
def tiers(draw: st.DrawFn, name: str) -> Tier:
    order = draw(st.sampled_from([None, 1.0, 2.0, 2_000_000.0]))
    return Tier(name, order, draw(st.sampled_from([Action.DENY, Action.PASS])))


@st.composite
def host_endpoints(draw: st.DrawFn, name: str) -> HostEndpoint:
    labels = {"role": role} if (role := draw(st.sampled_from(ROLES))) else {}
    asked = tuple(draw(st.lists(st.sampled_from(PROFILES), max_size=2, unique=True)))
    return HostEndpoint(name, HERE, draw(st.sampled_from(["eth0", "eth1", "*"])), labels, profiles=asked)


@st.composite
def profiles(draw: st.DrawFn, name: str, some: Rules = RULES) -> Profile:
    labels = draw(st.sampled_from([{}, {"env": "prod"}, {"role": "web"}]))
    return Profile(name, draw(some), draw(some), labels)


@st.composite
def sets(draw: st.DrawFn) -> AddressSet:
    some = many(draw(st.sampled_from(STEPS)), draw(st.sampled_from((4, 6))))
    own = draw(st.sets(st.sampled_from(ADDRESSES4 + ADDRESSES6), max_size=4))
    return AddressSet(some | own, draw(st.sets(st.sampled_from(PREFIXES), max_size=3)))


@st.composite
def endpoints(draw: st.DrawFn, number: int, addresses: tuple[bytes, ...] = ()) -> Endpoint:
    """Its own addresses are its own; shared addresses and prefixes are those of everybody's."""
    own = [a for a in addresses or (ADDRESSES4[number], ADDRESSES6[number]) if draw(st.booleans())]
    extra = [parse_address(f"10.65.1.{number}")] if draw(st.booleans()) else []
    shared = [SharedAddress(parse_address("10.9.0.9"), "vip")] if draw(st.booleans()) else []
    labels = {"role": role} if (role := draw(st.sampled_from(ROLES))) else {}
    return Endpoint(
        key(number),
        f"guest{number}",
        labels,
        tuple(draw(st.lists(st.sampled_from(PROFILES), max_size=2, unique=True))),
        (*own, *extra),
        tuple(shared if own or extra or shared else [SharedAddress(parse_address("10.9.0.9"), "vip")]),
        tuple(draw(st.lists(st.sampled_from(PREFIXES), max_size=2, unique=True))),
    )


@st.composite
def locals_(draw: st.DrawFn, number: int) -> Local:
    endpoint = draw(endpoints(number))
    accepted = draw(st.sampled_from([endpoint, endpoint, None]) | endpoints(number))
    lives = draw(st.sampled_from([100 + number, 200 + number]))
    carrier = draw(st.sampled_from([Carrier(f"vnet{lives}", lives), Carrier(f"vnet{lives}", lives), None]))
    phase = draw(st.sampled_from(Phase)) if carrier else Phase.RESERVED
    return Local(endpoint, "qemu", phase, carrier, accepted)


# -- steps ----------------------------------------------------------------------------------------------------------


class Commit(NamedTuple):
    """One commit of the dispatcher: these objects are now so (None: gone)."""

    values: tuple[tuple[ObjectKey, Value | None], ...]


class Run(NamedTuple):
    """What runs here changed."""

    number: int
    local: Local | None


class Absorb(NamedTuple):
    """What came is taken over; until then it gathers. `snapshot`: the session was lost in between."""

    snapshot: bool = False


class Settle(NamedTuple):
    """The kernel is brought up to date."""


TAPS = tuple(base + number for base in (100, 200) for number in range(GUESTS))  # interface indexes of guests


Step = Commit | Run | Absorb | Settle


@st.composite
def commits(draw: st.DrawFn) -> Commit:
    def one() -> tuple[ObjectKey, Value | None]:
        kind = draw(st.sampled_from([*Kind, Kind.POLICY, Kind.SET]))
        gone = draw(st.integers(0, 3)) == 0
        match kind:
            case Kind.POLICY:
                name = draw(st.sampled_from(POLICIES))
                return ObjectKey(kind, name), None if gone else draw(policies(name))
            case Kind.STAGED:
                name = draw(st.sampled_from(POLICIES))
                return ObjectKey(kind, name), None if gone else draw(policies(name, staged=True))
            case Kind.TIER:
                name = draw(st.sampled_from(TIERS))
                return ObjectKey(kind, name), None if gone else draw(tiers(name))
            case Kind.HOSTENDPOINT:
                name = draw(st.sampled_from(HOST_ENDPOINTS))
                return ObjectKey(kind, name), None if gone else draw(host_endpoints(name))
            case Kind.PROFILE:
                name = draw(st.sampled_from(PROFILES))
                return ObjectKey(kind, name), None if gone else draw(profiles(name))
            case Kind.SET:
                return ObjectKey(kind, draw(st.sampled_from(SELECTORS))), None if gone else draw(sets())
            case Kind.HOST:
                own = draw(st.sets(st.sampled_from(NEXT_HOPS), min_size=1))
                return ObjectKey(kind, draw(st.sampled_from(["h2", "h3"]))), None if gone else tuple(sorted(own))
            case _:
                prefix = draw(st.sampled_from([*PREFIXES, *map(host_prefix, ADDRESSES4[:3] + ADDRESSES6[:2])]))
                hosts = draw(st.sets(st.sampled_from([HERE, "h2", "h3"]), min_size=1))
                return ObjectKey(kind, prefix), None if gone else tuple(sorted(hosts))

    return Commit(tuple(one() for _ in range(draw(st.integers(1, 3)))))


@st.composite
def runs(draw: st.DrawFn) -> Run:
    number = draw(st.integers(0, GUESTS - 1))
    return Run(number, draw(st.none() | locals_(number) | locals_(number)))


def lives(most: int = 14) -> st.SearchStrategy[list[Step]]:
    absorbs = st.builds(Absorb, st.sampled_from([False, False, True]))
    some = st.one_of(commits(), commits(), runs(), runs(), absorbs, st.just(Settle()))
    return st.lists(some, min_size=1, max_size=most)


# -- the scene ------------------------------------------------------------------------------------------------------


class Scene:
    """One host's core, fed as hostd is: the replica takes messages, the calculation what the replica applied."""

    def __init__(self) -> None:
        self.content: dict[ObjectKey, Value] = {}
        self.revision = 0
        self.replica, self.locals = Replica(), Locals({})
        self.replica.receive(Snapshot("e", 0, 0, False, ()))
        self.calc = Calculation.build(HERE, world_of(self.replica), self.locals)
        self.waiting: list[Applied] = []
        self.dirty = Dirty()

    def digest(self) -> int:
        return sum(digest_of(*at, value) for at, value in self.content.items()) & MASK

    def take(self, step: Step) -> None:
        match step:
            case Commit(values):
                self.commit(values)
            case Run(number, local):
                self.absorb()  # hostd takes over what came at once: the replica is never ahead of anything else
                self.locals.remove(key(number))
                if local is not None:
                    self.locals.put(local)
                self.dirty.merge(self.calc.local_changed(key(number)))
            case Absorb(snapshot):
                self.absorb(snapshot)

    def commit(self, values: Iterable[tuple[ObjectKey, Value | None]]) -> None:
        changes = [c for at, value in dict(values).items() if (c := self._change(at, value)) is not None]
        before, self.revision = self.revision, self.revision + 1
        out = self.replica.receive(Delta("e", before, self.revision, self.digest(), tuple(changes)))
        assert len(out) == 1 and isinstance(out[0], Applied)
        self.waiting.append(out[0])

    def _change(self, at: ObjectKey, value: Value | None) -> Change | None:
        old = self.content.pop(at, None)
        if value is not None:
            self.content[at] = value.copy() if isinstance(value, AddressSet) else value
        if value is None:
            return Delete(*at) if old is not None else None
        if isinstance(old, AddressSet) and isinstance(value, AddressSet):
            add = AddressSet(value.addresses - old.addresses, value.prefixes - old.prefixes)
            gone = AddressSet(old.addresses - value.addresses, old.prefixes - value.prefixes)
            return Members(str(at.name), add, gone)
        return Put(*at, value)

    def absorb(self, snapshot: bool = False) -> None:
        if snapshot:
            objects = tuple(Put(*at, v.copy() if isinstance(v, AddressSet) else v) for at, v in self.content.items())
            for outcome in self.replica.receive(Snapshot("e", self.revision, self.digest(), False, objects)):
                assert isinstance(outcome, Applied)
                self.waiting.append(outcome)
        self.dirty.merge(absorb(self.calc, self.waiting))
        self.waiting = []

    def rest(self) -> None:
        """All that came is taken over, and what nobody uses is forgotten."""
        self.absorb()
        self.dirty.merge(self.calc.collect_classes())

    def fresh(self) -> Calculation:
        return Calculation.build(HERE, world_of(self.replica), self.locals)


def same(one: Desired, other: Desired) -> None:
    assert one.sets == other.sets
    assert one.chains == other.chains
    assert one.logs == other.logs
    assert one.staged == other.staged
    assert one.taps == other.taps
    assert one.routes == other.routes
    for name in one.sets:
        assert set(one.members(name)) == set(other.members(name)), name


