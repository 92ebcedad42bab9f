# Owns: the abstract packet filter of a host, as data: what hostd.compiler.calc computes, hostd.change.plan compares and
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


class Interface(NamedTuple):
    """The interface a packet came in through, or goes out by, has this very name (never a guest's tap)."""

    incoming: bool
    name: str


Match = Family | Protocol | Ports | InSet | InNets | IcmpIs | Interface


class Verdict(str, enum.Enum):
    ACCEPT = "accept"
    DROP = "drop"
    CONTINUE = "continue"  # on with the next rule
    RETURN = "return"  # out of this chain: on after the jump that led here; after a Goto, after the jump before it


class Jump(NamedTuple):
    """Where that chain decides nothing, on with the next rule."""

    chain: str


@dataclass(frozen=True, slots=True)
class Goto:  # no tuple: Jump("x") == Log("x") would hold, and rules that differ in nothing else be one
    """That chain decides: it always ends with a verdict."""

    chain: str


@dataclass(frozen=True, slots=True)
class Log:
    """Say so, rate-limited in the kernel, and on with the next rule. `tag` names policy and rule: at most 28 characters
    of A-Z a-z 0-9 . : - (it is the packet filter's log prefix, by which hostd finds the words for people)."""

    tag: str


class Rule(NamedTuple):
    """All matches hold -> verdict. The comment names the policy and rule for people (`nft list`)."""

    matches: tuple[Match, ...]
    verdict: Verdict | Jump | Goto | Log
    comment: str = ""
    counted: bool = False  # packets and bytes that match are counted
    keep: bool = False  # of an ACCEPT that is taken away: flows it had let in stay


NAME_LIMIT = 28  # characters of a chain's name: what iptables takes
LOG_GROUP = 5332  # nfnetlink_log group to which Log rules speak

# Chains that the skeleton jumps to and calc.py fills (there is no such chain, or it is empty: no host endpoint).
# Each holds a jump per host endpoint, named interfaces first; where they decide nothing the packet passes.
HOST_IN = "host-in"  # to the host, not from a guest of it nor through lo
HOST_OUT = "host-out"  # from the host, not to a guest of it nor through lo
HOST_FORWARD_IN = "host-forward-in"  # forwarded, in through no tap
HOST_FORWARD_OUT = "host-forward-out"  # forwarded, out by no tap
HOST_GUESTS = "host-guests"  # from a guest to the host: holds `Jump(GUEST_EGRESS)`, or it is dropped
HOST_FROM_GUESTS = "host-from-guests"  # then, what the guest's egress policy let by
HOST_TO_GUESTS = "host-to-guests"  # from the host to a guest, before the guest's ingress policy is asked
GUEST_EGRESS = "guest-egress"  # the skeleton's own: asks the guest's class
HOST_CHAINS = (
    HOST_IN, HOST_OUT, HOST_FORWARD_IN, HOST_FORWARD_OUT, HOST_GUESTS, HOST_FROM_GUESTS, HOST_TO_GUESTS
)  # fmt: skip


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
    dispatcher_port: int = 0  # TCP, outbound: what host endpoints never close, besides slash32.failsafe


GROUP_MASK = 0xFFFF0000
