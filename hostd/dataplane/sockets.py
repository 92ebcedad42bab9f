# Owns: ending TCP sessions of the host itself. To forget such a flow is not enough: the host's next packet would begin
# it anew the other way round, where that is allowed. Touches: sockets, over sock_diag.
from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Collection

from ..revocation.revoke import OwnSocket
from .netlink import NLM_F_ACK, KernelRefused, NetlinkSocket, message

_SOCK_DIAG, _BY_FAMILY, _DESTROY = 4, 20, 21
_REQUEST = struct.Struct("=BBBxI2s2s16s16sI8s")
_STATE, _NAMES, _COOKIE = 1, slice(4, 40), slice(44, 52)  # in an inet_diag_msg
_LISTEN = 10
_ANY_STATE, _NO_COOKIE = (1 << 32) - 1, b"\xff" * 8
_FORGIVEN = (errno.ENOENT, errno.EOPNOTSUPP)  # it ended by itself; a kernel without INET_DIAG_DESTROY


def destroy(sockets: Collection[OwnSocket]) -> None:
    """Their programs are told so (ECONNABORTED), and the other side (RST), if it may be. Raises OSError."""
    channel = NetlinkSocket(_SOCK_DIAG)
    try:
        for each in sockets:
            cookie = _session(channel, each)
            if cookie is not None:
                _end(channel, _request(each, cookie))
    finally:
        channel.close()


def _session(channel: NetlinkSocket, of: OwnSocket) -> bytes | None:
    """Where the session is over, the kernel finds the socket that listens there: a server, not to be touched."""
    try:
        found = channel.ask(_BY_FAMILY, _request(of, _NO_COOKIE))
    except KernelRefused as error:
        if error.errno in _FORGIVEN:
            return None
        raise
    either = _names(of), _names(of, b"\0" * 10 + b"\xff\xff")  # an IPv6 socket may speak IPv4
    for each in found:
        if each.body[_STATE] != _LISTEN and each.body[_NAMES] in either:
            return each.body[_COOKIE]
    return None


def _end(channel: NetlinkSocket, request: bytes) -> None:
    seq = channel.reserve()
    for refusal in channel.exchange(message(_DESTROY, NLM_F_ACK, seq, request), seq):
        if refusal.errno not in _FORGIVEN:
            raise OSError(refusal.errno, str(refusal))


def _names(of: OwnSocket, mapped: bytes = b"") -> bytes:
    ports = of.port.to_bytes(2, "big") + of.far_port.to_bytes(2, "big")
    return ports + b"".join((mapped[: 16 - len(each)] + each).ljust(16, b"\0") for each in (of.address, of.far))


def _request(of: OwnSocket, cookie: bytes) -> bytes:
    """A cookie names one socket for good."""
    family = socket.AF_INET if len(of.address) == 4 else socket.AF_INET6
    names = _names(of)
    return _REQUEST.pack(
        family, socket.IPPROTO_TCP, 0, _ANY_STATE, names[:2], names[2:4], names[4:20], names[20:], 0, cookie
    )  # fmt: skip
