"""Raw Ethernet frames as hex text, for the guest tool "frames" and the words s32.frame= of a guest. Pure."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address, ip_address

BROADCAST = "ff:ff:ff:ff:ff:ff"


def arp(source_mac: str, source: str, target: str, *, reply: bool = False, sender_mac: str = "") -> str:
    """An ARP request: who has TARGET, tell SOURCE. REPLY: SOURCE is at SENDER_MAC (else the frame's own), TARGET."""
    mac = _mac(source_mac)
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 2 if reply else 1) + _mac(sender_mac or source_mac)
    body += IPv4Address(source).packed + bytes(6) + IPv4Address(target).packed
    return (_mac(BROADCAST) + mac + b"\x08\x06" + body).hex()


def udp(
    to_mac: str,
    source_mac: str,
    source: str,
    target: str,
    port: int,
    *,
    source_port: int = 4000,
    data: bytes = b"s32",
) -> str:
    """A UDP datagram, v4 or v6 by its addresses."""
    segment = struct.pack("!HHHH", source_port, port, 8 + len(data), 0) + data
    return _frame((to_mac, source_mac, source, target), 17, segment, 6)


def tcp(
    to_mac: str,
    source_mac: str,
    source: str,
    target: str,
    port: int,
    *,
    flags: int = 0x02,
    source_port: int = 4000,
    data: bytes = b"",
) -> str:
    """A TCP segment: FLAGS 0x02 is SYN, 0x10 ACK."""
    segment = struct.pack("!HHIIBBHHH", source_port, port, 1, 0, 0x50, flags, 64240, 0, 0) + data
    return _frame((to_mac, source_mac, source, target), 6, segment, 16)


def icmp(to_mac: str, source_mac: str, source: str, target: str, number: int = 1) -> str:
    """An echo request, v4 or v6 by its addresses."""
    v4 = ip_address(source).version == 4
    segment = struct.pack("!BBHHH", 8 if v4 else 128, 0, 0, 0x3332, number)
    return _frame((to_mac, source_mac, source, target), 1 if v4 else 58, segment, 2)


def icmp_message(ends: tuple[str, str, str, str], kind: int, body: bytes, *, hops: int = 255) -> str:
    """Any ICMP or ICMPv6 message of code 0; ENDS: MAC to, MAC from, address from, address to. BODY follows the sum."""
    protocol = 1 if ip_address(ends[2]).version == 4 else 58
    return _frame(ends, protocol, struct.pack("!BBH", kind, 0, 0) + body, 2, hops)


def other(ends: tuple[str, str, str, str], protocol: int, payload: bytes) -> str:
    """A packet of a protocol without checksum of its own."""
    return _frame(ends, protocol, payload, None)


def tagged(frame: str, vlan: int = 0) -> str:
    """The frame with an 802.1Q tag; VLAN 0 is priority only, which kernels take as untagged."""
    return frame[:24] + f"8100{vlan:04x}" + frame[24:]


def _frame(
    ends: tuple[str, str, str, str], protocol: int, segment: bytes, checksum_at: int | None, hops: int = 64
) -> str:
    to_mac, source_mac, source, target = ends
    a, b = ip_address(source), ip_address(target)
    if isinstance(a, IPv4Address) != isinstance(b, IPv4Address):
        raise ValueError(f"{source} and {target} are not of one family")
    pseudo = b"" if protocol == 1 else a.packed + b.packed + struct.pack("!II", len(segment), protocol)
    if checksum_at is not None:
        total = _checksum(pseudo + segment) or 0xFFFF
        segment = segment[:checksum_at] + struct.pack("!H", total) + segment[checksum_at + 2 :]
    if isinstance(a, IPv6Address):
        header = struct.pack("!IHBB", 6 << 28, len(segment), protocol, hops) + a.packed + b.packed
        kind = b"\x86\xdd"
    else:
        header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(segment), 0, 0, hops, protocol, 0) + a.packed + b.packed
        header = header[:10] + struct.pack("!H", _checksum(header)) + header[12:]
        kind = b"\x08\x00"
    return (_mac(to_mac) + _mac(source_mac) + kind + header + segment).hex()


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total = sum(int.from_bytes(data[at : at + 2], "big") for at in range(0, len(data), 2))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
