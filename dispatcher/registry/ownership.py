# Owns: which endpoint holds which address and prefix, and what a host may claim. Pure. The border against a host that
# lies: it gets no address of another guest, of a hypervisor, or outside what its Host resource allows.
from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from slash32.errors import quoted
from slash32.model import Endpoint, EndpointKey, Host
from slash32.net import Address, Prefix, format_address, host_prefix
from slash32.unicast import unusable


@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds an address: an endpoint, or (key None) a hypervisor itself."""

    host: str
    key: EndpointKey | None
    name: str  # of the guest or hypervisor, for people
    group: str | None = None  # of a shared address

    def __str__(self) -> str:
        return f"{quoted(self.name)[1:-1]} on {self.host}" if self.key else f"the hypervisor {self.host} itself"


@dataclass(slots=True)
class _Family:
    """The holdings of one address family, found by what overlaps them."""

    holders: dict[Prefix, list[Owner]] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)  # prefix length -> how many
    ordered: list[Prefix] = field(default_factory=list)  # by network: what lies inside a prefix stands together


class Ownership:
    def __init__(self) -> None:
        self._families = {4: _Family(), 16: _Family()}

    def add(self, owner: Owner, prefix: Prefix) -> None:
        family = self._families[len(prefix.network)]
        holders = family.holders.setdefault(prefix, [])
        if not holders:
            insort(family.ordered, prefix)
            family.lengths[prefix.length] = family.lengths.get(prefix.length, 0) + 1
        holders.append(owner)

    def remove(self, owner: Owner, prefix: Prefix) -> None:
        family = self._families[len(prefix.network)]
        holders = family.holders[prefix]
        holders.remove(owner)
        if holders:
            return
        del family.holders[prefix]
        del family.ordered[bisect_left(family.ordered, prefix)]
        family.lengths[prefix.length] -= 1
        if not family.lengths[prefix.length]:
            del family.lengths[prefix.length]

    def overlapping(self, prefix: Prefix) -> Iterator[tuple[Prefix, Owner]]:
        """Every holding that contains the prefix, is it, or lies inside it."""
        family = self._families[len(prefix.network)]
        for length in family.lengths:
            if length < prefix.length:
                outer = _cut(prefix.network, length)
                yield from ((outer, owner) for owner in family.holders.get(outer, ()))
        last = prefix.bounds()[1]
        at = bisect_left(family.ordered, prefix)
        while at < len(family.ordered) and family.ordered[at].network <= last:
            inner = family.ordered[at]
            yield from ((inner, owner) for owner in family.holders[inner])
            at += 1

    def conflict(self, host: str, endpoint: Endpoint) -> str | None:
        """Why the endpoint cannot have what it claims, in one line; None where it can."""
        for prefix, owner in holdings(host, endpoint):
            for held, other in self.overlapping(prefix):
                if other.key == endpoint.key or (held == prefix and owner.group is not None and _shares(owner, other)):
                    continue
                return f"{what(prefix)} is in use by {other}" + ("" if held == prefix else f" (its {what(held)})")
        return None


def _cut(address: Address, length: int) -> Prefix:
    width = 8 * len(address)
    value = int.from_bytes(address, "big") >> (width - length) << (width - length)
    return Prefix(value.to_bytes(len(address), "big"), length)


def _shares(one: Owner, other: Owner) -> bool:
    return one.group == other.group


def what(prefix: Prefix) -> str:
    single = prefix.length == 8 * len(prefix.network)
    return f"address {format_address(prefix.network)}" if single else f"prefix {prefix}"


def holdings(host: str, endpoint: Endpoint) -> Iterable[tuple[Prefix, Owner]]:
    """All that an endpoint holds: routed to it, once each."""
    own = Owner(host, endpoint.key, endpoint.domain)
    for address in endpoint.addresses:
        yield host_prefix(address), own
    for shared in endpoint.shared:
        yield host_prefix(shared.address), Owner(host, endpoint.key, endpoint.domain, shared.group)
    for prefix in endpoint.prefixes:
        yield prefix, own


def out_of_bounds(host: Host, endpoint: Endpoint, labels: Mapping[str, str]) -> str | None:
    """Why this host may not claim the endpoint, whoever else there is. `labels` are the effective ones."""
    prefixes = [prefix for prefix, _ in holdings(host.name, endpoint)]
    if len(set(prefixes)) != len(prefixes):
        return "an address or prefix stands twice in the claim"
    for prefix in prefixes:
        why = unusable(prefix)
        if why is not None:
            return f"{what(prefix)} is or holds {why}"
        if host.nets and not any(n.length <= prefix.length and n.contains(prefix.network) for n in host.nets):
            return f"{what(prefix)} is outside what host {host.name} may claim (Host {host.name}: spec.nets)"
    for key, allowed in host.labels.items():
        if key in labels and labels[key] not in allowed:
            value = quoted(labels[key], 64)
            return f"label {key}={value} is not one that host {host.name} may use (Host {host.name}: spec.labels)"
    return None
