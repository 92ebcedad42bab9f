# Owns: GET /v1/watch: commits as server-sent events (watchers.py has their text and their bounds). Touches: the core's
# thread, which says what was committed, and the watchers' connections.
from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from typing import TYPE_CHECKING

from aiohttp import web

from ..decisions.inputs import Refused
from ..metrics import Counts
from ..store.commits import Commit
from .bodies import whole
from .gate import gate_of
from .watchers import WATCHERS, Watcher, Watchers, alive

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

log = logging.getLogger("slash32.dispatcher.api")

KEEP_ALIVE = 15.0  # seconds
STALL = 30.0  # seconds in which a client takes nothing of what is written to it
AGAIN = 1000  # milliseconds until a browser asks again
ALLOWED = "slash32.allowed"  # of a request: raises Refused once who asks may not ask any more
_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class Events:
    def __init__(self, revision: int, counts: Counts, loop: AbstractEventLoop) -> None:
        self._watchers = Watchers(revision)
        self._counts = counts
        self._loop = loop
        self._arrived: deque[Commit] = deque()
        self._called = False
        self._ending = False

    def committed(self, commit: Commit) -> None:
        """In the core's thread."""
        self._arrived.append(commit)
        if not self._called:
            self._called = True
            with contextlib.suppress(RuntimeError):  # the API has stopped
                self._loop.call_soon_threadsafe(self._take)

    def _take(self) -> None:
        self._called = False  # first: what comes from now on calls again
        while self._arrived:
            self._watchers.publish(self._arrived.popleft())

    def end(self) -> None:
        """No more events: whoever watches is let go."""
        self._ending = True
        self._watchers.cut_all()

    async def watch(self, request: web.Request) -> web.StreamResponse:
        gate, news = gate_of(request), asyncio.Event()
        watcher = self._watchers.subscribe(_since(request), news.set)
        if watcher is None or self._ending:
            raise Refused(503, f"{WATCHERS} clients watch already; try again later")
        self._counts.watchers = len(self._watchers)
        response = web.StreamResponse(headers=_HEADERS)
        gone = asyncio.ensure_future(gate.lost.wait())
        gone.add_done_callback(lambda _: news.set())
        try:
            await response.prepare(request)
            await _written(response, f"retry: {AGAIN}\nid: {watcher.begun}\n\n".encode())
            while not gate.lost.is_set() and not watcher.cut and _allowed(request):
                await self._some(response, watcher, news)
        except TimeoutError:
            log.info("a client that watches takes nothing: cut off")
        except ConnectionError:
            pass  # it went
        finally:
            gone.cancel()
            self._watchers.unsubscribe(watcher)
            self._counts.watchers = len(self._watchers)
        if not self._ending:
            gate.abort()
        return response

    async def _some(self, response: web.StreamResponse, watcher: Watcher, news: asyncio.Event) -> None:
        """What waits; or, after a while, a sign of life."""
        news.clear()
        while event := watcher.take():
            await _written(response, event)
        if watcher.cut:
            return
        last = self._watchers.revision
        try:
            await asyncio.wait_for(news.wait(), KEEP_ALIVE)
        except TimeoutError:
            await _written(response, alive(last))


def _allowed(request: web.Request) -> bool:
    """A token may end while its owner watches."""
    try:
        request[ALLOWED]()
    except Refused:
        return False
    return True


async def _written(response: web.StreamResponse, text: bytes) -> None:
    await asyncio.wait_for(response.write(text), STALL)


def _since(request: web.Request) -> int | None:
    """Last-Event-ID is newer: a browser that comes back sends it with the address that it first used."""
    last = request.headers.get("Last-Event-ID", "")
    if last:
        return whole(last, "Last-Event-ID")
    since = request.query.get("since")
    return None if since is None else whole(since, "since")
