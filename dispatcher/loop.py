# Owns: the dispatcher's one thread: hosts' socket, authentication, operators' commands, time. Touches: zmq, signals'
# wake-up, systemd's notify socket. Everything that is decided is decided in the core.
from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import queue
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import zmq

from slash32 import wire
from slash32.errors import Slash32Error
from slash32.keys import KeyPair
from slash32.notify import notify

from .core import Core
from .decisions.inputs import Command, Refused
from .hosts.zap import DOMAIN, Zap
from .operators import fleet
from .replicas.links import Links

if TYPE_CHECKING:
    Context = zmq.Context[zmq.Socket[bytes]]

log = logging.getLogger("slash32.dispatcher")

SWEEP = 2.0  # seconds
AT_ONCE = 2000  # messages that one commit takes together,
ENOUGH = 256 << 10  # or bytes of them: then all others have their turn, whatever one host sends
QUEUE = 64  # messages a connection that wait to be taken; each has up to wire.MAX_FRAME bytes
_NOW = int(zmq.NOBLOCK)
_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
_HAS_MORE = int(zmq.RCVMORE)
BIG = 64 << 10  # frames from this size are handed to zmq without a copy


class ListenError(Slash32Error):
    """One line."""


@dataclass(slots=True)
class _Waiter:
    revision: int
    until: float
    future: Future[Any]
    did: dict[str, Any] | None = None  # what the command answers that waits for its own revision


@dataclass(slots=True)
class _Call:
    run: Callable[[Core], Any]
    future: Future[Any]


class Bell:
    """Ends the loop's sleep, from any thread and from signal handlers."""

    def __init__(self) -> None:
        self._in, self.out = socket.socketpair()
        self._in.setblocking(False)
        self.out.setblocking(False)

    def ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it is awake enough
            self._in.send(b"x")

    def fileno(self) -> int:
        """A byte written there rings it."""
        return self._in.fileno()

    def hush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self.out.recv(4096):
                pass


class Loop:
    def __init__(self, core: Core, listen: str, keys: KeyPair, bell: Bell) -> None:
        """Raises ListenError."""
        self.core = core
        self._stop = False
        self._closed = False
        self._commands: queue.SimpleQueue[Command | _Call | _Waiter] = queue.SimpleQueue()
        self._waiters: list[_Waiter] = []
        self._bell = bell
        self._swept = 0.0
        self._context: Context = zmq.Context(io_threads=2)
        self._zap = Zap(self._context)
        self._router = self._listen(listen, keys)
        self._poller = zmq.Poller()
        self._links = Links(self._context, keys)
        for waited in (self._router, self._zap.socket, bell.out):
            self._poller.register(waited, zmq.POLLIN)

    def _listen(self, listen: str, keys: KeyPair) -> zmq.Socket[bytes]:
        s = self._context.socket(zmq.ROUTER)
        s.curve_server = True
        s.curve_secretkey, s.curve_publickey = keys.secret.encode(), keys.public.encode()
        s.zap_domain = DOMAIN
        for option, value in (
            (zmq.LINGER, 0), (zmq.MAXMSGSIZE, wire.MAX_FRAME), (zmq.HANDSHAKE_IVL, 10_000), (zmq.BACKLOG, 4096),
            (zmq.ROUTER_MANDATORY, 1), (zmq.SNDHWM, 1000), (zmq.RCVHWM, QUEUE), (zmq.IPV6, 1),
            (zmq.ZAP_ENFORCE_DOMAIN, 1), (zmq.HEARTBEAT_IVL, 5_000), (zmq.HEARTBEAT_TIMEOUT, 10_000),
        ):  # fmt: skip
            # Hosts' heartbeats have a time-to-live, too, but libzmq forgets it at each message. ROUTER_HANDOVER lets a
            # host abort libzmq (tests/faults/test_router.py); every connection of a host has an id of its own.
            s.setsockopt(option, value)
        try:
            s.bind(listen)
        except zmq.ZMQError as e:
            s.close()
            raise ListenError(f"cannot listen on {listen}: {e}") from None
        return s

    @property
    def address(self) -> str:
        """Where it listens, with the port that was chosen."""
        return self._router.getsockopt_string(zmq.LAST_ENDPOINT)

    # -- from other threads and from signal handlers ----------------------------------------------------------------

    def submit(self, run: Callable[[Core], Any], who: str = "", seconds: float = 0.0) -> Future[Any]:
        """Run it between two commits; the result comes after the commit that makes it durable. `who`: for the audit.

        `seconds`: it comes when all hosts have its revision or after that time, with the revision's "progress".
        """
        command = Command(self.core, run, who, seconds)
        self._put(command)
        return command.future

    def call(self, run: Callable[[Core], Any]) -> Future[Any]:
        """Run it once, between two messages: it changes nothing that is stored."""
        call = _Call(run, Future())
        self._put(call)
        return call.future

    def wait(self, revision: int, seconds: float) -> Future[Any]:
        """The revision's progress, when all hosts have it or time is up. The next revision may still be to come."""
        waiter = _Waiter(revision, time.monotonic() + seconds, Future())
        self._put(waiter)
        return waiter.future

    def _put(self, command: Command | _Call | _Waiter) -> None:
        if self._closed:
            command.future.set_exception(Refused(503, "the dispatcher is stopping"))
            return
        self._commands.put(command)
        self._bell.ring()

    def stop(self) -> None:
        self._stop = True
        self._bell.ring()

    # -- the loop -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until `stop`."""
        watchdog = int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6
        gc.collect()
        gc.enable()
        gc.freeze()  # what was loaded stays: the collector need not look at it again and again
        notify("READY=1")
        patted = time.monotonic()
        while not self._stop:
            ready = dict(self._poller.poll(self._patience(watchdog)))
            now = time.monotonic()
            while self._zap.socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:  # type: ignore[operator]
                self.core.counts.handshakes_refused += not self._zap.answer(self.core.ledger.keys, now)
            if self._router in ready:
                self._take_messages()
            if self._bell.out.fileno() in ready:
                self._bell.hush()
                self._take_commands()
            if now - self._swept >= SWEEP:
                self._swept = now
                self.core.sweep()
            self.core.company.look(now)
            self._flush()
            self._tell_others(now)
            self.core.questions.expire(now)
            self._serve_waiters()
            if watchdog and now - patted >= watchdog:
                patted = now
                notify("WATCHDOG=1")
            self.core.counts.busy += time.monotonic() - now
        notify("STOPPING=1")

    def close(self) -> None:
        """Answers whoever waits, and says no to what has come since."""
        self._closed = True
        self._stop = True
        self._take_commands()
        self.core.turns.cancel("the dispatcher is stopping")
        for command in self.core.done:
            command.finish()
        for waiting in self._waiters:
            if waiting.did is None:
                waiting.future.set_exception(Refused(503, "the dispatcher is stopping"))
            else:  # it is done, and who asked is to know
                self._tell(waiting)
        self.core.questions.expire(math.inf)
        self._links.close()
        self._router.close(0)
        self._zap.socket.close(0)
        self._context.term()

    def _patience(self, watchdog: float) -> int:
        """Milliseconds."""
        until = min((w.until for w in self._waiters), default=float("inf"))
        core = self.core
        until = min(until, core.questions.deadline, core.turns.deadline, core.company.deadline)
        seconds = min(SWEEP, until - time.monotonic(), watchdog or SWEEP)
        return max(0, int(seconds * 1000) + 1)

    def _take_messages(self) -> None:
        receive, known = self.core.receive, self.core.sessions
        recv, more = self._router.recv, self._router.getsockopt
        taken = 0
        for _ in range(AT_ONCE):
            if taken > ENOUGH:
                return
            try:
                identity = recv(_NOW)
            except zmq.Again:
                return
            user = ""
            if identity in known:
                body = recv(_NOW)
            else:
                frame = self._router.recv(_NOW, copy=False)
                user, body = str(frame["User-Id"]), frame.bytes
            if more(_HAS_MORE):
                while more(_HAS_MORE):
                    recv(_NOW)
                body = b""  # no message of ours has a second frame
            taken += len(body)
            receive(identity, body, user)

    def _take_commands(self) -> None:
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            if not command.future.set_running_or_notify_cancel():
                continue  # the client went away before anything was done
            if self._stop:
                command.future.set_exception(Refused(503, "the dispatcher is stopping"))
            elif isinstance(command, Command):
                self.core.turns.add(command)
            elif isinstance(command, _Waiter):
                self._waiters.append(command)
                self.core.progress = True
            else:
                self._call(command)

    def _call(self, call: _Call) -> None:
        try:
            call.future.set_result(call.run(self.core))
        except Refused as e:
            call.future.set_exception(e)

    def _flush(self) -> None:
        send, counts = self._router.send, self.core.counts
        for identity, frames in self.core.flush():
            try:
                send(identity, _MORE)
                if len(frames) > 1:
                    for frame in frames[:-1]:
                        send(frame, _MORE, len(frame) < BIG)
                send(frames[-1], _NOW, len(frames[-1]) < BIG)
            except zmq.ZMQError:  # unreachable, or it takes nothing: a new Hello begins anew
                self.core.gone(identity)
                continue
            counts.deliveries += 1
            counts.delivered_bytes += sum(map(len, frames))
        if not self.core.done:
            return
        done, self.core.done = self.core.done, []
        for command in done:
            did = command.awaited
            if did is None:
                command.finish()
            else:
                until = time.monotonic() + command.seconds
                self._waiters.append(_Waiter(int(did["revision"]), until, command.future, did))
                self.core.progress = True

    def _tell_others(self, now: float) -> None:
        company = self.core.company
        company.tick(now)
        self._links.follow(company.links, now)
        said, company.out = company.out, []
        for to, word in said:
            self._links.say(word, now, to)

    def _worth_telling(self, revision: int) -> bool:
        """It is on every host, or none that comes soon."""
        known = self.core.revision
        return fleet.live(self.core, revision) if revision <= known else revision > known + 1

    def _serve_waiters(self) -> None:
        if not self._waiters:
            self.core.progress = False
            return
        now = time.monotonic()
        look, self.core.progress = self.core.progress, False
        kept: list[_Waiter] = []
        for waiter in self._waiters:
            if now < waiter.until and not (look and self._worth_telling(waiter.revision)):
                kept.append(waiter)
            else:
                self._tell(waiter)
        self._waiters = kept

    def _tell(self, waiter: _Waiter) -> None:
        try:
            progress = fleet.progress(self.core, waiter.revision)
        except Refused as e:
            waiter.future.set_exception(e)
        else:
            waiter.future.set_result(progress if waiter.did is None else {**waiter.did, "progress": progress})
