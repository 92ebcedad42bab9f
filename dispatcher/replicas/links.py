# Owns: this dispatcher's connections to the others of its store: one DEALER each, with its own key. Touches: zmq.
# What the others say comes in by the ROUTER where hosts do. Nothing here waits; what cannot be sent is said again.
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import zmq

from slash32.keys import KeyPair

from ..store.commits import Peer

if TYPE_CHECKING:
    Context = zmq.Context[zmq.Socket[bytes]]

_OPTIONS = (
    (zmq.LINGER, 0), (zmq.SNDHWM, 64), (zmq.RCVHWM, 8), (zmq.IMMEDIATE, 1), (zmq.IPV6, 1), (zmq.CONNECT_TIMEOUT, 1000),
    (zmq.RECONNECT_IVL, 100), (zmq.RECONNECT_IVL_MAX, 1000), (zmq.HANDSHAKE_IVL, 2000), (zmq.HEARTBEAT_IVL, 500),
    (zmq.HEARTBEAT_TIMEOUT, 1500), (zmq.HEARTBEAT_TTL, 1500),
)  # fmt: skip


AGAIN = 1.0  # seconds until a connection that takes nothing is made anew: one that was refused is never tried again


@dataclass(slots=True)
class _Link:
    peer: Peer
    socket: zmq.Socket[bytes]
    took: float  # when it was made, or has last taken something


class Links:
    def __init__(self, context: Context, keys: KeyPair) -> None:
        self._context, self._keys = context, keys
        self._open: dict[str, _Link] = {}

    def follow(self, peers: Mapping[str, Peer], now: float) -> None:
        """These are the others."""
        for name in [name for name, link in self._open.items() if peers.get(name) != link.peer]:
            self._open.pop(name).socket.close(0)
        for name, peer in peers.items():
            if name not in self._open:
                self._open[name] = _Link(peer, self._connect(peer), now)

    def _connect(self, peer: Peer) -> zmq.Socket[bytes]:
        s = self._context.socket(zmq.DEALER)
        s.curve_publickey, s.curve_secretkey = self._keys.public.encode(), self._keys.secret.encode()
        s.curve_serverkey = peer.public_key.encode()
        for option, value in _OPTIONS:
            s.setsockopt(option, value)
        s.connect(peer.address)
        return s

    def say(self, word: bytes, now: float, to: str = "") -> None:
        """To one, or to all. What one does not take is lost."""
        for name, link in self._open.items():
            if to not in ("", name):
                continue
            try:
                link.socket.send(word, zmq.NOBLOCK)
                link.took = now
            except zmq.Again:
                if now - link.took >= AGAIN:
                    link.socket.close(0)
                    link.socket, link.took = self._connect(link.peer), now

    def close(self) -> None:
        for link in self._open.values():
            link.socket.close(0)
        self._open.clear()
