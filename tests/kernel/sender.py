# Owns: a process that sends the same packets again and again, as fast as it can, from another CPU where there is one:
# each time a new flow, by its source port or ICMP id.
from __future__ import annotations

import contextlib
import mmap
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count

from fabric import Fabric, frame_of, ip_of, number_of
from netns import eventually
from verdict_packets import Shot
from verdict_worlds import HOST

FIRST, LAST = 25000, 48000  # source ports: no rule of random worlds tells them apart
_Say = Callable[[bytes], object]


class Sender:
    """Sends while it is entered."""

    def __init__(self, fabric: Fabric, shots: Sequence[Shot]) -> None:
        self.fabric, self.shots = fabric, shots
        self.sent = 0
        self._shared = mmap.mmap(-1, 16)  # rounds done; anything: stop
        self._cpu = max(range(os.cpu_count() or 1))

    def __enter__(self) -> Sender:
        lines = [self._line(shot, number) for number, shot in enumerate(self.shots)]
        self._child = os.fork()
        if not self._child:
            with contextlib.suppress(BaseException):
                os.sched_setaffinity(0, {self._cpu})
                self._run(lines)
            os._exit(0)
        return self

    def __exit__(self, *_: object) -> None:
        self._shared[8] = 1
        os.waitpid(self._child, 0)
        self.sent = self._rounds() * len(self.shots)
        mine = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {self._cpu})
        self.fabric.settle()  # what waits in that CPU's queue is through
        os.sched_setaffinity(0, mine)

    def twice(self) -> None:
        """Each packet was sent twice from now on."""
        wanted = self._rounds() + 3
        eventually(lambda: self._rounds() >= wanted, "the sender goes round")

    def passed(self) -> int:
        """How many came to another than who sent them."""
        numbers = ((where, number_of(frame)) for where, frame in self.fabric.heard())
        return sum(number is not None and where != self.shots[number].sender for where, number in numbers)

    def _rounds(self) -> int:
        return int.from_bytes(self._shared[:8], "little")

    def _line(self, shot: Shot, number: int) -> tuple[_Say, bytearray, int]:
        """How to say it, what, and where the two bytes stand that make a new flow of it."""
        of_link = 0 if shot.sender == HOST else 14
        header = of_link + (20 if len(shot.packet.source) == 4 else 40)
        at = header + (0 if shot.packet.icmp is None else 4)
        if shot.sender == HOST:
            return self.fabric.own.say, bytearray(ip_of(shot.packet, number)), at
        port = self.fabric.ports[shot.sender]
        return _patient(port.wire), bytearray(frame_of(shot.packet, number, port)), at

    def _run(self, lines: Sequence[tuple[_Say, bytearray, int]]) -> None:
        for turn in count():
            fresh = (FIRST + turn % (LAST - FIRST)).to_bytes(2, "big")
            for say, packet, at in lines:
                packet[at : at + 2] = fresh
                say(bytes(packet))
            self._shared[:8] = (turn + 1).to_bytes(8, "little")
            if self._shared[8]:
                return


def _patient(wire: socket.socket) -> _Say:
    def say(frame: bytes) -> None:
        with contextlib.suppress(BlockingIOError, OSError):  # no room: the next one is as good
            wire.send(frame)

    return say


def steady(shots: Sequence[Shot], forbidden: Callable[[Shot], bool]) -> list[Shot]:
    """Those that stay forbidden whatever source port of ours they have."""
    found = []
    for shot in shots:
        packet = shot.packet
        if packet.icmp is not None:
            found.append(shot)
        elif packet.source_port and (packet.destination_port or FIRST) < FIRST:
            other = shot._replace(packet=replace(packet, source_port=FIRST))
            found += [other] if forbidden(other) else []
    return found
