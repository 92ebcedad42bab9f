# Owns: the few words of HTTP in which hostd is asked how it is: GET of a page, one a connection. Inside hostd's loop,
# which it never holds up: bounded connections, bytes and time, pages made at most five times a second.
# Touches: one listening TCP socket.
from __future__ import annotations

import errno
import logging
import selectors
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

log = logging.getLogger("slash32.hostd")

MAX_CONNECTIONS = 16
MAX_REQUEST = 8192  # bytes
PATIENCE = 5.0  # seconds for asking and hearing
FRESH = 0.2  # seconds for which a page is good for others who ask
AGAIN = 30.0  # seconds until an address that could not be had is tried again

_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 503: "Service Unavailable"}
_TEXT = "text/plain; charset=utf-8"


class Page(NamedTuple):
    status: int
    kind: str  # Content-Type
    body: str


@dataclass(eq=False, slots=True)
class _Connection:
    socket: socket.socket
    deadline: float
    heard: bytearray = field(default_factory=bytearray)
    left: memoryview = field(default_factory=lambda: memoryview(b""))  # of the answer


class Scrape:
    """`page` makes what is at a path, None where there is nothing. Everything that it registers with the selector is a
    function of the time."""

    def __init__(self, where: tuple[str, int], page: Callable[[str], Page | None]) -> None:
        self._where = where
        self._page = page
        self._selector: selectors.BaseSelector | None = None
        self._listener: socket.socket | None = None
        self._listening = False
        self._tried = float("-inf")
        self._trouble = ""
        self._connections: set[_Connection] = set()
        self._fresh: dict[str, tuple[float, Page | None]] = {}

    @property
    def address(self) -> tuple[str, int] | None:
        """Where it listens; None while it cannot."""
        return None if self._listener is None else self._listener.getsockname()[:2]

    def register(self, selector: selectors.BaseSelector, now: float) -> None:
        self._selector = selector
        self.tick(now)

    def tick(self, now: float) -> None:
        """Every second or so."""
        for connection in [c for c in self._connections if c.deadline <= now]:
            self._drop(connection)
        if self._listener is None and now - self._tried >= AGAIN:
            self._tried = now
            self._open()
        self._listen(True)

    def close(self) -> None:
        for connection in list(self._connections):
            self._drop(connection)
        self._listen(False)
        if self._listener is not None:
            self._listener.close()

    def _open(self) -> None:
        """An address that is not there is no reason to leave guests alone."""
        family = socket.AF_INET6 if ":" in self._where[0] else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(self._where)
            listener.listen(MAX_CONNECTIONS)
        except OSError as error:
            listener.close()
            if self._trouble != str(error):
                self._trouble = str(error)
                log.error("metrics_listen: %s port %d: %s: tried again every %.0f s", *self._where, error, AGAIN)
        else:
            self._listener, self._trouble = listener, ""

    def _listen(self, on: bool) -> None:
        on = on and len(self._connections) < MAX_CONNECTIONS
        if self._selector is None or self._listener is None or on == self._listening:
            return
        self._listening = on
        if on:
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        else:
            self._selector.unregister(self._listener)

    def _accept(self, now: float) -> None:
        """Beyond MAX_CONNECTIONS, or without descriptors, clients wait in the backlog."""
        assert self._listener is not None and self._selector is not None
        while len(self._connections) < MAX_CONNECTIONS:
            try:
                accepted, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    break
                continue  # the client's trouble
            accepted.setblocking(False)
            connection = _Connection(accepted, now + PATIENCE)
            self._connections.add(connection)
            self._selector.register(accepted, selectors.EVENT_READ, partial(self._read, connection))
        self._listen(False)

    def _read(self, connection: _Connection, now: float) -> None:
        if connection not in self._connections:
            return  # dropped by another event of this turn
        try:
            part = connection.socket.recv(MAX_REQUEST)
        except BlockingIOError:
            return
        except OSError:
            part = b""
        connection.heard += part
        whole = b"\r\n\r\n" in connection.heard or b"\n\n" in connection.heard
        if not part and not whole:
            self._drop(connection)
        elif whole or len(connection.heard) > MAX_REQUEST:
            connection.left = memoryview(self._answer(bytes(connection.heard), now))
            assert self._selector is not None
            write = partial(self._write, connection)
            self._selector.modify(connection.socket, selectors.EVENT_WRITE, write)
            write(now)

    def _write(self, connection: _Connection, _now: float) -> None:
        if connection not in self._connections:
            return
        try:
            connection.left = connection.left[connection.socket.send(connection.left) :]
        except BlockingIOError:
            return
        except OSError:
            connection.left = memoryview(b"")
        if not connection.left:
            self._drop(connection)

    def _drop(self, connection: _Connection) -> None:
        assert self._selector is not None
        self._connections.remove(connection)
        self._selector.unregister(connection.socket)
        connection.socket.close()
        self._listen(True)

    def _answer(self, heard: bytes, now: float) -> bytes:
        words = heard.partition(b"\n")[0].decode("latin-1").split()
        if len(words) != 3 or not words[2].startswith("HTTP/1.") or len(heard) > MAX_REQUEST:
            page = Page(400, _TEXT, "this is no request of HTTP/1.1\n")
        elif words[0] not in ("GET", "HEAD"):
            page = Page(405, _TEXT, "only GET\n")
        else:
            page = self._made(words[1].partition("?")[0], now) or Page(404, _TEXT, "there are /metrics and /health\n")
        body = page.body.encode()
        head = (
            f"HTTP/1.1 {page.status} {_REASONS[page.status]}\r\nContent-Type: {page.kind}\r\n"
            f"Content-Length: {len(body)}\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + (b"" if words[:1] == ["HEAD"] else body)

    def _made(self, path: str, now: float) -> Page | None:
        until, page = self._fresh.get(path, (float("-inf"), None))
        if until <= now:
            page = self._page(path)
            if page is not None:  # or anybody could fill this with paths
                self._fresh[path] = now + FRESH, page
        return page
