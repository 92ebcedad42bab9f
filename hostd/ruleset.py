# Owns: the abstract packet filter of a host, as data: what hostd.calc computes, hostd.plan compares and
# hostd.dataplane writes and reads back. No backend's syntax here. Pure.
from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from slash32.net import Prefix
from slash32.policy import Icmp, PortRange


class Side(str, enum.Enum):
    SRC = "src"
    DST = "dst"


class SetKind(str, enum.Enum):
    ADDR4 = "addr4"  # hash set of single addresses, declared size
    ADDR6 = "addr6"
    NET4 = "net4"  # interval set of prefixes
    NET6 = "net6"


class Family(NamedTuple):
    version: int  # 4 or 6


class Protocol(NamedTuple):
    number: int
    negate: bool = False


class Ports(NamedTuple):
    side: Side
    ranges: tuple[PortRange, ...]
    negate: bool = False


class InSet(NamedTuple):
    """The side's address is in a named set (of the set's own family: put a Family match before it)."""

    side: Side
    set: str
    kind: SetKind
    negate: bool = False


class InNets(NamedTuple):
    """The side's address is in one of these prefixes, all of one family (put a Family match before it)."""

    side: Side
    nets: tuple[Prefix, ...]
    negate: bool = False


class IcmpIs(NamedTuple):
    version: int  # 4: ICMP, 6: ICMPv6
    icmp: Icmp
    negate: bool = False


Match = Family | Protocol | Ports | InSet | InNets | IcmpIs


class Verdict(str, enum.Enum):
    ACCEPT = "accept"
    DROP = "drop"


class Jump(NamedTuple):
    chain: str


class Rule(NamedTuple):
    """All matches hold -> verdict. The comment names the policy and rule for people (`nft list`)."""

    matches: tuple[Match, ...]
    verdict: Verdict | Jump
    comment: str = ""


class SetSpec(NamedTuple):
    kind: SetKind
    size: int


@dataclass(frozen=True, slots=True)
class Guard:
    """The skeleton's parameters: what stands in the kernel before and without any endpoint."""

    prefixes: tuple[str, ...] = ("vnet",)  # tap names that start so are guarded
    group_base: int = 0x53320000  # classes are device groups base+1 .. base+0xffff
    conn_limit: int = 65536  # conntrack entries per endpoint
    drop_transit: tuple[int, ...] = ()  # IP versions the host did not forward before us: not between other NICs


GROUP_MASK = 0xFFFF0000
