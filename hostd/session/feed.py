# Owns: the host's session with a dispatcher: what is said, what comes in, and when the dispatcher has had its time.
# Touches: its line (line.py), and the clock once, at its beginning. Belongs to one thread; `now` is monotonic seconds.
from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import zmq

from slash32 import wire
from slash32.model import Endpoint, EndpointKey
from slash32.net import Address
from slash32.sync import NO_SESSION, Applied, Held, NeedSnapshot, Replica
from slash32.wire import Ack, Claim, Expect, Failure, Refusal, Release, Report, WireError

from .dealer import Place
from .line import Line

__all__ = [
    "Applied", "Asked", "ClaimAnswer", "Connected", "Disconnected", "Feed", "FeedConfig", "FeedEvent", "Held", "Missed",
    "Place",
]  # fmt: skip

PING_EVERY = 5.0  # seconds
SILENCE = 15.0  # seconds without an answer from the dispatcher: not connected, whatever TCP says
HELLO_AGAIN = 2.0  # seconds between two requests for a snapshot, at least
HELD_AGAIN = 60.0  # seconds between two questions, at most, whether a dispatcher that was behind has caught up


@dataclass(frozen=True, slots=True)
class FeedConfig:
    dispatchers: tuple[Place, ...]  # at least one
    key_file: Path  # this host's own key pair, made at first use
    addresses: tuple[Address, ...] = ()  # next hops of this host
    host: str = ""  # its name
    about: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))  # words about it (wire.ABOUT)


class Connected(NamedTuple):
    """A session is open: call `report` with all live claims."""

    endpoint: str = ""


class Disconnected(NamedTuple):
    """Nothing that was asked will be answered. `away`: the dispatcher sends its hosts to another: no alarm."""

    reason: str
    away: bool = False


class Missed(NamedTuple):
    """There was no session with that dispatcher, and why."""

    endpoint: str
    reason: str


class ClaimAnswer(NamedTuple):
    """Of the report, claim or release with this number; what it needs was applied before."""

    seq: int
    refused: tuple[Refusal, ...]


class Asked(NamedTuple):
    """An operator's question: `Feed.answer` it (slash32.questions)."""

    seq: int
    question: str


FeedEvent = Connected | Disconnected | Missed | ClaimAnswer | Applied | Held | Asked


@dataclass(slots=True)
class _Session:
    """What was said and heard on the present connection. Moments < 0: not yet."""

    hello_at: float = -1.0
    again: bool = False  # a Hello is due, as soon as HELLO_AGAIN allows
    pinged: float = -1.0
    unanswered: float = -1.0  # the first ping without a word since
    accepted: bool = False  # the Hello was answered: the dispatcher takes this host for its own
    hellos: int = 0


class Feed:
    """Register `fileno()` for reading; call `ready` when it is, `tick` at least every second and after `patience`."""

    def __init__(self, config: FeedConfig, replica: Replica, context: zmq.Context[zmq.Socket[bytes]] | None = None):
        """Raises KeyFileError, and ValueError for a dispatcher that zmq does not take."""
        self.config = config
        self.replica = replica
        self.connected = False
        self._seq = 0
        self._events: list[FeedEvent] = []
        self._session = _Session()
        self._holding: set[str] = set()  # dispatchers whose content was refused, since one's was taken
        self._patience = HELLO_AGAIN  # with such a one
        self._line = Line(config.dispatchers, config.key_file, context)
        try:
            self._line.step(time.monotonic())
        except ValueError:
            self._line.close()
            raise

    def close(self) -> None:
        self._line.close()

    def fileno(self) -> int:
        return self._line.fileno()

    @property
    def in_sync(self) -> bool:
        return self.connected and self.replica.in_sync

    @property
    def endpoint(self) -> str:
        """The dispatcher that is spoken with; "" where there is no session."""
        return self._line.endpoint if self.connected else ""

    @property
    def trouble(self) -> str:
        """Why not connected, for people."""
        return "" if self.connected else self._line.trouble

    @property
    def key_trouble(self) -> str:
        """Why the next key is not used, if there is one and it is not."""
        return self._line.identity.trouble

    @property
    def public_key(self) -> str:
        return self._line.identity.present.public

    def patience(self, now: float) -> float:
        """Seconds until `tick` has something to do that no descriptor tells."""
        return self._line.patience(now)

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

    def expect(self, endpoint: Endpoint) -> int:
        """A guest that is on its way here; to be said again after each report."""
        self._seq += 1
        self._say(Expect(self._seq, endpoint))
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
        if self.connected and not self._line.send(wire.encode_to_dispatcher(message)):
            self._line.leave("the dispatcher does not take what this host sends")
            self._drop("the dispatcher does not take what this host sends")

    # -- what comes in --------------------------------------------------------------------------------------------

    def ready(self, now: float) -> list[FeedEvent]:
        """Takes everything that has come; what it means, in order."""
        self._line.awake()
        self._hear(now)
        self._greet(now)
        endpoint, why = self._line.endpoint, self._line.step(now)
        if why:
            if self._session.hello_at < 0:
                self._events.append(Missed(endpoint, why))
            self._drop(why)
            self._session = _Session()
        events, self._events = self._events, []
        return events

    def tick(self, now: float) -> list[FeedEvent]:
        self._hear(now)  # first: after a long sleep here what is due may have come long ago
        self._judge(now)
        return self.ready(now)

    def _hear(self, now: float) -> None:
        while (frames := self._line.receive()) is not None:
            self._session.unanswered = -1.0
            self._receive(frames, now)
        if self._line.watch(now):
            self._session = _Session(again=True)

    def _judge(self, now: float) -> None:
        """What the dispatcher does not do tells nothing but by the clock."""
        session = self._session
        if not self._line.is_open:
            return
        if session.unanswered >= 0 and now - session.unanswered > SILENCE:
            self._line.leave(f"no word from the dispatcher for {SILENCE:.0f} s")
        elif session.hello_at >= 0 and now - session.pinged >= PING_EVERY and self._line.send(wire.PING):
            session.pinged = now
            session.unanswered = now if session.unanswered < 0 else session.unanswered
        if not self.connected or self.replica.in_sync:
            return
        if not self.replica.held:
            if now - session.hello_at > SILENCE:
                self._line.leave(f"no content from the dispatcher for {SILENCE:.0f} s")
        elif self._line.several and now - session.hello_at > self._patience:
            self._doubt()

    def _doubt(self) -> None:
        """Its content was refused, and an operator may have to decide; but it may only be behind, or alone in that."""
        self._patience = min(HELD_AGAIN, 2 * self._patience)
        self._holding.add(self._line.endpoint)
        if self._session.hellos == 1 or len(self._holding) == len(self.config.dispatchers):
            self._session.again = True
        else:
            self._line.leave(f"its content is refused: {self.replica.held}")

    def _greet(self, now: float) -> None:
        session = self._session
        if not session.again or not self._line.is_open:
            return
        if session.hello_at >= 0:
            if now - session.hello_at < HELLO_AGAIN:
                return
            if self._line.another_key(now):  # made since
                self._drop("a new connection, with the next key")
                self._session = _Session()
                return
        hello = self.replica.hello(self.config.addresses)._replace(name=self.config.host, about=self.config.about)
        if not self._line.send(wire.encode_to_dispatcher(hello)):
            return  # the pipe is not there yet, or full: the next tick tries again
        session.again, session.hello_at, session.hellos = False, now, session.hellos + 1
        if not self.connected:
            self.connected = True
            self._events.append(Connected(self._line.endpoint))

    def _drop(self, reason: str, away: bool = False) -> None:
        if self.connected:
            self.connected = False
            self.replica.lost()
            self._events.append(Disconnected(reason, away))

    # -- what it says ---------------------------------------------------------------------------------------------

    def _receive(self, frames: list[bytes], now: float) -> None:
        try:
            message = wire.decode_from_dispatcher(frames)
        except WireError as e:
            self._line.leave(f"the dispatcher sent what this host does not understand: {e}")
            return
        if isinstance(message, wire.Refused):
            away = message.message.startswith(wire.AWAY)
            self._line.leave(message.message)
            self._drop(f"refused by the dispatcher: {message.message}", away)
        elif not self.connected:
            self._session.again = True  # what it says belongs to no session
        elif isinstance(message, wire.Pong) and message.revision == NO_SESSION:
            self._drop("the dispatcher knows of no session with this host")
            self._session.again = True
        else:
            if not self._session.accepted and isinstance(message, wire.Snapshot | wire.Delta | wire.Claimed):
                self._session.accepted = True
                self._line.accepted(now)
            self._mean(message)

    def _mean(self, message: wire.Snapshot | wire.Delta | wire.Claimed | wire.Pong | wire.Ask) -> None:
        match message:
            case wire.Claimed(seq, refused):
                self._events.append(ClaimAnswer(seq, refused))
            case wire.Ask(seq, question):
                self._events.append(Asked(seq, question))
            case wire.Snapshot() | wire.Delta() | wire.Pong():
                for outcome in self.replica.receive(message):
                    if isinstance(outcome, NeedSnapshot):
                        self._session.again = True
                        continue
                    self._events.append(outcome)
                    if isinstance(outcome, Applied):
                        self._holding.clear()
                        self._patience = HELLO_AGAIN
