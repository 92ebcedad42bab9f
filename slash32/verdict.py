# Owns: the specification of what policy means, as a program: one packet in, the verdict and who gave it out. Pure.
# Clarity over speed: the kernel's answer is compared with this one, never the other way round.
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

from slash32 import selector as selectors
from slash32.model import Endpoint, EndpointKey
from slash32.net import Address, version
from slash32.policy import (
    DEFAULT_TIER,
    THE_DEFAULT_TIER,
    Action,
    Direction,
    HostEndpoint,
    Icmp,
    NetworkSet,
    Peer,
    Policy,
    PortRange,
    Profile,
    Rule,
    Tier,
)

_ICMP_VERSION = {1: 4, 58: 6}


@dataclass(frozen=True, slots=True)
class World:
    endpoints: Sequence[Endpoint]
    policies: Sequence[Policy] = ()  # staged ones are never asked
    profiles: Sequence[Profile] = ()
    tiers: Sequence[Tier] = ()  # besides `default`
    sets: Sequence[NetworkSet] = ()
    host_endpoints: Sequence[HostEndpoint] = ()
    places: Mapping[EndpointKey, str] = field(default_factory=dict)  # host of each endpoint, as far as known


@dataclass(frozen=True, slots=True)
class Packet:
    """The first packet of a flow. Ports of protocols that have them; `icmp` with its code, of ICMP or ICMPv6."""

    source: Address
    destination: Address
    protocol: int
    source_port: int | None = None
    destination_port: int | None = None
    icmp: Icmp | None = None


class Stage(NamedTuple):
    """Who decided at one end: a rule of a policy or profile, a tier's default action, what is always open at host
    endpoints (`failsafe`), or nobody (`default`: dropped)."""

    allowed: bool
    direction: Direction
    kind: Literal["policy", "profile", "tier", "failsafe", "default"]
    name: str = ""
    rule: int | None = None  # index into the policy's rules of this direction
    domain: str = ""  # the guest, or the host endpoint, at which it was decided
    tier: str = ""  # of a policy, or whose default action it was


@dataclass(frozen=True, slots=True)
class Verdict:
    """`egress` is None where no endpoint owns the source, `ingress` where none owns the destination. `host_egress` and
    `host_ingress`: host endpoints on the way (see `verdict`)."""

    allowed: bool
    egress: Stage | None = None
    ingress: Stage | None = None
    host_egress: Stage | None = None
    host_ingress: Stage | None = None


@dataclass(slots=True)
class _Case:
    """A packet in its world: what rules ask about."""

    world: World
    packet: Packet
    profiles: Mapping[str, Profile] = field(init=False)

    def __post_init__(self) -> None:
        self.profiles = {profile.name: profile for profile in self.world.profiles}


def effective_labels(endpoint: Endpoint, profiles: Mapping[str, Profile]) -> dict[str, str]:
    """The endpoint's labels, with those its profiles apply below them; of two profiles the first named wins."""
    labels: dict[str, str] = {}
    for name in reversed(endpoint.profiles):
        if name in profiles:
            labels.update(profiles[name].labels)
    return labels | dict(endpoint.labels)


def applicable(policies: Iterable[Policy], labels: Mapping[str, str], direction: Direction) -> list[Policy]:
    """Those that select an endpoint with these labels in this direction, in the order they are asked."""
    found = [p for p in policies if direction in p.types and _parsed(p.selector).matches(labels)]
    return sorted(found, key=Policy.sort_key)


def steps(
    policies: Iterable[Policy],
    tiers: Iterable[Tier],
    labels: Mapping[str, str],
    direction: Direction,
    staged: bool = False,
) -> list[tuple[Tier, list[Policy]]]:
    """The tiers that an endpoint with these labels meets, in order, each with its policies that apply, in order.
    `staged`: with the staged ones at their places; a tier may then hold nothing else, and is as if absent to the real
    verdict. A tier that nobody defined sorts last and denies."""
    known = {tier.name: tier for tier in tiers} | {DEFAULT_TIER: THE_DEFAULT_TIER}
    found: dict[str, list[Policy]] = {}
    for policy in applicable((p for p in policies if staged or not p.staged), labels, direction):
        found.setdefault(policy.tier, []).append(policy)
    asked = [(known.get(name) or Tier(name), listed) for name, listed in found.items()]
    return sorted(asked, key=lambda step: step[0].sort_key())


def verdict(world: World, packet: Packet) -> Verdict:
    """Both ends must allow. Where several endpoints share an address, each of them must."""
    case = _Case(world, packet)
    egress = _end(case, packet.source, Direction.EGRESS)
    ingress = _end(case, packet.destination, Direction.INGRESS)
    return Verdict(all(stage is None or stage.allowed for stage in (egress, ingress)), egress, ingress)


def owners(endpoints: Iterable[Endpoint], address: Address) -> list[Endpoint]:
    """Every endpoint that has the address: as its own, shared, or in a prefix behind it."""
    return [e for e in endpoints if address in e.all_addresses() or any(p.contains(address) for p in e.prefixes)]


def _end(case: _Case, address: Address, direction: Direction) -> Stage | None:
    stages = [_stage(case, endpoint, direction) for endpoint in _routed_to(case.world.endpoints, address)]
    return min(stages, key=lambda stage: stage.allowed, default=None)


def _routed_to(endpoints: Iterable[Endpoint], address: Address) -> list[Endpoint]:
    """Of the owners those with the most specific claim: an address beats a prefix, a longer prefix a shorter one."""

    def length(endpoint: Endpoint) -> int:
        if address in endpoint.all_addresses():
            return 8 * len(address)
        return max(prefix.length for prefix in endpoint.prefixes if prefix.contains(address))

    found = owners(endpoints, address)
    longest = max(map(length, found), default=0)
    return [endpoint for endpoint in found if length(endpoint) == longest]


def _stage(case: _Case, endpoint: Endpoint, direction: Direction) -> Stage:
    policies = applicable(case.world.policies, effective_labels(endpoint, case.profiles), direction)
    profiles = [case.profiles[name] for name in endpoint.profiles if name in case.profiles]
    kind: Literal["policy", "profile"] = "policy" if policies else "profile"
    for item in policies or profiles:  # profiles are asked only where no policy applies in this direction
        for index, rule in enumerate(item.rules(direction)):
            if _rule_matches(case, rule):
                return Stage(rule.action is Action.ALLOW, direction, kind, item.name, index, endpoint.domain)
    return Stage(False, direction, "default", domain=endpoint.domain)


def _rule_matches(case: _Case, rule: Rule) -> bool:
    packet = case.packet
    return (
        rule.ip_version in (None, version(packet.source))
        and rule.protocol in (None, packet.protocol)
        and (rule.not_protocol is None or rule.not_protocol != packet.protocol)
        and _icmp_fields_hold(rule, packet)
        and _peer_matches(case, rule.source, packet.source, packet.source_port)
        and _peer_matches(case, rule.destination, packet.destination, packet.destination_port)
    )


def _icmp_fields_hold(rule: Rule, packet: Packet) -> bool:
    if rule.icmp is None and rule.not_icmp is None:
        return True
    if packet.icmp is None or _ICMP_VERSION.get(packet.protocol) != version(packet.source):
        return False  # nothing to read them from
    wanted = rule.icmp is None or _icmp_matches(rule.icmp, packet.icmp)
    return wanted and (rule.not_icmp is None or not _icmp_matches(rule.not_icmp, packet.icmp))


def _icmp_matches(asked: Icmp, have: Icmp) -> bool:
    return asked.type == have.type and asked.code in (None, have.code)


def _peer_matches(case: _Case, peer: Peer, address: Address, port: int | None) -> bool:
    return (
        (not peer.nets or any(net.contains(address) for net in peer.nets))
        and not any(net.contains(address) for net in peer.not_nets)
        and (peer.selector is None or _selects(case, peer.selector, address))
        and (peer.not_selector is None or not _selects(case, peer.not_selector, address))
        and (not peer.ports or _among(peer.ports, port))
        and (not peer.not_ports or (port is not None and not _among(peer.not_ports, port)))
    )


def _selects(case: _Case, selector: str, address: Address) -> bool:
    """An address that no endpoint owns has no labels at all: not even all() selects it."""
    labels = (effective_labels(endpoint, case.profiles) for endpoint in owners(case.world.endpoints, address))
    return any(_parsed(selector).matches(have) for have in labels)


def _among(ranges: tuple[PortRange, ...], port: int | None) -> bool:
    return port is not None and any(first <= port <= last for first, last in ranges)


@lru_cache(maxsize=4096)
def _parsed(text: str) -> selectors.Selector:
    return selectors.parse(text)
