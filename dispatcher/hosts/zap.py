# Owns: who may connect: the ZAP handler (ZeroMQ RFC 27). Touches: its inproc socket. Fails closed: CURVE only, a known
# public key only; libzmq refuses everybody while nothing answers here.
from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import zmq
from zmq.utils import z85

from slash32.errors import quoted

if TYPE_CHECKING:
    Context = zmq.Context[zmq.Socket[bytes]]

log = logging.getLogger("slash32.dispatcher")

DOMAIN = b"slash32"
_AGAIN = 3600.0  # seconds until an unknown key is logged once more
_REMEMBERED = 1000  # unknown keys


class Zap:
    """Bind before the ROUTER binds. `keys` maps public keys (Z85) to host names; it may be replaced at any time."""

    def __init__(self, context: Context) -> None:
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind("inproc://zeromq.zap.01")
        self._logged: dict[str, float] = {}

    def answer(self, keys: Mapping[str, str], now: float) -> bool:
        """One waiting request; whether it may come in. The user id is "host key", so that a session is tied to both."""
        frames = self.socket.recv_multipart(zmq.NOBLOCK)
        request = frames[1] if len(frames) > 1 else b""
        user = self._user(frames, keys, now)
        status, text = (b"200", b"OK") if user else (b"400", b"unknown key")
        self.socket.send_multipart([b"1.0", request, status, text, user.encode(), b""])
        return bool(user)

    def _user(self, frames: list[bytes], keys: Mapping[str, str], now: float) -> str:
        """Empty: denied."""
        if len(frames) != 7:
            return ""
        version, _, domain, address, _, mechanism, credentials = frames
        if (version, domain, mechanism, len(credentials)) != (b"1.0", DOMAIN, b"CURVE", 32):
            return ""
        key = str(z85.encode(credentials), "ascii")  # type: ignore[no-untyped-call]
        if key in keys:
            return f"{keys[key]} {key}"
        self._unknown(key, address, now)
        return ""

    def _unknown(self, key: str, address: bytes, now: float) -> None:
        if now - self._logged.get(key, -_AGAIN) < _AGAIN:
            return
        if len(self._logged) >= _REMEMBERED:  # keys cost a stranger nothing: he does not fill the journal with them
            self._logged = {known: said for known, said in self._logged.items() if now - said < _AGAIN}
            if len(self._logged) >= _REMEMBERED:
                return
        self._logged[key] = now
        where = quoted(address[:64].decode(errors="replace"))
        log.warning("unknown key %s from %s: denied; a host of yours? apply a Host with this publicKey", key, where)
