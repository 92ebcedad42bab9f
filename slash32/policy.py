# Owns: the typed, normalised policy model (what `slash32.resources` decodes YAML into). Pure data.
# Semantics are Calico's GlobalNetworkPolicy and Profile, https://docs.tigera.io (v3 resources).
from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from slash32.net import Address, Prefix


class Action(str, enum.Enum):
    ALLOW = "Allow"
    DENY = "Deny"
    LOG = "Log"  # says that the packet was here, and asks on
    PASS = "Pass"  # on to the next tier; in a profile or the last tier: to the profiles


class Direction(str, enum.Enum):
    """Seen from the guest."""

    INGRESS = "Ingress"
    EGRESS = "Egress"


class PortRange(NamedTuple):
    """Both ends inclusive."""

    first: int
    last: int


class Icmp(NamedTuple):
    """`type` 0..254 and, where given, `code` 0..255. Of ICMP or ICMPv6, as the rule's protocol says."""

    type: int
    code: int | None = None


@dataclass(frozen=True, slots=True)
class Peer:
    """One side of a rule. All fields that are given must hold. Selectors are canonical texts (slash32.selector)."""

    nets: tuple[Prefix, ...] = ()  # empty: not asked; a positive list admits only addresses of its own families
    not_nets: tuple[Prefix, ...] = ()
    selector: str | None = None
    not_selector: str | None = None
    ports: tuple[PortRange, ...] = ()
    not_ports: tuple[PortRange, ...] = ()


@dataclass(frozen=True, slots=True)
class Rule:
    action: Action
    protocol: int | None = None  # IP protocol number; ICMP = 1, ICMPv6 = 58
    not_protocol: int | None = None
    ip_version: int | None = None  # 4 or 6
    icmp: Icmp | None = None
    not_icmp: Icmp | None = None
    source: Peer = Peer()
    destination: Peer = Peer()


DEFAULT_TIER = "default"
DEFAULT_TIER_ORDER = 1_000_000.0


@dataclass(frozen=True, slots=True)
class Tier:
    """Policies that are asked together. `order` None sorts last; equal orders sort by name. The tier `default` always
    exists, with this order and Deny; no resource changes it."""

    name: str
    order: float | None = None
    default_action: Action = Action.DENY  # or PASS: where a policy of the tier applies and none of its rules matched

    def sort_key(self) -> tuple[float, str]:
        return (math.inf if self.order is None else self.order, self.name)


THE_DEFAULT_TIER = Tier(DEFAULT_TIER, DEFAULT_TIER_ORDER)


@dataclass(frozen=True, slots=True)
class Policy:
    """A GlobalNetworkPolicy, or a StagedGlobalNetworkPolicy (`staged`): that one counts what it would have dropped and
    drops nothing. The two kinds have names of their own. `order` None sorts last; equal orders sort by name."""

    name: str
    selector: str  # canonical
    types: tuple[Direction, ...]
    order: float | None = None
    ingress: tuple[Rule, ...] = ()
    egress: tuple[Rule, ...] = ()
    tier: str = DEFAULT_TIER
    apply_on_forward: bool = False  # host endpoints: asked for what the host forwards, too
    keep_established: bool = False  # when it no longer allows what it allowed, flows that are open stay open
    staged: bool = False

    def sort_key(self) -> tuple[float, bool, str]:
        """Within its tier."""
        return (math.inf if self.order is None else self.order, self.staged, self.name)

    def rules(self, direction: Direction) -> tuple[Rule, ...]:
        return self.ingress if direction is Direction.INGRESS else self.egress


@dataclass(frozen=True, slots=True)
class Profile:
    """Rules for endpoints to which no policy applies in a direction, and labels handed to its users."""

    name: str
    ingress: tuple[Rule, ...] = ()
    egress: tuple[Rule, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)  # labelsToApply

    def rules(self, direction: Direction) -> tuple[Rule, ...]:
        return self.ingress if direction is Direction.INGRESS else self.egress


@dataclass(frozen=True, slots=True)
class NetworkSet:
    """A GlobalNetworkSet: prefixes with labels, so that selectors in rules find them. No policy applies to it."""

    name: str
    labels: Mapping[str, str]
    nets: tuple[Prefix, ...] = ()


ANY_INTERFACE = "*"


@dataclass(frozen=True, slots=True)
class HostEndpoint:
    """A hypervisor's own interface, under policy: what ends at the host or begins there, and, for policies with
    `apply_on_forward`, what it forwards through the interface. `interface` "*": every one but lo and the guests' taps,
    and with it what its own guests and the host say to each other (closed without). A named one goes before."""

    name: str
    node: str  # the host
    interface: str
    labels: Mapping[str, str] = field(default_factory=dict)
    addresses: tuple[Address, ...] = ()  # expectedIPs: by these other policies' selectors find it
    profiles: tuple[str, ...] = ()
