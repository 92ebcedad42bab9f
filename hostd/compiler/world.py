# Owns: what the dispatcher told this host, by kind. Pure.
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from slash32.net import Address, Prefix
from slash32.pack import AddressSet, Kind
from slash32.policy import HostEndpoint, Policy, Profile, Tier
from slash32.sync import Replica


@dataclass(slots=True)
class World:
    """Views of the replica's objects: they change as it does."""

    policies: Mapping[str, Policy] = field(default_factory=dict)
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    sets: Mapping[str, AddressSet] = field(default_factory=dict)  # by canonical selector
    hosts: Mapping[str, tuple[Address, ...]] = field(default_factory=dict)  # next hops
    routes: Mapping[Prefix, tuple[str, ...]] = field(default_factory=dict)  # names of the hosts behind which it is
    tiers: Mapping[str, Tier] = field(default_factory=dict)  # without `default`
    staged: Mapping[str, Policy] = field(default_factory=dict)
    host_endpoints: Mapping[str, HostEndpoint] = field(default_factory=dict)  # of this host


def world_of(replica: Replica) -> World:
    return World(
        cast(Mapping[str, Policy], replica.objects(Kind.POLICY)),
        cast(Mapping[str, Profile], replica.objects(Kind.PROFILE)),
        cast(Mapping[str, AddressSet], replica.objects(Kind.SET)),
        cast(Mapping[str, tuple[Address, ...]], replica.objects(Kind.HOST)),
        cast(Mapping[Prefix, tuple[str, ...]], replica.objects(Kind.ROUTE)),
        cast(Mapping[str, Tier], replica.objects(Kind.TIER)),
        cast(Mapping[str, Policy], replica.objects(Kind.STAGED)),
        cast(Mapping[str, HostEndpoint], replica.objects(Kind.HOSTENDPOINT)),
    )
