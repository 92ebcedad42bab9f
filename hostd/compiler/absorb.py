# Owns: which calculations ask for what, when the replica took changes. Pure.
from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import cast

from slash32.net import Prefix
from slash32.pack import AddressSet, Kind, Name
from slash32.sync import Applied
from slash32.wire import Members

from .calc import Calculation
from .desired import Dirty, Member

RULES = (Kind.PROFILE, Kind.POLICY, Kind.STAGED, Kind.TIER, Kind.HOSTENDPOINT)


def absorb(calc: Calculation, batch: Sequence[Applied]) -> Dirty:
    """What the kernel may need, after the replica took all these changes.

    Sets go first: a policy that is loaded afterwards finds them as they are now, counted once.
    """
    members, names = list[Members](), dict[Kind, list[Name]]()
    for applied in batch:
        for change in applied.changes:
            if isinstance(change, Members):
                members.append(change)
            else:
                names.setdefault(change.kind, []).append(change.name)
    whole = {str(name) for name in names.get(Kind.SET, ())}
    changed = [(m.name, _listed(m.add), _listed(m.remove)) for m in members if m.name not in whole]
    dirty = calc.sets_changed(changed, whole)
    rules = {kind: cast("list[str]", names[kind]) for kind in RULES if kind in names}
    if rules:
        dirty.merge(calc.rules_changed(rules))
    if Kind.HOST in names:
        dirty.merge(calc.hosts_changed(cast("list[str]", names[Kind.HOST])))
    if Kind.ROUTE in names:
        dirty.merge(calc.routes_changed(cast("list[Prefix]", names[Kind.ROUTE])))
    return dirty


def _listed(members: AddressSet) -> Collection[Member]:
    return [*members.addresses, *members.prefixes] if members.prefixes else members.addresses
