# Owns: the part of the skeleton that is about the host itself: what guests may say to it and it to them, and what its
# host endpoints are asked. Data only. Two stages, as in forward: `input` and `output` are the guests', `input-host` and
# `output-host` come after them and are the host's; `accept` in one leaves the other to be asked.
from __future__ import annotations

from collections.abc import Iterable, Sequence

from slash32.failsafe import INBOUND, OUTBOUND, TCP, UDP, VITAL_ICMP6, Failsafe
from slash32.net import Prefix

from ...compiler.ruleset import (
    GROUP_MASK,
    GUEST_EGRESS,
    HOST_FROM_GUESTS,
    HOST_GUESTS,
    HOST_IN,
    HOST_OUT,
    HOST_TO_GUESTS,
    Guard,
)
from .intervals import Interval, merge
from .shapes import CONNS, EXEMPT, FROM, MACS, SOURCE, Base, Chain
from .statements import Draft, Statement

_NOWHERE4, _NOWHERE6 = Prefix(bytes(4), 32), Prefix(bytes(16), 128)
_LINK_LOCAL = Prefix(b"\xfe\x80" + bytes(14), 10)
_LOOPBACK = Prefix(bytes((127, 0, 0, 0)), 8)  # reached from outside where route_localnet is set
UNNUMBERED = (_NOWHERE4, _NOWHERE6, _LINK_LOCAL)  # sources of a guest that asks for or finds out its address


def guest_chains(guard: Guard, to_guest: Iterable[Statement]) -> dict[str, Chain]:
    """Of the stage that is the guests'."""
    return {
        "neighbour": Chain(tuple(d.jump("asks").done() for d in _neighbours())),
        GUEST_EGRESS: Chain(tuple(_guest_egress(guard))),
        "guest-input": Chain(tuple(_guest_input())),
        "guest-output": Chain((*(d.accept().done() for d in _vital_to_guest()), *to_guest)),
    }


def own_chains(guard: Guard) -> dict[str, Chain]:
    """Of the stage that is the host's: where host endpoints decide nothing, the packet passes."""
    base = guard.group_base
    before = [Draft().ct("established", "related").accept().done()]
    return {
        "input-guest": Chain(
            (*(d.accept().done() for d in _vital_from_guest()), Draft().jump(HOST_FROM_GUESTS).done(), _passes())
        ),
        "output-guest": Chain(
            (*(d.accept().done() for d in _vital_to_guest()), Draft().jump(HOST_TO_GUESTS).done(), _passes())
        ),
        "input-host": Chain(
            (*before, *_own(True, base, "input-guest"), *_failsafe(INBOUND), Draft().jump(HOST_IN).done()),
            Base("input", 1, -9),
        ),
        "output-host": Chain(
            (
                *before,
                *_own(False, base, "output-guest"),
                *_failsafe(OUTBOUND, guard.dispatcher_port),
                Draft().jump(HOST_OUT).done(),
            ),
            Base("output", 3, -9),
        ),
    }


def _passes() -> Statement:
    return Draft().accept().done()


def _own(incoming: bool, base: int, guest: str) -> list[Statement]:
    return [
        Draft().loopback(incoming).accept().done(),
        Draft().group(incoming, base, GROUP_MASK).jump(guest).done(),
        Draft().interface(incoming, EXEMPT).accept().done(),
    ]


def _failsafe(open_: Sequence[Failsafe], also_tcp: int = 0) -> list[Statement]:
    """Nobody locks himself out of a hypervisor."""
    ports: dict[int, list[Interval]] = {TCP: [(also_tcp, also_tcp)] if also_tcp else [], UDP: []}
    for item in open_:
        ports[item.protocol].append((item.first, item.last))
    return [
        *(Draft().protocol(p).ports(False, merge(found)).accept().done() for p, found in ports.items()),
        Draft().icmp6_types(VITAL_ICMP6).accept().done(),
    ]


def _guest_egress(guard: Guard) -> list[Statement]:
    """As a guest is asked that speaks to others; asked only where a host endpoint lets guests speak to the host."""
    return [
        Draft().ct("invalid").drop().done(),
        Draft().not_syn().drop().done("a TCP flow begins with SYN"),
        Draft().too_many_connections(CONNS, guard.conn_limit).drop().done(),
        Draft().in_prefix(False, _LOOPBACK).drop().done("what listens there is for nobody else"),
        Draft().classes(True, FROM).done(),
        Draft().drop().done(),
    ]


def _neighbours() -> list[Draft]:
    """Of neighbour discovery, the sources that a guest may ask from."""
    return [
        Draft().in_prefix(True, _NOWHERE6),
        Draft().in_prefix(True, _LINK_LOCAL),
        Draft().guest_source(6, SOURCE[6]),
    ]


def _discovery() -> Draft:
    return Draft().icmp6_types([133, 135, 136]).hop_limit(255).guest_mac(MACS)


def _dhcp() -> list[Draft]:
    return [
        Draft().udp(68, 67).in_prefix(True, _NOWHERE4).guest_mac(MACS),
        Draft().udp(68, 67).guest_source(4, SOURCE[4]),
        Draft().udp(546, 547).in_prefix(True, _LINK_LOCAL).guest_mac(MACS),
    ]


def _vital_from_guest() -> list[Draft]:
    """What guest-input lets by whatever policy says, and has counted already."""
    return [
        _discovery().in_prefix(True, _NOWHERE6),
        _discovery().in_prefix(True, _LINK_LOCAL),
        _discovery().guest_source(6, SOURCE[6]),
        *_dhcp(),
    ]


def _guest_input() -> list[Statement]:
    return [
        Draft().udp_to([4789, 6081, 8472]).drop().done("no tunnels to the host"),
        Draft().protocols([4, 41, 47]).drop().done("no tunnels to the host"),
        _discovery().jump("neighbour").done(),
        *(d.jump("asks").done() for d in _dhcp()),
        *(Draft().in_prefix(True, source).drop().done() for source in UNNUMBERED),
        Draft().icmp(4, 5).drop().done("no redirects from a guest"),
        Draft().ct("established").accept().done(),
        Draft().ct("related").jump("about").done(),
        Draft().jump(HOST_GUESTS).done(),
        Draft().drop().done(),
    ]


def _vital_to_guest() -> list[Draft]:
    return [Draft().icmp6_types([134, 135, 136]), Draft().udp(67, 68), Draft().udp(547, 546)]
