# Owns: which calculations ask for what, when the replica took changes. Pure.
from __future__ import annotations

from collections.abc import Sequence
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
    dirty = Dirty()
    changes = [change for applied in batch for change in applied.changes]
    whole = {change.name for change in changes if not isinstance(change, Members) and change.kind is Kind.SET}
    names: dict[Kind, list[Name]] = {}
    for change in changes:
        if not isinstance(change, Members):
            names.setdefault(change.kind, []).append(change.name)
        elif change.name not in whole:
            dirty.merge(calc.members_changed(change.name, _listed(change.add), _listed(change.remove)))
    for name in whole:
        dirty.merge(calc.set_replaced(str(name)))
    rules = {kind: cast("list[str]", names[kind]) for kind in RULES if kind in names}
    if rules:
        dirty.merge(calc.rules_changed(rules))
    if Kind.HOST in names:
        dirty.merge(calc.hosts_changed(cast("list[str]", names[Kind.HOST])))
    if Kind.ROUTE in names:
        dirty.merge(calc.routes_changed(cast("list[Prefix]", names[Kind.ROUTE])))
    return dirty


def _listed(members: AddressSet) -> list[Member]:
    return [*members.addresses, *members.prefixes]
