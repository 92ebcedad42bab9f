# Owns: the host's one connection to the dispatcher: CURVE, reconnecting, heartbeats, and the session on it.
# Touches: one DEALER socket and its monitor. Belongs to one thread; `now` is monotonic seconds.
from __future__ import annotations

import contextlib
import os
import select
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import zmq

from slash32 import wire
from slash32.keys import load_or_create_key
from slash32.model import Endpoint, EndpointKey
from slash32.net import Address
from slash32.sync import NO_SESSION, Applied, Held, NeedSnapshot, Replica
from slash32.wire import Ack, Claim, Failure, Refusal, Release, Report, WireError

__all__ = [
    "Applied", "Asked", "ClaimAnswer", "Connected", "Disconnected", "Feed", "FeedConfig", "FeedEvent", "Held",
    "load_or_create_key",
]  # fmt: skip

PING_EVERY = 5.0  # seconds
SILENCE = 15.0  # seconds without a word from the dispatcher: not connected, whatever TCP says
KNOCK_EVERY = 1.0  # seconds between two attempts of a host whose key is refused
HELLO_AGAIN = 2.0  # seconds between two requests for a snapshot, at least

_EVENT = struct.Struct("=Hi")  # zmq_socket_monitor(3); zmq.utils.monitor would bring asyncio and ssl along: 8 MiB
_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL


@dataclass(frozen=True, slots=True)
class FeedConfig:
    endpoint: str  # tcp://ADDRESS:PORT
    server_key: str  # the dispatcher's public key, Z85
    key_file: Path  # this host's own key pair, made at first use
    addresses: tuple[Address, ...] = ()  # next hops of this host
    host: str = ""  # its name


class Connected(NamedTuple):
    """A session is open: call `report` with all live claims."""


class Disconnected(NamedTuple):
    """Nothing that was asked will be answered."""

    reason: str


class ClaimAnswer(NamedTuple):
    """Of the report, claim or release with this number; what it needs was applied before."""

    seq: int
    refused: tuple[Refusal, ...]


class Asked(NamedTuple):
    """An operator's question: `Feed.answer` it (slash32.questions)."""

    seq: int
    question: str


FeedEvent = Connected | Disconnected | ClaimAnswer | Applied | Held | Asked


@dataclass(slots=True)
class _Session:
    """The present connection. `hello_at` < 0: no Hello was sent on it yet."""

    up: bool = False  # the handshake is done
    refused: bool = False  # it failed for good: zmq itself does not try again
    knocked: float = 0.0
    hello_at: float = -1.0
    again: bool = False  # a Hello is due, as soon as HELLO_AGAIN allows
    heard: float = 0.0
    pinged: float = 0.0
    events: list[FeedEvent] = field(default_factory=list)


class Feed:
    """Register `fileno()` for reading; call `ready` when it is, `tick` at least every second."""

    def __init__(self, config: FeedConfig, replica: Replica, context: zmq.Context[zmq.Socket[bytes]] | None = None):
        """Raises KeyFileError, and ValueError for an endpoint that zmq does not take."""
        self.config = config
        self.replica = replica
        self.connected = False
        self.trouble = "not connected yet"  # why not connected, for people
        self._session = _Session()
        self._seq = 0
        self._context = context or zmq.Context()
        self._own_context = context is None
        self._socket = self._open()
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | _REFUSED
        )
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.epoll()
        for fd in (self._socket.getsockopt(zmq.FD), self._monitor.getsockopt(zmq.FD), self._wake):
            assert isinstance(fd, int)
            self._poll.register(fd, select.EPOLLIN)
        try:
            self._socket.connect(config.endpoint)
        except zmq.ZMQError as e:
            self.close()
            raise ValueError(f"{config.endpoint!r}: {e}; give tcp://ADDRESS:PORT") from None

    def _open(self) -> zmq.Socket[bytes]:
        keys = load_or_create_key(self.config.key_file)
        s = self._context.socket(zmq.DEALER)
        s.linger = 0
        s.setsockopt(zmq.ROUTING_ID, b"s" + os.urandom(15))  # nobody else can guess it, so nobody can take it
        s.curve_publickey, s.curve_secretkey = keys.public.encode(), keys.secret.encode()
        try:
            s.curve_serverkey = self.config.server_key.encode()
        except (ValueError, zmq.ZMQError):
            s.close()
            raise ValueError(f"dispatcher key {self.config.server_key!r} is not 40 characters of Z85") from None
        for option, value in (
            (zmq.MAXMSGSIZE, wire.MAX_FRAME), (zmq.SNDHWM, 1000), (zmq.RCVHWM, 64), (zmq.IMMEDIATE, 1),
            (zmq.HANDSHAKE_IVL, 10_000), (zmq.CONNECT_TIMEOUT, 5_000), (zmq.RECONNECT_IVL, 100),
            (zmq.RECONNECT_IVL_MAX, 5_000), (zmq.HEARTBEAT_IVL, 5_000), (zmq.HEARTBEAT_TIMEOUT, 15_000),
            (zmq.HEARTBEAT_TTL, 15_000), (zmq.IPV6, 1),
        ):  # fmt: skip
            s.setsockopt(option, value)
        return s

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._poll.close()
        os.close(self._wake)
        self._socket.close(0)
        if self._own_context:
            self._context.term()

    def fileno(self) -> int:
        return self._poll.fileno()

    @property
    def in_sync(self) -> bool:
        return self.connected and self.replica.in_sync

    # -- what the host says ---------------------------------------------------------------------------------------

    def report(self, endpoints: Iterable[Endpoint]) -> int:
        """All live claims; what the dispatcher holds beyond them is released. The number its answer will carry."""
        self._seq += 1
        self._say(Report(self._seq, tuple(endpoints)))
        return self._seq

    def claim(self, endpoint: Endpoint) -> int:
        self._seq += 1
        self._say(Claim(self._seq, endpoint))
        return self._seq

    def release(self, key: EndpointKey) -> int:
        self._seq += 1
        self._say(Release(self._seq, key))
        return self._seq

    def answer(self, seq: int, answer: str) -> None:
        """Of the question with this number."""
        self._say(wire.Answer(seq, answer))

    def ack(self, revision: int, failures: Iterable[Failure] = ()) -> None:
        """The kernel has `revision`, but for the failures."""
        if self.in_sync:
            self._say(Ack(revision, tuple(failures)))

    def _say(self, message: wire.FromHost) -> None:
        """Not connected: said by the Hello and the report that follow the next connection."""
        if self.connected and not self._send(message):
            self._drop("the dispatcher does not take what this host sends")
            self._session.again = True

    def _send(self, message: wire.FromHost) -> bool:
        try:
            self._socket.send(wire.encode_to_dispatcher(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        if self._socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:  # type: ignore[operator]
            os.eventfd_write(self._wake, 1)  # sending may take the descriptor's edge: what came in still counts
        return True

    # -- what comes in --------------------------------------------------------------------------------------------

    def ready(self, now: float) -> list[FeedEvent]:
        """Takes everything that has come; what it means, in order."""
        with contextlib.suppress(BlockingIOError):  # another descriptor it was
            os.eventfd_read(self._wake)
        self._watch()
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            self._session.heard = now
            self._receive(frames)
        self._watch()
        self._greet(now)
        return self._taken()

    def tick(self, now: float) -> list[FeedEvent]:
        session = self._session
        if session.refused and now - session.knocked >= KNOCK_EVERY:
            session.refused, session.knocked = False, now
            with contextlib.suppress(zmq.ZMQError):  # zmq may have forgotten the endpoint by itself
                self._socket.disconnect(self.config.endpoint)
            self._socket.connect(self.config.endpoint)
        if self.connected and now - session.heard > SILENCE:
            self._drop(f"no word from the dispatcher for {SILENCE:.0f} s")
            session.again = True
        if session.up and now - session.pinged >= PING_EVERY:
            session.pinged = now
            self._send(wire.Ping())
        if self.connected and not self.replica.in_sync and not self.replica.held and now - session.hello_at > SILENCE:
            session.again = True
        return self.ready(now)

    def _taken(self) -> list[FeedEvent]:
        events, self._session.events = self._session.events, []
        return events

    def _watch(self) -> None:
        while self._monitor.getsockopt(zmq.EVENTS) & zmq.POLLIN:  # type: ignore[operator]
            event, _ = _EVENT.unpack(self._monitor.recv_multipart(zmq.NOBLOCK)[0])
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._drop("a new connection")
                self._session.up, self._session.again, self._session.hello_at = True, True, -1.0
            elif event == zmq.EVENT_DISCONNECTED:
                self._session.up = self._session.again = False
                self._drop("the connection to the dispatcher is lost")
            else:
                self._session.refused = True
                self.trouble = "the dispatcher refuses this host's key: register it as Host.spec.publicKey"

    def _drop(self, reason: str) -> None:
        if self.connected:
            self.connected = False
            self.trouble = reason
            self.replica.lost()
            self._session.events.append(Disconnected(reason))

    def _greet(self, now: float) -> None:
        session = self._session
        if not session.again or not session.up or 0 <= session.hello_at > now - HELLO_AGAIN:
            return
        if not self._send(self.replica.hello(self.config.addresses)._replace(name=self.config.host)):
            return  # the pipe is not there yet, or full: the next tick tries again
        session.again, session.hello_at = False, now
        if not self.connected:
            self.connected, self.trouble, session.heard = True, "", now
            session.events.append(Connected())

    def _receive(self, frames: list[bytes]) -> None:
        events = self._session.events
        try:
            message = wire.decode_from_dispatcher(frames)
        except WireError as e:
            self._drop(f"the dispatcher sent what this host does not understand: {e}")
            self._session.again = True
            return
        if isinstance(message, wire.Refused):
            self._drop(f"refused by the dispatcher: {message.message}")
            self.trouble = message.message
            return
        if not self.connected:
            self._session.again = True  # it was silent, or a greeting is due: what it says belongs to no session
            return
        if isinstance(message, wire.Claimed):
            events.append(ClaimAnswer(message.seq, message.refused))
            return
        if isinstance(message, wire.Ask):
            events.append(Asked(message.seq, message.question))
            return
        if isinstance(message, wire.Pong) and message.revision == NO_SESSION:
            self._drop("the dispatcher knows of no session with this host")
            self._session.again = True
            return
        for outcome in self.replica.receive(message):
            if isinstance(outcome, NeedSnapshot):
                self._session.again = True
            else:
                events.append(outcome)
