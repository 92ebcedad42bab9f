# Owns: the operators' API as a server: its thread, where it is served, what happens to every request before and after
# its handler. Touches: the sockets (listening.py). Each request becomes a command for the core (routes.py).
from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import socket
import threading
from collections.abc import Awaitable, Callable, Iterable
from functools import partial

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from slash32.errors import quoted

from ..config import Config
from ..decisions.inputs import Refused
from ..loop import Loop
from .access import Access
from .events import ALLOWED, Events
from .gate import gate_of
from .listening import ApiError, Certificate, Door, tcp_sockets, unix_socket
from .routes import CALLER, Handler, Route, Routes, answer
from .tokens import TokenError, Tokens

__all__ = ["Api", "ApiError"]

log = logging.getLogger("slash32.dispatcher.api")

MAX_HEAD = 16 << 10  # bytes of one line of a request's head
GOODBYE = 2.0  # seconds for answers that are on their way when the dispatcher ends
LINGER = 2.0  # seconds for a client to finish what it says although it was refused
KEEP = 30.0  # seconds between two requests
Middleware = Callable[[web.Request, Handler], Awaitable[web.StreamResponse]]


class Api:
    def __init__(self, loop: Loop, config: Config) -> None:
        self._dispatcher = loop
        self._config = config
        self._asyncio = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._asyncio.run_forever, name="api", daemon=True)
        self._events = Events(loop.core.revision, loop.core.counts, self._asyncio)
        self._routes = Routes(loop, self._events)
        self._runners: list[web.AppRunner] = []
        self._doors: list[Door] = []
        loop.core.on_commit.append(self._events.committed)

    def start(self) -> None:
        """Raises ApiError: then nothing is served."""
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._serve(), self._asyncio).result()

    def stop(self) -> None:
        """After the loop has ended: it has answered all that waited."""
        if not self._thread.is_alive():
            return
        try:
            asyncio.run_coroutine_threadsafe(self._end(), self._asyncio).result(GOODBYE + 2)
        except concurrent.futures.TimeoutError:
            log.warning("a client of the API is still connected: cut off")
        self._asyncio.call_soon_threadsafe(self._asyncio.stop)
        self._thread.join(3)
        if self._doors:
            self._config.socket.unlink(missing_ok=True)

    async def _serve(self) -> None:
        config, sockets = self._config, list[socket.socket]()
        try:
            tokens, certificate, remote, measured = None, None, list[socket.socket](), list[socket.socket]()
            if config.api_listen:
                assert config.api_tokens and config.api_cert and config.api_key  # the configuration's reader saw to it
                tokens, certificate = Tokens(config.api_tokens), Certificate(config.api_cert, config.api_key)
                tokens.all()
                sockets += (remote := tcp_sockets("api_listen", config.api_listen))
            if config.metrics_listen:
                sockets += (measured := tcp_sockets("metrics_listen", config.metrics_listen))
            local = unix_socket(config.socket, config.socket_group)
        except (ApiError, TokenError) as e:
            for s in sockets:
                s.close()
            raise ApiError(str(e)) from None
        await self._open([local, *remote], self._routes.served(), Access(tokens), certificate)
        await self._open(measured, self._routes.measured(), None, None)

    async def _open(
        self,
        sockets: Iterable[socket.socket],
        served: Iterable[Route],
        access: Access | None,
        certificate: Certificate | None,
    ) -> None:
        app = web.Application(middlewares=[_around(access, self._count)])
        app.on_response_prepare.append(_signed)
        for route in served:
            app.router.add_route(route.method, route.path, _strict(route))
        runner = web.AppRunner(
            app, access_log=None, logger=_journal(), auto_decompress=False, keepalive_timeout=KEEP,
            lingering_time=LINGER, max_line_size=MAX_HEAD, max_field_size=MAX_HEAD, max_headers=100,
        )  # fmt: skip
        await runner.setup()
        self._runners.append(runner)
        assert runner.server is not None
        for s in sockets:
            self._doors.append(Door(s, runner.server, None if s.family == socket.AF_UNIX else certificate))

    async def _end(self) -> None:
        self._events.end()
        for door in self._doors:
            await door.close()
        for runner in self._runners:
            if runner.server is not None:
                await runner.server.shutdown(GOODBYE)
            await runner.cleanup()

    def _count(self, status: int) -> None:
        self._dispatcher.core.counts.requests[status] += 1


def _around(access: Access | None, count: Callable[[int], None]) -> Middleware:
    """Around every request, of routes that are none, too. `access` None: everybody may."""

    @web.middleware
    async def around(request: web.Request, handler: Handler) -> web.StreamResponse:
        gate = gate_of(request)
        gate.begin()
        try:
            if access is not None:
                request[ALLOWED] = partial(access.caller, request, gate.peer)
                request[CALLER] = request[ALLOWED]()
            response = await handler(request)
        except Refused as e:
            response = answer({"errors": e.errors}, e.status)
            if e.status == 401:
                response.headers["WWW-Authenticate"] = "Bearer"
        except web.HTTPException as e:
            asked = f"{quoted(request.method, 32)[1:-1]} {quoted(request.path)}"
            response = answer({"errors": [f"{asked}: {e.reason}"]}, e.status)
            if "Allow" in e.headers:
                response.headers["Allow"] = e.headers["Allow"]
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception:
            log.exception("a request could not be answered: %s %s", request.method, quoted(request.path))
            response = answer({"errors": ["the dispatcher has an error of its own; its journal has more"]}, 500)
        finally:
            gate.end()
        count(response.status)
        return response

    return around


async def _signed(request: web.Request, response: web.StreamResponse) -> None:
    """Which libraries we are made of is nobody's business."""
    response.headers["Server"] = "slash32-dispatcher"


def _strict(route: Route) -> Handler:
    """A query that the route does not know would be ignored, and is refused instead."""

    async def handle(request: web.Request) -> web.StreamResponse:
        for name in request.query:
            if name not in route.query:
                known = f"known here: {', '.join(route.query)}" if route.query else "there are none here"
                raise Refused(400, f"?{quoted(name, 64)[1:-1]}: unknown query parameter ({known})")
            if len(request.query.getall(name)) > 1:
                raise Refused(400, f"?{name} is there twice; give it once")
        return await route.handler(request)

    return handle


def _journal() -> logging.Logger:
    """aiohttp's words, but for those about what a client said wrong or did not wait for: the client's matter."""

    def ours(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, HttpProcessingError | ConnectionError)

    logger = logging.getLogger("slash32.dispatcher.http")
    logger.addFilter(ours)
    return logger
