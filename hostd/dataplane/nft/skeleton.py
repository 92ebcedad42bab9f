# Owns: what stands in the kernel before and without any endpoint: two tables, their sets, base chains and rules.
# Data only (host.py has the part about the host itself). Whose a packet is, is asked before anything else looks at it:
# reassembly and conntrack would believe it.
# The order of the rules is for the packet of an established flow, which is most of them: from a guest it costs two
# known-group tests, one source lookup and the conntrack state; to a guest one test and the state.
from __future__ import annotations

from collections.abc import Callable

from ...compiler.ruleset import GROUP_MASK, HOST_CHAINS, HOST_FORWARD_IN, HOST_FORWARD_OUT, Guard
from . import host
from . import kernel as k
from .host import UNNUMBERED
from .shapes import (
    ARP_SETS,
    ASKS,
    BEHIND,
    CONNS,
    EXEMPT,
    FIRST,
    FROM,
    INET_SETS,
    MACS,
    SENDERS,
    SENDERS_BEHIND,
    SOURCE,
    TO,
    Base,
    Chain,
    Skeleton,
)
from .statements import Draft, Statement

FAMILIES = {k.INET: "inet", k.ARP: "arp"}

_ASKS = 20, 100  # questions (ND, DHCP, ARP for others) a second and at once: each may cost the host a table entry


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
        Draft().group(False, guard.group_base, GROUP_MASK).give_back().done(),
        *(Draft().name(False, p).give_back().done() for p in guard.prefixes),
        Draft().bridge(True).give_back().done(),
        Draft().bridge(False).give_back().done(),
        what.drop().done("the host did not forward before slash32"),
    ]


def _forward_in(guard: Guard) -> list[Statement]:
    """What comes in through no tap: a guest's packet does not get here."""
    return [
        Draft().loopback(False).drop().done(),
        *([Draft().jump("transit").done()] if guard.drop_transit else []),
        *_asked_of_host(HOST_FORWARD_IN),
    ]


def _asked_of_host(chain: str) -> list[Statement]:
    return [Draft().ct("established", "related").accept().done(), Draft().jump(chain).done()]


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
        Draft().loopback(False).drop().done("nothing is forwarded to lo"),
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


def inet(guard: Guard) -> Skeleton:
    chains = {
        **{name: Chain(filled=True) for name in HOST_CHAINS},
        "unnumbered": Chain(tuple(Draft().in_prefix(True, source).accept().done() for source in UNNUMBERED)),
        "guest-source": Chain(tuple(_guest_source())),
        "about": Chain(tuple(_about())),
        "asks": Chain(tuple(_asks())),
        "transit": Chain(tuple(_transit(guard))),
        "guest-from": Chain(tuple(_guest_from(guard))),
        "guest-to": Chain(tuple(_guest_to())),
        **host.guest_chains(guard, _guest_to()),
        "prerouting": Chain(tuple(_guarded(guard, True, "guest-source")), Base("prerouting", 0, FIRST)),
        # Two stages: `accept` by the sender's egress policy ends the first only, the receiver's policy is still asked.
        "forward-from": Chain((*_guarded(guard, True, "guest-from"), *_forward_in(guard)), Base("forward", 2, -10)),
        "forward-to": Chain(
            (*_guarded(guard, False, "guest-to"), *_asked_of_host(HOST_FORWARD_OUT)), Base("forward", 2, -9)
        ),
        "input": Chain(tuple(_guarded(guard, True, "guest-input")), Base("input", 1, -10)),
        "output": Chain(tuple(_guarded(guard, False, "guest-output")), Base("output", 3, -10)),
        **host.own_chains(guard),
    }
    return Skeleton(INET_SETS, chains)


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
    return Skeleton(ARP_SETS, chains)


SKELETONS: dict[int, Callable[[Guard], Skeleton]] = {k.INET: inet, k.ARP: arp}
ALWAYS = "asks"  # a chain that is there in both tables
RESERVED_CHAINS = frozenset(inet(Guard()).chains) - frozenset(HOST_CHAINS)
