# Owns: answers that are large: they go out piece by piece, as fast as they are taken, so that who takes them slowly
# costs no memory, and who does not take them at all is let go. Touches: the connection.
from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator

from aiohttp import web

LARGE = PIECE = 256 << 10  # bytes
STALL = 30.0  # seconds in which a client takes nothing
GRACE = 60.0  # seconds, and
RATE = 50_000  # bytes a second: who is slower keeps an answer in memory for nothing
_JSON = {"Content-Type": "application/json; charset=utf-8"}


async def poured(request: web.Request, pieces: Iterable[bytes], length: int | None = None) -> web.StreamResponse:
    """JSON; `length` in bytes, if known. Raises ConnectionResetError: the client is gone, or takes too little."""
    response = web.StreamResponse(headers=_JSON)
    response.content_length = length
    await response.prepare(request)
    clock = asyncio.get_running_loop().time
    until, sent = clock() + GRACE, 0
    for piece in pieces:
        patience = min(STALL, until + sent / RATE - clock())
        try:
            await asyncio.wait_for(response.write(piece), max(0.0, patience))
        except TimeoutError:
            raise ConnectionResetError("the client takes too little") from None
        sent += len(piece)
        await asyncio.sleep(0)  # others have their turn
    return response


async def given(request: web.Request, body: bytes) -> web.StreamResponse:
    """A whole answer in JSON, poured if it is large. Raises as poured()."""
    if len(body) <= LARGE:
        return web.Response(body=body, headers=_JSON)
    return await poured(request, _cut(body), len(body))


def _cut(body: bytes) -> Iterator[bytes]:
    for start in range(0, len(body), PIECE):
        yield body[start : start + PIECE]
