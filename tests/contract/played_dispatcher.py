# Dispatchers that a test plays: real CURVE, real ZAP, and every answer is the test's. No thread: `pump` is the loop;
# and the stage on which one host meets them.
from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq
from dispatcher_rig import PATIENCE
from zmq.utils import z85

from hostd.session.feed import Connected, Disconnected, Feed, FeedConfig, FeedEvent, Missed, Place
from slash32 import wire
from slash32.keys import KeyPair, load_or_create_key
from slash32.sync import Replica
from slash32.wire import Delta, Hello

Answers = Callable[[wire.FromHost], list[wire.FromDispatcher]]


def up_to_date(message: wire.FromHost) -> list[wire.FromDispatcher]:
    """What a dispatcher with nothing new says."""
    match message:
        case Hello():
            return [Delta(message.epoch, message.revision, message.revision, message.digest, ())]
        case wire.Report(seq) | wire.Claim(seq) | wire.Expect(seq) | wire.Release(seq):
            return [wire.Claimed(seq)]
    return []


def known(epoch: str = "e", revision: int = 5) -> Replica:
    """What a host has that has spoken with a dispatcher before."""
    replica = Replica()
    replica.hello()
    replica.receive(wire.Snapshot(epoch, revision, 0, False, ()))
    replica.lost()
    return replica


class Played:
    def __init__(self, folder: Path, name: str, port: int = 0) -> None:
        self.pair: KeyPair = load_or_create_key(folder / f"{name}.server")
        self.welcome: set[str] = set()  # public keys of hosts; empty: everybody
        self.asked: list[str] = []  # public keys that came to ZAP
        self.heard: list[wire.FromHost] = []
        self.answers: Answers = up_to_date
        self.mute = False  # does nothing, as if stopped
        self._peers: list[bytes] = []
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._zap = self._context.socket(zmq.REP)
        self._zap.bind("inproc://zeromq.zap.01")
        self._router = self._context.socket(zmq.ROUTER)
        self._router.curve_server = True
        self._router.curve_secretkey = self.pair.secret.encode()
        self._router.curve_publickey = self.pair.public.encode()
        self._router.zap_domain = b"slash32"
        self._router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        self._router.bind(f"tcp://127.0.0.1:{port or '*'}")
        endpoint = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self.port = int(endpoint.rpartition(":")[2])
        self.place = Place(endpoint, self.pair.public)

    @property
    def hellos(self) -> list[Hello]:
        return [message for message in self.heard if isinstance(message, Hello)]

    def pump(self) -> None:
        if self.mute:
            return
        while self._zap.poll(0):
            frames = self._zap.recv_multipart()
            key = bytes(z85.encode(frames[6])).decode()  # type: ignore[no-untyped-call]
            self.asked.append(key)
            status = b"200" if not self.welcome or key in self.welcome else b"400"
            self._zap.send_multipart([b"1.0", frames[1], status, b"", key.encode(), b""])
        while self._router.poll(0):
            identity, body = self._router.recv_multipart()
            message = wire.decode_from_host(body)
            self.heard.append(message)
            if isinstance(message, Hello):
                self._peers.append(identity)
            for answer in [wire.Pong(5)] if isinstance(message, wire.Ping) else self.answers(message):
                self._router.send_multipart([identity, *wire.encode_to_host(answer)])

    def send(self, *frames: bytes) -> None:
        """To whoever came last."""
        self._router.send_multipart([self._peers[-1], *frames])

    def close(self) -> None:
        self._router.close(0)
        self._zap.close(0)
        self._context.term()


class Stage:
    """Dispatchers that are played, and one host."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.key_file = folder, folder / "hostd.key"
        self.played: list[Played] = []
        self.replica = known()
        self.events: list[FeedEvent] = []
        self.feed: Feed | None = None
        self.later = 0.0  # seconds that the host was asleep

    def dispatchers(self, count: int) -> list[Played]:
        self.played += [Played(self.folder, f"d{n}") for n in range(count)]
        return self.played

    def start(self, *places: Place) -> Feed:
        where = places or tuple(played.place for played in self.played)
        config = FeedConfig(where, self.key_file, host="h1", about={"version": "9"})
        self.feed = Feed(config, self.replica)
        return self.feed

    def turn(self) -> None:
        for played in self.played:
            played.pump()
        assert self.feed
        for event in self.feed.tick(time.monotonic() + self.later):
            self.events.append(event)
            if isinstance(event, Connected):
                self.feed.report(())
        time.sleep(0.002)

    def until(self, holds: Callable[[], Any]) -> None:
        end = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < end, (self.events[-5:], self.feed and self.feed.trouble)
            self.turn()

    def for_a_while(self, seconds: float) -> None:
        """How often something happens at most: a slow machine only makes it less."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.turn()

    def present(self) -> Played:
        assert self.feed
        return next(p for p in self.played if p.place.endpoint == self.feed.endpoint)

    def in_sync(self) -> bool:
        return self.feed is not None and self.feed.in_sync

    def restart(self) -> None:
        assert self.feed
        self.feed.close()
        self.replica = Replica.load(self.replica.dump())
        self.start()

    def reasons(self) -> list[str]:
        return [event.reason for event in self.events if isinstance(event, Disconnected | Missed)]

    def close(self) -> None:
        if self.feed is not None:
            self.feed.close()
        for played in self.played:
            played.close()
