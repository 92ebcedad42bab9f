# Owns: what no document shows by itself: resources of one apply that contradict each other or what is there, and what
# may not be deleted since others rest on it. Pure. Each error is one line.
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from slash32.errors import quoted
from slash32.model import Host
from slash32.net import format_address
from slash32.policy import DEFAULT_TIER, HostEndpoint, Policy, Tier
from slash32.resources import Resource, kind_of

from ..registry.registry import Registry
from ..store.commits import HostState, Peer


def clashes(registry: Registry, decoded: Sequence[Resource]) -> list[str]:
    return [*_of_hosts(registry, decoded), *_of_tiers(registry, decoded), *_of_host_endpoints(registry, decoded)]


def keys_of_others(
    hosts: Mapping[str, HostState], dispatchers: Mapping[str, Peer], decoded: Sequence[Resource]
) -> Iterator[str]:
    """A host with a key that is to be another's, or is a dispatcher's: whose it is would depend on who asks."""
    for host in decoded:
        if not isinstance(host, Host) or not host.public_key:
            continue
        said = f"Host {host.name}: spec.publicKey: {host.public_key}"
        for name, state in hosts.items():
            if name != host.name and state.next_key == host.public_key:
                yield f"{said} is the next key of host {name}"
        for name, peer in dispatchers.items():
            if peer.public_key == host.public_key:
                yield f"{said} is that of dispatcher {name}"


def _of_hosts(registry: Registry, decoded: Sequence[Resource]) -> Iterator[str]:
    """Two hosts with one key or one address, or with another's."""
    new = {r.name: r for r in decoded if isinstance(r, Host)}
    if not new:
        return
    hosts = {**registry.hosts, **new}
    for field, values in (
        ("spec.publicKey", {n: {h.public_key} - {""} for n, h in hosts.items()}),
        ("spec.addresses", {n: {format_address(a) for a in h.addresses} for n, h in hosts.items()}),
    ):
        holder: dict[str, str] = {}
        for name, mine in sorted(values.items(), key=lambda item: item[0] in new):
            for value in sorted(mine):
                if holder.setdefault(value, name) != name:
                    yield f"Host {name}: {field}: {value} is that of host {holder[value]} already"
    for name, host in new.items():
        for error in registry.next_hop_conflicts(name, host.addresses):
            yield f"Host {name}: spec.addresses: {error}"


def _of_tiers(registry: Registry, decoded: Sequence[Resource]) -> Iterator[str]:
    known = registry.tiers.keys() | {r.name for r in decoded if isinstance(r, Tier)} | {DEFAULT_TIER}
    for resource in decoded:
        if isinstance(resource, Policy) and resource.tier not in known:
            what = f"{kind_of(resource)} {resource.name}: spec.tier: tier {quoted(resource.tier, 64)}"
            yield f"{what} does not exist: apply a Tier of that name first, or together with it"


def _of_host_endpoints(registry: Registry, decoded: Sequence[Resource]) -> Iterator[str]:
    """Two for one interface of one host."""
    new = {r.name: r for r in decoded if isinstance(r, HostEndpoint)}
    if not new:
        return
    holder: dict[tuple[str, str], str] = {}
    for name, found in sorted({**registry.host_endpoints, **new}.items(), key=lambda item: item[0] in new):
        other = holder.setdefault((found.node, found.interface), name)
        if other != name:
            where = f"interface {quoted(found.interface, 64)} of node {found.node}"
            yield f"HostEndpoint {name}: spec.interface: {where} is that of HostEndpoint {other} already: delete one"


def still_needed(registry: Registry, kind: str, name: str) -> str | None:
    """Why it cannot be deleted."""
    if kind != "Tier":
        return None
    if name == DEFAULT_TIER:
        return f"Tier {name}: always exists, and cannot be deleted"
    policies = (*registry.policies.values(), *registry.staged.values())
    users = sorted(f"{kind_of(policy)} {policy.name}" for policy in policies if policy.tier == name)
    if not users:
        return None
    more = f" and {len(users) - 3} more" if len(users) > 3 else ""
    return f"Tier {name}: {', '.join(users[:3])}{more} name it: delete them first, or give them another spec.tier"
