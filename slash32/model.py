# Owns: the nouns that every room shares: endpoint, host. Pure data, no I/O, no parsing of text formats.
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from slash32.net import Address, Prefix


class EndpointKey(NamedTuple):
    """What identifies one NIC of one guest for ever: libvirt's domain uuid and the NIC's MAC (both lower case)."""

    uuid: str
    mac: str

    def __str__(self) -> str:
        return f"{self.uuid}/{self.mac}"


@dataclass(frozen=True, slots=True)
class SharedAddress:
    """An address with many claimants, all of one share group (VRRP, anycast)."""

    address: Address
    group: str


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One managed NIC of one guest, as its tag says it: what is claimed from the dispatcher."""

    key: EndpointKey
    domain: str  # libvirt's name of the guest, for people; never an identity
    labels: Mapping[str, str]  # the domain's labels, overridden by the NIC's
    profiles: tuple[str, ...] = ()
    addresses: tuple[Address, ...] = ()  # exactly one claimant in the fleet
    shared: tuple[SharedAddress, ...] = ()
    prefixes: tuple[Prefix, ...] = ()  # behind this guest: routed to its tap, admitted as source

    def all_addresses(self) -> tuple[Address, ...]:
        """Own and shared."""
        return self.addresses + tuple(s.address for s in self.shared)


@dataclass(frozen=True, slots=True)
class Host:
    """One hypervisor as the dispatcher knows it."""

    name: str
    public_key: str = ""  # CURVE, Z85, 40 characters
    addresses: tuple[Address, ...] = ()  # next hops on the segment, at most one per family
    nets: tuple[Prefix, ...] = ()  # what its guests may claim; empty: anything
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # values its guests may carry; absent: any
