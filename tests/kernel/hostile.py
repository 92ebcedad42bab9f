# Owns: what a hostile guest makes of a packet: fragments, extension headers, VLAN tags. Bytes only.
from __future__ import annotations

import struct

from frames import Frame

HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION = 0, 43, 44, 60
_V6 = 14 + 40


_HEADERS = {  # after the number of the following header
    HOP_BY_HOP: b"\0\1\4\0\0\0\0",
    ROUTING: b"\0\4\0\0\0\0\0",  # segment routing, at its end
    FRAGMENT: b"\0\0\0slsh",  # atomic
    DESTINATION: b"\0\1\4\0\0\0\0",
}


def extended(frame: bytes, *headers: int) -> bytes:
    """The same IPv6 packet with extension headers of these kinds before its upper layer."""
    kind, body = frame[20], frame[_V6:]
    following = (*headers[1:], kind)
    chain = b"".join(bytes([after]) + _HEADERS[each] for each, after in zip(headers, following, strict=False))
    length = struct.pack(">H", len(chain) + len(body))
    return frame[:18] + length + bytes([(*headers, kind)[0]]) + frame[21:_V6] + chain + body


def fragments(frame: bytes, at: int, ident: int = 7) -> list[bytes]:
    """Two fragments; the second begins `at` bytes (a multiple of 8) behind the network header."""
    if frame[12:14] == b"\x08\0":
        pieces = [(frame[34 : 34 + at], 0x2000), (frame[34 + at :], at // 8)]
        return [_v4(frame, struct.pack(">HH", ident, flags), body) for body, flags in pieces]
    body = frame[_V6:]
    return [
        frame[:18] + struct.pack(">HB", 8 + len(part), FRAGMENT) + frame[21:_V6]
        + struct.pack(">BBHI", frame[20], 0, offset, ident) + part
        for part, offset in ((body[:at], 1), (body[at:], at))
    ]  # fmt: skip


def _v4(frame: bytes, ident_flags: bytes, body: bytes) -> bytes:
    head = b"\x45\0" + struct.pack(">H", 20 + len(body)) + ident_flags + frame[22:24] + b"\0\0" + frame[26:34]
    total = sum(struct.unpack(">10H", head))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return frame[:14] + head[:10] + struct.pack(">H", ~total & 0xFFFF) + head[12:] + body


def tagged(frame: bytes, *tags: tuple[int, int]) -> bytes:
    """(TPID, VID), the outermost first."""
    return frame[:12] + b"".join(struct.pack(">HH", tpid, vid) for tpid, vid in tags) + frame[12:]


def about(flow: Frame, sport: int, dport: int) -> bytes:
    """The part of a flow's packet that an ICMP error quotes."""
    return flow.udp(sport, dport)[len(flow.to_mac + flow.mac) + 2 :]
