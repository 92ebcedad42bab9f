# Owns: ipset as the kernel spells it: messages and elements as bytes, and the way back. Pure: no socket here.
# Numbers are those of <linux/netfilter/ipset/ip_set.h>. Adding what is there, and deleting what is not, is fine
# (no message carries NLM_F_EXCL).
from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from slash32.net import Address, Prefix

from ...compiler.ruleset import SetKind, SetSpec
from ..netlink import attr, attribute_map, attributes, be32, nest, text, u8

SUBSYSTEM = 6 << 8
CREATE, DESTROY, FLUSH, LIST, ADD, DEL, TEST = 2, 3, 4, 7, 9, 10, 11
NOT_IN = 4103  # the answer to TEST
_PROTOCOL = 6
_NETORDER = 0x4000
_INET = {4: 2, 6: 10}
_HEADERS = 1 << 2  # of LIST: without members
_WITH_COMMENT = 1 << 4
_REFERENCES = be32(25 | _NETORDER, 0)[:4]  # how that attribute begins
_ROOM = 60000  # bytes of elements in one message: an attribute's length is 16 bits

Member = Address | Prefix

TYPES = {SetKind.ADDR4: ("hash:ip", 4), SetKind.ADDR6: ("hash:ip", 6),
         SetKind.NET4: ("hash:net", 4), SetKind.NET6: ("hash:net", 6)}  # fmt: skip
_REVISION = {"hash:ip": 2, "hash:net": 4, "hash:net,iface": 5}  # kernel 3.14 and later
PAIRS = "hash:net,iface"
ERRORS = {
    4100: "it is still in use",
    4103: "it is there already, of another type",
    4105: "a prefix length that this type does not take",
    4352: "the set is full",
    4353: "it does not take 0.0.0.0 or ::",
}


class Pair(NamedTuple):
    """What a tap may send from; `owner` says for which interface (its index and MAC) it was written."""

    prefix: Prefix
    tap: str
    owner: str = ""


class Header(NamedTuple):
    name: str
    type: str
    version: int
    size: int
    members: int
    references: int


def message_head(name: str) -> bytes:
    return struct.pack(">BBH", 0, 0, 0) + u8(1, _PROTOCOL) + text(2, name)


def create(name: str, kind: str, version: int, size: int, room: int = 64) -> bytes:
    """`room`: buckets from the start on."""
    flags = be32(8 | _NETORDER, _WITH_COMMENT) if kind == PAIRS else b""
    data = be32(18 | _NETORDER, room) + be32(19 | _NETORDER, size) + flags
    return message_head(name) + text(3, kind) + u8(4, _REVISION[kind]) + u8(5, _INET[version]) + nest(7, data)


def of_spec(name: str, spec: SetSpec) -> bytes:
    """Prefix sets have room for one more: /0 is two elements."""
    kind, version = TYPES[spec.kind]
    return create(name, kind, version, spec.size + (kind == "hash:net"), max(64, spec.size // 8))


def elements(kind: SetKind, members: Iterable[Member]) -> Iterator[bytes]:
    """Bodies for ADD and DEL, behind message_head(). Raises ValueError for a member of another kind."""
    name, version = TYPES[kind]
    width = 4 if version == 4 else 16
    if name == "hash:ip":
        found = [member for member in members if member != bytes(width)]  # ipset does not take 0.0.0.0, nor ::
        if not {width}.issuperset(map(len, found)):
            raise ValueError(f"a member of a set of {width}-byte addresses has another length")
        yield from _pieces(_addresses(width, b"".join(found)), len(_single(bytes(width))))  # type: ignore[arg-type]
        return
    each = [_net(part) for member in members for part in halves(_fitting(member, width))]
    for start in range(0, len(each), 1000):
        yield _body(b"".join(each[start : start + 1000]))


def pair_elements(pairs: Sequence[Pair]) -> Iterator[bytes]:
    for start in range(0, len(pairs), 200):
        yield _body(b"".join(map(_pair, pairs[start : start + 200])))


def _body(items: bytes) -> bytes:
    return be32(9, 0) + nest(8, items)


def _single(address: bytes) -> bytes:
    return nest(7, _address(address))


def one(address: Address) -> bytes:
    """What TEST asks for."""
    return _single(address)


def _address(address: bytes) -> bytes:
    return nest(1, attr((1 if len(address) == 4 else 2) | _NETORDER, address))


def _addresses(width: int, keys: bytes) -> bytearray:
    """Thousands are laid out by slices."""
    template = _single(bytes(width))
    filled, step = bytearray(template * (len(keys) // width)), len(template)
    for byte in range(width):
        filled[12 + byte :: step] = keys[byte::width]
    return filled


def _pieces(filled: bytearray, step: int) -> Iterator[bytes]:
    size = _ROOM // step * step
    for offset in range(0, len(filled), size):
        yield _body(bytes(filled[offset : offset + size]))


def _fitting(member: Member, width: int) -> Prefix:
    if not isinstance(member, Prefix) or len(member.network) != width:
        raise ValueError(f"{member!r} is no prefix of {width} bytes")
    return member


def halves(prefix: Prefix) -> tuple[Prefix, ...]:
    """ipset has no /0."""
    if prefix.length:
        return (prefix,)
    return Prefix(prefix.network, 1), Prefix(b"\x80" + prefix.network[1:], 1)


def _net(prefix: Prefix) -> bytes:
    return nest(7, _address(prefix.network) + u8(3, prefix.length))


def _pair(pair: Pair) -> bytes:
    note = text(26, pair.owner) if pair.owner else b""
    return nest(7, _address(pair.prefix.network) + u8(3, pair.prefix.length) + text(23, pair.tap) + note)


# -- the way back -----------------------------------------------------------------------------------------------------


def dump_request(name: str = "", headers: bool = False) -> bytes:
    named = text(2, name) if name else b""
    flags = be32(6 | _NETORDER, _HEADERS) if headers else b""
    return struct.pack(">BBH", 0, 0, 0) + u8(1, _PROTOCOL) + named + flags


def header(body: bytes) -> Header | None:
    """Of one dumped message; None: it goes on with a set that was begun before."""
    found = attribute_map(body, 4)
    if 3 not in found or 7 not in found:
        return None
    data = attribute_map(found[7])
    version = 4 if found.get(5, b"\x02")[0] == _INET[4] else 6
    numbers = (int.from_bytes(data.get(kind, b""), "big") for kind in (19, 24, 25))
    return Header(_text(found[2]), _text(found[3]), version, *numbers)


def unreferenced(body: bytes) -> bytes:
    """Of a dumped header all but how many rules refer to the set."""
    at = body.find(_REFERENCES) + len(_REFERENCES)
    return body[:at] + body[at + 4 :] if at >= len(_REFERENCES) else body


def name_of(body: bytes) -> str:
    return _text(attribute_map(body, 4).get(2, b"\0"))


def kind_of(head: Header) -> SetSpec | None:
    """None: of no kind of ours."""
    kind = next((k for k, shape in TYPES.items() if shape == (head.type, head.version)), None)
    return SetSpec(kind, head.size - (head.type == "hash:net")) if kind is not None else None


def listed(body: bytes) -> Iterator[dict[int, bytes]]:
    """The elements in one dumped message, as attributes."""
    for kind, piece in attributes(body, 4):
        if kind == 8:
            for _, item in attributes(piece):
                yield attribute_map(item)


def members(kind: SetKind, bodies: Iterable[bytes]) -> frozenset[Address] | frozenset[Prefix]:
    if TYPES[kind][0] == "hash:ip":
        return frozenset(a for body in bodies for a in _plain(body, 4 if TYPES[kind][1] == 4 else 16))
    return _whole({_prefix(item) for body in bodies for item in listed(body)})


def _whole(prefixes: set[Prefix]) -> frozenset[Prefix]:
    """As they were given: a /0 is one again. Of the others each is its own, also where two make up a third: one of them
    may be what somebody who ended on the way did not take out any more."""
    for width in {len(prefix.network) for prefix in prefixes}:
        everything = Prefix(bytes(width), 0)
        parts = set(halves(everything))
        if parts <= prefixes:
            prefixes = prefixes - parts | {everything}
    return frozenset(prefixes)


def _plain(body: bytes, width: int) -> Iterator[bytes]:
    """Thousands are taken apart by slices where all look alike."""
    step = len(_single(bytes(width)))
    for kind, piece in attributes(body, 4):
        if kind != 8:
            continue
        count, rest = divmod(len(piece), step)
        keys = [piece[at : at + width] for at in range(12, len(piece), step)]
        if not rest and bytes(_addresses(width, b"".join(keys))) == _nested(piece, step, count):
            yield from keys
        else:
            yield from (_ip(attribute_map(item)) for _, item in attributes(piece))


def _nested(piece: bytes, step: int, count: int) -> bytes:
    return piece if len(piece) == step * count else b""


def _ip(item: dict[int, bytes]) -> bytes:
    return next(iter(attribute_map(item.get(1, b"")).values()), b"")


def _prefix(item: dict[int, bytes]) -> Prefix:
    address = _ip(item)
    return Prefix(address, item[3][0] if 3 in item else 8 * len(address))


def pairs(bodies: Iterable[bytes]) -> Iterator[Pair]:
    for body in bodies:
        for item in listed(body):
            yield Pair(_prefix(item), _text(item.get(23, b"\0")), _text(item.get(26, b"\0")))


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")
