# Owns: the values on the wire and in the dispatcher's store as msgpack-able data, strictly decoded, and the digest of
# a replica's content. Pure. `pack_x` and `unpack_x` are inverses; packing is canonical: equal values, equal bytes.
from __future__ import annotations

import enum
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import Any, NamedTuple, TypeVar

import msgpack

from slash32 import selector as selectors
from slash32.errors import SelectorError
from slash32.model import Endpoint, EndpointKey, SharedAddress
from slash32.net import Address, Prefix
from slash32.policy import (
    DEFAULT_TIER,
    Action,
    Direction,
    HostEndpoint,
    Icmp,
    Peer,
    Policy,
    PortRange,
    Profile,
    Rule,
    Tier,
)
from slash32.unicast import unusable

T = TypeVar("T")
MASK = (1 << 64) - 1
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_MAC = re.compile(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}")
_LABEL = re.compile(r"[A-Za-z0-9_./-]{1,512}")
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")  # of resources: it becomes a name in the kernel
_INTERFACE = re.compile(r"\*|(?!\.{1,2}$)[A-Za-z0-9_.@-]{1,15}")  # it stands in rules as it is
_ADDRESSES = _PREFIXES = 64  # of one endpoint: what slash32.tag lets through; each is a route on every host
_LABELS, _PROFILES, _LABEL_VALUE = 128, 16, 512
_NET_SIZES = frozenset((5, 17))
_ADDRESS_SIZES = frozenset((4, 16))


class WireError(ValueError):
    """Bytes that are not what the protocol allows; the message is one line."""


class Kind(enum.Enum):
    POLICY = "policy"  # name -> Policy
    PROFILE = "profile"  # name -> Profile
    SET = "set"  # canonical selector -> AddressSet of all matching endpoints of the fleet
    HOST = "host"  # name -> next-hop addresses
    ROUTE = "route"  # Prefix -> names of the hosts behind which it is (several for a shared address)
    TIER = "tier"  # name -> Tier; never `default`, which needs no telling
    STAGED = "staged"  # name -> Policy that is staged
    HOSTENDPOINT = "hostendpoint"  # name -> HostEndpoint, to its own host only

    __hash__ = object.__hash__  # Enum's own is a Python function: these are keys on every hot path


KINDS = tuple(Kind)
Name = str | Prefix


class ObjectKey(NamedTuple):
    kind: Kind
    name: Name

    def __str__(self) -> str:
        return f"{self.kind.value} {self.name}"


@dataclass(slots=True)
class AddressSet:
    addresses: set[Address] = field(default_factory=set)
    prefixes: set[Prefix] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.addresses) + len(self.prefixes)

    def packed(self) -> list[bytes]:
        return [*self.addresses, *(p.network + bytes((p.length,)) for p in self.prefixes)]

    def copy(self) -> AddressSet:
        return AddressSet(set(self.addresses), set(self.prefixes))


Value = Policy | Profile | Tier | HostEndpoint | AddressSet | tuple[Address, ...] | tuple[str, ...]


# --- the digest: a sum, so that each side keeps it up to date change by change ---------------------------------------


def digest_of(kind: Kind, name: Name, value: Value) -> int:
    """What this object adds to the digest of a content (mod 2**64)."""
    packed = pack_name(kind, name)
    if isinstance(value, AddressSet):
        return (_hash(msgpack.packb([2, packed])) + digest_of_members(str(name), value)) & MASK
    return _hash(msgpack.packb([KINDS.index(kind), packed, pack_value(kind, value)]))


def digest_of_members(set_name: str, members: AddressSet) -> int:
    seed = blake2b(set_name.encode(), digest_size=16).digest()
    return sum(int.from_bytes(blake2b(seed + m, digest_size=8).digest(), "big") for m in members.packed()) & MASK


def _hash(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")


# --- checked primitives ----------------------------------------------------------------------------------------------


def shown(raw: object) -> str:
    """Foreign data in a message for people: one line, bounded."""
    text = ascii(raw)
    return text if len(text) <= 120 else text[:117] + "..."


def array(raw: Any, what: str, most: int = 1 << 20) -> list[Any]:
    if type(raw) is not list:
        raise WireError(f"{what}: {shown(raw)} is not a list")
    if len(raw) > most:
        raise WireError(f"{what}: {len(raw)} entries, more than {most}")
    return raw


def fixed(raw: Any, what: str, length: int) -> list[Any]:
    if len(array(raw, what)) != length:
        raise WireError(f"{what}: {len(raw)} fields, not {length}")
    return raw  # type: ignore[no-any-return]


def text(raw: Any, what: str, most: int = 16384) -> str:
    if type(raw) is not str:
        raise WireError(f"{what}: {shown(raw)} is not a text")
    if len(raw) > most:
        raise WireError(f"{what}: {len(raw)} characters, more than {most}")
    return raw


def integer(raw: Any, what: str, most: int = MASK) -> int:
    if type(raw) is not int or not 0 <= raw <= most:
        raise WireError(f"{what}: {shown(raw)} is not a number from 0 to {most}")
    return raw


def address(raw: Any, what: str) -> Address:
    if type(raw) is not bytes or len(raw) not in _ADDRESS_SIZES:
        raise WireError(f"{what}: {shown(raw)} is not an address")
    return raw


def prefix(raw: Any, what: str) -> Prefix:
    if type(raw) is not bytes or len(raw) not in _NET_SIZES:
        raise WireError(f"{what}: {shown(raw)} is not a prefix")
    found = Prefix(raw[:-1], raw[-1])
    rest = 8 * len(found.network) - found.length
    if rest < 0 or int.from_bytes(found.network, "big") & ((1 << rest) - 1):
        raise WireError(f"{what}: {shown(raw)} is not a prefix")
    return found


def pack_prefix(p: Prefix) -> bytes:
    return p.network + bytes((p.length,))


def _pattern(raw: Any, what: str, pattern: re.Pattern[str]) -> str:
    if not pattern.fullmatch(text(raw, what)):
        raise WireError(f"{what}: {shown(raw)} is malformed")
    return str(raw)


def _tuple(raw: Any, what: str, most: int, decode: Callable[[Any, str], T]) -> tuple[T, ...]:
    return tuple(decode(item, what) for item in array(raw, what, most))


# --- endpoints -------------------------------------------------------------------------------------------------------


def pack_endpoint(e: Endpoint) -> list[Any]:
    return [
        e.key.uuid, e.key.mac, e.domain, pack_labels(e.labels), list(e.profiles), list(e.addresses),
        [[s.address, s.group] for s in e.shared], [pack_prefix(p) for p in e.prefixes],
    ]  # fmt: skip


def unpack_key(raw: Any) -> EndpointKey:
    uuid, mac = fixed(raw, "endpoint", 2)
    return EndpointKey(_pattern(uuid, "endpoint.uuid", _UUID), _pattern(mac, "endpoint.mac", _MAC))


def unpack_endpoint(raw: Any) -> Endpoint:
    uuid, mac, domain, labels, profiles, addresses, shared, prefixes = fixed(raw, "endpoint", 8)
    return Endpoint(
        key=unpack_key([uuid, mac]),
        domain=text(domain, "endpoint.domain", 4096),
        labels=unpack_labels(labels),
        profiles=_tuple(profiles, "endpoint.profiles", _PROFILES, lambda r, w: text(r, w, 253)),
        addresses=_tuple(addresses, "endpoint.addresses", _ADDRESSES, address),
        shared=_tuple(shared, "endpoint.shared", _ADDRESSES, _shared),
        prefixes=_tuple(prefixes, "endpoint.prefixes", _PREFIXES, prefix),
    )


def _shared(raw: Any, what: str) -> SharedAddress:
    found, group = fixed(raw, what, 2)
    return SharedAddress(address(found, what), text(group, what, 253))


def pack_labels(labels: Mapping[str, str]) -> list[str]:
    return [text for pair in sorted(labels.items()) for text in pair]


def unpack_labels(raw: Any) -> dict[str, str]:
    flat = array(raw, "labels", 2 * _LABELS)
    if len(flat) % 2:
        raise WireError("labels: a key without a value")
    keys = [_pattern(k, "labels", _LABEL) for k in flat[::2]]
    if len(set(keys)) != len(keys):
        raise WireError("labels: a key twice")
    return dict(zip(keys, (text(v, "labels", _LABEL_VALUE) for v in flat[1::2]), strict=True))


# --- objects ---------------------------------------------------------------------------------------------------------


def pack_name(kind: Kind, name: Name) -> str | bytes:
    return pack_prefix(name) if isinstance(name, Prefix) else name


def unpack_name(kind: Kind, raw: Any) -> Name:
    if kind is Kind.ROUTE:
        return _route(raw)
    return text(raw, "set") if kind is Kind.SET else _pattern(raw, kind.value, _NAME)


def _route(raw: Any) -> Prefix:
    """No default route, no loopback: a dispatcher that is wrong does not take a host off its own network."""
    found = prefix(raw, "route")
    why = unusable(found)
    if why is not None:
        raise WireError(f"route {found}: is or holds {why}")
    return found


def pack_value(kind: Kind, value: Any) -> Any:
    match kind:
        case Kind.POLICY | Kind.STAGED:
            types = [d in value.types for d in Direction]
            rules = _pack_rules(value.ingress), _pack_rules(value.egress)
            flags = value.tier, value.apply_on_forward, value.keep_established
            return [value.selector, _pack_order(value.order), types, *rules, *flags]
        case Kind.TIER:
            return [_pack_order(value.order), value.default_action is Action.PASS]
        case Kind.HOSTENDPOINT:
            labels, addresses = pack_labels(value.labels), list(value.addresses)
            return [value.node, value.interface, labels, addresses, list(value.profiles)]
        case Kind.PROFILE:
            return [_pack_rules(value.ingress), _pack_rules(value.egress), pack_labels(value.labels)]
        case Kind.SET:
            return value.packed()
        case _:
            return list(value)


def unpack_value(kind: Kind, name: Name, raw: Any) -> Value:
    match kind:
        case Kind.POLICY | Kind.STAGED:
            return _unpack_policy(str(name), raw, kind is Kind.STAGED)
        case Kind.TIER:
            order, passes = fixed(raw, "tier", 2)
            return Tier(str(name), _order(order, "tier"), Action.PASS if passes is True else Action.DENY)
        case Kind.HOSTENDPOINT:
            return _unpack_host_endpoint(str(name), raw)
        case Kind.PROFILE:
            ingress, egress, labels = fixed(raw, "profile", 3)
            return Profile(str(name), _unpack_rules(ingress), _unpack_rules(egress), unpack_labels(labels))
        case Kind.SET:
            return unpack_set(raw)
        case Kind.HOST:
            return _tuple(raw, "host", 8, address)
        case Kind.ROUTE:
            return _tuple(raw, "route", 65536, lambda r, w: text(r, w, 253))


def unpack_set(raw: Any) -> AddressSet:
    members = array(raw, "set")
    if not {type(m) for m in members} <= {bytes} or not set(map(len, members)) <= {4, 5, 16, 17}:
        raise WireError("set: a member that is neither address nor prefix")
    found = {m for m in members if len(m) in _ADDRESS_SIZES}
    if len(found) == len(members):
        return AddressSet(found)
    return AddressSet(found, {prefix(m, "set") for m in members if len(m) in _NET_SIZES})


def _unpack_policy(name: str, raw: Any, staged: bool) -> Policy:
    if type(raw) is list and len(raw) == 5:  # as 0.1.0 wrote it to disk
        raw = [*raw, DEFAULT_TIER, False, False]
    selector, order, types, ingress, egress, tier, forward, keep = fixed(raw, "policy", 8)
    flags = fixed(types, "policy.types", len(Direction))
    chosen = tuple(d for d, flag in zip(Direction, flags, strict=True) if flag is True)
    rules = _unpack_rules(ingress), _unpack_rules(egress)
    place = _pattern(tier, "policy.tier", _NAME)
    asked = _selector(selector), chosen, _order(order, "policy")
    return Policy(name, *asked, *rules, place, forward is True, keep is True, staged)


def _pack_order(order: float | None) -> float | None:
    return None if order is None else float(order)


def _order(raw: Any, what: str) -> float | None:
    if raw is not None and (type(raw) is not float or math.isnan(raw)):
        raise WireError(f"{what}.order: {shown(raw)} is not a number")
    return raw


def _unpack_host_endpoint(name: str, raw: Any) -> HostEndpoint:
    node, interface, labels, addresses, profiles = fixed(raw, "host endpoint", 5)
    return HostEndpoint(
        name,
        _pattern(node, "host endpoint.node", _NAME),
        _pattern(interface, "host endpoint.interface", _INTERFACE),
        unpack_labels(labels),
        _tuple(addresses, "host endpoint.addresses", _ADDRESSES, address),
        _tuple(profiles, "host endpoint.profiles", _PROFILES, lambda r, w: text(r, w, 253)),
    )


def _selector(raw: Any) -> str:
    found = text(raw, "policy.selector")
    try:
        _parsed(found)
    except SelectorError as error:
        raise WireError(f"policy.selector: {shown(found)}: column {error.column}") from None
    return found


@lru_cache(maxsize=1024)
def _parsed(canonical: str) -> None:
    """A restarted host finds the same policies again and again."""
    selectors.parse(canonical)


def _pack_rules(rules: tuple[Rule, ...]) -> list[Any]:
    return [
        [r.action.value, r.protocol, r.not_protocol, r.ip_version, r.icmp and list(r.icmp), r.not_icmp
         and list(r.not_icmp), _pack_peer(r.source), _pack_peer(r.destination)]
        for r in rules
    ]  # fmt: skip


def _pack_peer(p: Peer) -> list[Any] | None:
    if p == _NOBODY:
        return None
    nets, not_nets = [pack_prefix(n) for n in p.nets], [pack_prefix(n) for n in p.not_nets]
    ports, not_ports = [list(r) for r in p.ports], [list(r) for r in p.not_ports]
    return [nets, not_nets, p.selector, p.not_selector, ports, not_ports]


_NOBODY = Peer()


def _unpack_rules(raw: Any) -> tuple[Rule, ...]:
    return _tuple(raw, "rules", 65536, _unpack_rule)


def _unpack_rule(raw: Any, what: str) -> Rule:
    action, protocol, not_protocol, ip_version, icmp, not_icmp, source, destination = fixed(raw, "rule", 8)
    try:
        verb = Action(action)
    except ValueError:
        raise WireError(f"rule.action: {shown(action)} is unknown") from None
    return Rule(
        verb, _maybe(protocol, "rule.protocol", 255), _maybe(not_protocol, "rule.notProtocol", 255),
        _ip_version(ip_version), _icmp(icmp), _icmp(not_icmp), _peer(source), _peer(destination),
    )  # fmt: skip


def _maybe(raw: Any, what: str, most: int) -> int | None:
    return None if raw is None else integer(raw, what, most)


def _ip_version(raw: Any) -> int | None:
    found = _maybe(raw, "rule.ipVersion", 6)
    if found not in (None, 4, 6):
        raise WireError(f"rule.ipVersion: {found} is neither 4 nor 6")
    return found


def _icmp(raw: Any) -> Icmp | None:
    if raw is None:
        return None
    kind, code = fixed(raw, "rule.icmp", 2)
    return Icmp(integer(kind, "rule.icmp.type", 255), _maybe(code, "rule.icmp.code", 255))


def _peer(raw: Any) -> Peer:
    if raw is None:
        return _NOBODY
    nets, not_nets, selector, not_selector, ports, not_ports = fixed(raw, "rule peer", 6)
    return Peer(
        _tuple(nets, "rule.nets", 65536, prefix),
        _tuple(not_nets, "rule.notNets", 65536, prefix),
        None if selector is None else text(selector, "rule.selector"),
        None if not_selector is None else text(not_selector, "rule.notSelector"),
        _tuple(ports, "rule.ports", 65536, _ports),
        _tuple(not_ports, "rule.notPorts", 65536, _ports),
    )


def _ports(raw: Any, what: str) -> PortRange:
    first, last = fixed(raw, what, 2)
    if integer(first, what, 65535) > integer(last, what, 65535):
        raise WireError(f"{what}: {first} to {last} runs backwards")
    return PortRange(first, last)
