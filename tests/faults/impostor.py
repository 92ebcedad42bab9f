# Owns: a registered host's key in other hands, on real sockets. Touches: one DEALER.
from __future__ import annotations

import os
import time

import zmq
from dispatcher_rig import FakeHost, Rack

from slash32 import wire
from slash32.wire import Claimed, FromDispatcher, FromHost, Hello, Report


class Hostile:
    """A host's key in other hands."""

    def __init__(self, rack: Rack, host: FakeHost) -> None:
        self.rack, self.host = rack, host
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.connect()
        self.said = 0  # characters in the dispatcher's log before it began

    def connect(self, queue: int = 1000) -> zmq.Socket[bytes]:
        s = self.context.socket(zmq.DEALER)
        s.linger, s.sndhwm, s.rcvhwm, s.sndtimeo = 0, 0, queue, 20_000
        s.setsockopt(zmq.ROUTING_ID, os.urandom(16))
        if queue == 1:
            s.setsockopt(zmq.RCVBUF, 2304)
        s.curve_publickey, s.curve_secretkey = self.host.keys.public.encode(), self.host.keys.secret.encode()
        s.curve_serverkey = self.rack.dispatcher.public_key.encode()
        s.connect(f"tcp://127.0.0.1:{self.rack.dispatcher.port}")
        return s

    def anew(self, queue: int = 1000) -> None:
        """`queue`: so many messages it takes before it is asked to."""
        self.socket.close(0)
        self.socket = self.connect(queue)

    def asks(self, number: int = 99) -> None:
        """It says Hello as it should, and is answered: everything that was said before has been taken."""
        self.socket.send(wire.encode_to_dispatcher(Hello("", 0, 0)))
        self.socket.send(wire.encode_to_dispatcher(Report(number, ())))
        while True:
            assert self.socket.poll(20_000), "it gets no answer any more"
            message = wire.decode_from_dispatcher(self.socket.recv_multipart())
            if isinstance(message, Claimed) and message.seq == number:
                return

    def close(self) -> None:
        self.socket.close(0)
        self.context.term()

    def say(self, *messages: FromHost) -> None:
        for message in messages:
            self.socket.send(wire.encode_to_dispatcher(message))

    def hears(self, until: type, seconds: float = 20.0) -> list[FromDispatcher]:
        """Everything up to the first of that kind."""
        found: list[FromDispatcher] = []
        end = time.monotonic() + seconds
        while self.socket.poll(max(0, int(1000 * (end - time.monotonic())))):
            found.append(wire.decode_from_dispatcher(self.socket.recv_multipart()))
            if isinstance(found[-1], until):
                return found
        raise AssertionError(f"no {until.__name__} in {found[-5:]}")
