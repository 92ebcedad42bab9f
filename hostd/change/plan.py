# Owns: the difference between desired and actual, as ordered operations: close, filter, open, collect. Pure.
#
# The order is the safety of the whole: what is taken away is closed first (device group 0 is the guard's), the packet
# filter changes in one transaction, and only then routes appear and, last of all, a tap's group opens it. What nothing
# refers to any more is collected at the end.
from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from slash32.net import Address, Prefix, format_address

from ..compiler.desired import Actual, Admitted, ClassChains, Desired, Dirty, Member, Tap
from ..compiler.forwarding import Add, Delete, Item, Neighbour, Operation, Replace, Route, SetGroup, Take, TapAddress
from ..compiler.names import height
from ..compiler.ruleset import HOST_CHAINS, Rule, SetSpec
from .moves import PARKED, parking, turned


class AddSet(NamedTuple):
    name: str
    spec: SetSpec


class FlushSet(NamedTuple):
    name: str
    spec: SetSpec


class AddMembers(NamedTuple):
    name: str
    spec: SetSpec
    members: tuple[Member, ...]


class DelMembers(NamedTuple):
    name: str
    spec: SetSpec
    members: tuple[Member, ...]


class PutChain(NamedTuple):
    name: str
    rules: tuple[Rule, ...]


class PutClass(NamedTuple):
    """`turned`: it takes the place of another class, with these taps in it."""

    group: int
    chains: ClassChains
    turned: tuple[int, ...] = ()


class Admit(NamedTuple):
    """All that the guest may send from; what is there already is fine."""

    ifindex: int
    mac: bytes
    addresses: tuple[Address, ...]
    prefixes: tuple[Prefix, ...]


class Expel(NamedTuple):
    """All that it may send from, and its MAC."""

    ifindex: int
    mac: bytes
    addresses: tuple[Address, ...]
    prefixes: tuple[Prefix, ...]


class Exempt(NamedTuple):
    ifindex: int
    on: bool


class Sweep(NamedTuple):
    """Elements that no admission of ours is made of."""

    strays: frozenset[Hashable]


class DelClass(NamedTuple):
    group: int


class DelChain(NamedTuple):
    name: str


class DelSet(NamedTuple):
    name: str


class PutSysctls(NamedTuple):
    ifindex: int
    name: str


Grow = AddSet | FlushSet | AddMembers | DelMembers | PutChain | PutClass | Sweep | Admit | Expel | Exempt
Shrink = DelClass | DelChain | DelSet
FilterOp = Grow | Shrink
LinkOp = Operation | PutSysctls


@dataclass(slots=True)
class Plan:
    close: list[Operation] = field(default_factory=list)
    filter: list[Grow] = field(default_factory=list)
    open: list[LinkOp] = field(default_factory=list)
    collect: list[Shrink] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.close) + len(self.filter) + len(self.open) + len(self.collect)

    def __iter__(self) -> Iterator[FilterOp | LinkOp]:
        yield from (*self.close, *self.filter, *self.open, *self.collect)


class Limits(NamedTuple):
    """Where device groups of ours lie, and whether what is not desired may go (only once all is known)."""

    group_base: int
    prune: bool = True
    scanned: bool = True  # libvirt was; before, nobody knows which interfaces the exempt guests have


class Scope(NamedTuple):
    """What is compared. `fingerprints` are those of the desired chains in `dirty` (the packet filter computes them)."""

    desired: Desired
    actual: Actual
    dirty: Dirty
    fingerprints: Mapping[str, tuple[str, ...]]
    limits: Limits


def everything(desired: Desired, actual: Actual) -> Dirty:
    """All names of either side: the scope of a full comparison (`actual.members` must have been read)."""
    dirty = Dirty(
        sets=desired.sets.keys() | actual.sets.keys(),
        chains=desired.chains.keys() | actual.chains.keys(),
        taps=desired.taps.keys() | actual.taps.keys() | actual.foreign_groups.keys(),
        routes=desired.routes.keys() | actual.routes.keys(),
    )
    for name in desired.sets.keys() & actual.sets.keys():
        want, have = set(desired.members(name)), set((actual.members or {}).get(name, ()))
        if want != have:
            dirty.members[name] = (want - have, have - want)
    return dirty


def plan(scope: Scope) -> Plan:
    """Operations that take `actual` to `desired` within `dirty`."""
    actual = scope.actual
    quiet = not (actual.strays or actual.extra_routes) and scope.desired.exempt == actual.exempt
    return Plan(filter=_members(scope)) if quiet and scope.dirty.only_members else whole_plan(scope)


def whole_plan(scope: Scope) -> Plan:
    """The same whatever is dirty. (`plan` knows the commonest change of all, that of members, by sight.)"""
    desired, actual, dirty, _, limits = scope
    out = Plan()
    _plan_sets(out, scope)
    if dirty.chains:
        _plan_chains(out, scope)
    groups = _plan_classes(out, scope) if dirty.taps or out.collect else {}
    for ifindex in sorted(dirty.taps):
        tap, have = desired.taps.get(ifindex), actual.taps.get(ifindex)
        if tap is not None:
            _plan_tap(out, tap, have or Admitted(), groups[tap.chains])
        elif have is not None and limits.prune:
            _plan_withdrawal(out, ifindex, have)
        elif actual.foreign_groups.get(ifindex, 0) and limits.prune:
            out.close.append(SetGroup(ifindex, 0))
    if dirty.routes:
        _plan_routes(out, scope)
    if desired.exempt != actual.exempt:
        _plan_exempt(out, scope)
    if actual.strays and limits.prune:
        out.filter.append(Sweep(actual.strays))
    out.close += [Delete(route) for route in actual.extra_routes if limits.prune]
    if dirty.taps:  # else all are routes
        out.close += parking(out.open, actual, limits.group_base, _only_adds(out.filter, actual))
        out.close.sort(key=_closing)
        out.open.sort(key=_opening)
    out.filter.sort(key=lambda op: _FILTERING.index(type(op)))
    out.collect.sort(key=lambda op: _COLLECTING.index(type(op)))
    return out


def _closing(op: Operation) -> int:
    """The group first: the guard has the tap from then on."""
    return 0 if isinstance(op, SetGroup) else 1 if isinstance(op, Delete) and isinstance(op.item, Route) else 2


def _opening(op: LinkOp) -> int:
    """How the host speaks on the link, then neighbours, then routes; the group last: it opens the tap."""
    if isinstance(op, Add) and isinstance(op.item, Route):  # thousands at a time
        return 3
    if isinstance(op, PutSysctls):
        return 0
    if isinstance(op, Add | Delete) and not isinstance(op.item, Route):
        return 1 if isinstance(op.item, TapAddress) else 2
    return 4 if isinstance(op, SetGroup) else 3


# Sweep before PutClass and Admit: what is left of one that somebody damaged is a stray, and part of the whole, too.
_FILTERING = (AddSet, FlushSet, DelMembers, AddMembers, PutChain, Sweep, PutClass, Expel, Admit, Exempt)
_COLLECTING = (DelClass, DelChain, DelSet)


def _plan_sets(out: Plan, scope: Scope) -> None:
    desired, actual, dirty, _, limits = scope
    for name in sorted(dirty.sets):
        spec, have = desired.sets.get(name), actual.sets.get(name)
        if spec is None:
            if have is not None and limits.prune:
                out.collect.append(DelSet(name))
        elif have is None:
            out.filter.append(AddSet(name, spec))
            members = tuple(desired.members(name))
            if members:
                out.filter.append(AddMembers(name, spec, members))
    for name in sorted(dirty.refill & desired.sets.keys() & actual.sets.keys()):
        out.filter.append(FlushSet(name, desired.sets[name]))
        members = tuple(desired.members(name))
        if members:
            out.filter.append(AddMembers(name, desired.sets[name], members))
    out.filter += _members(scope)


def _members(scope: Scope) -> list[Grow]:
    """Those that leave go first."""
    desired, actual, dirty, *_ = scope
    adding, removing = list[Grow](), list[Grow]()
    for name, (add, remove) in dirty.members.items():
        spec = desired.sets.get(name)
        if spec is None or name not in actual.sets or name in dirty.refill:
            continue  # gone, or new and filled elsewhere
        if add:
            adding.append(AddMembers(name, spec, tuple(add)))
        if remove:
            removing.append(DelMembers(name, spec, tuple(remove)))
    return removing + adding


def _plan_chains(out: Plan, scope: Scope) -> None:
    """Chains in an order in which what a rule jumps or goes to exists; removed the other way round."""
    desired, actual, dirty, fingerprints, limits = scope
    puts: list[PutChain] = []
    gone: list[DelChain] = []
    for name in sorted(dirty.chains):
        rules = desired.chains.get(name)
        if rules is None:
            if name in actual.chains and limits.prune:
                gone.append(DelChain(name))
        elif name in HOST_CHAINS:  # the skeleton's own: always there, and empty for who knows no host endpoints
            have = actual.chains.get(name, ())
            if have != fingerprints[name] and (rules or limits.prune):
                puts.append(PutChain(name, rules))
        elif actual.chains.get(name) != fingerprints[name]:
            puts.append(PutChain(name, rules))
    puts.sort(key=lambda put: height(put.name))
    gone.sort(key=lambda end: -height(end.name))
    out.filter += puts
    out.collect += gone


def _plan_classes(out: Plan, scope: Scope) -> dict[ClassChains, int]:
    """Device group of every class that a dirty tap needs; new classes get groups that no link carries."""
    desired, actual, dirty, _, limits = scope
    groups = {chains: group for group, chains in actual.classes.items()}
    wanted = dict.fromkeys(desired.taps[ifindex].chains for ifindex in sorted(dirty.taps & desired.taps.keys()))
    new = [chains for chains in wanted if chains not in groups]
    instead: dict[ClassChains, int] = {}
    if new:  # seldom: nothing else here costs more the more taps there are
        instead = turned(desired.taps, actual, new)
        for chains, group in instead.items():
            there = tuple(sorted(ifindex for ifindex, tap in actual.taps.items() if tap.group == group))
            out.filter.append(PutClass(group, chains, there))
        groups.update(instead)
        new = [chains for chains in new if chains not in instead]
        taken = {*actual.classes, *actual.foreign_groups.values(), *(t.group for t in actual.taps.values())}
        taken.add(limits.group_base | PARKED)
        free = (group for group in count(limits.group_base + 1) if group not in taken)
        groups.update(zip(new, free, strict=False))
        out.filter += [PutClass(groups[chains], chains) for chains in new]
    doomed = {op.name for op in out.collect if isinstance(op, DelChain)}
    standing = {group: chains for group, chains in actual.classes.items() if group not in instead.values()}
    out.collect += [DelClass(group) for group, chains in standing.items() if doomed.intersection(chains)]
    return groups


def _only_adds(ops: list[Grow], actual: Actual) -> bool:
    """Nobody's packets meet what is changed, but for those who may send at all."""
    fresh = {op.name for op in ops if isinstance(op, AddSet)}

    def adds(op: Grow) -> bool:
        match op:
            case AddMembers(name):
                return name in fresh
            case PutChain(name):
                return name not in actual.chains and name not in HOST_CHAINS
            case PutClass():
                return not op.turned
        return isinstance(op, AddSet | Admit | Expel | Exempt)

    return all(map(adds, ops))


def _plan_tap(out: Plan, tap: Tap, have: Admitted, group: int) -> None:
    old = _admission(have, tap.ifindex)
    may = {*tap.addresses, *tap.prefixes}
    does = {*have.addresses, *have.prefixes}
    if old is not None and (have.mac != tap.mac or not does <= may):
        out.filter.append(old)
        does = set()
    if does != may:
        out.filter.append(Admit(tap.ifindex, tap.mac, tap.addresses, tap.prefixes))
    if not have.sysctls:
        out.open.append(PutSysctls(tap.ifindex, tap.name))
    if not have.gateway:
        out.open.append(Add(TapAddress(tap.ifindex)))
    neighbours = {(address, tap.mac) for address in tap.addresses}
    for address, mac in sorted(neighbours - have.neighbours):
        out.open.append(Add(Neighbour(tap.ifindex, address, mac)))
    for address, mac in sorted(have.neighbours - neighbours):
        if address not in tap.addresses:
            out.close.append(Delete(Neighbour(tap.ifindex, address, mac)))
    if have.group != group:
        out.open.append(SetGroup(tap.ifindex, group))


def _plan_withdrawal(out: Plan, ifindex: int, have: Admitted) -> None:
    if have.group:
        out.close.append(SetGroup(ifindex, 0))
    out.close += [Delete(Neighbour(ifindex, address, mac)) for address, mac in sorted(have.neighbours)]
    if have.gateway:
        out.close.append(Delete(TapAddress(ifindex)))
    old = _admission(have, ifindex)
    if old is not None:
        out.filter.append(old)


def _admission(have: Admitted, ifindex: int) -> Expel | None:
    if not have.addresses and not have.prefixes:
        return None
    return Expel(ifindex, have.mac, tuple(sorted(have.addresses)), tuple(sorted(have.prefixes)))


def _plan_routes(out: Plan, scope: Scope) -> None:
    desired, actual, dirty, _, limits = scope
    for prefix in sorted(dirty.routes):
        want, have = desired.routes.get(prefix), actual.routes.get(prefix)
        if want is None and have is not None and limits.prune:
            out.close.append(Delete(have))
        elif want is not None and not same_way(want, have):
            missing = Take(want) if prefix in actual.taken else Add(want)
            out.open.append(missing if have is None else Replace(have, want))


def same_way(want: Route, have: Route | None) -> bool:
    """A next hop whose interface the kernel was left to find is the same whichever it found."""
    return have is not None and want.via == have.via and want.oif in (0, have.oif)


def _plan_exempt(out: Plan, scope: Scope) -> None:
    desired, actual, _, _, limits = scope
    out.filter += [Exempt(ifindex, on=True) for ifindex in sorted(desired.exempt - actual.exempt)]
    if limits.prune and limits.scanned:
        out.filter += [Exempt(ifindex, on=False) for ifindex in sorted(actual.exempt - desired.exempt)]


_VERBS = {"Add": "add", "Put": "write", "Del": "delete", "Flush": "empty"}


def describe(op: FilterOp | LinkOp) -> str:
    """For people (`slash32-hostd diff`): one line."""
    match op:
        case Add(item) | Delete(item):
            what = f"{type(item).__name__.lower()} {_shown(item)}"
            return f"{'add' if isinstance(op, Add) else 'delete'} {what}"
        case Replace(_, new):
            return f"replace route {_shown(new)}"
        case Take(route):
            return f"take back route {_shown(route)}"
        case SetGroup(ifindex, group):
            return f"set link #{ifindex} group {group:#x}"
        case Admit(ifindex, mac) | Expel(ifindex, mac):
            return f"{type(op).__name__.lower()} link #{ifindex} {mac.hex(':')}"
        case AddMembers(name, _, members) | DelMembers(name, _, members):
            return f"{'add' if isinstance(op, AddMembers) else 'delete'} {len(members)} members of set {name}"
        case Sweep(strays):
            return f"sweep {len(strays)} stray elements"
        case PutClass(group) | DelClass(group):
            return f"{_verb(op)} class {group:#x}"
        case PutSysctls(ifindex, name):
            return f"set sysctls of link #{ifindex} {name}"
        case Exempt(ifindex, on):
            return f"{'exempt' if on else 'guard'} link #{ifindex}"
        case AddSet(name) | FlushSet(name) | DelSet(name):
            return f"{_verb(op)} set {name}"
        case PutChain(name) | DelChain(name):
            return f"{_verb(op)} chain {name}"


def _verb(op: FilterOp | LinkOp) -> str:
    name = type(op).__name__
    return next(word for start, word in _VERBS.items() if name.startswith(start))


def _shown(item: Item) -> str:
    match item:
        case Route(prefix, oif, via):
            return f"{prefix}" + (f" via {format_address(via)}" if via else "") + (f" dev #{oif}" if oif else "")
        case Neighbour(ifindex, address, mac):
            return f"{format_address(address)} lladdr {mac.hex(':')} dev #{ifindex}"
        case TapAddress(ifindex, address, length):
            return f"{format_address(address)}/{length} dev #{ifindex}"
