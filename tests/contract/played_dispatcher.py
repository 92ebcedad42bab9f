# A dispatcher that a test plays: real CURVE, real ZAP, and every answer is the test's. No thread: `pump` is its loop.
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import zmq
from zmq.utils import z85

from hostd.feed import Place
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
        case wire.Report(seq) | wire.Claim(seq) | wire.Release(seq):
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
