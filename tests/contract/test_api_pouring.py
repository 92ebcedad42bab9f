# Large answers: who takes them slowly costs no memory, who takes too little is let go, anybody else has all of it.
from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from aiohttp import ClientSession, web

from dispatcher.api import pouring
from dispatcher.api.pouring import PIECE, given, poured

COUNT = 400  # pieces: far more than what sockets keep


class Source:
    def __init__(self) -> None:
        self.asked, self.ended = 0, ""

    def pieces(self) -> Iterator[bytes]:
        for _ in range(COUNT):
            self.asked += 1
            yield bytes(PIECE)

    async def serve(self, request: web.Request) -> web.StreamResponse:
        try:
            return await poured(request, self.pieces())
        except ConnectionResetError as e:
            self.ended = str(e)
            raise


async def asked(source: Source, take: int, pause: float, patience: float) -> int:
    """How many bytes came: `take` at once, at most, with a pause after each."""
    app = web.Application()
    app.router.add_get("/", source.serve)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=PIECE)
    came = 0
    try:
        async with asyncio.timeout(patience):
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            while not source.ended and came < COUNT * PIECE and (part := await reader.read(take)):
                came += len(part)
                await asyncio.sleep(pause)
    finally:
        writer.transport.abort()
        await runner.cleanup()
    return came


def test_who_takes_it_has_it_all() -> None:
    source = Source()
    assert asyncio.run(asked(source, PIECE, 0, 60)) >= COUNT * PIECE
    assert source.asked == COUNT and not source.ended


@pytest.mark.parametrize("words", [{"STALL": 1.0}, {"GRACE": 1.0, "RATE": 1 << 40}], ids=["silent", "slow"])
def test_who_takes_too_little_is_let_go_and_costs_no_memory(
    words: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in words.items():
        monkeypatch.setattr(pouring, name, value)
    source = Source()
    asyncio.run(asked(source, 1, 0.05, 60))
    assert source.ended == "the client takes too little"
    assert source.asked < COUNT / 4, "what was not taken was not made"


@pytest.mark.parametrize("size", [0, 5, pouring.LARGE, pouring.LARGE + 1, 3 * PIECE + 7])
def test_an_answer_is_whole(size: int) -> None:
    body = bytes(n % 251 for n in range(size))

    async def give(request: web.Request) -> web.StreamResponse:
        return await given(request, body)

    async def ask() -> tuple[bytes, str, str]:
        app = web.Application()
        app.router.add_get("/", give)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        async with ClientSession() as client, client.get(f"http://127.0.0.1:{port}/") as answer:
            found = await answer.read(), answer.headers["Content-Length"], answer.headers["Content-Type"]
        await runner.cleanup()
        return found

    assert asyncio.run(ask()) == (body, str(size), "application/json; charset=utf-8")
