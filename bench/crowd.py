# Simulated hosts, many in a process: the real wire and sync code over real DEALER sockets with CURVE; only the kernel
# is left out. Each has a line to the dispatcher and one to the bare ROUTER beside it, where the same bytes come again.
# The first host of each process is a full one.
from __future__ import annotations

import contextlib
import gc
import os
import select
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import zmq

from bench.bare import Message, identity
from bench.served import Fleet
from bench.simulated import Broken, Host, Where, dealer, header, take
from slash32 import wire
from slash32.keys import KeyPair
from slash32.sync import NO_SESSION
from slash32.wire import Ack, Claim, Ping, Tag

PING_EVERY = 5.0  # seconds
_EVENT = struct.Struct("=Hi")
_WATCHED = zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL  # else zmq tries again


@dataclass(slots=True)
class Mood:
    """What the driver wants of all hosts at the moment."""

    prompt: bool = False  # acknowledge what comes, apply it afterwards
    fresh: bool = True  # a Hello asks for everything
    first: bool = True  # what comes is not known yet
    storm: str = ""  # the server that everybody comes back to
    acked: int = 0
    connected: float = 0.0  # the first of all
    last: float = 0.0  # the last acknowledgement
    told: bool = False  # the driver was told that all have acknowledged
    herald: int = -1  # the host that tells the driver which revision it was given
    unanswered: int = 0  # claims
    asked: bool = False  # the driver waits for their answers
    pinged: float = 0.0
    seen: dict[bytes, bytes] = field(default_factory=dict)  # equal frames of snapshots, kept once


class Line:
    """One host's connection to one server."""

    def __init__(self, crowd: Crowd, host: Host, where: Where, keys: KeyPair) -> None:
        self.crowd, self.host, self.server = crowd, host, where.name
        self.replica = host.replica
        name = identity(host.number) if where.name == "bare" else b"s" + os.urandom(15)
        self.socket = dealer(crowd.context, where, keys, name)
        self.monitor = self.socket.get_monitor_socket(_WATCHED | _REFUSED)
        self.got: list[Message] = []  # since the last `collect`
        self.later: list[Message] = []  # acknowledged, not applied yet
        self.up = False
        for waited, call in ((self.socket, self.drain), (self.monitor, self.watch)):
            crowd.listen(int(waited.getsockopt(zmq.FD)), call)
        self.socket.connect(where.endpoint)
        self.watch()

    def watch(self) -> None:
        mood = self.crowd.mood
        while self.monitor.getsockopt(zmq.EVENTS) & zmq.POLLIN:  # type: ignore[operator]
            event, _ = _EVENT.unpack(self.monitor.recv_multipart(zmq.NOBLOCK)[0])
            if event == zmq.EVENT_CONNECTED:
                if mood.storm == self.server and not mood.connected:
                    mood.connected = time.monotonic()
            elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.up = True
                for frame in self.host.hello(mood.fresh):
                    self.socket.send(frame)
                self.drain()
            elif event == zmq.EVENT_DISCONNECTED:
                self.up = False
                if self.server == "dispatcher":
                    self.host.replica.lost()
            else:
                raise Broken(f"host {self.host.name}: the {self.server} does not let it in")

    def drain(self) -> None:
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self.receive(frames)

    def receive(self, frames: Message) -> None:
        tag = frames[0][1]
        if tag == Tag.DELTA:
            self.delta(frames)
        elif tag == Tag.SNAPSHOT:
            self.snapshot(frames)
        elif tag == Tag.CLAIMED:
            self.crowd.mood.unanswered -= 1
            if self.crowd.mood.storm:
                self.got.append(frames)
        elif tag != Tag.PONG or wire.decode_from_dispatcher(frames) == wire.Pong(NO_SESSION):
            raise Broken(f"host {self.host.name}: was told {wire.decode_from_dispatcher(frames)}")

    def delta(self, frames: Message) -> None:
        mood = self.crowd.mood
        if mood.storm and self.server == "bare":
            revision = header(frames[0])[3]
        elif mood.prompt:
            revision = header(frames[0])[3]
            self.later.append(frames)
        else:
            revision = take(self.host.twin if self.server == "bare" else self.replica, frames, self.host.name)
        self.ack(revision)
        if self.server == "dispatcher":
            self.got.append(frames)
            if self.host.number == mood.herald:
                mood.herald = -1
                self.crowd.pipe.send(revision)

    def snapshot(self, frames: Message) -> None:
        mood = self.crowd.mood
        if self.server == "dispatcher":
            if mood.first:
                self.host.begin(frames)
                frames = [mood.seen.setdefault(frame, frame) for frame in frames]
                self.got.append(frames)
            else:
                self.host.again(frames)
        self.ack(header(frames[0])[2])

    def ack(self, revision: int) -> None:
        self.socket.send(wire.encode_to_dispatcher(Ack(revision)))
        mood = self.crowd.mood
        if mood.storm == self.server:
            mood.acked += 1
            mood.last = time.monotonic()

    def catch_up(self) -> None:
        for frames in self.later:
            take(self.host.twin if self.server == "bare" else self.replica, frames, self.host.name)
        self.later.clear()

    def say(self, message: wire.FromHost) -> None:
        self.socket.send(wire.encode_to_dispatcher(message))


class Crowd:
    def __init__(self, pipe: Connection, fleet: Fleet, keys: Mapping[int, KeyPair]) -> None:
        self.pipe, self.fleet, self.keys = pipe, fleet, keys
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self.context.set(zmq.MAX_SOCKETS, 20_000)
        self.mood = Mood()
        self.hosts = {n: Host(fleet, n, n == min(keys)) for n in keys}
        self.lines: dict[str, dict[int, Line]] = {"dispatcher": {}, "bare": {}}
        self.poll = select.epoll()
        self.calls: dict[int, Any] = {}
        self.listen(pipe.fileno(), self.obey)
        self.going = True

    def listen(self, fd: int, call: Any) -> None:
        self.calls[fd] = call
        self.poll.register(fd, select.EPOLLIN)

    def run(self) -> None:
        gc.disable()
        calls, mood = self.calls, self.mood
        while self.going:
            for fd, _ in self.poll.poll(1.0, 2048):
                calls[fd]()
            if mood.storm == "bare":
                self.ping()
            if mood.storm and not mood.told and mood.acked == len(self.hosts):
                mood.told = True
                self.pipe.send((mood.connected, mood.last))
            if mood.asked and mood.unanswered <= 0:
                mood.asked = False
                self.pipe.send("answered")

    def obey(self) -> None:
        command, *values = self.pipe.recv()
        getattr(self, f"do_{command}")(*values)

    # -- what the driver says ---------------------------------------------------------------------------------------

    def do_claim_all(self, where: Where) -> None:
        """Every host reports its guests, and goes: nobody is there to be told of the others'."""
        for number, host in self.hosts.items():
            s = dealer(self.context, where, self.keys[number], b"s" + os.urandom(15))
            s.connect(where.endpoint)
            for frame in host.hello(True):
                s.send(frame)
            while (frames := s.recv_multipart())[0][1] != Tag.CLAIMED:
                if frames[0][1] == Tag.REFUSED:
                    raise Broken(f"host {host.name}: {wire.decode_from_dispatcher(frames)}")
            s.close(0)
        self.pipe.send("claimed")

    def do_storm(self, server: str, fresh: bool, first: bool) -> None:
        """All come back as soon as the server is there; answered when all have acknowledged."""
        self.mood.storm, self.mood.fresh, self.mood.first = server, fresh, first
        self.mood.acked, self.mood.connected, self.mood.told, self.mood.prompt = 0, 0.0, False, False
        self.pipe.send("ready")

    def do_connect(self, where: Where) -> None:
        for number, host in self.hosts.items():
            self.lines[where.name][number] = Line(self, host, where, self.keys[number])

    def do_pair(self) -> None:
        for host in self.hosts.values():
            host.pair()
        gc.freeze()
        self.pipe.send("paired")

    def do_begin(self, prompt: bool) -> None:
        self.mood.prompt, self.mood.storm = prompt, ""
        self.mood.unanswered = 0
        self.ping()
        self.pipe.send("ready")

    def do_claim(self, host: int, number: int, grouped: bool) -> None:
        """Its labels change: when it was sent is told, and which revision it became."""
        self.mood.herald = host
        self.pipe.send(time.monotonic())
        self.do_claim_too(host, number, grouped)

    def do_claim_too(self, host: int, number: int, grouped: bool) -> None:
        """One of many."""
        endpoint = self.hosts[host].claims[number] = self.fleet.endpoint(number, grouped)
        self.mood.unanswered += 1
        self.lines["dispatcher"][host].say(Claim(2, endpoint))
        self.lines["dispatcher"][host].drain()

    def do_claims_answered(self) -> None:
        self.mood.asked = True

    def do_collect(self) -> None:
        """What the dispatcher has told each host since it was last asked; all that is owed is applied first."""
        for line in (*self.lines["dispatcher"].values(), *self.lines["bare"].values()):
            line.drain()
            line.catch_up()
        self.pipe.send({n: line.got for n, line in self.lines["dispatcher"].items() if line.got})
        for line in self.lines["dispatcher"].values():
            line.got = []
        self.mood.seen.clear()

    def do_check(self) -> None:
        """Every host is in sync, and its twin says the same."""
        bad = [h.name for h in self.hosts.values() if not h.replica.in_sync or h.replica.digest != h.twin.digest]
        self.pipe.send(bad)

    def do_end(self) -> None:
        self.going = False

    def ping(self) -> None:
        """The dispatcher forgets who is silent. Between rounds, or while the other server is looked at."""
        if time.monotonic() - self.mood.pinged < PING_EVERY:
            return
        self.mood.pinged = time.monotonic()
        for line in self.lines["dispatcher"].values():
            if line.up:
                line.say(Ping())
                line.drain()


def live(pipe: Connection, fleet: Fleet, keys: Mapping[int, KeyPair], cores: set[int]) -> None:
    os.sched_setaffinity(0, cores)
    crowd = Crowd(pipe, fleet, keys)
    try:
        crowd.run()
    except Exception as e:
        with contextlib.suppress(OSError):
            pipe.send(e)
        raise
