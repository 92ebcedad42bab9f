# Owns: one attempt to speak with one dispatcher with one key: a CURVE connection that is not made again once lost.
# Touches: one DEALER socket and its monitor. Belongs to one thread.
from __future__ import annotations

import enum
import os
import struct
from typing import TYPE_CHECKING, NamedTuple

import zmq

from slash32 import wire
from slash32.keys import KeyPair

if TYPE_CHECKING:
    Context = zmq.Context[zmq.Socket[bytes]]

_EVENTS, _IN, _NOW, _MORE = int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.NOBLOCK), int(zmq.RCVMORE)
_EVENT = struct.Struct("=Hi")  # zmq_socket_monitor(3); zmq.utils.monitor would bring asyncio and ssl along: 8 MiB


class Place(NamedTuple):
    """One dispatcher."""

    endpoint: str  # tcp://ADDRESS:PORT
    key: str  # its public key, Z85


class Pace(NamedTuple):
    """Milliseconds."""

    connect: int  # until TCP is there
    handshake: int  # then until each knows who the other is
    heartbeat: int
    silence: int  # without anything from there: it is lost


ALONE = Pace(connect=5_000, handshake=10_000, heartbeat=5_000, silence=15_000)
# With others to go to: whoever has vanished is left after 1.6 s at most, so that his hosts are back within two.
SEVERAL = Pace(connect=700, handshake=3_000, heartbeat=400, silence=1_200)


class Turn(enum.Enum):
    """What became of the connection."""

    REACHED = zmq.EVENT_CONNECTED  # TCP is there
    OPEN = zmq.EVENT_HANDSHAKE_SUCCEEDED
    UNREACHABLE = zmq.EVENT_CLOSED
    KEY_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH
    NO_HANDSHAKE = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    NO_CURVE = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    LOST = zmq.EVENT_DISCONNECTED


_WATCHED = sum(turn.value for turn in Turn)


class Dealer:
    def __init__(self, context: Context, place: Place, keys: KeyPair, pace: Pace) -> None:
        """Raises ValueError for a place that zmq does not take."""
        self.place, self.keys, self.pace = place, keys, pace
        self.is_open = self.was_open = False
        self._socket = _socket(context, place, keys, pace)
        self._monitor = self._socket.get_monitor_socket(_WATCHED)
        try:
            self._socket.connect(place.endpoint)
        except zmq.ZMQError as e:
            self.close()
            raise ValueError(f"{place.endpoint!r}: {e}; give tcp://ADDRESS:PORT") from None

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)

    def filenos(self) -> tuple[int, int]:
        found, monitor = self._socket.getsockopt(zmq.FD), self._monitor.getsockopt(zmq.FD)
        assert isinstance(found, int) and isinstance(monitor, int)
        return found, monitor

    @property
    def readable(self) -> bool:
        return bool(self._socket.getsockopt(_EVENTS) & _IN)  # type: ignore[operator]

    def send(self, frame: bytes) -> bool:
        """False: the connection takes nothing now. Afterwards look whether it is `readable`: a descriptor's edge may
        be gone."""
        try:
            self._socket.send(frame, _NOW)
        except zmq.Again:
            return False
        return True

    def receive(self) -> list[bytes] | None:
        """What has come. It looks first: that costs a third of the exception that says nothing has."""
        s = self._socket
        if not s.getsockopt(_EVENTS) & _IN:  # type: ignore[operator]
            return None
        try:
            found = [s.recv(_NOW)]
            while s.getsockopt(_MORE):
                found.append(s.recv(_NOW))
        except zmq.Again:
            return None
        return found

    def turn(self) -> Turn | None:
        """The next thing that became of it."""
        if not self._monitor.getsockopt(_EVENTS) & _IN:  # type: ignore[operator]
            return None
        event, _ = _EVENT.unpack(self._monitor.recv_multipart(zmq.NOBLOCK)[0])
        turn = Turn(event)
        if turn is Turn.OPEN:
            self.is_open = self.was_open = True
        elif turn is Turn.LOST:
            self.is_open = False
        return turn


def _socket(context: Context, place: Place, keys: KeyPair, pace: Pace) -> zmq.Socket[bytes]:
    s = context.socket(zmq.DEALER)
    s.linger = 0
    s.setsockopt(zmq.ROUTING_ID, b"s" + os.urandom(15))  # nobody else can guess it, so nobody can take it
    s.curve_publickey, s.curve_secretkey = keys.public.encode(), keys.secret.encode()
    try:
        s.curve_serverkey = place.key.encode()
    except (ValueError, zmq.ZMQError):
        s.close()
        raise ValueError(f"dispatcher key {place.key!r} is not 40 characters of Z85") from None
    for option, value in (
        (zmq.MAXMSGSIZE, wire.MAX_FRAME), (zmq.SNDHWM, 1000), (zmq.RCVHWM, 64), (zmq.IMMEDIATE, 1),
        (zmq.HANDSHAKE_IVL, pace.handshake), (zmq.CONNECT_TIMEOUT, pace.connect), (zmq.RECONNECT_IVL, -1),
        (zmq.HEARTBEAT_IVL, pace.heartbeat), (zmq.HEARTBEAT_TIMEOUT, pace.silence), (zmq.HEARTBEAT_TTL, pace.silence),
        (zmq.IPV6, 1),
    ):  # fmt: skip
        s.setsockopt(option, value)
    return s
