# Owns: links on the wire of rtnetlink, both ways. Bytes only, no socket.
from __future__ import annotations

import struct
import sys

from ...compiler.forwarding import Link
from ..netlink import attribute_map, text, u32

RTM_NEWLINK = 16
RTM_DELLINK = 17
RTM_GETLINK = 18
RTM_SETLINK = 19

_IFLA_ADDRESS = 1
_IFLA_IFNAME = 3
_IFLA_MASTER = 10
_IFLA_LINKINFO = 18
_IFLA_GROUP = 27
_IFLA_EXT_MASK = 29
_INFO_KIND = 1
_SKIP_STATS = 8
_IFF_UP = 1
_WANTED = {_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MASTER, _IFLA_LINKINFO, _IFLA_GROUP}

_HEADER = struct.Struct("=BxHiII")


def _header(ifindex: int = 0, flags: int = 0, change: int = 0) -> bytes:
    return _HEADER.pack(0, 0, ifindex, flags, change)


def dump_body() -> bytes:
    return _header() + u32(_IFLA_EXT_MASK, _SKIP_STATS)


def get_body(name_or_index: str | int) -> bytes:
    if isinstance(name_or_index, int):
        return _header(name_or_index) + u32(_IFLA_EXT_MASK, _SKIP_STATS)
    return _header() + text(_IFLA_IFNAME, name_or_index) + u32(_IFLA_EXT_MASK, _SKIP_STATS)


def group_body(ifindex: int, group: int) -> bytes:
    return _header(ifindex) + u32(_IFLA_GROUP, group)


def up_body(ifindex: int) -> bytes:
    return _header(ifindex, _IFF_UP, _IFF_UP)


def decode(body: bytes) -> Link:
    """Of an RTM_NEWLINK or RTM_DELLINK of family AF_UNSPEC."""
    _, _, ifindex, flags, _ = _HEADER.unpack_from(body)
    found = attribute_map(body, 16, _WANTED)
    info = attribute_map(found.get(_IFLA_LINKINFO, b""))
    return Link(
        ifindex,
        found.get(_IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="replace"),
        int.from_bytes(found.get(_IFLA_GROUP, b""), sys.byteorder),
        found.get(_IFLA_ADDRESS, b""),
        bool(flags & _IFF_UP),
        int.from_bytes(found.get(_IFLA_MASTER, b""), sys.byteorder),
        info.get(_INFO_KIND, b"").rstrip(b"\0").decode(errors="replace"),
    )
