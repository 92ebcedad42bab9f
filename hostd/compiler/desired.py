# Owns: the shape of what the kernel of one host is to hold ("desired") and does hold ("actual"), as plain data
# that hostd.compiler.calc fills, hostd.change.plan compares and hostd.dataplane reads and writes. Pure.
from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

from slash32.net import Address, Prefix
from slash32.policy import Direction

from .forwarding import Route
from .ruleset import Rule, SetSpec

Member = Address | Prefix  # single addresses in ADDR sets, prefixes in NET sets


class ClassChains(NamedTuple):
    """A class of endpoints: all that share these two chains (same policies in the same order, both ways)."""

    egress: str  # what the guest sends
    ingress: str  # what the guest receives


class Tap(NamedTuple):
    """One endpoint that is to be connected. An isolated one simply is not here: the guard holds it."""

    ifindex: int
    name: str
    mac: bytes
    addresses: tuple[Address, ...]
    prefixes: tuple[Prefix, ...]
    chains: ClassChains


class LogPoint(NamedTuple):
    """What a Log rule's tag stands for."""

    kind: str  # "policy" or "profile"
    name: str
    tier: str  # of a policy
    direction: Direction
    rule: int  # index into the item's rules of this direction


class StagedPoint(NamedTuple):
    """What a counted rule stands for: packets that a staged policy would have dropped."""

    policy: str  # "", with no rule: the end of a tier in which only staged policies apply
    tier: str
    direction: Direction
    rule: int | None


def no_members(_name: str) -> Collection[Member]:
    return ()


@dataclass(slots=True)
class Desired:
    sets: dict[str, SetSpec] = field(default_factory=dict)
    members: Callable[[str], Collection[Member]] = no_members  # by set; asked only when a set is new or read back
    chains: dict[str, tuple[Rule, ...]] = field(default_factory=dict)
    taps: dict[int, Tap] = field(default_factory=dict)  # by ifindex
    routes: dict[Prefix, Route] = field(default_factory=dict)
    exempt: frozenset[int] = frozenset()  # ifindexes of untagged guests that ran at the first install
    logs: dict[str, LogPoint] = field(default_factory=dict)  # by tag
    staged: dict[tuple[str, int], StagedPoint] = field(default_factory=dict)  # by chain and position of the rule


@dataclass(slots=True)
class Actual:
    """What was read, or written since. Fingerprints stand for rules; set members are kept only while comparing."""

    sets: dict[str, SetSpec] = field(default_factory=dict)
    chains: dict[str, tuple[str, ...]] = field(default_factory=dict)
    classes: dict[int, ClassChains] = field(default_factory=dict)  # device group -> chains
    taps: dict[int, Admitted] = field(default_factory=dict)  # by ifindex
    routes: dict[Prefix, Route] = field(default_factory=dict)
    exempt: frozenset[int] = frozenset()
    members: dict[str, Collection[Member]] | None = None  # only straight after a read
    strays: frozenset[Hashable] = frozenset()  # elements of nothing whole, for the filter to sweep
    extra_routes: tuple[Route, ...] = ()  # second routes of ours to one prefix (a replacement was cut off)
    taken: set[Prefix] = field(default_factory=set)  # places of routes of ours that somebody's `replace` took
    foreign_groups: dict[int, int] = field(default_factory=dict)  # guarded links we know nothing of: ifindex -> group


@dataclass(slots=True)
class Admitted:
    """One interface as the kernel has it: anti-spoof elements, neighbours, gateway address, class."""

    mac: bytes = b""
    addresses: frozenset[Address] = frozenset()
    prefixes: frozenset[Prefix] = frozenset()
    neighbours: frozenset[tuple[Address, bytes]] = frozenset()
    gateway: bool = False  # carries fe80::1/64
    sysctls: bool = False
    group: int = 0


@dataclass(slots=True)
class Dirty:
    """Which objects may differ since the last plan; names only, so that a plan costs what changed."""

    sets: set[str] = field(default_factory=set)
    members: dict[str, tuple[set[Member], set[Member]]] = field(default_factory=dict)  # set -> (added, removed)
    refill: set[str] = field(default_factory=set)  # sets whose members are all to be written anew
    chains: set[str] = field(default_factory=set)
    taps: set[int] = field(default_factory=set)
    routes: set[Prefix] = field(default_factory=set)

    @property
    def only_members(self) -> bool:
        return not (self.sets or self.refill or self.chains or self.taps or self.routes)

    def merge(self, other: Dirty) -> None:
        self.sets |= other.sets
        self.refill |= other.refill
        self.chains |= other.chains
        self.taps |= other.taps
        self.routes |= other.routes
        for name, (add, remove) in other.members.items():
            self.change_members(name, add, remove)

    def change_members(self, name: str, add: Collection[Member], remove: Collection[Member]) -> None:
        """Both are real changes, so that what came and went (or went and came back) is no change at all."""
        added, removed = self.members.setdefault(name, (set(), set()))
        came_back, went_again = removed.intersection(add), added.intersection(remove)
        added.update(set(add) - came_back)
        removed.update(set(remove) - went_again)
        added.difference_update(went_again)
        removed.difference_update(came_back)

    def __bool__(self) -> bool:
        return bool(self.sets or self.refill or self.members or self.chains or self.taps or self.routes)
