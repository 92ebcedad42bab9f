# Owns: routes on the wire of rtnetlink, both ways. Bytes only, no socket.
#
# How ours and foreign ones live side by side. Our routes have the best metric of their family (v4: 0, v6: 1): a
# foreign route of the same prefix either has a worse metric, and then both stand and ours wins, or has the same
# metric, and then ours is refused (NLM_F_EXCL) and reported. A foreign route never wins silently, and is never
# replaced (NLM_F_REPLACE looks at no protocol), but for one that was seen to replace ours. One of ours changes by
# NLM_F_APPEND of the new and deletion of the old, which names protocol, interface and next hop: there is a route at
# every moment.
from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from socket import AF_INET, AF_INET6

from slash32.net import Address, Prefix

from ...compiler.forwarding import Route
from ..netlink import attr, attribute_map, u32

RTM_NEWROUTE = 24
RTM_DELROUTE = 25
RTM_GETROUTE = 26

PROTOCOL = 132
TABLE_MAIN = 254
METRIC = {AF_INET: 0, AF_INET6: 1}

_UNICAST = 1
_LOCAL = 2  # the type of routes to the host's own addresses
_SCOPE_UNIVERSE = 0
_SCOPE_LINK = 253
_SCOPE_ANY = 255
_ONLINK = 4
_FIB_MATCH = 0x2000

_RTA_DST = 1
_RTA_OIF = 4
_RTA_GATEWAY = 5
_RTA_PRIORITY = 6
_RTA_MULTIPATH = 9
_RTA_TABLE = 15
_RTA_VIA = 18

_HEADER = struct.Struct("=BBBBBBBBI")
_NEXTHOP = struct.Struct("=HBBi")
_OIF = struct.Struct("=I")
# The whole body of the commonest routes: to a prefix by one next hop or one link; to one address directly on a link.
_ONE_WAY4 = struct.Struct("=BBBBBBBBI HH4s HH4s")
_LINK6 = struct.Struct("=BBBBBBBBI HH16s HHI HHI")


def _body(route: Route, scope: int, flags: int) -> bytes:
    (network, length), oif, via, _ = route
    if len(network) == 4 and length and (via is None) is not (oif == 0):
        kind, way = (_RTA_OIF, _OIF.pack(oif)) if via is None else (_RTA_GATEWAY, via)
        return _ONE_WAY4.pack(
            AF_INET, length, 0, 0, TABLE_MAIN, PROTOCOL, scope, _UNICAST, flags, 8, _RTA_DST, network, 8, kind, way
        )
    family = AF_INET if len(network) == 4 else AF_INET6
    if via is None and oif and length == 128:
        return _LINK6.pack(
            family, length, 0, 0, TABLE_MAIN, PROTOCOL, scope, _UNICAST, 0,
            20, _RTA_DST, network, 8, _RTA_OIF, oif, 8, _RTA_PRIORITY, METRIC[family],
        )  # fmt: skip
    body = _HEADER.pack(family, length, 0, 0, TABLE_MAIN, PROTOCOL, scope, _UNICAST, flags)
    if length:
        body += attr(_RTA_DST, network)
    if oif:
        body += u32(_RTA_OIF, oif)
    if via is not None:
        body += attr(_RTA_GATEWAY, via)
    if METRIC[family]:
        body += u32(_RTA_PRIORITY, METRIC[family])
    return body


def add_body(route: Route) -> bytes:
    scope = _SCOPE_LINK if route.via is None else _SCOPE_UNIVERSE
    return _body(route, scope, _ONLINK if route.onlink and route.via is not None else 0)


def delete_body(route: Route) -> bytes:
    return _body(route, _SCOPE_ANY, 0)


def dump_body(family: int) -> bytes:
    """The kernel itself leaves the routes of others out (it needs strict checking)."""
    header = _HEADER.pack(family, 0, 0, 0, 0, PROTOCOL, 0, _UNICAST, 0)
    return header + u32(_RTA_TABLE, TABLE_MAIN)


def match_body(address: Address) -> bytes:
    """Asks for the table's entry that an address meets, rather than for the way it would take."""
    family = AF_INET if len(address) == 4 else AF_INET6
    return _HEADER.pack(family, 8 * len(address), 0, 0, 0, 0, 0, 0, _FIB_MATCH) + attr(_RTA_DST, address)


def way_body(address: Address) -> bytes:
    """Asks for the way that a packet to it would take."""
    family = AF_INET if len(address) == 4 else AF_INET6
    return _HEADER.pack(family, 8 * len(address), 0, 0, 0, 0, 0, 0, 0) + attr(_RTA_DST, address)


def _number(data: bytes | None) -> int:
    return int.from_bytes(data or b"", sys.byteorder)


class Entry:
    """One RTM_NEWROUTE or RTM_DELROUTE of anybody's, decoded as far as asked."""

    def __init__(self, body: bytes) -> None:
        self.family, self._length, _, _, table, self.protocol, _, self.type, self._flags = _HEADER.unpack_from(body)
        self._found = attribute_map(body, 12)
        self.table = _number(self._found.get(_RTA_TABLE)) or table
        self.metric = _number(self._found.get(_RTA_PRIORITY))
        self.via = self._found.get(_RTA_GATEWAY)
        self.oif = _number(self._found.get(_RTA_OIF))

    @property
    def prefix(self) -> Prefix:
        width = 4 if self.family == AF_INET else 16
        return Prefix(self._found.get(_RTA_DST, bytes(width)), self._length)

    @property
    def is_local(self) -> bool:
        return bool(self.type == _LOCAL)

    @property
    def competes(self) -> bool:
        """It has the place in the table that a route of ours to this prefix has or would take."""
        return self.table == TABLE_MAIN and self.family in METRIC and self.metric == METRIC[self.family]

    def ours(self) -> Iterator[Route]:
        """Its routes if it is one of ours. Two v6 routes with next hops come as one of two hops."""
        if self.protocol != PROTOCOL or self.type != _UNICAST or not self.competes or _RTA_VIA in self._found:
            return
        prefix = self.prefix
        if _RTA_MULTIPATH not in self._found:
            yield Route(prefix, self.oif, self.via, bool(self._flags & _ONLINK))
            return
        hops, offset = self._found[_RTA_MULTIPATH], 0
        while offset + 8 <= len(hops):
            length, flags, _, oif = _NEXTHOP.unpack_from(hops, offset)
            if length < 8:
                return
            via = attribute_map(hops[offset + 8 : offset + length]).get(_RTA_GATEWAY)
            yield Route(prefix, oif, via, bool(flags & _ONLINK))
            offset += (length + 3) & ~3
