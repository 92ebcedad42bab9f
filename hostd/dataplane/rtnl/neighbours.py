# Owns: neighbours and tap addresses on the wire of rtnetlink, both ways. Bytes only, no socket.
# Both carry our protocol number, so that a daemon with no memory knows its own.
from __future__ import annotations

import struct
import sys
from socket import AF_INET, AF_INET6

from ...compiler.forwarding import Neighbour, TapAddress
from ..netlink import attr, attribute_map, u8

RTM_NEWADDR = 20
RTM_DELADDR = 21
RTM_GETADDR = 22
RTM_NEWNEIGH = 28
RTM_DELNEIGH = 29
RTM_GETNEIGH = 30

PROTOCOL = 132

_NDA_DST = 1
_NDA_LLADDR = 2
_NDA_PROTOCOL = 12
_WANTED = (_NDA_DST, _NDA_LLADDR, _NDA_PROTOCOL)
NUD_PERMANENT = 0x80

_IFA_ADDRESS = 1
_IFA_FLAGS = 8
_IFA_PROTO = 11
_NODAD = 0x02
_SCOPE_UNIVERSE = 0
_SCOPE_LINK = 253

_NEIGHBOUR = struct.Struct("=B3xiHBB")
_ADDRESS = struct.Struct("=BBBBI")
_OURS = bytes([PROTOCOL])
_IFA_OURS = u8(_IFA_PROTO, PROTOCOL)


def _family(address: bytes) -> int:
    return AF_INET if len(address) == 4 else AF_INET6


def neighbour_body(neighbour: Neighbour) -> bytes:
    return (
        _NEIGHBOUR.pack(_family(neighbour.address), neighbour.ifindex, NUD_PERMANENT, 0, 1)
        + attr(_NDA_DST, neighbour.address)
        + attr(_NDA_LLADDR, neighbour.mac)
        + u8(_NDA_PROTOCOL, PROTOCOL)
    )


def neighbour_delete_body(neighbour: Neighbour) -> bytes:
    return _NEIGHBOUR.pack(_family(neighbour.address), neighbour.ifindex, 0, 0, 0) + attr(_NDA_DST, neighbour.address)


def neighbour_dump_body() -> bytes:
    return _NEIGHBOUR.pack(0, 0, 0, 0, 0)


def decode_neighbour(body: bytes) -> Neighbour | None:
    """None: not one of ours. On a deletion the kernel keeps the protocol but not always the MAC."""
    family, ifindex, _, _, _ = _NEIGHBOUR.unpack_from(body)
    if family not in (AF_INET, AF_INET6):
        return None
    found = attribute_map(body, 12, _WANTED)
    if found.get(_NDA_PROTOCOL) != _OURS or _NDA_DST not in found:
        return None
    return Neighbour(ifindex, found[_NDA_DST], found.get(_NDA_LLADDR, b""))


def is_permanent(body: bytes) -> bool:
    return int.from_bytes(body[8:10], sys.byteorder) == NUD_PERMANENT


def address_body(address: TapAddress) -> bytes:
    scope = _SCOPE_LINK if address.address[:2] == b"\xfe\x80" else _SCOPE_UNIVERSE
    return (
        _ADDRESS.pack(AF_INET6, address.length, _NODAD, scope, address.ifindex)
        + attr(_IFA_ADDRESS, address.address)
        + u8(_IFA_PROTO, PROTOCOL)
    )


def address_dump_body() -> bytes:
    return _ADDRESS.pack(AF_INET6, 0, 0, 0, 0)


def decode_address(body: bytes) -> TapAddress | None:
    """None: not one of ours."""
    family, length, _, _, ifindex = _ADDRESS.unpack_from(body)
    if _IFA_OURS not in body:  # most are not
        return None
    found = attribute_map(body, 8)
    if family != AF_INET6 or found.get(_IFA_PROTO) != _OURS or _IFA_ADDRESS not in found:
        return None
    return TapAddress(ifindex, found[_IFA_ADDRESS], length)
