# Owns: hearing what Log rules say, of either packet filter: one nfnetlink_log group of this network namespace. Touches:
# one netlink socket. What is lost under load is counted, and never holds anything up.
from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

from ..compiler.ruleset import LOG_GROUP
from ..reporting.packetlog import Logged
from .netlink import (
    NETLINK_NETFILTER,
    NLM_F_ACK,
    KernelRefused,
    NetlinkSocket,
    Overrun,
    attr,
    attribute_map,
    be16,
    be32,
    message,
    messages,
)

_PACKET, _CONFIG = 4 << 8, 4 << 8 | 1
_BIND = 1
_COPY_PACKET = 2
_SEQUENCE = 1  # flag: entries are numbered
_ROOM = 1 << 20  # bytes that may wait for hostd
_COPIED = 128  # bytes of each packet: headers
_TOGETHER, _WAIT = 16, 10  # entries that the kernel sends together, or what it has after so many 1/100 s
_AT_ONCE = 64  # datagrams in one read


class LogListener:
    """`bind`, then `read` whenever there is something. For one thread."""

    def __init__(self, group: int = LOG_GROUP) -> None:
        self._socket = NetlinkSocket(NETLINK_NETFILTER, receive=_ROOM)
        self._group = group
        self._next: int | None = None
        self.lost = 0  # entries that the kernel could not deliver

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def bind(self) -> None:
        """Raises OSError: EBUSY where somebody else listens to this group in this namespace."""
        mode = struct.pack(">IBx", _COPIED, _COPY_PACKET)
        limits = be32(4, _WAIT) + be32(5, _TOGETHER) + be16(6, _SEQUENCE)
        body = struct.pack(">BBH", 0, 0, self._group) + attr(1, bytes([_BIND])) + attr(2, mode) + limits
        seq = self._socket.reserve()
        refused = self._socket.exchange(message(_CONFIG, NLM_F_ACK, seq, body), seq)
        if refused and refused[0].errno in (errno.EPERM, errno.EBUSY):
            raise OSError(errno.EBUSY, f"somebody else listens to log group {self._group}")
        if refused:
            raise KernelRefused(refused[0])

    def read(self) -> list[Logged]:
        """What has arrived, without waiting; may leave some for the next call."""
        found: list[Logged] = []
        try:
            for datagram in self._socket.datagrams(_AT_ONCE):
                found.extend(self._entries(datagram))
        except Overrun:
            pass  # the numbers of those that come next say how many were lost
        return found

    def _entries(self, datagram: bytes) -> Iterator[Logged]:
        for each in messages(datagram):
            if each.kind != _PACKET:
                continue
            fields = attribute_map(each.body, 4)
            self._count(fields.get(12, b""))
            yield Logged(
                fields.get(10, b"").rstrip(b"\0").decode("ascii", "replace"),
                int.from_bytes(fields.get(4, b""), "big"),
                int.from_bytes(fields.get(5, b""), "big"),
                _mac(fields.get(8, b"")),
                fields.get(9, b""),
            )

    def _count(self, number: bytes) -> None:
        if len(number) == 4:
            now = int.from_bytes(number, "big")
            self.lost += (now - self._next) & 0xFFFFFFFF if self._next is not None else 0
            self._next = now + 1 & 0xFFFFFFFF


def _mac(data: bytes) -> bytes:
    length = int.from_bytes(data[:2], "big")
    return data[4 : 4 + length] if length == 6 else b""
