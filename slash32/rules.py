# Owns: one rule of a policy or profile, both ways: YAML/JSON data <-> slash32.policy.Rule, with Calico's semantic
# checks. Where Calico would ignore or never match, this refuses. Pure.
from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from slash32 import selector as selectors
from slash32.decode import Field, listed, short, shown
from slash32.errors import SelectorError
from slash32.net import Prefix
from slash32.policy import Action, Icmp, Peer, PortRange, Rule

RULES_LIMIT = 1024  # of one direction
SELECTOR_LIMIT = 1024  # characters that a user may write; its canonical form may be longer
NETS_LIMIT = 256
PORTS_LIMIT = 256

ACTIONS = tuple(action.value for action in Action)
PROTOCOLS = {"ICMP": 1, "TCP": 6, "UDP": 17, "ICMPv6": 58, "SCTP": 132, "UDPLite": 136}
WITH_PORTS = (6, 17, 132, 136)
_BY_FOLDED = {name.lower(): number for name, number in PROTOCOLS.items()}
_NAMES = {number: name for name, number in PROTOCOLS.items()}
_ICMP_VERSION = {1: 4, 58: 6}

RULE = ("action", "protocol", "notProtocol", "icmp", "notICMP", "ipVersion", "source", "destination", "metadata")
RULE_LATER = {"http": "remove it, and use ports"}
PEER = ("nets", "notNets", "selector", "notSelector", "ports", "notPorts")
PEER_LATER = {
    "namespaceSelector": "there are no namespaces here: remove it, and use selector",
    "serviceAccounts": "there are no service accounts here: remove it, and use selector",
    "services": "there are no services here: remove it, and use selector and ports",
    "domains": "remove it, and use nets, or a selector that finds a GlobalNetworkSet",
}
ICMP = ("type", "code")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,9}")
_NAMED_PORT = re.compile(r"[A-Za-z][A-Za-z0-9-]*")

_PORT_FORM = 'give 1..65535 or a range like "80:90"'

T = TypeVar("T")


def decode_rules(given: dict[str, Field], key: str, stored: bool) -> tuple[Rule, ...]:
    return tuple(decode_rule(item, stored) for item in given[key].items(RULES_LIMIT)) if key in given else ()


def decode_rule(field: Field, stored: bool = False) -> Rule:
    """`stored`: it was accepted once, perhaps by an earlier version that was less strict about sense."""
    given = field.fields(RULE, RULE_LATER)
    if "action" not in given:
        field.fail(f"action is missing; give {listed(ACTIONS)}")
    if "metadata" in given:
        given["metadata"].fields(("annotations",))  # says nothing about policy
    protocol = _optional(given, "protocol", decode_protocol)
    rule = Rule(
        action=Action(given["action"].one_of(ACTIONS)),
        protocol=protocol,
        not_protocol=_optional(given, "notProtocol", decode_protocol),
        ip_version=_optional(given, "ipVersion", _ip_version),
        icmp=_optional(given, "icmp", lambda f: _icmp(f, protocol)),
        not_icmp=_optional(given, "notICMP", lambda f: _icmp(f, protocol)),
        source=_optional(given, "source", lambda f: _peer(f, protocol, stored)) or Peer(),
        destination=_optional(given, "destination", lambda f: _peer(f, protocol, stored)) or Peer(),
    )
    if not stored:
        _check_families(field, given, rule)
        _check_negations(given, rule)
    return rule


def decode_selector(field: Field, stored: bool = False) -> str:
    """The canonical text."""
    text = field.string(selectors.MAX_LENGTH if stored else SELECTOR_LIMIT)
    try:
        selector = selectors.parse(text)
    except SelectorError as error:
        hint = "" if "expected" in error.message else '; write it as in role == "web" && !has(test)'
        field.fail(f"{_around(text, error.column)}: column {error.column}: {error.message}{hint}")
    if selector.uses_global():
        field.fail(f"{short(text)}: global() selects nothing that exists here; remove it")
    return str(selector)


def _around(text: str, column: int) -> str:
    """Of a long selector the part where the error is."""
    start = max(0, column - 60) if len(text) > 80 else 0
    return ("..." if start else "") + short(text[start:])


def decode_protocol(field: Field) -> int:
    """A name, or a number 1..255, also written as text."""
    value = field.value
    if isinstance(value, str):
        number = _BY_FOLDED.get(value.lower()) if len(value) < 16 else None
        if number is None and _NUMBER.fullmatch(value):
            number = int(value)
    else:
        number = value if type(value) is int else None
    if number is None or not 1 <= number <= 255:
        field.fail(f"{shown(value)} is not a protocol: give {', '.join(PROTOCOLS)} or 1..255")
    return number


def _optional(given: dict[str, Field], key: str, decode: Callable[[Field], T]) -> T | None:
    field = given.get(key)
    return None if field is None else decode(field)


def _ip_version(field: Field) -> int:
    if type(field.value) is not int or field.value not in (4, 6):
        field.fail(f"{shown(field.value)} is not an IP version: give 4 or 6")
    return field.value


def _icmp(field: Field, protocol: int | None) -> Icmp:
    if protocol not in _ICMP_VERSION:
        field.fail("needs the rule's protocol to be ICMP or ICMPv6: give it, or remove this")
    given = field.fields(ICMP)
    if "type" not in given:
        field.fail("type is missing; give 0..254" + (" (a code alone means nothing)" if "code" in given else ""))
    return Icmp(given["type"].integer(0, 254), _optional(given, "code", lambda f: f.integer(0, 255)))


def _peer(field: Field, protocol: int | None, stored: bool) -> Peer:
    given = field.fields(PEER, PEER_LATER)
    if protocol not in WITH_PORTS:
        for key in ("ports", "notPorts"):
            if key in given:
                given[key].fail("needs the rule's protocol to be TCP, UDP, SCTP or UDPLite: give it, or remove this")
    return Peer(
        nets=_optional(given, "nets", _nets) or (),
        not_nets=_optional(given, "notNets", _nets) or (),
        selector=_optional(given, "selector", lambda f: _peer_selector(f, stored)),
        not_selector=_optional(given, "notSelector", lambda f: _peer_selector(f, stored)),
        ports=_optional(given, "ports", _ports) or (),
        not_ports=_optional(given, "notPorts", _ports) or (),
    )


def _peer_selector(field: Field, stored: bool) -> str:
    if isinstance(field.value, str) and not field.value.strip(" \t"):
        # Calico reads this as "anybody", the language itself as "every endpoint": too far apart to guess.
        field.fail("is empty: remove the field to mean anybody, or write all() for every endpoint")
    return decode_selector(field, stored)


def _nets(field: Field) -> tuple[Prefix, ...]:
    # An empty list would mean "any address": the opposite of what a template that found none wanted to say.
    return tuple(item.prefix() for item in field.items(NETS_LIMIT, at_least=1))


def _ports(field: Field) -> tuple[PortRange, ...]:
    return tuple(_port_range(item) for item in field.items(PORTS_LIMIT, at_least=1))


def _port_range(field: Field) -> PortRange:
    value = field.value
    if type(value) is int:
        first = last = value
    elif not isinstance(value, str):
        field.fail(f"{shown(value)} is not a port: {_PORT_FORM}")
    else:
        text = field.line(64)
        if _NAMED_PORT.fullmatch(text):
            field.fail(f"{short(text)}: named ports are not supported by this version; give the number")
        ends = text.split(":")
        if len(ends) > 2 or not all(_NUMBER.fullmatch(end) for end in ends):
            field.fail(f"{short(text)} is not a port: {_PORT_FORM}")
        first, last = int(ends[0]), int(ends[-1])
    if not (1 <= first <= 65535 and 1 <= last <= 65535):
        field.fail(f"{shown(value)} is not a port: give 1..65535")
    if first > last:
        field.fail(f"{shown(value)}: the range runs backwards; give {last}:{first}")
    return PortRange(first, last)


def _check_families(field: Field, given: dict[str, Field], rule: Rule) -> None:
    """A rule that names both IPv4 and IPv6 where only one can be: it would silently match nothing."""
    icmp_version = _ICMP_VERSION.get(rule.protocol or 0)
    if rule.ip_version and icmp_version and rule.ip_version != icmp_version:
        name = _NAMES[rule.protocol or 0]
        given["ipVersion"].fail(f"{rule.ip_version} contradicts protocol {name}; remove one of them")
    only = rule.ip_version or icmp_version
    because = f"ipVersion {rule.ip_version}" if rule.ip_version else f"protocol {_NAMES.get(rule.protocol or 0)}"
    for side, peer in (("source", rule.source), ("destination", rule.destination)):
        for name, nets in (("nets", peer.nets), ("notNets", peer.not_nets)):
            for index, net in enumerate(nets):
                if only and net.version != only:
                    at = Field(None, field.subject, f"{field.path}.{side}.{name}[{index}]")
                    at.fail(f"{net} is IPv{net.version}, which contradicts {because}; remove one of them")
    versions = [{net.version for net in peer.nets} or {4, 6} for peer in (rule.source, rule.destination)]
    if not versions[0] & versions[1]:
        at = given["destination"].child("nets")
        at.fail("is of another IP version than source.nets: the rule could never match; give both of one version")


def _check_negations(given: dict[str, Field], rule: Rule) -> None:
    """A negation that leaves nothing of what is asked for: such a rule looks as if it did something."""
    if rule.protocol is not None and rule.protocol == rule.not_protocol:
        given["notProtocol"].fail(_nothing_left("protocol"))
    if rule.icmp and rule.not_icmp and rule.not_icmp in (rule.icmp, Icmp(rule.icmp.type)):
        given["notICMP"].fail(_nothing_left("icmp"))
    only = rule.ip_version or _ICMP_VERSION.get(rule.protocol or 0)
    for side, peer in (("source", rule.source), ("destination", rule.destination)):
        asked = peer.nets or tuple(net for net in _EVERYWHERE if only in (None, net.version))
        if all(any(_within(net, hole) for hole in peer.not_nets) for net in asked):
            given[side].child("notNets").fail(_nothing_left("nets" if peer.nets else "all addresses"))
        if peer.selector and peer.not_selector in (peer.selector, "all()"):
            given[side].child("notSelector").fail(_nothing_left("selector"))
        if peer.ports and all(any(n[0] <= p[0] and p[1] <= n[1] for n in peer.not_ports) for p in peer.ports):
            given[side].child("notPorts").fail(_nothing_left("ports"))


_EVERYWHERE = (Prefix(bytes(4), 0), Prefix(bytes(16), 0))


def _within(net: Prefix, other: Prefix) -> bool:
    return net.length >= other.length and other.contains(net.network)


def _nothing_left(of: str) -> str:
    return f"leaves nothing of {of}: the rule could never match; remove one of them"


def encode_rule(rule: Rule) -> dict[str, object]:
    result: dict[str, object] = {"action": rule.action.value}
    if rule.ip_version is not None:
        result["ipVersion"] = rule.ip_version
    for name, protocol in (("protocol", rule.protocol), ("notProtocol", rule.not_protocol)):
        if protocol is not None:
            result[name] = _NAMES.get(protocol, protocol)
    for name, icmp in (("icmp", rule.icmp), ("notICMP", rule.not_icmp)):
        if icmp is not None:
            result[name] = {"type": icmp.type} if icmp.code is None else {"type": icmp.type, "code": icmp.code}
    for name, peer in (("source", rule.source), ("destination", rule.destination)):
        encoded = _encode_peer(peer)
        if encoded:
            result[name] = encoded
    return result


def _encode_peer(peer: Peer) -> dict[str, object]:
    result: dict[str, object] = {
        "nets": [str(net) for net in peer.nets],
        "notNets": [str(net) for net in peer.not_nets],
        "selector": peer.selector,
        "notSelector": peer.not_selector,
        "ports": [encode_port(ports) for ports in peer.ports],
        "notPorts": [encode_port(ports) for ports in peer.not_ports],
    }
    return {key: value for key, value in result.items() if value}


def encode_port(ports: PortRange) -> int | str:
    return ports.first if ports.first == ports.last else f"{ports.first}:{ports.last}"
