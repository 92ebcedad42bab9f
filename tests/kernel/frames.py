# Owns: Ethernet frames byte by byte, so that a test can send what no honest guest would.
from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, replace

BROADCAST = b"\xff" * 6
SYN, ACK, SYN_ACK = 0x02, 0x10, 0x12


def _sum(data: bytes) -> int:
    data += b"\0" * (len(data) & 1)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def pack(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def _ip(source: str, target: str, protocol: int, body: bytes, hops: int) -> bytes:
    if ":" in source:
        return struct.pack(">IHBB", 6 << 28, len(body), protocol, hops) + pack(source) + pack(target) + body
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 7, 0, hops, protocol, 0) + pack(source) + pack(target)
    return head[:10] + struct.pack(">H", _sum(head)) + head[12:] + body


def _transport(source: str, target: str, protocol: int, body: bytes, at: int) -> bytes:
    """With its checksum at offset `at`."""
    pseudo = pack(source) + pack(target) + struct.pack(">IHBB", len(body), 0, 0, protocol)
    covered = body if protocol == 1 else pseudo + body
    return body[:at] + struct.pack(">H", _sum(covered)) + body[at + 2 :]


@dataclass(frozen=True)
class Frame:
    """Who says it to whom; then .udp(), .tcp(), .icmp() or .raw() makes the bytes."""

    mac: bytes  # of the sender
    to_mac: bytes
    source: str
    target: str
    hops: int = 64

    def but(self, **changes: object) -> Frame:
        return replace(self, **changes)

    def back(self) -> Frame:
        return replace(self, source=self.target, target=self.source)

    def raw(self, protocol: int, body: bytes) -> bytes:
        kind = b"\x86\xdd" if ":" in self.source else b"\x08\0"
        return self.to_mac + self.mac + kind + _ip(self.source, self.target, protocol, body, self.hops)

    def udp(self, sport: int, dport: int, payload: bytes = b"slash32") -> bytes:
        body = struct.pack(">HHHH", sport, dport, 8 + len(payload), 0) + payload
        return self.raw(17, _transport(self.source, self.target, 17, body, 6))

    def tcp(self, sport: int, dport: int, flags: int, seq: int = 0, ack: int = 0) -> bytes:
        body = struct.pack(">HHIIBBHHH", sport, dport, seq, ack, 5 << 4, flags, 8192, 0, 0)
        return self.raw(6, _transport(self.source, self.target, 6, body, 16))

    def icmp(self, kind: int, code: int = 0, rest: bytes = bytes(4)) -> bytes:
        protocol = 58 if ":" in self.source else 1
        body = struct.pack(">BBH", kind, code, 0) + rest
        return self.raw(protocol, _transport(self.source, self.target, protocol, body, 2))


def arp(mac: bytes, operation: int, sender: tuple[bytes, str], asked: str, to_mac: bytes = BROADCAST) -> bytes:
    body = struct.pack(">HHBBH", 1, 0x800, 6, 4, operation) + sender[0] + pack(sender[1]) + bytes(6) + pack(asked)
    return to_mac + mac + b"\x08\x06" + body


def solicitation(asked: str) -> bytes:
    """What follows type, code and checksum of a neighbour solicitation."""
    return bytes(4) + pack(asked)


def same_packet(got: bytes, sent: bytes) -> bool:
    """Equal but for what a router changes: MACs, hop limit, IPv4 checksum."""
    if got[12:14] != sent[12:14]:
        return False
    if sent[12:14] == b"\x08\0":
        return got[14:22] + got[23:24] + got[26:] == sent[14:22] + sent[23:24] + sent[26:]
    return got[14:21] + got[22:] == sent[14:21] + sent[22:]
