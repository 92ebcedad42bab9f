# Owns: what stands in iptables before and without any endpoint, with the guarantees of nft/skeleton.py. Data only.
#
# raw: whose a packet is, by (source address, tap). security: guests and what speaks to the host; both stages of a
# forwarded packet in one traversal: `accept` of a policy about what leaves goes on to "s32-onto", which asks the
# receiver. mangle: what host endpoints are asked of forwarded packets (there `accept` of a policy about what comes in
# goes on to "s32-away"), and whether a guest may speak to the host. Chains of policies stand in both tables.
# A chain that -g leads to always ends with a verdict: it would return into the middle of somebody's policies.
from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from slash32.failsafe import INBOUND, OUTBOUND, TCP, UDP, VITAL_ICMP6, Failsafe
from slash32.net import Prefix

from ...compiler.ruleset import (
    GROUP_MASK,
    GUEST_EGRESS,
    HOST_CHAINS,
    HOST_FORWARD_IN,
    HOST_FORWARD_OUT,
    HOST_FROM_GUESTS,
    HOST_GUESTS,
    HOST_IN,
    HOST_OUT,
    HOST_TO_GUESTS,
    Guard,
)
from . import about
from .about import ABOUT, ABOUT_HOST, BEHIND_CHAINS
from .lines import ACCEPT, DROP, ICMP, NOT_SYN, RETURN, Line, ct, goto, group, icmp, in_set, jump, named, net, udp
from .names import BEHIND, SOURCE

RAW, MANGLE, SECURITY = "raw", "mangle", "security"
TABLES = (RAW, MANGLE, SECURITY)
POLICY_TABLES = (MANGLE, SECURITY)

ONTO = "s32-onto"  # where a policy's `accept` leads in security, of what leaves
AWAY = "s32-away"  # and in mangle, of what comes in
FROM, TO = "s32-class-from", "s32-class-to"  # roots of the dispatch by class, filled with the classes
BRIDGES = "s32-bridges"  # filled with the names of this host's bridges
GATE = "s32-gate"  # empty; CLOSED for as long as a change is in several steps
CLOSED = Line((), DROP, "while policies change")
EXEMPT_IN, EXEMPT_FROM, EXEMPT_TO = "s32-exempt-in", "s32-exempt-from", "s32-exempt-to"  # filled with names of taps

FILLED = {
    RAW: (EXEMPT_IN,),
    MANGLE: (FROM, *HOST_CHAINS),
    SECURITY: (FROM, TO, BRIDGES, EXEMPT_IN, EXEMPT_FROM, EXEMPT_TO, *BEHIND_CHAINS, *HOST_CHAINS),
}

ABOUT_BEHIND, BEHIND_HOST = BEHIND_CHAINS
_NOWHERE = {4: Prefix(bytes(4), 32), 6: Prefix(bytes(16), 128)}
_LOOPBACK = Prefix(bytes((127, 0, 0, 0)), 8)  # reached from outside where route_localnet is set
_LINK_LOCAL = Prefix(b"\xfe\x80" + bytes(14), 10)
_ASKS = ("--hashlimit-above", "20/second", "--hashlimit-burst", "100")
_INPUT_PORTS = "4789,6081,8472"  # tunnels


class Part(NamedTuple):
    """Of one table and IP version: the hooks that lead to our chains, and these."""

    hooks: dict[str, str]
    chains: dict[str, tuple[Line, ...]]


def part(guard: Guard, table: str, version: int) -> Part:
    return {RAW: _raw, MANGLE: _mangle, SECURITY: _security}[table](guard, version)


def _guarded(guard: Guard, incoming: bool) -> list[Line]:
    return [Line(named(incoming, f"{prefix}+"), DROP) for prefix in guard.prefixes]


def _ours(guard: Guard, incoming: bool, negate: bool = False) -> tuple[str, ...]:
    return group(incoming, guard.group_base, GROUP_MASK, negate)


def unnumbered(version: int) -> list[Prefix]:
    """Sources of a guest that asks for or finds out its address."""
    return [_NOWHERE[4]] if version == 4 else [_NOWHERE[6], _LINK_LOCAL]


# -- raw: whose is it -------------------------------------------------------------------------------------------------


def _raw(guard: Guard, version: int) -> Part:
    source = (
        Line(_ours(guard, True), goto("s32-guest")),
        Line((), jump(EXEMPT_IN)),
        *_guarded(guard, True),
    )
    guest = (
        Line(in_set(SOURCE[version], "src,src"), RETURN),
        Line(in_set(BEHIND[version], "src,src"), RETURN),
        *(Line(net(True, prefix), RETURN) for prefix in unnumbered(version)),
        Line((), DROP, "source address is not the guest's"),
    )
    return Part({"PREROUTING": "s32-source"}, {"s32-source": source, "s32-guest": guest})


# -- security: guests -------------------------------------------------------------------------------------------------


def _security(guard: Guard, version: int) -> Part:
    chains = {
        GATE: (),
        "s32-forward": _forward(guard, version),
        "s32-from": _from(guard, version),
        ONTO: _onto(guard),
        "s32-to": _to(),
        "s32-input": _input(guard, version),
        "s32-input-guest": _input_guest(version),
        GUEST_EGRESS: (Line((), jump(HOST_FROM_GUESTS)), Line((), ACCEPT)),
        "s32-output": _output(guard, version),
        "s32-output-guest": _output_guest(version),
        "s32-asks": _asks(version),
        ABOUT: _about(version, ABOUT_BEHIND, goto(ONTO)),
        ABOUT_HOST: _about(version, BEHIND_HOST, ACCEPT),
    }
    return Part({"INPUT": "s32-input", "FORWARD": "s32-forward", "OUTPUT": "s32-output"}, chains)


def _forward(guard: Guard, version: int) -> tuple[Line, ...]:
    return (
        Line(_ours(guard, True), goto("s32-from")),
        Line((), jump(EXEMPT_FROM)),
        *_guarded(guard, True),
        Line(named(False, "lo"), DROP),
        *_transit(guard, version),
        Line((), goto(ONTO)),
    )


def _transit(guard: Guard, version: int) -> Iterable[Line]:
    """Neither side is guarded here or is a bridge: two NICs between which this host never forwarded."""
    if version in guard.drop_transit:
        yield Line(_ours(guard, False), goto(ONTO))
        for prefix in guard.prefixes:
            yield Line(named(False, f"{prefix}+"), goto(ONTO))
        yield Line((), jump(BRIDGES))
        yield Line((), DROP, "the host did not forward before slash32")


def _from(guard: Guard, version: int) -> tuple[Line, ...]:
    return (
        Line(ct("ESTABLISHED"), goto(ONTO)),
        Line(named(False, "lo"), DROP, "nothing is forwarded to lo"),
        *_no_advice(version),
        Line(ct("RELATED"), goto(ABOUT)),
        *_begins(guard, version),
        Line((), jump(GATE)),
        Line((), jump(FROM)),
        Line((), DROP),
    )


def _no_advice(version: int) -> tuple[Line, ...]:
    if version == 4:
        return (
            Line((*ICMP[4], *icmp(4, 5)), DROP, "no redirects from a guest"),
            Line(udp(67, 68), DROP, "no DHCP server"),
        )
    return (
        Line((*ICMP[6], *icmp(6, 134)), DROP, "no router advertisements"),
        Line((*ICMP[6], *icmp(6, 137)), DROP, "no redirects from a guest"),
        Line(udp(547, 546), DROP, "no DHCPv6 server"),
    )


def _begins(guard: Guard, version: int) -> tuple[Line, ...]:
    """What may begin a flow. Per source address: iptables cannot count by interface."""
    wide = ("-m", "connlimit", "--connlimit-above", str(guard.conn_limit), "--connlimit-saddr")
    one, many = ("32", "24") if version == 4 else ("128", "64")
    return (
        Line(ct("INVALID"), DROP),
        Line(NOT_SYN, DROP, "a TCP flow begins with SYN"),
        Line((*in_set(SOURCE[version], "src,src"), *wide, "--connlimit-mask", one), DROP),
        Line((*in_set(BEHIND[version], "src,src"), *wide, "--connlimit-mask", many), DROP),
    )


def _to_loopback(version: int) -> Iterable[Line]:
    if version == 4:
        yield Line(net(False, _LOOPBACK), DROP, "what listens there is for nobody else")


def _onto(guard: Guard) -> tuple[Line, ...]:
    """The second stage: who is it for?"""
    return (
        Line((*_ours(guard, False), *ct("ESTABLISHED,RELATED")), ACCEPT),
        Line(_ours(guard, False), goto("s32-to")),
        Line((), jump(EXEMPT_TO)),
        *_guarded(guard, False),
        Line((), ACCEPT),
    )


def _to() -> tuple[Line, ...]:
    return (
        Line(ct("INVALID"), DROP),
        Line(NOT_SYN, DROP, "a TCP flow begins with SYN"),
        Line((), jump(GATE)),
        Line((), jump(TO)),
        Line((), DROP),
    )


def _about(version: int, behind: str, known: tuple[str, ...]) -> tuple[Line, ...]:
    return (
        about.of_itself(version, known),
        Line((), jump(behind)),
        Line((), DROP, "about a flow that is not the guest's"),
    )


# -- security: the host itself ----------------------------------------------------------------------------------------


def _input(guard: Guard, version: int) -> tuple[Line, ...]:
    return (
        Line(_ours(guard, True), goto("s32-input-guest")),
        Line((), jump(EXEMPT_IN)),
        *_guarded(guard, True),
        Line(named(True, "lo"), RETURN),
        Line(ct("ESTABLISHED,RELATED"), RETURN),
        *_failsafe(INBOUND, version),
        Line((), jump(GATE)),
        Line((), jump(HOST_IN)),
    )


def _output(guard: Guard, version: int) -> tuple[Line, ...]:
    return (
        Line(_ours(guard, False), goto("s32-output-guest")),
        Line((), jump(EXEMPT_TO)),
        *_guarded(guard, False),
        Line(named(False, "lo"), RETURN),
        Line(ct("ESTABLISHED,RELATED"), RETURN),
        *_failsafe(OUTBOUND, version, guard.dispatcher_port),
        Line((), jump(GATE)),
        Line((), jump(HOST_OUT)),
    )


def _failsafe(open_: Iterable[Failsafe], version: int, also_tcp: int = 0) -> Iterable[Line]:
    """Nobody locks himself out of a hypervisor."""
    slots: dict[int, list[str]] = {TCP: [str(also_tcp)] if also_tcp else [], UDP: []}
    for item in open_:
        slots[item.protocol].append(str(item.first) if item.first == item.last else f"{item.first}:{item.last}")
    for protocol, found in slots.items():
        yield Line(("-p", str(protocol), "-m", "multiport", "--dports", ",".join(found)), RETURN)
    if version == 6:
        for kind in VITAL_ICMP6:
            yield Line((*ICMP[6], *icmp(6, kind)), RETURN)


def _asking(version: int) -> Iterable[tuple[str, ...]]:
    """Neighbour discovery and DHCP of a guest without an address, or from one that it took itself."""
    if version == 4:
        yield (*udp(68, 67), *net(True, _NOWHERE[4]))
        return
    for question in _discovery():
        for source in unnumbered(6):
            yield (*question, *net(True, source))
    yield (*udp(546, 547), *net(True, _LINK_LOCAL))


def _asking_as_itself(version: int) -> Iterable[tuple[str, ...]]:
    """From its own address: that costs the host no entry of any table, and nobody else can use the measure up."""
    for question in [udp(68, 67)] if version == 4 else _discovery():
        yield (*question, *in_set(SOURCE[version], "src,src"))


def _discovery() -> Iterable[tuple[str, ...]]:
    for kind in (133, 135, 136):
        yield (*ICMP[6], *icmp(6, kind), "-m", "hl", "--hl-eq", "255")


def _asks(version: int) -> tuple[Line, ...]:
    """Questions a second and at once, of each source: each may cost the host a table entry. Guests without an address
    share theirs: no limit there, or one could silence the others."""
    by = ("--hashlimit-name", f"s32-asks{version}", "--hashlimit-mode", "srcip")
    own = (Line(net(True, _NOWHERE[version]), ACCEPT),)
    return (*own, Line(("-m", "hashlimit", *_ASKS, *by), DROP, "asks too often"), Line((), ACCEPT))


def _input_guest(version: int) -> tuple[Line, ...]:
    tunnels = ("4", "41", "47")
    return (
        Line(("-p", "17", "-m", "multiport", "--dports", _INPUT_PORTS), DROP, "no tunnels to the host"),
        *(Line(("-p", number), DROP, "no tunnels to the host") for number in tunnels),
        *(Line(what, ACCEPT) for what in _asking_as_itself(version)),
        *(Line(what, goto("s32-asks")) for what in _asking(version)),
        *(Line(net(True, source), DROP) for source in unnumbered(version)),
        *(line for line in _no_advice(version)[:1] if version == 4),
        Line(ct("ESTABLISHED"), ACCEPT),
        Line(ct("RELATED"), goto(ABOUT_HOST)),
        Line((), jump(GATE)),
        Line((), jump(HOST_GUESTS)),
        Line((), DROP),
    )


def _output_guest(version: int) -> tuple[Line, ...]:
    vital = [udp(67, 68)] if version == 4 else [udp(547, 546), *((*ICMP[6], *icmp(6, k)) for k in (134, 135, 136))]
    return (
        *(Line(what, ACCEPT) for what in vital),
        Line(ct("ESTABLISHED,RELATED"), ACCEPT),
        Line(ct("INVALID"), DROP),
        Line((), jump(GATE)),
        Line((), jump(HOST_TO_GUESTS)),
        Line((), goto("s32-to")),
    )


# -- mangle: host endpoints and what is forwarded, guests and the host ------------------------------------------------


def _mangle(guard: Guard, version: int) -> Part:
    """An empty chain of host endpoints costs a jump and asks nothing."""

    def away(end: tuple[str, ...]) -> tuple[Line, ...]:
        return (
            *(Line(named(False, f"{prefix}+"), end) for prefix in guard.prefixes),
            Line((), jump(GATE)),
            Line((), jump(HOST_FORWARD_OUT)),
            Line((), end),
        )

    chains: dict[str, tuple[Line, ...]] = {
        GATE: (),
        "s32-forward": (
            Line(ct("ESTABLISHED,RELATED"), RETURN),
            *(Line(named(True, f"{prefix}+"), goto("s32-leave")) for prefix in guard.prefixes),
            Line((), jump(GATE)),
            Line((), jump(HOST_FORWARD_IN)),
            Line((), goto("s32-leave")),
        ),
        # By `accept` of a host endpoint, or without: then others' rules in this table see the packet, too.
        AWAY: away(ACCEPT),
        "s32-leave": away(RETURN),
        "s32-input": (Line(_ours(guard, True), goto("s32-input-guest")),),
        "s32-input-guest": (
            Line(ct("ESTABLISHED,RELATED"), RETURN),
            *(Line(what, RETURN) for what in (*_asking_as_itself(version), *_asking(version))),
            Line((), jump(GATE)),
            Line((), jump(HOST_GUESTS)),
        ),
        GUEST_EGRESS: (*_begins(guard, version), *_to_loopback(version), Line((), jump(FROM)), Line((), DROP)),
    }
    return Part({"INPUT": "s32-input", "FORWARD": "s32-forward"}, chains)
