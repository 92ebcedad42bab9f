# Owns: the patience with one connection: how long it may be silent, how slowly it may take what it asked for, how much
# it may say before it is asked. Touches: its transport. aiohttp's protocol, behind it, has no such limits of its own.
from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

log = logging.getLogger("slash32.dispatcher.api")

PATIENCE = 30.0  # seconds for a request's head, for what comes next, and for a client that takes nothing
AHEAD = 1 << 20  # bytes that a client may send while it has no answer yet
_UNREADABLE = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end, as far as the socket knows."""

    trusted: str = ""  # who it is ("root (unix socket)"): no token is asked of it
    address: str = ""


class Gate(asyncio.Protocol):
    def __init__(self, inner: asyncio.Protocol, peer: Peer, left: Callable[[], None]) -> None:
        self.peer = peer
        self.lost = asyncio.Event()
        self.reading = False  # a body that was asked for: it is bounded elsewhere
        self._inner = inner
        self._left = left
        self._transport: Any = None
        self._busy = False
        self._ahead = 0
        self._unsent = 0
        self._timer: asyncio.TimerHandle | None = None

    # -- asyncio's --------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._arm()
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._busy and not self.reading:
            self._ahead += len(data)
            if self._ahead > AHEAD:
                self.abort()
                return
        try:
            self._inner.data_received(data)
        except Exception as e:  # of aiohttp's parser: some addresses are too odd for it
            log.debug("a question that cannot be read: %r", e)
            if not self._busy:
                self._transport.write(_UNREADABLE)
            self._transport.close()

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self.lost.set()
        self._left()
        self._inner.connection_lost(exc)

    # -- what the requests' handlers say ------------------------------------------------------------------------------

    def begin(self) -> None:
        """A request is here: for now it is our turn."""
        self._busy = True
        self._disarm()

    def end(self) -> None:
        """It has its answer, or will have when it takes it."""
        self._busy = self.reading = False
        if not self.lost.is_set():
            self._arm()

    def abort(self) -> None:
        self._disarm()
        if self._transport is not None:
            self._transport.abort()

    def _arm(self) -> None:
        self._disarm()
        self._unsent = self._transport.get_write_buffer_size()
        self._timer = asyncio.get_running_loop().call_later(PATIENCE, self._late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        if 0 < self._transport.get_write_buffer_size() < self._unsent:
            self._arm()  # it is slow, but it takes
        else:
            self.abort()


def gate_of(request: web.Request) -> Gate:
    """Raises ConnectionResetError when nobody is there any more."""
    gate = request.transport.get_protocol() if request.transport is not None else None
    if not isinstance(gate, Gate):
        raise ConnectionResetError("the client is gone")
    return gate
