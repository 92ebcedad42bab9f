# The floor of `bench.fanout`: a ROUTER with CURVE that sends given bytes to its peers and counts acknowledgements, and
# nothing else. A process of its own, told over a pipe what to send.
from __future__ import annotations

import os
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import zmq

from bench.served import memory
from slash32.keys import KeyPair
from slash32.wire import Tag

BIG = 64 << 10  # frames from this size are not copied, as the dispatcher does it
Message = Sequence[bytes]


def identity(host: int) -> bytes:
    return b"s" + host.to_bytes(15, "big")


class Bare:
    def __init__(self, pipe: Connection, endpoint: str, keys: KeyPair) -> None:
        self.pipe = pipe
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=2)
        self.context.set(zmq.MAX_SOCKETS, 20_000)
        self.router = self.context.socket(zmq.ROUTER)
        self.router.curve_server = True
        self.router.curve_secretkey, self.router.curve_publickey = keys.secret.encode(), keys.public.encode()
        for option, value in ((zmq.LINGER, 0), (zmq.BACKLOG, 4096), (zmq.SNDHWM, 1000), (zmq.RCVHWM, 64),
                              (zmq.ROUTER_HANDOVER, 1), (zmq.IPV6, 1)):  # fmt: skip
            self.router.setsockopt(option, value)
        self.endpoint = endpoint

    def storm(self, answers: dict[int, list[Message]]) -> None:
        """Whoever reports is answered; until all have acknowledged. Tells when that was."""
        self.router.bind(self.endpoint)
        waiting = len(answers)
        while waiting:
            peer, body = self.router.recv_multipart()
            if body[1] == Tag.REPORT:
                for frames in answers[int.from_bytes(peer[1:], "big")]:
                    self.send(peer, frames)
            elif body[1] == Tag.ACK:
                waiting -= 1
        self.pipe.send((time.monotonic(), memory(os.getpid(), "VmHWM")))

    def send(self, peer: bytes, frames: Message) -> None:
        send = self.router.send
        send(peer, zmq.SNDMORE)
        for frame in frames[:-1]:
            send(frame, zmq.SNDMORE, len(frame) < BIG)
        send(frames[-1], 0, len(frames[-1]) < BIG)

    def round(self, messages: list[tuple[bytes, Message]]) -> None:
        """Sends all, takes as many acknowledgements. Tells how many seconds that took, and of CPU."""
        recv, waiting = self.router.recv_multipart, len(messages)
        used, begun = time.process_time(), time.monotonic()
        for peer, frames in messages:
            self.send(peer, frames)
        while waiting:
            waiting -= recv()[1][1] == Tag.ACK
        self.pipe.send((time.monotonic() - begun, time.process_time() - used))

    def run(self) -> None:
        self.storm(self.pipe.recv())
        while True:
            command: Any = self.pipe.recv()
            if command is None:
                return
            self.round(command)


def serve(pipe: Connection, endpoint: str, keys: KeyPair, cores: set[int]) -> None:
    os.sched_setaffinity(0, cores)
    Bare(pipe, endpoint, keys).run()
