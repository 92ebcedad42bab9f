# Owns: what one transaction of iptables and ipset is to change, as data. Pure.
from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

from slash32.net import Prefix

from ...compiler.ruleset import Rule, SetKind, SetSpec
from .ipset import Member
from .names import BEHIND


class Change(NamedTuple):
    """Of the members of a set that is there already."""

    name: str
    kind: SetKind
    members: Collection[Member]
    add: bool
    label: Hashable


class Put(NamedTuple):
    rules: tuple[Rule, ...]
    label: Hashable


class Grant(NamedTuple):
    """One element of the anti-spoof sets."""

    set: str
    tap: str
    source: Prefix
    owner: str
    label: Hashable


class NewClass(NamedTuple):
    chains: tuple[str, str] | None  # None: it ends
    label: Hashable


@dataclass
class Batch:
    fresh: dict[str, SetSpec] = field(default_factory=dict)  # new sets
    labels: dict[str, Hashable] = field(default_factory=dict)  # of these
    fill: list[Change] = field(default_factory=list)  # members of new sets
    changes: list[Change] = field(default_factory=list)
    puts: dict[str, Put] = field(default_factory=dict)
    gone: dict[str, Hashable] = field(default_factory=dict)  # chains
    gone_sets: dict[str, Hashable] = field(default_factory=dict)
    classes: dict[int, NewClass] = field(default_factory=dict)
    exempt: dict[str, bool] = field(default_factory=dict)  # by tap
    expel: list[Grant] = field(default_factory=list)
    admit: list[Grant] = field(default_factory=list)
    completes: bool = False  # what one that ended on the way has left: its gate may open

    @property
    def touches_tables(self) -> bool:
        return bool(self.puts or self.gone or self.classes or self.exempt or self.moves_behind)

    @property
    def moves_behind(self) -> bool:
        return any(grant.set in BEHIND.values() for grant in (*self.expel, *self.admit))
