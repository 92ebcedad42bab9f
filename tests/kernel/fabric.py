# Owns: h1 in a namespace of its own with six taps, two uplinks and its own addresses, and everybody else at their far
# ends: it is given one world after the other, and packets in bulk. All runs on one CPU, whose queue is first in, first
# out: what is not there when a later frame has crossed the host's bridge was dropped.
from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence

from fleet import Fleet
from frames import SYN, Frame, _transport
from netns import Namespace, eventually, run
from nft_rig import Port, _port
from verdict_packets import Case, Shot
from verdict_worlds import BARE, GUESTS, HOST, OWN, STRANGERS, UP0, UP1

from hostd.change.plan import Limits
from hostd.change.settle import Settler
from hostd.compiler.ruleset import Guard
from hostd.dataplane.kernel import Kernel
from slash32.net import format_address
from slash32.verdict import Packet, World
from slash32.wire import Failure

_ROOM = 8 << 20  # bytes of a socket's buffer
_RCVBUFFORCE, _SOL_PACKET, _IGNORE_OUTGOING, _IPV6_HDRINCL = 33, 263, 23, 36
_HEARD = (1, 6, 17, 132, 136, *BARE)  # protocols by which h1 itself is spoken to
_DROPPED = (errno.EPERM, errno.ENETUNREACH, errno.EHOSTUNREACH)  # by the packet filter; no way there
_MARK = b"s32!"


class Unsettled(AssertionError):
    """The kernel refused something."""


class Fabric:
    """Enter `home` to use it. `kind`: of packet filter."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.home, self.far = Namespace(), Namespace()
        with self.home.entered():
            # Linux reads UDPLite's checksum as if it were UDP's: a right one makes the packet invalid to conntrack.
            unchecked = ("netfilter/nf_conntrack_checksum", "0")
            for path, value in (("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1"), unchecked):
                with open(f"/proc/sys/net/{path}", "w") as file:
                    file.write(value)
            self.ports = {f"vnet{n}": _port(n, f"vnet{n}", self.far) for n in range(1, GUESTS + 1)}
            self.ports |= {UP0: _port(20, UP0, self.far), UP1: _port(21, UP1, self.far)}
            for port in self.ports.values():
                _roomy(port.wire)
                port.wire.setsockopt(_SOL_PACKET, _IGNORE_OUTGOING, 1)
            self._addresses()
            self.own = _Own()
            run("ip", "link", "add", "way", "up", "type", "bridge")
            self._sentinel = _port(30, "way30", self.far), _port(31, "way31", self.far)
            for port in self._sentinel:
                run("ip", "link", "set", port.name, "master", "way")
            self.kernel = Kernel(Guard(), False, kind)
            self.kernel.load()
        self._count = 0
        self.fleet_world = World(())
        self.fleet = self.new_fleet()
        self.settler = self.settler_of(self.fleet)

    def _addresses(self) -> None:
        for address in map(format_address, OWN):
            run("ip", "address", "add", address, "dev", "lo", *(["nodad"] if ":" in address else []))
        for name, some in STRANGERS.items():
            for address in map(format_address, some):
                version = "-6" if ":" in address else "-4"
                known = "lladdr", self.ports[name].mac.hex(":"), "dev", name, "nud", "permanent"
                run("ip", version, "neigh", "replace", address, *known)
                run("ip", version, "route", "add", address, "dev", name)

    def close(self) -> None:
        self.kernel.close()
        self.own.close()
        for port in (*self.ports.values(), *self._sentinel):
            port.wire.close()
        self.home.close()
        self.far.close()

    # -- worlds ---------------------------------------------------------------------------------------------------

    def new_fleet(self) -> Fleet:
        return Fleet({name: port.ifindex for name, port in self.ports.items()})

    def settler_of(self, fleet: Fleet, shift: int = 0) -> Settler:
        """`shift`: its classes begin at other numbers."""
        return Settler(self.kernel, fleet.calc, Limits(Guard().group_base + shift), ("vnet",))

    def load(self, asked: Case) -> None:
        """From whatever is there, with nothing remembered."""
        self.fleet = self.new_fleet()
        self.fleet.become(asked.world)
        self.fleet_world = asked.world
        self.settler = self.settler_of(self.fleet, _shift(asked))
        self.settler.resync()
        self._settled(asked, self.settler.failures())
        run("conntrack", "-F")

    def change(self, asked: Case) -> None:
        """From the world that is there, as hostd does it."""
        dirty = self.fleet.become(asked.world)
        self.fleet_world = asked.world
        beside = _shift(asked) + (16, 256, 1)[asked.seed % 3]  # of the class numbers there are some end as theirs
        self.settler.limits = Limits(Guard().group_base + beside)
        self._settled(asked, self.settler.settle(dirty))
        run("conntrack", "-F")

    def begin_again(self) -> None:
        """hostd was killed, and is started with what it had on its disk."""
        self.fleet.calc = self.fleet.fresh()
        self.settler = self.settler_of(self.fleet)
        failures = self.settler.resync()
        if failures:
            raise Unsettled(f"{self.kind} refuses {failures}")

    def _settled(self, asked: Case, failures: Sequence[Failure]) -> None:
        if failures:
            raise Unsettled(f"seed {asked.seed}: {self.kind} refuses {failures}")

    # -- packets --------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        self._count += 1
        first, last = self._sentinel
        frame = last.mac + first.mac + b"\x88\xb5" + self._count.to_bytes(46, "big")
        first.wire.send(frame)
        eventually(lambda: frame in last.heard(), "the sentinel crosses the host's bridge")

    def say(self, shot: Shot, number: int) -> None:
        if shot.sender == HOST:
            self.own.say(ip_of(shot.packet, number))
        else:
            port = self.ports[shot.sender]
            port.wire.send(frame_of(shot.packet, number, port))

    def heard(self) -> Iterator[tuple[str, bytes]]:
        """Where, and what of ours."""
        for name, port in self.ports.items():
            yield from ((name, frame) for frame in port.heard())
        yield from ((HOST, frame) for frame in self.own.heard())

    def send(self, shots: Sequence[Shot]) -> set[int]:
        """Which of the packets, by number, came to where they belong; none may come anywhere else."""
        list(self.heard())
        for number, shot in enumerate(shots):
            self.say(shot, number)
        self.settle()
        arrived: set[int] = set()
        for where, frame in self.heard():
            number = number_of(frame)
            if number is None or where == shots[number].sender:
                continue  # an answer, which quotes what it sent itself
            assert where == shots[number].receiver, f"{shown(shots[number])} came to {where}"
            arrived.add(number)
        return arrived

    def wrong(self, asked: Case) -> list[Shot]:
        """Packets on which kernel and model differ."""
        return self._wrong(asked, self.load)

    def wrong_after(self, asked: Case) -> list[Shot]:
        """When the world that is there becomes this one."""
        return self._wrong(asked, self.change)

    def _wrong(self, asked: Case, enter: Callable[[Case], None]) -> list[Shot]:
        with self.home.entered():
            enter(asked)
            arrived = self.send(asked.shots)
        return [shot for number, shot in enumerate(asked.shots) if shot.word != (number in arrived)]


def _shift(asked: Case) -> int:
    return asked.seed * 37 % 0xF000


class _Own:
    """The host's own sockets: what it hears, and whatever it wants to say."""

    def __init__(self) -> None:
        self._heard = []
        for family in (socket.AF_INET, socket.AF_INET6):
            for protocol in _HEARD:
                number = 58 if family == socket.AF_INET6 and protocol == 1 else protocol
                made = socket.socket(family, socket.SOCK_RAW | socket.SOCK_NONBLOCK, number)
                _roomy(made)
                self._heard.append(made)
        self._four = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        self._six = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW)
        self._four.setsockopt(socket.IPPROTO_IP, socket.IP_HDRINCL, 1)
        self._six.setsockopt(socket.IPPROTO_IPV6, _IPV6_HDRINCL, 1)

    def say(self, packet: bytes) -> None:
        try:
            if packet[0] >> 4 == 4:
                self._four.sendto(packet, (socket.inet_ntop(socket.AF_INET, packet[16:20]), 0))
            else:
                self._six.sendto(packet, (socket.inet_ntop(socket.AF_INET6, packet[24:40]), 0))
        except OSError as error:
            if error.errno not in _DROPPED:
                raise

    def heard(self) -> Iterator[bytes]:
        for one in self._heard:
            with contextlib.suppress(BlockingIOError):
                while True:
                    yield one.recv(2048)

    def close(self) -> None:
        for one in (*self._heard, self._four, self._six):
            one.close()


def _roomy(one: socket.socket) -> None:
    one.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, _ROOM)


def shown(shot: Shot) -> str:
    packet = shot.packet
    ports = f" {packet.source_port}->{packet.destination_port}" if packet.source_port else f" {packet.icmp or ''}"
    ends = f"{format_address(packet.source)} ({shot.sender}) -> {format_address(packet.destination)} ({shot.receiver})"
    return f"{ends} protocol {packet.protocol}{ports}"


# -- bytes ------------------------------------------------------------------------------------------------------------


def ip_of(packet: Packet, number: int) -> bytes:
    return _bytes(packet, number, Frame(bytes(6), bytes(6), *_ends(packet)))[14:]


def frame_of(packet: Packet, number: int, sender: Port) -> bytes:
    """It ends with its number."""
    return _bytes(packet, number, Frame(sender.mac, sender.host_mac, *_ends(packet)))


def _ends(packet: Packet) -> tuple[str, str]:
    return format_address(packet.source), format_address(packet.destination)


def _bytes(packet: Packet, number: int, frame: Frame) -> bytes:
    mark = _MARK + (number + 1).to_bytes(4, "big")
    ports = packet.source_port or 0, packet.destination_port or 0
    match packet.protocol:
        case 17:
            return frame.udp(*ports, mark)
        case 6:
            bare = frame.tcp(*ports, SYN)
            return frame.raw(6, _transport(*_ends(packet), 6, bare[-20:-4] + bytes(2) + bare[-2:] + mark, 16))
        case 132:
            return frame.raw(132, _sctp_init(ports, mark))
        case 136:  # all of it is covered by the checksum
            return frame.raw(136, _transport(*_ends(packet), 136, struct.pack(">HHHH", *ports, 0, 0) + mark, 6))
    if packet.icmp is not None:
        rest = (number & 0xFFFF).to_bytes(2, "big") + bytes(2) + mark
        return frame.icmp(packet.icmp.type, packet.icmp.code or 0, rest)
    return frame.raw(packet.protocol, bytes(8) + mark)


def _sctp_init(ports: tuple[int, int], mark: bytes) -> bytes:
    parameter = struct.pack(">HH", 0xC001, 4 + len(mark)) + mark  # of a type that is to be skipped
    body = struct.pack(">BBHIIHHI", 1, 0, 20 + len(parameter), 7, 65536, 1, 1, 7) + parameter
    head = struct.pack(">HHI", *ports, 0)
    return head + struct.pack("<I", _crc32c(head + bytes(4) + body)) + body


def _crc32c(data: Iterable[int]) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _crc_of(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_CRC = [_crc_of(byte) for byte in range(256)]


def number_of(frame: bytes) -> int | None:
    return int.from_bytes(frame[-4:], "big") - 1 if frame[-8:-4] == _MARK else None


@contextlib.contextmanager
def one_cpu(number: int = 0) -> Iterator[None]:
    """First in, first out. `number`: of those that there are."""
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(cpus)[number % len(cpus)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cpus)
