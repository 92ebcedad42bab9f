# Owns: ending TCP sessions of the host itself. To forget such a flow is not enough: the host's next packet would begin
# it anew the other way round, where that is allowed. Touches: sockets, over sock_diag.
from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Collection

from ..revoke import OwnSocket
from .netlink import NLM_F_ACK, NetlinkSocket, message

_SOCK_DIAG, _DESTROY = 4, 21
_REQUEST = struct.Struct("=BBBxI2s2s16s16sIQ")
_ANY_STATE, _NO_COOKIE = (1 << 32) - 1, (1 << 64) - 1
_FORGIVEN = (errno.ENOENT, errno.EOPNOTSUPP)  # it ended by itself; a kernel without INET_DIAG_DESTROY


def destroy(sockets: Collection[OwnSocket]) -> None:
    """Their programs are told so (ECONNABORTED), and the other side (RST), if it may be. Raises OSError."""
    channel = NetlinkSocket(_SOCK_DIAG)
    try:
        for each in sockets:
            seq = channel.reserve()
            for refusal in channel.exchange(message(_DESTROY, NLM_F_ACK, seq, _request(each)), seq):
                if refusal.errno not in _FORGIVEN:
                    raise OSError(refusal.errno, str(refusal))
    finally:
        channel.close()


def _request(of: OwnSocket) -> bytes:
    family = socket.AF_INET if len(of.address) == 4 else socket.AF_INET6
    ports = of.port.to_bytes(2, "big"), of.far_port.to_bytes(2, "big")
    return _REQUEST.pack(
        family, socket.IPPROTO_TCP, 0, _ANY_STATE, *ports, of.address, of.far, 0, _NO_COOKIE
    )  # fmt: skip
