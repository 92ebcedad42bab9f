# Owns: one world as rule lists ask about it: who is where, by which selectors each is found, which programs each is
# asked (slash32.programs). Worlds that are compared share one Lexicon: equal things have equal numbers. Pure.
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from slash32 import failsafe
from slash32.matching import World, effective_labels, parsed
from slash32.model import Endpoint
from slash32.net import Address, Prefix
from slash32.policy import (
    ANY_INTERFACE,
    Action,
    Direction,
    HostEndpoint,
    Icmp,
    Peer,
    Policy,
    PortRange,
    Profile,
    Rule,
)
from slash32.programs import Block, Compiler, Program
from slash32.selector import Compare, Has, InSet, Node, Not, Several
from slash32.verdict import steps

_ICMPV6 = 58
Labels = tuple[tuple[str, str], ...]


class Seat(NamedTuple):
    """Who is asked about a flow that begins or ends at one place. Numbers of programs; all must allow."""

    guest: bool = False
    out: tuple[int, ...] = ()
    into: tuple[int, ...] = ()
    host: str = ""  # "": its host asks nothing
    leaving: tuple[int, ...] = ()  # where the other end is not on the same host
    entering: tuple[int, ...] = ()
    to_guests: tuple[int, ...] = ()  # what the host says to its own guests
    to_host: tuple[int, ...] = ()  # what they say to it


def ruled(world: World) -> list[Policy | Profile]:
    """All that has rules and counts."""
    return [*(policy for policy in world.policies if not policy.staged), *world.profiles]


@dataclass(slots=True)
class _Values:
    """What selectors ask about the value of one label."""

    named: set[str] = field(default_factory=set)
    parts: dict[tuple[str, str], Compare] = field(default_factory=dict)  # contains, starts with, ends with
    _first: dict[tuple[object, ...], str] = field(default_factory=dict)
    _known: dict[str, str] = field(default_factory=dict)

    def alike(self, value: str) -> str:
        """The first value seen for which every selector holds that holds for this one, and no other."""
        found = self._known.get(value)
        if found is None:
            answers = (part.matches({part.label: value}) for part in self.parts.values())
            found = self._first.setdefault((value if value in self.named else None, *answers), value)
            self._known[value] = found
        return found


class Lexicon:
    """What the selectors of all worlds can tell apart in labels; the numbers of selectors and of programs."""

    def __init__(self, worlds: Iterable[World]) -> None:
        self.compiler = Compiler()
        self._values: dict[str, _Values] = {}  # of each label that a selector names
        self._numbers: dict[str, int] = {}  # of selectors in rules
        self._bits: dict[Labels, int] = {}
        for world in worlds:
            for item in ruled(world):
                self._learn(item)
        self.keys = tuple(sorted(self._values))

    def _learn(self, item: Policy | Profile) -> None:
        if isinstance(item, Policy):
            self._note(parsed(item.selector).root)
        for rule in (*item.ingress, *item.egress):
            for text in (x for peer in (rule.source, rule.destination) for x in (peer.selector, peer.not_selector)):
                if text is not None and text not in self._numbers:
                    self._numbers[text] = len(self._numbers)
                    self._note(parsed(text).root)

    def _note(self, root: Node) -> None:
        todo = [root]
        while todo:
            match todo.pop():
                case Not(operand):
                    todo.append(operand)
                case Several(_, operands):
                    todo.extend(operands)
                case Has(label):
                    self._values.setdefault(label, _Values())
                case InSet(label, _, values):
                    self._values.setdefault(label, _Values()).named.update(values)
                case Compare(label, operator, value):
                    have = self._values.setdefault(label, _Values())
                    if operator in ("==", "!="):
                        have.named.add(value)
                    else:
                        have.parts[operator, value] = Compare(label, operator, value)

    def reduced(self, labels: Mapping[str, str]) -> Labels:
        """Two of equal reduced labels are selected by the same selectors."""
        return tuple((key, self._values[key].alike(labels[key])) for key in self.keys if key in labels)

    def bits(self, labels: Labels) -> int:
        """A bit for each selector that matches."""
        found = self._bits.get(labels)
        if found is None:
            have = dict(labels)
            found = sum(1 << number for text, number in self._numbers.items() if parsed(text).matches(have))
            self._bits[labels] = found
        return found

    def bit(self, selector: str | None) -> int:
        return 0 if selector is None else 1 << self._numbers[selector]


@dataclass(slots=True)
class Reading:
    """One world."""

    world: World
    lexicon: Lexicon
    profiles: dict[str, Profile] = field(default_factory=dict)
    own: dict[Address, list[Endpoint]] = field(default_factory=dict)
    behind: dict[Prefix, list[Endpoint]] = field(default_factory=dict)
    at_hosts: dict[Address, list[HostEndpoint]] = field(default_factory=dict)
    sets: dict[Prefix, int] = field(default_factory=dict)  # selectors that find each prefix of the network sets
    hosts: dict[str, list[HostEndpoint]] = field(default_factory=dict)
    _seats: dict[tuple[Labels, tuple[str, ...], str], Seat] = field(default_factory=dict)
    _labels: dict[int, Labels] = field(default_factory=dict)  # by identity of the endpoint
    _programs: dict[tuple[Labels, tuple[str, ...], Direction], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        world = self.world
        self.profiles = {profile.name: profile for profile in world.profiles}
        for endpoint in world.endpoints:
            for address in dict.fromkeys(endpoint.all_addresses()):
                self.own.setdefault(address, []).append(endpoint)
            for prefix in endpoint.prefixes:
                self.behind.setdefault(prefix, []).append(endpoint)
        for each in world.host_endpoints:
            self.hosts.setdefault(each.node, []).append(each)
            for address in dict.fromkeys(each.addresses):
                self.at_hosts.setdefault(address, []).append(each)
        for group in world.sets:
            bits = self.lexicon.bits(self.lexicon.reduced(group.labels))
            for net in group.nets:
                self.sets[net] = self.sets.get(net, 0) | bits

    def labels(self, item: Endpoint | HostEndpoint) -> Labels:
        found = self._labels.get(id(item))
        if found is None:
            found = self._labels[id(item)] = self.lexicon.reduced(effective_labels(item, self.profiles))
        return found

    def bits(self, item: Endpoint | HostEndpoint) -> int:
        return self.lexicon.bits(self.labels(item))

    def host_of(self, endpoint: Endpoint) -> str:
        """Nothing where it is not known, or has no host endpoints: it asks nothing."""
        host = self.world.places.get(endpoint.key, "")
        return host if host in self.hosts else ""

    def seat(self, endpoint: Endpoint) -> Seat:
        key = (self.labels(endpoint), endpoint.profiles, self.host_of(endpoint))
        found = self._seats.get(key)
        if found is None:
            out = (self._guest(endpoint, Direction.EGRESS),)
            into = (self._guest(endpoint, Direction.INGRESS),)
            found = self._seats[key] = self._hosted(Seat(True, out, into, key[2]), forward=True)
        return found

    def host_seat(self, host: str) -> Seat:
        return self._hosted(Seat(host=host), forward=False)

    def _hosted(self, seat: Seat, forward: bool) -> Seat:
        facing = self.hosts.get(seat.host, ())
        if not facing:
            return seat
        every = [each for each in facing if each.interface == ANY_INTERFACE]
        ask = self._forward if forward else self._local
        closed = (self.lexicon.compiler.number(Program(())),)
        return seat._replace(
            leaving=tuple(sorted({ask(each, Direction.EGRESS) for each in facing})),
            entering=tuple(sorted({ask(each, Direction.INGRESS) for each in facing})),
            to_guests=tuple(sorted({self._guest(each, Direction.EGRESS) for each in every})),
            to_host=tuple(sorted({self._guest(each, Direction.INGRESS) for each in every})) or closed,
        )

    def _guest(self, item: Endpoint | HostEndpoint, direction: Direction) -> int:
        """All policies, then the profiles."""
        key = (self.labels(item), item.profiles, direction)
        found = self._programs.get(key)
        if found is None:
            world = self.world
            tiers = steps(world.policies, world.tiers, dict(key[0]), direction)
            known = [self.profiles[name] for name in item.profiles if name in self.profiles]
            found = self._programs[key] = self.lexicon.compiler.guest(tiers, known, direction)
        return found

    def _forward(self, item: HostEndpoint, direction: Direction) -> int:
        policies = [policy for policy in self.world.policies if policy.apply_on_forward]
        tiers = steps(policies, self.world.tiers, dict(self.labels(item)), direction)
        return self.lexicon.compiler.forward(tiers, direction)

    def _local(self, item: HostEndpoint, direction: Direction) -> int:
        compiler = self.lexicon.compiler
        blocks, finally_allowed = compiler.programs[self._guest(item, direction)]
        rules = _INBOUND if direction is Direction.INGRESS else _OUTBOUND
        first = Block(tuple(compiler.line(rule) for rule in rules), Action.PASS)
        return compiler.number(Program((first, *blocks), finally_allowed))


def _always(ports: Sequence[failsafe.Failsafe]) -> tuple[Rule, ...]:
    neighbours = [Rule(Action.ALLOW, _ICMPV6, icmp=Icmp(number), ip_version=6) for number in failsafe.VITAL_ICMP6]
    open_ports = [
        Rule(Action.ALLOW, each.protocol, destination=Peer(ports=(PortRange(each.first, each.last),))) for each in ports
    ]
    return (*neighbours, *open_ports)


_INBOUND, _OUTBOUND = _always(failsafe.INBOUND), _always(failsafe.OUTBOUND)
