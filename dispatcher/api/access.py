# Owns: who a request is from and what that one may do. Touches: the file of tokens (tokens.py).
# On the Unix socket the file's mode has decided; on TCP a token does: `ro` reads all but backups, `admin` does all.
from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from aiohttp import web

from slash32.errors import quoted

from ..decisions.inputs import Refused
from .gate import Peer
from .tokens import TokenError, Tokens

log = logging.getLogger("slash32.dispatcher.api")

ADMIN_READS = ("/v1/backup",)
_QUIET = 10.0  # seconds between two lines about the same
_HINT = "`slash32 --token-file FILE` sends one, `slash32-dispatcher token NAME --role ro` makes one"


@dataclass(frozen=True, slots=True)
class Caller:
    who: str  # for the audit log
    admin: bool


class Access:
    def __init__(self, tokens: Tokens | None) -> None:
        self._tokens = tokens
        self._said: dict[str, float] = {}

    def caller(self, request: web.Request, peer: Peer) -> Caller:
        """Raises Refused (401, 403)."""
        if peer.trusted:
            return Caller(peer.trusted, True)
        caller = self._by_token(request.headers.getall("Authorization", []), peer)
        if not caller.admin and (request.method != "GET" or request.path in ADMIN_READS):
            raise Refused(403, f"{caller.who}: its role, ro, may only read; {request.method} of this needs role admin")
        return caller

    def _by_token(self, given: list[str], peer: Peer) -> Caller:
        if self._tokens is None:
            raise Refused(401, "nobody gets in here")
        if len(given) != 1:
            raise Refused(401, f"this needs one header Authorization: Bearer TOKEN; {_HINT}")
        scheme, _, token = given[0].partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Refused(401, f"the header Authorization is not Bearer TOKEN; {_HINT}")
        try:
            found = self._tokens.find(token.strip())
        except TokenError as e:
            self._warn(str(e), "%s", e)
            raise Refused(401, "no token is valid now; the dispatcher's journal says why") from None
        if found is None:
            self._warn(peer.address, "%s: a token was refused", quoted(peer.address, 64)[1:-1])
            raise Refused(401, "this token is not valid")
        return Caller(f"token {found.name} from {peer.address}", found.role == "admin")

    def _warn(self, about: str, text: str, value: object) -> None:
        now = asyncio.get_running_loop().time()
        if len(self._said) > 1000:
            self._said.clear()
        if now - self._said.get(about, -_QUIET) >= _QUIET:
            self._said[about] = now
            log.warning(text, value)
