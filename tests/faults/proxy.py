# Owns: somebody between hosts and a dispatcher: TCP through a thread that loses, delays, doubles, cuts, flips, swaps
# bytes, breaks connections and lets them hang, as its seed says. Touches: sockets on loopback, a thread of its own.
from __future__ import annotations

import contextlib
import random
import selectors
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

CHUNK = 4096
FAULTS = ("drop", "delay", "double", "cut", "flip", "swap", "hang")
_RESET = struct.pack("ii", 1, 0)


@dataclass(slots=True, eq=False)
class Way:
    """One direction of a connection."""

    source: socket.socket
    sink: socket.socket
    waiting: bytearray = field(default_factory=bytearray)
    since: float = 0.0  # nothing goes on before
    late: bytes = b""  # is to go after what comes next
    hangs: bool = False


class Proxy:
    """`odds`: how often something happens to what is read at a time; `faults`: which of FAULTS."""

    def __init__(
        self, target: int, seed: int, odds: float = 0.0, faults: tuple[str, ...] = FAULTS, bind: str = "127.0.0.1"
    ) -> None:
        self.target, self.odds, self.faults = target, odds, faults
        self.done: Counter[str] = Counter()
        self.passed = 0  # bytes
        self._noise = random.Random(seed)
        self._deck: list[str] = []  # each fault once before any comes again
        self._lock = threading.Lock()
        self._listener = socket.create_server((bind, 0), backlog=128)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._ways: dict[socket.socket, Way] = {}
        self._over = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over = True
        self._thread.join(10)
        for way in list(self._ways.values()):
            self._break(way)
        self._listener.close()
        self._selector.close()

    def calm(self) -> None:
        """From now on it is a good line; what hung is broken."""
        self.odds = 0.0
        with self._lock:
            for way in list(self._ways.values()):
                if way.hangs or way.late:
                    self._break(way)

    def hang(self) -> None:
        """Everything that is open stays so, and is silent for ever."""
        with self._lock:
            for way in self._ways.values():
                way.hangs = True
                self.done["hang"] += 1

    def cut(self) -> None:
        """Every connection, with a reset."""
        with self._lock:
            for way in list(self._ways.values()):
                self._break(way)

    @property
    def connections(self) -> int:
        return len(self._ways) // 2

    def _run(self) -> None:
        while not self._over:
            ready = self._selector.select(0.005)
            with self._lock:
                for key, _ in ready:
                    if key.fileobj is self._listener:
                        self._accept()
                    elif (way := self._ways.get(key.fileobj)) is not None:  # type: ignore[call-overload]
                        self._read(way)
                now = time.monotonic()
                for way in list(self._ways.values()):
                    if way.source in self._ways:
                        self._write(way, now)

    def _accept(self) -> None:
        try:
            near, _ = self._listener.accept()
        except BlockingIOError:
            return
        try:
            far = socket.create_connection(("127.0.0.1", self.target), 5)
        except OSError:
            near.close()
            return
        for source, sink in ((near, far), (far, near)):
            source.setblocking(False)
            source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._ways[source] = Way(source, sink)
            self._selector.register(source, selectors.EVENT_READ)

    def _read(self, way: Way) -> None:
        if len(way.waiting) > 1 << 20:
            return
        try:
            data = way.source.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._break(way)
        elif not way.hangs:
            self._pass(way, data)

    def _pass(self, way: Way, data: bytes) -> None:
        fault = ""
        if self._noise.random() < self.odds:
            self._deck = self._deck or self._noise.sample(self.faults, len(self.faults))
            fault = self._deck.pop()
        self.done[fault] += 1
        late, way.late = way.late, b""
        match fault:
            case "drop":
                self._break(way)
                return
            case "delay":
                way.since = time.monotonic() + self._noise.random() * 0.2
            case "double":
                data += data
            case "cut":
                data = data[: self._noise.randrange(len(data))]
            case "flip":
                at = self._noise.randrange(len(data))
                data = data[:at] + bytes([data[at] ^ 1 << self._noise.randrange(8)]) + data[at + 1 :]
            case "swap":
                way.late, data = data, b""
            case "hang":
                way.hangs = True
        way.waiting += data + late

    def _write(self, way: Way, now: float) -> None:
        if not way.waiting or way.hangs or now < way.since:
            return
        try:
            sent = way.sink.send(way.waiting)
        except BlockingIOError:
            return
        except OSError:
            self._break(way)
            return
        self.passed += sent
        del way.waiting[:sent]

    def _break(self, way: Way) -> None:
        for end in (way.source, way.sink):
            if self._ways.pop(end, None) is None:
                continue
            with contextlib.suppress(OSError):
                self._selector.unregister(end)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            end.close()
