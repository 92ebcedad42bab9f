# Owns: what a carried out operation makes of what is believed to be in the kernel (`Actual`). Pure.
from __future__ import annotations

from collections.abc import Callable

from ..change.plan import (
    AddMembers,
    AddSet,
    Admit,
    DelChain,
    DelClass,
    DelMembers,
    DelSet,
    Exempt,
    Expel,
    FilterOp,
    PutChain,
    PutClass,
    Sweep,
)
from ..compiler.desired import Actual, Admitted
from ..compiler.forwarding import Add, Delete, Neighbour, Operation, Replace, Route, SetGroup, Take, TapAddress
from ..compiler.ruleset import Rule

Fingerprints = Callable[[tuple[Rule, ...]], tuple[str, ...]]


def record_filter(op: FilterOp, actual: Actual, fingerprints: Fingerprints) -> None:
    match op:
        case AddMembers() | DelMembers():  # most of all
            pass
        case AddSet(name, spec):
            actual.sets[name] = spec
        case DelSet(name):
            del actual.sets[name]
        case PutChain(name, rules):
            actual.chains[name] = fingerprints(rules)
        case DelChain(name):
            del actual.chains[name]
        case PutClass(number, chains):
            actual.classes[number] = chains
        case DelClass(number):
            del actual.classes[number]
        case Admit(ifindex, mac, addresses, prefixes):
            tap = actual.taps.setdefault(ifindex, Admitted())
            tap.mac, tap.addresses, tap.prefixes = mac, frozenset(addresses), frozenset(prefixes)
        case Expel(ifindex):
            tap = actual.taps[ifindex]
            tap.mac, tap.addresses, tap.prefixes = b"", frozenset(), frozenset()
            if not (tap.group or tap.gateway or tap.neighbours):
                del actual.taps[ifindex]
        case Exempt(ifindex, on):
            actual.exempt = actual.exempt | {ifindex} if on else actual.exempt - {ifindex}
        case Sweep():
            actual.strays = frozenset()


def record_link(op: Operation, actual: Actual) -> None:
    if isinstance(op, Add | Take) and isinstance(op.item, Route):  # thousands at a time
        actual.routes[op.item.prefix] = op.item
        actual.taken.discard(op.item.prefix)
        return
    match op:
        case SetGroup(ifindex, number):
            if ifindex in actual.taps or number:
                actual.taps.setdefault(ifindex, Admitted()).group = number
            actual.foreign_groups.pop(ifindex, None)
        case Replace(_, new):
            actual.routes[new.prefix] = new
        case Delete(Route() as route):
            if actual.routes.get(route.prefix) == route:
                del actual.routes[route.prefix]
        case Add(Neighbour(ifindex, address, mac)):
            tap = actual.taps.setdefault(ifindex, Admitted())
            tap.neighbours = frozenset({n for n in tap.neighbours if n[0] != address} | {(address, mac)})
        case Delete(Neighbour(ifindex, address, mac)):
            if ifindex in actual.taps:
                actual.taps[ifindex].neighbours -= {(address, mac)}
        case Add(TapAddress(ifindex)):
            actual.taps.setdefault(ifindex, Admitted()).gateway = True
        case Delete(TapAddress(ifindex)):
            if ifindex in actual.taps:
                actual.taps[ifindex].gateway = False

