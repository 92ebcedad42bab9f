# Owns: forgetting tracked flows: a new guest inherits none that its addresses had before it, whoever had them, and
# whether or not hostd lived to see them go. Touches: the kernel's conntrack table, over netlink.
from __future__ import annotations

import errno
import os
import socket
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress

from slash32.net import Address, Prefix, host_prefix

from .netlink import NETLINK_NETFILTER, NLM_F_ACK, NetlinkSocket, attr, attribute_map, message, nest, u32

_GET, _DELETE = 0x101, 0x102
_TUPLE_ORIG, _TUPLE_REPLY, _ID, _ZONE, _FILTER = 1, 2, 12, 18, 25
_TUPLE_IP, _TUPLE_PROTOCOL, _PROTOCOL_NUMBER = 1, 2, 1
_SOURCE = {4: 1, 16: 3}  # attribute of a source address by its width
_BY_SOURCE = 1  # flag of the filter
_COUNT = "/proc/sys/net/netfilter/nf_conntrack_count"


class Flows:
    """A held socket, for one thread."""

    def __init__(self) -> None:
        self._socket = NetlinkSocket(NETLINK_NETFILTER)

    def close(self) -> None:
        self._socket.close()

    def forget(self, owned: Iterable[Address | Prefix]) -> int:
        """All flows from or to these, however translated; how many there were. Raises OSError."""
        prefixes = [each if isinstance(each, Prefix) else host_prefix(each) for each in owned]
        if not prefixes or _empty():
            return 0
        found = {entry for version in (4, 6) for entry in self._of([p for p in prefixes if p.version == version])}
        if found:
            self._delete(found)
        return len(found)

    def forget_but_tcp(self, owned: Collection[Address | Prefix]) -> int:
        """What may have begun while these had no filter, and begins anew with its next packet if it may: TCP does not,
        and stays. One walk, for however many. Raises OSError."""
        singles = {each for each in owned if not isinstance(each, Prefix)}
        prefixes = [each for each in owned if isinstance(each, Prefix)]
        found = set()
        for reply in self._socket.dump(_GET, _head(socket.AF_UNSPEC)):  # a walk costs 10 ms, be the table empty
            family, fields = reply.body[0], attribute_map(reply.body, 4)
            width = 4 if family == socket.AF_INET else 16
            ends = {_source(fields.get(side, b""), width) for side in (_TUPLE_ORIG, _TUPLE_REPLY)}
            theirs = singles & ends or any(p.contains(end) for p in prefixes for end in ends)
            if theirs and _protocol(fields[_TUPLE_ORIG]) != socket.IPPROTO_TCP:
                found.add(_name(family, fields))
        if found:
            self._delete(found)
        return len(found)

    def _of(self, prefixes: list[Prefix]) -> Iterator[bytes]:
        """What names each flow, as a request wants it. Of one family."""
        if not prefixes:
            return
        width = len(prefixes[0].network)
        head = _head(socket.AF_INET if width == 4 else socket.AF_INET6)
        for chosen in _chosen(prefixes):
            for reply in self._socket.dump(_GET, head + chosen):
                fields = attribute_map(reply.body, 4)
                sides = [_source(fields.get(side, b""), width) for side in (_TUPLE_ORIG, _TUPLE_REPLY)]
                if any(prefix.contains(source) for source in sides for prefix in prefixes):
                    yield _name(head[0], fields)

    def _delete(self, entries: set[bytes]) -> None:
        first = self._socket.reserve(len(entries))
        last = first + len(entries) - 1
        batch = (message(_DELETE, NLM_F_ACK if n == last else 0, n, e) for n, e in enumerate(entries, first))
        for refusal in self._socket.exchange(b"".join(batch), last):
            if refusal.errno != errno.ENOENT:  # it ended by itself
                raise OSError(refusal.errno, str(refusal))


def _name(family: int, fields: Mapping[int, bytes]) -> bytes:
    """Of one flow, as a request wants it."""
    kept = b"".join(attr(kind, fields[kind]) for kind in (_ID, _ZONE) if kind in fields)
    return _head(family) + nest(_TUPLE_ORIG, fields[_TUPLE_ORIG]) + kept


def _protocol(side: bytes) -> int:
    return attribute_map(attribute_map(side).get(_TUPLE_PROTOCOL, b"")).get(_PROTOCOL_NUMBER, b"\0")[0]


def _head(family: int) -> bytes:
    return bytes((family, 0, 0, 0))


def _chosen(prefixes: list[Prefix]) -> list[bytes]:
    """What the kernel is to look for by itself, one dump each: single v4 addresses, as they begin a flow and as they
    answer. Its test of v6 addresses is the wrong way round (6.18 still), and it knows no prefixes: then everything."""
    if any(prefix.length != 32 or prefix.version != 4 for prefix in prefixes):
        return [b""]
    chosen = []
    for prefix in prefixes:
        for side in (_TUPLE_ORIG, _TUPLE_REPLY):
            flags = u32(1, _BY_SOURCE * (side == _TUPLE_ORIG)) + u32(2, _BY_SOURCE * (side == _TUPLE_REPLY))
            chosen.append(nest(side, nest(_TUPLE_IP, attr(_SOURCE[4], prefix.network))) + nest(_FILTER, flags))
    return chosen


def _source(side: bytes, width: int) -> Address:
    ends = attribute_map(attribute_map(side).get(_TUPLE_IP, b""))
    return ends.get(_SOURCE[width], bytes(width))


def _empty() -> bool:
    """Cheaper than a walk through the table; where it is not shown, the walk decides."""
    with suppress(OSError):
        fd = os.open(_COUNT, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return int(os.read(fd, 32)) == 0
        finally:
            os.close(fd)
    return False
