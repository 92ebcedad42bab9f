# Owns: what stands in the kernel before and without any endpoint: two tables, their sets, base chains and rules.
# Data only. Whose a packet is, is asked before anything else looks at it: reassembly and conntrack would believe it.
# The order of the rules is for the packet of an established flow, which is most of them: from a guest it costs two
# known-group tests, one source lookup and the conntrack state; to a guest one test and the state.
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
_FIRST = -450  # before reassembly (-400), which keys by addresses only, and before conntrack (-200)
_ASKS = 20, 100  # questions (ND, DHCP, ARP for others) a second and at once: each may cost the host a table entry


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
        where = f"filter - {-self.priority}" if self.priority > _FIRST else str(self.priority)
        return f"type filter hook {self.hook} priority {where}; policy accept;"


class Chain(NamedTuple):
    rules: tuple[Statement, ...]
    base: Base | None = None


class Skeleton(NamedTuple):
    sets: dict[str, SetShape]
    chains: dict[str, Chain]  # targets of jumps come before their users


FROM, TO = "class-from", "class-to"
SOURCE = {4: "source4", 6: "source6"}
BEHIND = {4: "behind4", 6: "behind6"}
MACS, SENDERS, SENDERS_BEHIND, EXEMPT = "macs", "senders", "senders-behind", "exempt"
CONNS, ASKS = "conns", "asks"  # of these the kernel itself writes the elements

_SETS = {
    FROM: SetShape((GROUP,), _CLASSES, verdicts=True),
    TO: SetShape((GROUP,), _CLASSES, verdicts=True),
    "source4": SetShape((IFACE, IP4, MAC), _ENDPOINTS),
    "source6": SetShape((IFACE, IP6, MAC), _ENDPOINTS),
    "behind4": SetShape((IFACE, IP4, MAC), interval=True),
    "behind6": SetShape((IFACE, IP6, MAC), interval=True),
    MACS: SetShape((IFACE, MAC), _ENDPOINTS),
    CONNS: SetShape((IFACE,), _ENDPOINTS, dynamic=True),
    ASKS: SetShape((IFACE,), _ENDPOINTS, dynamic=True),
    EXEMPT: SetShape((IFACE,), _EXEMPT),  # untagged guests that ran at the first install
}
_ARP_SETS = {
    SENDERS: SetShape((IFACE, IP4, MAC, MAC), _ENDPOINTS),
    SENDERS_BEHIND: SetShape((IFACE, IP4, MAC, MAC), interval=True),
    ASKS: SetShape((IFACE,), _ENDPOINTS, dynamic=True),
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
    what = Draft() if len(guard.drop_transit) == 2 else Draft().family(*guard.drop_transit)
    return [
        Draft().group(False, guard.group_base, GROUP_MASK).accept().done(),
        *(Draft().name(False, p).accept().done() for p in guard.prefixes),
        Draft().bridge(True).accept().done(),
        Draft().bridge(False).accept().done(),
        what.drop().done("the host did not forward before slash32"),
    ]


_NOWHERE4, _NOWHERE6 = Prefix(bytes(4), 32), Prefix(bytes(16), 128)
_LINK_LOCAL = Prefix(b"\xfe\x80" + bytes(14), 10)
_UNNUMBERED = (_NOWHERE4, _NOWHERE6, _LINK_LOCAL)  # sources of a guest that asks for or finds out its address


def _guest_source() -> list[Statement]:
    """Every packet of a guest, fragments one by one. What has no Ethernet header is none of a guest's."""
    return [
        Draft().guest_source(4, SOURCE[4]).accept().done(),
        Draft().guest_source(6, SOURCE[6]).accept().done(),
        Draft().guest_source(4, BEHIND[4], interval=True).accept().done(),
        Draft().guest_source(6, BEHIND[6], interval=True).accept().done(),
        Draft().guest_mac(MACS).jump("unnumbered").done(),
        Draft().drop().done("source address or MAC is not the guest's"),
    ]


def _about() -> list[Statement]:
    """Errors, and what helpers expect: of flows that the guest itself is an end of."""
    found = [
        Draft().guest_flow(version, end, name, interval=name in BEHIND.values()).accept().done()
        for version in (4, 6)
        for name in (SOURCE[version], BEHIND[version])
        for end in ("original", "reply")
    ]
    return [*found, Draft().drop().done("about a flow that is not the guest's")]


def _guest_from(guard: Guard) -> list[Statement]:
    return [
        Draft().ct("established").accept().done(),
        Draft().to_loopback().drop().done("nothing is forwarded to lo"),
        Draft().icmp(4, 5).drop().done("no redirects from a guest"),
        Draft().icmp6_types([134, 137]).drop().done("no router advertisements, no redirects"),
        Draft().udp(67, 68).drop().done("no DHCP server"),
        Draft().udp(547, 546).drop().done("no DHCPv6 server"),
        Draft().ct("related").jump("about").done(),
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


def _asks() -> list[Statement]:
    return [
        Draft().too_often(ASKS, *_ASKS).drop().done("asks too often"),
        Draft().accept().done(),
    ]


def _neighbour() -> list[Statement]:
    return [
        Draft().in_prefix(True, _NOWHERE6).jump("asks").done(),
        Draft().in_prefix(True, _LINK_LOCAL).jump("asks").done(),
        Draft().guest_source(6, SOURCE[6]).jump("asks").done(),
    ]


def _guest_input() -> list[Statement]:
    return [
        Draft().udp_to([4789, 6081, 8472]).drop().done("no tunnels to the host"),
        Draft().protocols([4, 41, 47]).drop().done("no tunnels to the host"),
        Draft().icmp6_types([133, 135, 136]).hop_limit(255).guest_mac(MACS).jump("neighbour").done(),
        Draft().udp(68, 67).in_prefix(True, _NOWHERE4).guest_mac(MACS).jump("asks").done(),
        Draft().udp(68, 67).guest_source(4, SOURCE[4]).jump("asks").done(),
        Draft().udp(546, 547).in_prefix(True, _LINK_LOCAL).guest_mac(MACS).jump("asks").done(),
        *(Draft().in_prefix(True, source).drop().done() for source in _UNNUMBERED),
        Draft().icmp(4, 5).drop().done("no redirects from a guest"),
        Draft().ct("established").accept().done(),
        Draft().ct("related").jump("about").done(),
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
        "unnumbered": Chain(tuple(Draft().in_prefix(True, source).accept().done() for source in _UNNUMBERED)),
        "guest-source": Chain(tuple(_guest_source())),
        "about": Chain(tuple(_about())),
        "asks": Chain(tuple(_asks())),
        "neighbour": Chain(tuple(_neighbour())),
        "guest-from": Chain(tuple(_guest_from(guard))),
        "guest-to": Chain(tuple(_guest_to())),
        "guest-input": Chain(tuple(_guest_input())),
        "guest-output": Chain(tuple(_guest_output())),
        "prerouting": Chain(tuple(_guarded(guard, True, "guest-source")), Base("prerouting", 0, _FIRST)),
        # Two stages: `accept` by the sender's egress policy ends the first only, the receiver's policy is still asked.
        "forward-from": Chain(
            (*_guarded(guard, True, "guest-from"), Draft().to_loopback().drop().done(), *_transit(guard)),
            Base("forward", 2, -10),
        ),
        "forward-to": Chain(tuple(_guarded(guard, False, "guest-to")), Base("forward", 2, -9)),
        "input": Chain(tuple(_guarded(guard, True, "guest-input")), Base("input", 1, -10)),
        "output": Chain(tuple(_guarded(guard, False, "guest-output")), Base("output", 3, -10)),
    }
    return Skeleton(_SETS, chains)


def arp(guard: Guard) -> Skeleton:
    asked = (
        Draft().arp_question_or_answer().arp_sender(SENDERS).accept().done(),
        Draft().arp_question_or_answer().arp_sender(SENDERS_BEHIND, interval=True).jump("asks").done(),
        Draft().drop().done("not the guest's own address and MAC"),
    )
    chains = {
        "asks": Chain(tuple(_asks())),
        "guest-input": Chain(asked),
        "guest-output": Chain((Draft().accept().done(),)),
        "input": Chain(tuple(_guarded(guard, True, "guest-input")), Base("input", 0, -10)),
        "output": Chain(tuple(_guarded(guard, False, "guest-output")), Base("output", 1, -10)),
    }
    return Skeleton(_ARP_SETS, chains)


SKELETONS: dict[int, Callable[[Guard], Skeleton]] = {k.INET: inet, k.ARP: arp}
RESERVED_CHAINS = frozenset(inet(Guard()).chains)
RESERVED_SETS = frozenset(_SETS)
