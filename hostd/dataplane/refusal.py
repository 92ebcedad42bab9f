# Owns: what the refusal of one operation of the packet filter means for the others: which rest on it, how it is named
# for people, and what is to be planned again. Pure.
from __future__ import annotations

from collections.abc import Sequence

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
    FlushSet,
    PutChain,
    PutClass,
    Sweep,
)
from ..compiler.chains import targets
from ..compiler.desired import Actual, Dirty
from ..compiler.ruleset import InSet


def resting_on(ops: Sequence[FilterOp], bad: int, actual: Actual) -> set[int]:
    """Which operations cannot stand without that one, by number; it is one of them. What the kernel still has in its
    last good form stands."""
    sets: set[str] = set()
    chains: set[str] = set()
    taps: set[int] = set()  # that keep what they were to lose: what they get instead is for when that is gone
    dropped: set[int] = set()
    fresh = {bad}
    while fresh:
        dropped |= fresh
        for number in fresh:
            op = ops[number]
            if isinstance(op, AddSet):
                sets.add(op.name)
            elif isinstance(op, PutChain) and op.name not in actual.chains:
                chains.add(op.name)
            elif isinstance(op, Expel):
                taps.add(op.ifindex)
        fresh = {n for n, op in enumerate(ops) if n not in dropped and _rests_on(op, sets, chains, taps)}
    return dropped


def _rests_on(op: FilterOp, sets: set[str], chains: set[str], taps: set[int]) -> bool:
    match op:
        case Admit(ifindex):
            return ifindex in taps
        case AddMembers(name) | DelMembers(name) | FlushSet(name):
            return name in sets
        case PutChain(_, rules):
            asked = {m.set for r in rules for m in r.matches if isinstance(m, InSet)}
            return bool(chains.intersection(targets(rules)) or asked & sets)
        case PutClass(_, class_chains):
            return bool(chains.intersection(class_chains))
    return False


def named(op: FilterOp) -> str:
    match op:
        case PutChain(name) | DelChain(name):
            return f"chain {name}"
        case PutClass(number) | DelClass(number):
            return f"class {number:#x}"
        case Admit(ifindex) | Expel(ifindex) | Exempt(ifindex):
            return f"tap #{ifindex}"
        case Sweep():
            return "stray elements"
    return f"set {op.name}"


def scope(op: FilterOp) -> Dirty:
    match op:
        case PutChain(name) | DelChain(name):
            return Dirty(chains={name})
        case Admit(ifindex) | Expel(ifindex) | Exempt(ifindex):
            return Dirty(taps={ifindex})
        case AddMembers(name) | DelMembers(name) | FlushSet(name):
            return Dirty(refill={name})
        case AddSet(name) | DelSet(name):
            return Dirty(sets={name})
        case PutClass():
            return Dirty(taps=set(op.turned))  # one without is planned anew with whatever needs it
    return Dirty()  # planned anew with whatever needs it
