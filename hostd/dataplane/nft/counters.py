# Owns: what counted rules have counted. Reads through the socket it is given, writes nothing.
from __future__ import annotations

from collections.abc import Collection, Iterable

from ..netlink import Message, NetlinkSocket, attribute_map, attributes, text
from . import kernel as k
from .shapes import TABLE

Counts = dict[str, tuple[tuple[int, int], ...]]  # by chain: (packets, bytes) of each rule, in order

_NONE = 0, 0


def counters(socket: NetlinkSocket, chains: Collection[str] | None = None) -> Counts:
    """Of these chains, or of all; without those in which no rule counts. A rule that does not: (0, 0)."""
    head = k.nfgen(k.INET) + text(1, TABLE)
    if chains is None:
        return _read(socket.dump(k.SUBSYSTEM | k.GETRULE, head))
    found: Counts = {}
    for name in chains:
        found |= _read(socket.dump(k.SUBSYSTEM | k.GETRULE, head + text(2, name)))
    return found


def _read(replies: Iterable[Message]) -> Counts:
    found: dict[str, list[tuple[int, int] | None]] = {}
    for reply in replies:
        fields = attribute_map(reply.body, 4)
        if fields[1].rstrip(b"\0").decode(errors="replace") == TABLE:
            name = fields[2].rstrip(b"\0").decode(errors="replace")
            found.setdefault(name, []).append(_counted(fields.get(4, b"")))
    return {name: tuple(c or _NONE for c in rules) for name, rules in found.items() if any(rules)}


def _counted(code: bytes) -> tuple[int, int] | None:
    for _, expression in attributes(code):
        parts = attribute_map(expression)
        if parts.get(1) == b"counter\0":
            data = attribute_map(parts.get(2, b""))
            return int.from_bytes(data.get(2, b""), "big"), int.from_bytes(data.get(1, b""), "big")
    return None
