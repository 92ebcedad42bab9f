# Owns: ending tracked flows: a new guest inherits none that its addresses had before it, and what policy does not allow
# any more does not go on. Touches: the kernel's conntrack table, over netlink.
from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from typing import NamedTuple

from slash32.net import Address, Prefix, host_prefix
from slash32.notify import ALIVE, notify
from slash32.policy import Icmp
from slash32.verdict import Packet

from ..revocation.judge import within
from ..revocation.revoke import Flow
from .netlink import NETLINK_NETFILTER, NLM_F_ACK, NetlinkSocket, Wanted, attr, attribute_map, message, nest, u32

_GET, _DELETE = 0x101, 0x102
_TUPLE_ORIG, _TUPLE_REPLY, _ID, _MASTER, _ZONE, _FILTER = 1, 2, 12, 14, 18, 25
_TUPLE_IP, _TUPLE_PROTOCOL = 1, 2
_FAMILY = {4: int(socket.AF_INET), 16: int(socket.AF_INET6)}
_WIDTH = {family: width for width, family in _FAMILY.items()}
_ENDS = {4: (1, 2), 16: (3, 4)}  # attributes of source and destination by the address's width
_NUMBER, _SOURCE_PORT, _DESTINATION_PORT = 1, 2, 3
_ICMP = {1: (5, 6), 58: (8, 9)}  # attributes of type and code, by protocol
_WITH_PORTS = frozenset((6, 17, 33, 132, 136))
_BY_SOURCE = 1  # flag of the filter
_COUNT = "/proc/sys/net/netfilter/nf_conntrack_count"
_DEAR = 5_000  # entries that cost as much to look at here as two walks of the kernel's own for an address
_FOUND_MOST = 16  # addresses that the kernel is to look for by itself, each by two walks of that kind
_BEAT = 1024  # flows that are judged between two words to systemd
_BATCH = 1024  # deletions at a time: bounds the refusals that wait to be read
_HEADS = struct.Struct("=HHHH")  # of a flow's tuple and of the addresses in it
_FIRST, _THEN = _TUPLE_ORIG | 0x8000, _TUPLE_IP | 0x8000
_V4 = bytes((socket.AF_INET, 0, 0, 0))
_NAMING = frozenset((_ID, _ZONE, _MASTER))


class Flows:
    """A held socket, for one thread."""

    def __init__(self) -> None:
        self._socket = NetlinkSocket(NETLINK_NETFILTER)
        self._finds = True  # the kernel ends by itself what it is told to look for

    def close(self) -> None:
        self._socket.close()

    def forget(self, owned: Collection[Address | Prefix]) -> None:
        """All flows from or to these, however translated. Raises OSError."""
        if not _count():
            return
        prefixes = [_prefix(each) for each in owned]
        single = [prefix for prefix in prefixes if prefix.length == 32 and prefix.version == 4][:_FOUND_MOST]
        if self._finds and single and self._found(single):
            prefixes = [prefix for prefix in prefixes if prefix not in single]
        self.end(prefixes, lambda _: True)

    def _found(self, prefixes: list[Prefix]) -> bool:
        """The kernel finds and ends them by itself, and passes over empty buckets, which it does not when it tells:
        0.3 ms instead of 10. False: this one cannot (before Linux 6.11: EINVAL, for it takes what is to be looked for
        for a whole tuple that lacks most); then they are as they were, or ended."""
        filters = _filters(prefixes)
        first = self._socket.reserve(len(filters))
        last = first + len(filters) - 1
        batch = (
            message(_DELETE, NLM_F_ACK if n == last else 0, n, _V4 + each) for n, each in enumerate(filters, first)
        )
        self._finds = not self._socket.exchange(b"".join(batch), last)
        return self._finds

    def end(self, near: Collection[Address | Prefix], condemned: Callable[[Flow], bool]) -> int:
        """Those that are condemned, of the flows from or to these; how many there were. Raises OSError."""
        count = _count() if near else 0
        found = set()
        for number, flow in enumerate(self._near(near, count), 1):
            if condemned(flow):
                found.add(flow.name)
            if number % _BEAT == 0:  # a guest may have 65,536 that are no two alike, and policies be many
                notify(ALIVE)
        self._delete(found)
        return len(found)

    def _near(self, near: Collection[Address | Prefix], count: int) -> Iterator[Flow]:
        """Where so many are tracked. A walk costs most by the size of the kernel's table: one is for both families."""
        prefixes = [_prefix(each) for each in near] if count else []
        of = {width: [p for p in prefixes if len(p.network) == width] for width in (4, 16)}
        chosen = {width: _chosen(some, count) for width, some in of.items() if some}
        if len(chosen) == 2 and all(filters == [b""] for filters in chosen.values()):
            either = {_FAMILY[width]: _ends_in(some, width) for width, some in of.items()}
            yield from self._walk(
                socket.AF_UNSPEC, b"", lambda data, at: data[at] in either and either[data[at]](data, at)
            )
            return
        for width, filters in chosen.items():
            wanted = _ends_in(of[width], width)
            for each in filters:
                yield from self._walk(_FAMILY[width], each, wanted)

    def _walk(self, family: int, chosen: bytes, wanted: Wanted) -> Iterator[Flow]:
        for reply in self._socket.dump(_GET, bytes((family, 0, 0, 0)) + chosen, wanted=wanted):
            yield _flow(reply.body, _WIDTH[reply.body[0]])

    def _delete(self, entries: Collection[bytes]) -> None:
        waiting = list(entries)
        for at in range(0, len(waiting), _BATCH):
            part = waiting[at : at + _BATCH]
            first = self._socket.reserve(len(part))
            last = first + len(part) - 1
            batch = (message(_DELETE, NLM_F_ACK if n == last else 0, n, e) for n, e in enumerate(part, first))
            for refusal in self._socket.exchange(b"".join(batch), last):
                if refusal.errno != errno.ENOENT:  # it ended by itself
                    raise OSError(refusal.errno, str(refusal))


def _prefix(of: Address | Prefix) -> Prefix:
    return of if isinstance(of, Prefix) else host_prefix(of)


def _ends_in(prefixes: list[Prefix], width: int) -> Wanted:
    """Whether a flow is from or to one of these, by two places of what the kernel tells of it: the sources of the flow
    and of its answers. (The attributes for both come first, and in each the source.)"""
    singles = {prefix.network for prefix in prefixes if prefix.length == 8 * width}
    behind = [prefix for prefix in prefixes if prefix.length < 8 * width]
    inside = within(behind)

    def wanted(data: bytes, at: int) -> bool:
        length, kind, _, first = _HEADS.unpack_from(data, at + 4)
        if kind != _FIRST or first != _THEN:
            return True
        source = at + 16
        answered = source + length
        begins, answers = data[source : source + width], data[answered : answered + width]
        if begins in singles or answers in singles:
            return True
        return bool(behind) and (inside(begins) or inside(answers))

    return wanted


def _flow(body: bytes, width: int) -> Flow:
    length = _HEADS.unpack_from(body, 4)[0]
    packet = _with_ports(body, length, width)
    if packet is not None:
        fields = attribute_map(body, 4 + 2 * length, _NAMING)
        name = body[: 4 + length]
    else:
        fields = attribute_map(body, 4)
        name = body[:4] + nest(_TUPLE_ORIG, fields[_TUPLE_ORIG])
        packet = _packet(fields[_TUPLE_ORIG], fields.get(_TUPLE_REPLY), width)
    name = (
        body[:1] + bytes(3) + name[4:] + b"".join(attr(kind, fields[kind]) for kind in (_ID, _ZONE) if kind in fields)
    )
    if _MASTER in fields:  # one that a helper expected stands and falls with the flow that spoke of it
        packet = _packet(fields[_MASTER], None, width)
    return Flow(name, packet)


class _Layout(NamedTuple):
    """Where in the body the kernel puts one of the two tuples of a flow whose protocol has ports."""

    source: slice
    number: int  # of the protocol
    source_port: slice


def _layout(width: int, at: int) -> _Layout:
    """Behind heads of four bytes each: of the tuple, of its addresses, of the source, ..."""
    number, port = at + 24 + 2 * width, at + 32 + 2 * width
    return _Layout(slice(at + 12, at + 12 + width), number, slice(port, port + 2))


_LENGTH = {width: 44 + 2 * width for width in (4, 16)}  # of such a tuple, with its head
_PORTED = {width: (_layout(width, 4), _layout(width, 4 + length)) for width, length in _LENGTH.items()}


def _with_ports(body: bytes, length: int, width: int) -> Packet | None:
    """The common case, without taking all apart."""
    begun, answer = _PORTED[width]
    if length != _LENGTH[width] or body[begun.number] not in _WITH_PORTS:
        return None
    return Packet(
        body[begun.source],
        body[answer.source],
        body[begun.number],
        int.from_bytes(body[begun.source_port], "big"),
        int.from_bytes(body[answer.source_port], "big"),
    )


def _packet(side: bytes, answer: bytes | None, width: int) -> Packet:
    """That began a flow: what the filter has seen of it, between the translations of its destination and its source."""
    ends, ports = _tuple(side)
    source_kind, destination_kind = _ENDS[width]
    number = ports.get(_NUMBER, b"\0")[0]
    source, destination = ends.get(source_kind, bytes(width)), ends.get(destination_kind, bytes(width))
    target = ports.get(_DESTINATION_PORT)
    if answer is not None:
        ends, answering = _tuple(answer)
        destination, target = ends.get(source_kind, destination), answering.get(_SOURCE_PORT, target)
    if number in _WITH_PORTS and target is not None and _SOURCE_PORT in ports:
        begun = int.from_bytes(ports[_SOURCE_PORT], "big")
        return Packet(source, destination, number, begun, int.from_bytes(target, "big"))
    kind, code = _ICMP.get(number, (0, 0))
    if kind in ports:
        return Packet(source, destination, number, icmp=Icmp(ports[kind][0], ports.get(code, b"\0")[0]))
    return Packet(source, destination, number)


def _tuple(side: bytes) -> tuple[dict[int, bytes], dict[int, bytes]]:
    fields = attribute_map(side)
    return attribute_map(fields.get(_TUPLE_IP, b"")), attribute_map(fields.get(_TUPLE_PROTOCOL, b""))


def _chosen(prefixes: list[Prefix], count: int) -> list[bytes]:
    """What the kernel is to look for by itself, one dump each: single v4 addresses, as they begin a flow and as they
    answer, where that is cheaper than to look at all. Its test of v6 addresses is the wrong way round (6.18 still), and
    it knows no prefixes."""
    if len(prefixes) * _DEAR > count or any(prefix.length != 32 or prefix.version != 4 for prefix in prefixes):
        return [b""]
    return _filters(prefixes)


def _filters(prefixes: list[Prefix]) -> list[bytes]:
    chosen = []
    for prefix in prefixes:
        for side in (_TUPLE_ORIG, _TUPLE_REPLY):
            flags = u32(1, _BY_SOURCE * (side == _TUPLE_ORIG)) + u32(2, _BY_SOURCE * (side == _TUPLE_REPLY))
            chosen.append(nest(side, nest(_TUPLE_IP, attr(_ENDS[4][0], prefix.network))) + nest(_FILTER, flags))
    return chosen


def _count() -> int:
    """How many flows are tracked: cheaper than a walk. Where it is not shown, there may be any."""
    with suppress(OSError):
        fd = os.open(_COUNT, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return int(os.read(fd, 32))
        finally:
            os.close(fd)
    return _DEAR
