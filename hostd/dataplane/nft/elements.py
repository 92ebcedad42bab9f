# Owns: the members of sets as bytes, fast in both directions: thousands are laid out and taken apart by slices.
# Pure. ADDR sets hold addresses; NET sets hold disjoint prefixes as pairs of start and end.
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from slash32.net import Address, Prefix

from ...compiler.ruleset import SetKind
from ..netlink import attribute_map, attributes
from . import kernel as k
from .intervals import Interval, prefix_interval, prefixes_of

WIDTH = {SetKind.ADDR4: 4, SetKind.ADDR6: 16, SetKind.NET4: 4, SetKind.NET6: 16}
NETS = frozenset((SetKind.NET4, SetKind.NET6))
_ROOM = 65000  # bytes of elements in one message: an attribute's length is 16 bits

Member = Address | Prefix


def _fill(template: bytes, columns: Iterable[tuple[int, bytes]], width: int, count: int) -> bytearray:
    """`count` copies of a template, with a column of packed keys of `width` bytes at each of the offsets."""
    filled = bytearray(template * count)
    step = len(template)
    for offset, keys in columns:
        for byte in range(width):
            filled[offset + byte :: step] = keys[byte::width]
    return filled


def encode(kind: SetKind, members: Iterable[Member]) -> Iterator[bytes]:
    """The elements, in pieces that fit a message each. Raises ValueError for a member of another kind."""
    if kind in NETS:
        return _encode_nets(WIDTH[kind], [_fitting(kind, m) for m in members])
    return _encode_addresses(WIDTH[kind], members if isinstance(members, tuple) else list(members))


def _fitting(kind: SetKind, member: Member) -> Prefix:
    if not isinstance(member, Prefix) or len(member.network) != WIDTH[kind]:
        raise ValueError(f"{member!r} is no member of a set of kind {kind.value}")
    return member


def _pieces(filled: bytes | bytearray, step: int) -> Iterator[bytes]:
    size = _ROOM // step * step
    for offset in range(0, len(filled), size):
        yield bytes(filled[offset : offset + size])


def _encode_addresses(width: int, members: Sequence[Member]) -> Iterator[bytes]:
    if not members:
        return iter(())
    head = k.element(bytes(width))[:12]  # the key is all that follows
    filled = head + head.join(members)  # type: ignore[arg-type]
    if len(filled) != len(members) * (12 + width):  # addresses are of 4 bytes or 16: no two errors make up for another
        raise ValueError(f"a member of a set of {width}-byte addresses has another length")
    return _pieces(filled, 12 + width)


def _encode_nets(width: int, prefixes: list[Prefix]) -> Iterator[bytes]:
    top = 1 << 8 * width
    starts, ends, open_ends = [], [], []
    for prefix in prefixes:
        end = prefix_interval(prefix)[1] + 1
        if end == top:
            open_ends.append(prefix.network)
        else:
            starts.append(prefix.network)
            ends.append(end.to_bytes(width, "big"))
    start = k.element(bytes(width))
    pair = start + k.interval_end(bytes(width))
    columns = [(12, b"".join(starts)), (len(start) + 12, b"".join(ends))]
    yield from _pieces(_fill(pair, columns, width, len(starts)), len(pair))
    if open_ends:
        yield from _pieces(_fill(start, [(12, b"".join(open_ends))], width, len(open_ends)), len(start))


def keys(piece: bytes, length: int) -> Iterable[bytes]:
    """The keys of a dumped list of plain elements (a set without intervals, no data), whatever else they carry."""
    padded = (length + 3) & ~3
    step = 12 + padded
    template = _dumped(length)
    count, rest = divmod(len(piece), step)
    if not rest:
        blank = bytearray(piece)
        for byte in range(length):
            blank[12 + byte :: step] = bytes(count)
        if blank == template * count:
            return [piece[o : o + length] for o in range(12, len(piece), step)]
    return [key for key, _, _ in parts(piece)]


def _dumped(length: int) -> bytes:
    """As the kernel writes an element: its nests carry no NESTED flag."""
    padded = (length + 3) & ~3
    head = b"".join(n.to_bytes(2, "little") + b"\1\0" for n in (12 + padded, 8 + padded, 4 + length))
    return head + bytes(padded)


def parts(piece: bytes) -> Iterator[tuple[bytes, bool, dict[int, bytes]]]:
    """Of each dumped element: its key, whether it ends an interval, and all its attributes."""
    for _, element in attributes(piece):
        fields = attribute_map(element)
        flags = int.from_bytes(fields.get(3, b""), "big")
        yield attribute_map(fields.get(1, b"")).get(1, b""), bool(flags & k.ELEM_INTERVAL_END), fields


def decode_nets(pieces: Iterable[bytes], width: int) -> frozenset[Prefix]:
    """Intervals that are no prefix (not ours) come as the prefixes they are made of."""
    ends = sorted((int.from_bytes(key, "big"), not end) for key, end, _ in chain.from_iterable(map(parts, pieces)))
    found: set[Prefix] = set()
    start = -1
    for key, is_start in ends:
        if start >= 0:
            found.update(prefixes_of((start, key - 1), width))
        start = key if is_start else -1
    if start >= 0:
        found.update(prefixes_of((start, (1 << 8 * width) - 1), width))
    return frozenset(found)


def intervals(members: Iterable[Prefix]) -> list[Interval]:
    return sorted(prefix_interval(m) for m in members)
