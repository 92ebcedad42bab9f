# Owns: how a benchmark speaks to a dispatcher's operators' API, and waits. Touches: the socket it is given.
from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.cage import CageError

IDLE = 30.0  # seconds; after some more the dispatcher hangs up
PATIENCE = 120.0  # seconds until a condition that should hold is given up


class Api(http.client.HTTPConnection):
    """The operators' socket, with one connection kept."""

    def __init__(self, path: Path) -> None:
        super().__init__("dispatcher", timeout=PATIENCE)
        self.path, self._used = path, 0.0

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))

    def call(self, method: str, path: str, body: object = None) -> Any:
        """Raises CageError."""
        if time.monotonic() - self._used > IDLE:
            self.close()
        self.request(method, path, None if body is None else json.dumps(body))
        answer = self.getresponse()
        said = json.loads(answer.read())
        self._used = time.monotonic()
        if answer.status != 200:
            raise CageError(f"{method} {path}: {said}")
        return said


def document(kind: str, name: str, **spec: Any) -> dict[str, Any]:
    return {"apiVersion": "slash32/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}


def until(holds: Callable[[], object], what: Callable[[], str], pause: float = 0.01) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > deadline:
            raise CageError(what())
        time.sleep(pause)
