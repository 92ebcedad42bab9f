# Owns: this dispatcher's connections to the others of its store: one DEALER each, with its own key. Touches: zmq.
# What the others say comes in by the ROUTER where hosts do. Nothing here waits; what cannot be sent is said again.
from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import zmq

from slash32.keys import KeyPair

from .commits import Peer

if TYPE_CHECKING:
    Context = zmq.Context[zmq.Socket[bytes]]

_OPTIONS = (
    (zmq.LINGER, 0), (zmq.SNDHWM, 64), (zmq.RCVHWM, 8), (zmq.IMMEDIATE, 1), (zmq.IPV6, 1), (zmq.CONNECT_TIMEOUT, 1000),
    (zmq.RECONNECT_IVL, 100), (zmq.RECONNECT_IVL_MAX, 1000), (zmq.HANDSHAKE_IVL, 2000), (zmq.HEARTBEAT_IVL, 500),
    (zmq.HEARTBEAT_TIMEOUT, 1500), (zmq.HEARTBEAT_TTL, 1500),
)  # fmt: skip


class Links:
    def __init__(self, context: Context, keys: KeyPair) -> None:
        self._context, self._keys = context, keys
        self._open: dict[str, tuple[Peer, zmq.Socket[bytes]]] = {}

    def follow(self, peers: Mapping[str, Peer]) -> None:
        """These are the others."""
        for name in [name for name, (peer, _) in self._open.items() if peers.get(name) != peer]:
            self._open.pop(name)[1].close(0)
        for name, peer in peers.items():
            if name not in self._open:
                self._open[name] = peer, self._connect(peer)

    def _connect(self, peer: Peer) -> zmq.Socket[bytes]:
        s = self._context.socket(zmq.DEALER)
        s.curve_publickey, s.curve_secretkey = self._keys.public.encode(), self._keys.secret.encode()
        s.curve_serverkey = peer.public_key.encode()
        for option, value in _OPTIONS:
            s.setsockopt(option, value)
        s.connect(peer.address)
        return s

    def __len__(self) -> int:
        return len(self._open)

    def say(self, word: bytes, to: str = "") -> bool:
        """To one, or to all. False: it could not be sent to everybody."""
        sent = True
        for name, (_, s) in self._open.items():
            if to in ("", name):
                try:
                    s.send(word, zmq.NOBLOCK)
                except zmq.Again:
                    sent = False
        return sent

    def close(self) -> None:
        self.follow({})
