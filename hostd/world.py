# Owns: what the dispatcher told this host, by kind, and which calculations a change of it asks for. Pure.
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from slash32.net import Address, Prefix
from slash32.pack import AddressSet, Kind, Name
from slash32.policy import Policy, Profile
from slash32.sync import Applied, Replica
from slash32.wire import Members

from .desired import Dirty, Member

if TYPE_CHECKING:
    from .calc import Calculation


@dataclass(slots=True)
class World:
    """Views of the replica's objects: they change as it does."""

    policies: Mapping[str, Policy] = field(default_factory=dict)
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    sets: Mapping[str, AddressSet] = field(default_factory=dict)  # by canonical selector
    hosts: Mapping[str, tuple[Address, ...]] = field(default_factory=dict)  # next hops
    routes: Mapping[Prefix, tuple[str, ...]] = field(default_factory=dict)  # names of the hosts behind which it is


def world_of(replica: Replica) -> World:
    return World(
        cast(Mapping[str, Policy], replica.objects(Kind.POLICY)),
        cast(Mapping[str, Profile], replica.objects(Kind.PROFILE)),
        cast(Mapping[str, AddressSet], replica.objects(Kind.SET)),
        cast(Mapping[str, tuple[Address, ...]], replica.objects(Kind.HOST)),
        cast(Mapping[Prefix, tuple[str, ...]], replica.objects(Kind.ROUTE)),
    )


def absorb(calc: Calculation, batch: Sequence[Applied]) -> Dirty:
    """What the kernel may need, after the replica took all these changes.

    Sets go first: a policy that is loaded afterwards finds them as they are now, counted once.
    """
    dirty = Dirty()
    changes = [change for applied in batch for change in applied.changes]
    whole = {change.name for change in changes if not isinstance(change, Members) and change.kind is Kind.SET}
    names: dict[Kind, list[Name]] = {kind: [] for kind in Kind}
    for change in changes:
        if not isinstance(change, Members):
            names[change.kind].append(change.name)
        elif change.name not in whole:
            dirty.merge(calc.members_changed(change.name, _listed(change.add), _listed(change.remove)))
    for name in whole:
        dirty.merge(calc.set_replaced(str(name)))
    if names[Kind.PROFILE]:
        dirty.merge(calc.profiles_changed(cast(list[str], names[Kind.PROFILE])))
    if names[Kind.POLICY]:
        dirty.merge(calc.policies_changed(cast(list[str], names[Kind.POLICY])))
    if names[Kind.HOST]:
        dirty.merge(calc.hosts_changed(cast(list[str], names[Kind.HOST])))
    dirty.merge(calc.routes_changed(cast(list[Prefix], names[Kind.ROUTE])))
    return dirty


def _listed(members: AddressSet) -> list[Member]:
    return [*members.addresses, *members.prefixes]
