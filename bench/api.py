# Owns: how a benchmark speaks to a dispatcher's operators' API, and waits. Touches: the socket it is given.
from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.cage import CageError

IDLE = 30.0  # seconds; after some more the dispatcher hangs up
PATIENCE = 120.0  # seconds until a condition that should hold is given up


class Api:
    """The operators' socket, with one connection kept. Raw: a client's library would be measured, too."""

    def __init__(self, path: Path) -> None:
        self._path, self._used = path, 0.0
        self._socket: socket.socket | None = None

    def call(self, method: str, path: str, body: object = None) -> Any:
        """Raises CageError."""
        status, said = self.ask(method, path, body)
        if status != 200:
            raise CageError(f"{method} {path}: {said}")
        return said

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """HTTP's status, and what it says."""
        if self._socket is None or time.monotonic() - self._used > IDLE:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(PATIENCE)
            self._socket.connect(str(self._path))
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: dispatcher\r\nContent-Length: {len(data)}\r\n\r\n"
        self._socket.sendall(head.encode() + data)
        answer = self._read(self._socket)
        self._used = time.monotonic()
        return answer

    @staticmethod
    def _read(s: socket.socket) -> tuple[int, Any]:
        data, at = b"", -1
        while at < 0:
            data += s.recv(1 << 16) or _closed()
            at = data.find(b"\r\n\r\n")
        head = data[:at].lower()
        length = int(head.partition(b"content-length:")[2].split(b"\r", 1)[0])
        while len(data) < at + 4 + length:
            data += s.recv(1 << 16) or _closed()
        return int(head.split(b" ", 2)[1]), json.loads(data[at + 4 :])


def _closed() -> bytes:
    raise CageError("the dispatcher hung up")


def document(kind: str, name: str, **spec: Any) -> dict[str, Any]:
    return {"apiVersion": "slash32/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}


def until(holds: Callable[[], object], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > deadline:
            raise CageError(what())
        time.sleep(0.01)
