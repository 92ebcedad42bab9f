# Owns: the way from the kernel's dumps to plain data. Reads through the socket it is given, writes nothing.
from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from slash32.net import Address, Prefix

from ...compiler.ruleset import SetKind, SetSpec
from ..netlink import KernelRefused, NetlinkSocket, attribute_map, attributes, text
from . import elements
from . import kernel as k
from .admission import PLAIN, Element, Granted, whole
from .shapes import EXEMPT, FROM, RESERVED_SETS, TABLE, TO, SetShape, Skeleton

_RULE_DIGEST = 0x73
_SET_SIZE = 0x73
_KINDS = {(7, False): SetKind.ADDR4, (8, False): SetKind.ADDR6, (7, True): SetKind.NET4, (8, True): SetKind.NET6}
_ATTEMPTS = 20


@dataclass(frozen=True)
class Actual:
    """What the kernel holds. Everything but `skeleton_ok` is of policies and endpoints only."""

    skeleton_ok: bool = False
    chains: dict[str, tuple[str, ...]] = field(default_factory=dict)  # fingerprint of each rule; foreign ones begin "?"
    sets: dict[str, SetSpec | None] = field(default_factory=dict)  # None: a set of no kind of ours
    members: dict[str, frozenset[Address] | frozenset[Prefix]] = field(default_factory=dict)
    classes: dict[int, tuple[str, str]] = field(default_factory=dict)  # group -> (from chain, to chain)
    admissions: frozenset[Granted] = frozenset()
    exempt: frozenset[int] = frozenset()  # interfaces
    strays: frozenset[Element] = frozenset()  # of no whole admission, class or exemption: sweep them


class ChainHook(NamedTuple):
    number: int
    priority: int
    policy: int


class SetState(NamedTuple):
    flags: int
    key_type: int
    key_length: int
    size: int
    declared: int  # what was asked for, as noted in its user data


@dataclass
class Dump:
    """One table, its elements not included."""

    flags: int
    owner: int  # netlink port; 0: none
    chains: dict[str, ChainHook | None]
    rules: dict[str, tuple[str, ...]]
    sets: dict[str, SetState]


def generation(socket: NetlinkSocket) -> int:
    """A number that every change of any nf_tables table moves on."""
    (reply,) = socket.ask(k.SUBSYSTEM | k.GETGEN, k.nfgen(0))
    return _number(attribute_map(reply.body, 4)[1])


def consistent(socket: NetlinkSocket) -> Iterator[int]:
    """Attempts at a read of several dumps: leave the loop when generation() still is what was yielded."""
    for _ in range(_ATTEMPTS):
        yield generation(socket)
    raise OSError(errno.EINTR, f"nf_tables kept changing through {_ATTEMPTS} attempts to read it")


def table_of(socket: NetlinkSocket, family: int) -> dict[int, bytes] | None:
    """Its attributes, or None: there is no such table."""
    try:
        (reply,) = socket.ask(k.SUBSYSTEM | k.GETTABLE, k.nfgen(family) + text(1, TABLE))
    except KernelRefused as refused:
        if refused.errno == errno.ENOENT:
            return None
        raise
    return attribute_map(reply.body, 4)


def persists(socket: NetlinkSocket) -> bool | None:
    """Whether our table is of the kind that outlives its owner; None: there is none."""
    table = table_of(socket, k.INET)
    return None if table is None else bool(_number(table.get(2, b"")) & k.TABLE_PERSIST)


def dump(socket: NetlinkSocket, family: int) -> Dump | None:
    """None: there is no such table."""
    table = table_of(socket, family)
    if table is None:
        return None
    head = k.nfgen(family) + text(1, TABLE)
    return Dump(
        flags=_number(table.get(2, b"")),
        owner=_number(table.get(7, b"")),
        chains=_chains(socket, family),
        rules=_rules(socket, head),
        sets=_sets(socket, head),
    )


def _number(data: bytes) -> int:
    return int.from_bytes(data, "big")


def _signed(data: bytes) -> int:
    return int.from_bytes(data, "big", signed=True)


def _name(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")


def _chains(socket: NetlinkSocket, family: int) -> dict[str, ChainHook | None]:
    found: dict[str, ChainHook | None] = {}
    for reply in socket.dump(k.SUBSYSTEM | k.GETCHAIN, k.nfgen(family)):
        fields = attribute_map(reply.body, 4)
        if _name(fields[1]) != TABLE:
            continue
        base = None
        if 4 in fields:
            hook = attribute_map(fields[4])
            base = ChainHook(_number(hook[1]), _signed(hook[2]), _number(fields.get(5, b"")))
        found[_name(fields[3])] = base
    return found


def _rules(socket: NetlinkSocket, head: bytes) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for reply in socket.dump(k.SUBSYSTEM | k.GETRULE, head):
        fields = attribute_map(reply.body, 4)
        if _name(fields[1]) == TABLE:
            found.setdefault(_name(fields[2]), []).append(_fingerprint(_notes(fields.get(7, b""))))
    return {name: tuple(rules) for name, rules in found.items()}


def _notes(data: bytes) -> dict[int, bytes]:
    """nft's user data: kind and length of one byte each."""
    found: dict[int, bytes] = {}
    offset = 0
    while offset + 2 <= len(data):
        kind, length = data[offset], data[offset + 1]
        found[kind] = data[offset + 2 : offset + 2 + length]
        offset += 2 + length
    return found


def _fingerprint(notes: dict[int, bytes]) -> str:
    digest = notes.get(_RULE_DIGEST, b"").hex() or "?"
    return f"{digest} {_name(notes.get(0, b''))}"


def _sets(socket: NetlinkSocket, head: bytes) -> dict[str, SetState]:
    found: dict[str, SetState] = {}
    for reply in socket.dump(k.SUBSYSTEM | k.GETSET, head):
        fields = attribute_map(reply.body, 4)
        flags = _number(fields.get(3, b""))
        if flags & k.SET_ANONYMOUS or _name(fields[1]) != TABLE:
            continue
        size = _number(attribute_map(fields.get(9, b"")).get(1, b""))
        noted = int.from_bytes(_notes(fields.get(13, b"")).get(_SET_SIZE, b""), "little")
        found[_name(fields[2])] = SetState(flags, _number(fields[4]), _number(fields[5]), size, noted)
    return found


def element_pieces(socket: NetlinkSocket, family: int, name: str) -> list[bytes]:
    body = k.nfgen(family) + text(1, TABLE) + text(2, name)
    replies = socket.dump(k.SUBSYSTEM | k.GETSETELEM, body)
    return [piece for reply in replies for kind, piece in attributes(reply.body, 4) if kind == 3 and piece]


# ---- what the dumps mean ----------------------------------------------------------------------------------------


def set_is(state: SetState | None, shape: SetShape) -> bool:
    return state is not None and state[:4] == (shape.flags, shape.key_type, shape.key_length, shape.size)


def chain_hangs(dumped: Dump, skeleton: Skeleton, name: str) -> bool:
    """The chain is there and hangs where it should."""
    base = skeleton.chains[name].base
    wanted = ChainHook(base.number, base.priority, k.ACCEPT) if base else None
    return name in dumped.chains and dumped.chains[name] == wanted


def skeleton_stands(dumped: Dump, skeleton: Skeleton) -> bool:
    return all(set_is(dumped.sets.get(name), shape) for name, shape in skeleton.sets.items()) and all(
        chain_hangs(dumped, skeleton, name)
        and (chain.filled or dumped.rules.get(name, ()) == tuple(r.fingerprint for r in chain.rules))
        for name, chain in skeleton.chains.items()
    )


def specification(state: SetState) -> SetSpec | None:
    kind = _KINDS.get((state.key_type, bool(state.flags & k.SET_INTERVAL)))
    if kind is None or state.flags & ~k.SET_INTERVAL:
        return None
    return SetSpec(kind, state.declared if kind in elements.NETS else state.size)


def members(socket: NetlinkSocket, name: str, kind: SetKind) -> frozenset[Address] | frozenset[Prefix]:
    pieces, width = element_pieces(socket, k.INET, name), elements.WIDTH[kind]
    if kind in elements.NETS:
        return elements.decode_nets(pieces, width)
    return frozenset(key for piece in pieces for key in elements.keys(piece, width))


def classes(socket: NetlinkSocket, present: Skeleton) -> tuple[dict[int, tuple[str, str]], frozenset[Element]]:
    """Groups with a jump in both maps, and the elements of those that have not."""
    start, end = (dict(_jumps(socket, name)) if name in present.sets else {} for name in (FROM, TO))
    both = {key: (start[key], end[key]) for key in start.keys() & end.keys() if start[key] and end[key]}
    halves = {Element(k.INET, name, key) for name, side in ((FROM, start), (TO, end)) for key in side.keys() - both}
    return {int.from_bytes(key, sys.byteorder): chains for key, chains in both.items()}, frozenset(halves)


def _jumps(socket: NetlinkSocket, name: str) -> Iterator[tuple[bytes, str]]:
    """A verdict that is no jump is ""."""
    for piece in element_pieces(socket, k.INET, name):
        for key, _, fields in elements.parts(piece):
            verdict = attribute_map(attribute_map(fields.get(2, b"")).get(2, b""))
            jump = _signed(verdict.get(1, b"")) == k.JUMP
            yield key, _name(verdict.get(2, b"")) if jump else ""


def admissions(socket: NetlinkSocket, families: dict[int, Skeleton]) -> tuple[frozenset[Granted], frozenset[Element]]:
    plain: dict[str, set[bytes]] = {name: set() for name in PLAIN}
    ranges: set[Element] = set()
    for family, skeleton in families.items():
        for name, shape in skeleton.sets.items():
            if PLAIN.get(name) == family:
                for piece in element_pieces(socket, family, name):
                    plain[name].update(elements.keys(piece, shape.key_length))
            elif shape.interval:
                for piece in element_pieces(socket, family, name):
                    ranges.update(_ranges(family, name, piece))
    return whole(plain, ranges)


def _ranges(family: int, name: str, piece: bytes) -> Iterator[Element]:
    for key, _, fields in elements.parts(piece):
        yield Element(family, name, key, attribute_map(fields.get(10, b"")).get(1, key))


def exempted(socket: NetlinkSocket, families: dict[int, Skeleton]) -> tuple[frozenset[int], frozenset[Element]]:
    """Interfaces that both tables exempt, and the elements of those that only one does."""
    found = {
        family: frozenset(_exempt_keys(socket, family)) if EXEMPT in skeleton.sets else frozenset()
        for family, skeleton in families.items()
    }
    both = frozenset.intersection(*found.values())
    halves = {Element(family, EXEMPT, key) for family, keys in found.items() for key in keys - both}
    return frozenset(int.from_bytes(key, sys.byteorder) for key in both), frozenset(halves)


def _exempt_keys(socket: NetlinkSocket, family: int) -> Iterator[bytes]:
    for piece in element_pieces(socket, family, EXEMPT):
        yield from elements.keys(piece, 4)


def of_policies(dumped: Dump, skeleton: Skeleton) -> dict[str, tuple[str, ...]]:
    """Of the chains that the skeleton only hangs up, those that hold something."""
    filled = [name for name, chain in skeleton.chains.items() if chain.filled and dumped.rules.get(name)]
    others = [name for name in dumped.chains if name not in skeleton.chains]
    return {name: dumped.rules.get(name, ()) for name in (*others, *filled)}


def set_specifications(dumped: Dump) -> dict[str, SetSpec | None]:
    return {name: specification(state) for name, state in dumped.sets.items() if name not in RESERVED_SETS}
