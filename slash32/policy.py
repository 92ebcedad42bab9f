# Owns: the typed, normalised policy model (what `slash32.resources` decodes YAML into). Pure data.
# Semantics are Calico's GlobalNetworkPolicy and Profile, https://docs.tigera.io (v3 resources).
from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from slash32.net import Prefix


class Action(str, enum.Enum):
    ALLOW = "Allow"
    DENY = "Deny"


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


@dataclass(frozen=True, slots=True)
class Policy:
    """A GlobalNetworkPolicy. `order` None sorts last; equal orders sort by name."""

    name: str
    selector: str  # canonical
    types: tuple[Direction, ...]
    order: float | None = None
    ingress: tuple[Rule, ...] = ()
    egress: tuple[Rule, ...] = ()

    def sort_key(self) -> tuple[float, str]:
        return (float("inf") if self.order is None else self.order, self.name)

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
