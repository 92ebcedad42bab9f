# Owns: netlink itself, on a held socket: attributes, one-send batches whose errors name their operation, dumps,
# notifications. Knows no family (see nft/ and rtnl.py). May touch: AF_NETLINK sockets, nothing else.
from __future__ import annotations

import errno
import os
import socket
import struct
from array import array
from collections.abc import Callable, Container, Iterable, Iterator
from typing import NamedTuple

NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_ROOT = 0x100
NLM_F_MATCH = 0x200
NLM_F_DUMP = NLM_F_ROOT | NLM_F_MATCH
NLM_F_DUMP_INTR = 0x10
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_APPEND = 0x800

_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_FIRST_OWN = 16  # message types below are netlink's own
_F_CAPPED = 0x100  # on an error: the request is not repeated behind its header
_F_ACK_TLVS = 0x200  # on an error: attributes follow
_ERROR_MESSAGE = 1

_SOL_NETLINK = 270
_ADD_MEMBERSHIP = 1
_DROP_MEMBERSHIP = 2
_CAP_ACK = 10
_EXT_ACK = 11
_GET_STRICT_CHK = 12
_SO_ATTACH_FILTER = 26
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33

_NESTED = 0x8000
_TYPE_MASK = 0x3FFF
_RECEIVE = 1 << 18  # a dump's parts are at most 32 KiB, one message at most 64 KiB and a header
_BUFFER = 1 << 25  # a limit, not memory; grown when one batch needs more
_DUMP_ATTEMPTS = 20

_HEADER = struct.Struct("=IHHII")
_ATTR = struct.Struct("=HH")


# ---- writing ----------------------------------------------------------------------------------------------------


def attr(kind: int, data: bytes) -> bytes:
    length = 4 + len(data)
    return _ATTR.pack(length, kind) + data + bytes(-length & 3)


def nest(kind: int, *parts: bytes) -> bytes:
    return attr(kind | _NESTED, b"".join(parts))


def text(kind: int, value: str) -> bytes:
    return attr(kind, value.encode() + b"\0")


def u8(kind: int, value: int) -> bytes:
    return struct.pack("=HHB3x", 5, kind, value)


def u16(kind: int, value: int) -> bytes:
    return struct.pack("=HHH2x", 6, kind, value)


def u32(kind: int, value: int) -> bytes:
    """Host byte order, as rtnetlink has it."""
    return struct.pack("=HHI", 8, kind, value)


def be16(kind: int, value: int) -> bytes:
    return _ATTR.pack(6, kind) + struct.pack(">H2x", value)


def be32(kind: int, value: int) -> bytes:
    """Network byte order, as nfnetlink has it."""
    return _ATTR.pack(8, kind) + struct.pack(">I", value & 0xFFFFFFFF)


def be64(kind: int, value: int) -> bytes:
    return _ATTR.pack(12, kind) + struct.pack(">Q", value)


def message(kind: int, flags: int, seq: int, body: bytes) -> bytes:
    """One message; NLM_F_REQUEST is implied. `body` begins with the family's own header."""
    length = 16 + len(body)
    return _HEADER.pack(length, kind, flags | NLM_F_REQUEST, seq, 0) + body + bytes(-length & 3)


# ---- reading ----------------------------------------------------------------------------------------------------


class Message(NamedTuple):
    kind: int
    flags: int
    seq: int
    body: bytes  # begins with the family's own header
    port: int = 0  # of a notification: the socket whose request caused it; 0: the kernel by itself


class Refusal(NamedTuple):
    """The kernel's no to the message with this sequence number."""

    seq: int
    errno: int  # positive
    message: str  # the kernel's own words, or ""

    def __str__(self) -> str:
        return self.message or os.strerror(self.errno)


class KernelRefused(OSError):
    """The kernel refused a request: `errno`, and `strerror` with the kernel's own words where it gave any."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.errno, str(refusal))


class Overrun(OSError):
    """Messages were lost for want of buffer space (ENOBUFS): what was missed is unknown, so read everything again."""

    def __init__(self) -> None:
        super().__init__(errno.ENOBUFS, "netlink messages were lost: the receive buffer was full")


def attributes(data: bytes, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """(kind, payload) in order, flags cleared; stops at the first malformed one."""
    end = len(data)
    while offset + 4 <= end:
        length, kind = _ATTR.unpack_from(data, offset)
        if length < 4 or offset + length > end:
            return
        yield kind & _TYPE_MASK, data[offset + 4 : offset + length]
        offset += (length + 3) & ~3


def attribute_map(data: bytes, offset: int = 0, kinds: Container[int] = range(_TYPE_MASK + 1)) -> dict[int, bytes]:
    """Of these kinds; of a repeated one the last. (Not made of `attributes`: a start reads tens of thousands.)"""
    found: dict[int, bytes] = {}
    end, unpack = len(data), _ATTR.unpack_from
    while offset + 4 <= end:
        length, kind = unpack(data, offset)
        if length < 4 or offset + length > end:
            break
        if kind & _TYPE_MASK in kinds:
            found[kind & _TYPE_MASK] = data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


Wanted = Callable[[bytes, int], bool]  # of a message whose body begins there


def messages(data: bytes, wanted: Wanted | None = None) -> Iterator[Message]:
    """`wanted`: of a family's own messages (not of refusals and ends) only those."""
    offset, end = 0, len(data)
    while offset + 16 <= end:
        length, kind, flags, seq, port = _HEADER.unpack_from(data, offset)
        if length < 16 or offset + length > end:
            raise OSError(errno.EBADMSG, "malformed netlink message")
        if wanted is None or kind < _FIRST_OWN or wanted(data, offset + 16):
            yield Message(kind, flags, seq, data[offset + 16 : offset + length], port)
        offset += (length + 3) & ~3


def _refusal(reply: Message) -> Refusal:
    """Of an NLMSG_ERROR; errno 0 is an acknowledgement."""
    (code, length) = struct.unpack_from("=iI", reply.body)
    words = ""
    if reply.flags & _F_ACK_TLVS:
        offset = 20 if reply.flags & _F_CAPPED else 4 + ((length + 3) & ~3)
        words = attribute_map(reply.body, offset).get(_ERROR_MESSAGE, b"").rstrip(b"\0").decode(errors="replace")
    return Refusal(reply.seq, -code, words)


# ---- the socket -------------------------------------------------------------------------------------------------


class NetlinkSocket:
    """A held netlink socket, for one thread. Use one for requests and another, with `groups`, for notifications.
    `receive`: bytes that may wait to be read."""

    def __init__(self, protocol: int, groups: Iterable[int] = (), receive: int = _BUFFER) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._seq = 0
        self._room = memoryview(bytearray(_RECEIVE))
        for option in (_CAP_ACK, _EXT_ACK):
            self._socket.setsockopt(_SOL_NETLINK, option, 1)
        if protocol == NETLINK_ROUTE:
            self._socket.setsockopt(_SOL_NETLINK, _GET_STRICT_CHK, 1)
        self._buffer(_SO_RCVBUFFORCE, socket.SO_RCVBUF, receive)
        self._send_limit = 0
        self._grow(_BUFFER)
        self._socket.bind((0, 0))
        for group in groups:
            self.join(group)

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def port(self) -> int:
        """This socket's netlink port id: what the kernel names as the owner of an owned table."""
        name: tuple[int, int] = self._socket.getsockname()
        return name[0]

    def join(self, group: int) -> None:
        """Notifications of this group arrive from now on."""
        self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)

    def leave(self, group: int) -> None:
        """None arrives from now on."""
        self._socket.setsockopt(_SOL_NETLINK, _DROP_MEMBERSHIP, group)

    def close(self) -> None:
        self._socket.close()

    def reserve(self, count: int = 1) -> int:
        """The first of `count` consecutive fresh sequence numbers."""
        if self._seq + count >= 1 << 31:
            self._seq = 0
        first = self._seq + 1
        self._seq += count
        return first

    def exchange(self, batch: bytes, last: int) -> list[Refusal]:
        """Send messages in one go and return what the kernel refused, in its order ([]: all done).

        Only the message numbered `last` needs NLM_F_ACK: refusals of the others come unasked. The kernel works inside
        send(), so every reply is waiting when it returns. Raises OSError where the outcome is unknown.
        """
        self._send(batch)
        refused: list[Refusal] = []
        acknowledged = False
        while (data := self._receive(socket.MSG_DONTWAIT)) is not None:
            for reply in messages(data):
                if reply.kind == _NLMSG_ERROR:
                    refusal = _refusal(reply)
                    acknowledged |= refusal.seq == last
                    if refusal.errno:
                        refused.append(refusal)
            if acknowledged and not refused:
                return refused
        if not acknowledged and not refused:
            raise OSError(errno.EPROTO, "the kernel did not acknowledge a netlink batch")
        return refused

    def send(self, batch: bytes) -> None:
        """What nothing is answered to. The kernel is done with it on return."""
        self._send(batch)

    def ask(self, kind: int, body: bytes, flags: int = 0) -> list[Message]:
        """One request that is answered by messages (a GET). Raises KernelRefused."""
        seq = self.reserve()
        self._send(message(kind, flags | NLM_F_ACK, seq, body))
        found: list[Message] = []
        while (data := self._receive(socket.MSG_DONTWAIT)) is not None:
            for reply in messages(data):
                if reply.seq != seq:
                    continue
                if reply.kind != _NLMSG_ERROR:
                    found.append(reply)
                elif (refusal := _refusal(reply)).errno:
                    raise KernelRefused(refusal)
        return found

    def dump(self, kind: int, body: bytes, flags: int = 0, wanted: Wanted | None = None) -> list[Message]:
        """All objects, or of very many those that are wanted. A dump that the kernel marks as torn by a
        concurrent change is taken again, a bounded number of times; then OSError(EINTR). Raises KernelRefused."""
        for _ in range(_DUMP_ATTEMPTS):
            seq = self.reserve()
            self._send(message(kind, flags | NLM_F_DUMP, seq, body))
            found, torn = self._collect(seq, wanted)
            if not torn:
                return found
        raise OSError(errno.EINTR, f"the kernel's tables kept changing through {_DUMP_ATTEMPTS} dumps")

    def notifications(self) -> list[Message]:
        """What has arrived, without waiting. Raises Overrun."""
        found: list[Message] = []
        while (data := self._receive(socket.MSG_DONTWAIT)) is not None:
            found.extend(messages(data))
        return found

    def datagrams(self, limit: int) -> Iterator[bytes]:
        """What has arrived, unparsed, at most `limit` of them. Raises Overrun."""
        for _ in range(limit):
            if (data := self._receive(socket.MSG_DONTWAIT)) is None:
                return
            yield data

    def attach(self, program: bytes) -> None:
        """A classic BPF program (8 bytes an instruction): what it returns 0 for never enters the receive buffer."""
        code = array("B", program)
        self._socket.setsockopt(
            socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(program) // 8, code.buffer_info()[0])
        )

    def _collect(self, seq: int, wanted: Wanted | None) -> tuple[list[Message], bool]:
        found: list[Message] = []
        torn = False
        while True:
            for reply in messages(self._receive(0) or b"", wanted):
                if reply.seq != seq:
                    continue
                torn |= bool(reply.flags & NLM_F_DUMP_INTR)
                if reply.kind == _NLMSG_ERROR:
                    refusal = _refusal(reply)
                    if refusal.errno == errno.EINTR:
                        return found, True
                    raise KernelRefused(refusal)
                if reply.kind == _NLMSG_DONE:
                    code = struct.unpack_from("=i", reply.body)[0] if len(reply.body) >= 4 else 0
                    if code not in (0, -errno.EINTR):
                        raise KernelRefused(Refusal(seq, -code, ""))
                    return found, torn or code != 0
                found.append(reply)

    def _receive(self, flags: int) -> bytes | None:
        """Into a held buffer: to make one of that size for each answer takes longer than all the rest."""
        try:
            return bytes(self._room[: self._socket.recv_into(self._room, 0, flags)])
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                raise Overrun() from None
            raise

    def _send(self, data: bytes) -> None:
        if len(data) + 4096 > self._send_limit:
            self._grow(2 * len(data))
        self._socket.sendto(data, (0, 0))

    def _grow(self, size: int) -> None:
        self._buffer(_SO_SNDBUFFORCE, socket.SO_SNDBUF, min(size, (1 << 30) - 1))
        self._send_limit = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)

    def _buffer(self, force: int, plain: int, size: int) -> None:
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, force, size)
        except PermissionError:  # root of a user namespace only: the system's own limit then bounds a batch
            self._socket.setsockopt(socket.SOL_SOCKET, plain, size)
