# Owns: what stands in the kernel before and without any endpoint: two tables, their sets, base chains and rules.
# Data only. The order of the rules is for the packet of an established flow, which is most of them: guest-from
# costs it the known-group test, one source lookup and the conntrack state; guest-to the last of these only.
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from slash32.net import Prefix

from ...ruleset import GROUP_MASK, Guard
from . import kernel as k
from .statements import BIG, HOST, NONE, Draft, Statement

TABLE = "slash32"
FAMILIES = {k.INET: "inet", k.ARP: "arp"}

_ENDPOINTS = 65536  # elements; the kernel's memory for an empty set of this size is 1 MiB
_CLASSES = 16384
_EXEMPT = 4096


class Field(NamedTuple):
    text: str
    datatype: int
    length: int


IFACE = Field("iface_index", 20, 4)
GROUP = Field("devgroup", 35, 4)
MAC = Field("ether_addr", 9, 6)
IP4 = Field("ipv4_addr", 7, 4)
IP6 = Field("ipv6_addr", 8, 16)


class SetShape(NamedTuple):
    """A named set or verdict map as nft declares it."""

    fields: tuple[Field, ...]
    size: int = 0
    interval: bool = False
    dynamic: bool = False
    verdicts: bool = False

    @property
    def key_type(self) -> int:
        kind = 0
        for field in self.fields:
            kind = kind << 6 | field.datatype
        return kind

    @property
    def key_length(self) -> int:
        """Every field of a concatenation is padded to a word; a field alone is not."""
        return sum((f.length + 3) & ~3 for f in self.fields) if len(self.fields) > 1 else self.fields[0].length

    @property
    def order(self) -> int:
        if len(self.fields) > 1:
            return NONE
        return HOST if self.fields[0] in (IFACE, GROUP) else BIG

    @property
    def flags(self) -> int:
        flags = k.SET_MAP * self.verdicts | k.SET_EVAL * self.dynamic | k.SET_INTERVAL * self.interval
        return flags | k.SET_CONCAT * (self.interval and len(self.fields) > 1)

    def __str__(self) -> str:
        words = [f"type {' . '.join(f.text for f in self.fields)}{' : verdict' * self.verdicts};"]
        if self.size:
            words.append(f"size {self.size};")
        if self.interval or self.dynamic:
            words.append(f"flags {'interval' if self.interval else 'dynamic'};")
        return " ".join(words)


class Base(NamedTuple):
    """Where a base chain hangs; its policy is accept."""

    hook: str
    number: int
    priority: int

    def __str__(self) -> str:
        return f"type filter hook {self.hook} priority filter - {-self.priority}; policy accept;"


class Chain(NamedTuple):
    rules: tuple[Statement, ...]
    base: Base | None = None


class Skeleton(NamedTuple):
    sets: dict[str, SetShape]
    chains: dict[str, Chain]  # targets of jumps come before their users


FROM, TO = "class-from", "class-to"
SOURCE = {4: "source4", 6: "source6"}
BEHIND = {4: "behind4", 6: "behind6"}
MACS, CONNS, SENDERS, SENDERS_BEHIND, EXEMPT = "macs", "conns", "senders", "senders-behind", "exempt"

_SETS = {
    FROM: SetShape((GROUP,), _CLASSES, verdicts=True),
    TO: SetShape((GROUP,), _CLASSES, verdicts=True),
    "source4": SetShape((IFACE, IP4, MAC), _ENDPOINTS),
    "source6": SetShape((IFACE, IP6, MAC), _ENDPOINTS),
    "behind4": SetShape((IFACE, IP4, MAC), interval=True),
    "behind6": SetShape((IFACE, IP6, MAC), interval=True),
    MACS: SetShape((IFACE, MAC), _ENDPOINTS),
    CONNS: SetShape((IFACE,), _ENDPOINTS, dynamic=True),
    EXEMPT: SetShape((IFACE,), _EXEMPT),  # untagged guests that ran at the first install
}
_ARP_SETS = {
    SENDERS: SetShape((IFACE, IP4, MAC, MAC), _ENDPOINTS),
    SENDERS_BEHIND: SetShape((IFACE, IP4, MAC, MAC), interval=True),
    EXEMPT: SetShape((IFACE,), _EXEMPT),
}


def _guarded(guard: Guard, incoming: bool, chain: str) -> list[Statement]:
    """Known endpoints go to their chain; what falls out of it, and whatever else has a guarded name, is dropped."""
    known = Draft().group(incoming, guard.group_base, GROUP_MASK).jump(chain).done()
    exempt = Draft().interface(incoming, EXEMPT).accept().done()
    return [known, exempt, *(Draft().name(incoming, p).drop().done() for p in guard.prefixes)]


def _transit(guard: Guard) -> list[Statement]:
    """Neither side is guarded here or is a bridge: two NICs between which this host never forwarded."""
    if not guard.drop_transit:
        return []
    return [
        Draft().group(False, guard.group_base, GROUP_MASK).accept().done(),
        *(Draft().name(False, p).accept().done() for p in guard.prefixes),
        Draft().bridge(True).accept().done(),
        Draft().bridge(False).accept().done(),
        Draft().drop().done("the host did not forward before slash32"),
    ]


def _strays(version: int) -> Chain:
    admitted = Draft().guest_source(version, BEHIND[version], interval=True).give_back().done()
    return Chain((admitted, Draft().drop().done("source address or MAC is not the guest's")))


def _own_source() -> list[Statement]:
    return [
        Draft().guest_source(4, SOURCE[4], negate=True).jump("stray4").done(),
        Draft().guest_source(6, SOURCE[6], negate=True).jump("stray6").done(),
    ]


def _guest_from(guard: Guard) -> list[Statement]:
    return [
        *_own_source(),
        Draft().ct("established").accept().done(),
        Draft().icmp(4, 5).drop().done("no redirects from a guest"),
        Draft().icmp6_types([134, 137]).drop().done("no router advertisements, no redirects"),
        Draft().udp(67, 68).drop().done("no DHCP server"),
        Draft().udp(547, 546).drop().done("no DHCPv6 server"),
        Draft().ct("related").accept().done(),
        Draft().ct("invalid").drop().done(),
        Draft().not_syn().drop().done("a TCP flow begins with SYN"),
        Draft().too_many_connections(CONNS, guard.conn_limit).drop().done(),
        Draft().classes(True, FROM).done(),
        Draft().drop().done(),
    ]


def _guest_to() -> list[Statement]:
    return [
        Draft().ct("established", "related").accept().done(),
        Draft().ct("invalid").drop().done(),
        Draft().not_syn().drop().done("a TCP flow begins with SYN"),
        Draft().classes(False, TO).done(),
        Draft().drop().done(),
    ]


def _neighbour() -> list[Statement]:
    unspecified, link_local = bytes(16), b"\xfe\x80" + bytes(14)
    return [
        Draft().in_prefix(True, Prefix(unspecified, 128)).accept().done(),
        Draft().in_prefix(True, Prefix(link_local, 10)).accept().done(),
        Draft().guest_source(6, SOURCE[6]).accept().done(),
    ]


def _guest_input() -> list[Statement]:
    link_local = Prefix(b"\xfe\x80" + bytes(14), 10)
    return [
        Draft().udp_to([4789, 6081, 8472]).drop().done("no tunnels to the host"),
        Draft().protocols([4, 41, 47]).drop().done("no tunnels to the host"),
        Draft().icmp6_types([133, 135, 136]).hop_limit(255).guest_mac(MACS).jump("neighbour").done(),
        Draft().udp(68, 67).in_prefix(True, Prefix(bytes(4), 32)).guest_mac(MACS).accept().done(),
        Draft().udp(68, 67).guest_source(4, SOURCE[4]).accept().done(),
        Draft().udp(546, 547).in_prefix(True, link_local).guest_mac(MACS).accept().done(),
        *_own_source(),
        Draft().icmp(4, 5).drop().done("no redirects from a guest"),
        Draft().ct("established", "related").accept().done(),
        Draft().drop().done(),
    ]


def _guest_output() -> list[Statement]:
    return [
        Draft().icmp6_types([134, 135, 136]).accept().done(),
        Draft().udp(67, 68).accept().done(),
        Draft().udp(547, 546).accept().done(),
        *_guest_to(),
    ]


def inet(guard: Guard) -> Skeleton:
    chains = {
        "stray4": _strays(4),
        "stray6": _strays(6),
        "neighbour": Chain(tuple(_neighbour())),
        "guest-from": Chain(tuple(_guest_from(guard))),
        "guest-to": Chain(tuple(_guest_to())),
        "guest-input": Chain(tuple(_guest_input())),
        "guest-output": Chain(tuple(_guest_output())),
        # Two stages: `accept` by the sender's egress policy ends the first only, the receiver's policy is still asked.
        "forward-from": Chain(
            (*_guarded(guard, True, "guest-from"), *_transit(guard)), Base("forward", 2, -10)
        ),
        "forward-to": Chain(tuple(_guarded(guard, False, "guest-to")), Base("forward", 2, -9)),
        "input": Chain(tuple(_guarded(guard, True, "guest-input")), Base("input", 1, -10)),
        "output": Chain(tuple(_guarded(guard, False, "guest-output")), Base("output", 3, -10)),
    }
    return Skeleton(_SETS, chains)


def arp(guard: Guard) -> Skeleton:
    asked = (
        Draft().arp_question_or_answer().arp_sender(SENDERS).accept().done(),
        Draft().arp_question_or_answer().arp_sender(SENDERS_BEHIND, interval=True).accept().done(),
        Draft().drop().done("not the guest's own address and MAC"),
    )
    chains = {
        "guest-input": Chain(asked),
        "guest-output": Chain((Draft().accept().done(),)),
        "input": Chain(tuple(_guarded(guard, True, "guest-input")), Base("input", 0, -10)),
        "output": Chain(tuple(_guarded(guard, False, "guest-output")), Base("output", 1, -10)),
    }
    return Skeleton(_ARP_SETS, chains)


SKELETONS: dict[int, Callable[[Guard], Skeleton]] = {k.INET: inet, k.ARP: arp}
RESERVED_CHAINS = frozenset(inet(Guard()).chains)
RESERVED_SETS = frozenset(_SETS)
