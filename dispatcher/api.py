# Owns: the operators' API: HTTP and JSON on a Unix socket. Touches: that socket, in a thread of its own. Decides
# nothing: each request becomes one command for the loop, and waits for it.
from __future__ import annotations

import asyncio
import concurrent.futures
import json
import logging
import math
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from slash32.errors import Slash32Error, quoted
from slash32.wire import MAX_QUESTION

from . import fleet, operators, questions
from .core import Core
from .loop import Loop
from .openapi import DOCUMENT

log = logging.getLogger("slash32.dispatcher")

MAX_BODY = 32 << 20
MAX_DOCUMENTS = 10_000
MAX_WAIT = 600.0  # seconds

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ApiError(Slash32Error):
    """One line."""


class Api:
    def __init__(self, loop: Loop, path: Path) -> None:
        self._dispatcher = loop
        self._path = path
        self._asyncio = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._asyncio.run_forever, name="api", daemon=True)

    def start(self) -> None:
        """Raises ApiError."""
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._serve(), self._asyncio).result()

    def stop(self) -> None:
        """After the loop has ended: it has answered all that waited."""
        try:
            asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._asyncio).result(3)
        except concurrent.futures.TimeoutError:
            log.warning("a client of the API is still connected: cut off")
        self._asyncio.call_soon_threadsafe(self._asyncio.stop)
        self._thread.join(3)
        self._path.unlink(missing_ok=True)

    async def _serve(self) -> None:
        app = web.Application(client_max_size=MAX_BODY, middlewares=[_errors])
        app.add_routes([
            web.post("/v1/apply", self._apply),
            web.delete("/v1/resources/{kind}/{name}", self._delete),
            web.get("/v1/resources/{kind}", self._list),
            web.get("/v1/resources/{kind}/{name}", self._get),
            web.get("/v1/endpoints", self._plain(fleet.endpoints)),
            web.get("/v1/hosts", self._plain(fleet.hosts)),
            web.get("/v1/revisions/{number}", self._revision),
            web.get("/v1/status", self._plain(fleet.status)),
            web.post("/v1/adopt", self._adopt),
            web.post("/v1/ask", self._ask),
            web.get("/v1/openapi.json", _openapi),
        ])  # fmt: skip
        self._runner = web.AppRunner(app, access_log=None, logger=_journal())
        await self._runner.setup()
        old = os.umask(0o117)  # 0660 from its first moment
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.unlink(missing_ok=True)  # the database's lock says that no other dispatcher serves it
            await web.UnixSite(self._runner, str(self._path)).start()
        except OSError as e:
            raise ApiError(f"{self._path}: cannot serve the API there ({e.strerror or e})") from None
        finally:
            os.umask(old)

    async def _run(self, command: Callable[[Core], Any]) -> web.Response:
        return _json(await asyncio.wrap_future(self._dispatcher.submit(command)))

    def _plain(self, command: Callable[[Core], Any]) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            return await self._run(command)

        return handle

    async def _adopt(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request)
        names = body.get("hosts") if isinstance(body, dict) and set(body) == {"hosts"} else None
        if body != {"all": True} and not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
            raise operators.Refused(400, 'the body is neither {"hosts": [...]} nor {"all": true}')
        return await self._run(lambda core: fleet.adopt(core, names))

    async def _ask(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request)
        given = body if isinstance(body, dict) and set(body) == {"hosts", "question"} else {}
        names, question = given.get("hosts"), given.get("question")
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or not isinstance(question, dict):
            raise operators.Refused(400, 'the body is not {"hosts": [...], "question": {...}}')
        wanted, text = list(dict.fromkeys(names)), json.dumps(question)
        if len(wanted) > questions.MOST:
            raise operators.Refused(400, f"{len(wanted)} hosts; at most {questions.MOST} can be asked at once")
        if len(text) > MAX_QUESTION:
            raise operators.Refused(400, f"the question has {len(text)} characters; at most {MAX_QUESTION}")
        asked = await asyncio.wrap_future(self._dispatcher.call(lambda core: fleet.ask(core, wanted, text)))
        outcome: questions.Outcome = await asyncio.wrap_future(asked.future)
        answers = {host: _answer(said) for host, said in sorted(outcome.answers.items())}
        return _json({"answers": answers, "silent": outcome.silent})

    async def _apply(self, request: web.Request) -> web.StreamResponse:
        dry_run = _flag(request, "dry_run")
        body = await _body(request)
        documents = body.get("documents") if isinstance(body, dict) and set(body) == {"documents"} else None
        if not isinstance(documents, list):
            raise operators.Refused(400, 'the body is not {"documents": [...]}')
        if len(documents) > MAX_DOCUMENTS:
            raise operators.Refused(400, f"{len(documents)} documents; at most {MAX_DOCUMENTS} at once")
        return await self._run(lambda core: operators.apply(core, documents, dry_run))

    async def _delete(self, request: web.Request) -> web.StreamResponse:
        kind, name = request.match_info["kind"], request.match_info["name"]
        return await self._run(lambda core: operators.delete(core, kind, name))

    async def _list(self, request: web.Request) -> web.StreamResponse:
        kind = request.match_info["kind"]
        return await self._run(lambda core: operators.get(core, kind))

    async def _get(self, request: web.Request) -> web.StreamResponse:
        kind, name = request.match_info["kind"], request.match_info["name"]
        return await self._run(lambda core: operators.get(core, kind, name))

    async def _revision(self, request: web.Request) -> web.StreamResponse:
        number, wait = request.match_info["number"], request.query.get("wait", "0")
        if not (number.isascii() and number.isdigit() and len(number) < 20):
            raise operators.Refused(404, f"revision {quoted(number, 64)} is not a number")
        try:
            seconds = float(wait)
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds <= MAX_WAIT:
            raise operators.Refused(400, f"wait={quoted(wait, 64)} is not a number of seconds from 0 to {MAX_WAIT:.0f}")
        return _json(await asyncio.wrap_future(self._dispatcher.wait(int(number), seconds)))


def _journal() -> logging.Logger:
    """aiohttp's words, but for those about what a client said wrong or did not wait for: the client's matter."""

    def ours(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, HttpProcessingError | ConnectionError)

    logger = logging.getLogger("slash32.dispatcher.api")
    logger.addFilter(ours)
    return logger


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except operators.Refused as e:
        return _json({"errors": e.errors}, e.status)
    except web.HTTPException as e:
        return _json({"errors": [f"{request.method} {quoted(request.path)}: {e.reason}"]}, e.status)


async def _body(request: web.Request) -> Any:
    try:
        return json.loads(await request.read())
    except (ValueError, RecursionError):
        raise operators.Refused(400, "the body is not JSON") from None


def _answer(text: str) -> dict[str, Any]:
    """What a host said; nonsense is its problem, and nobody else's."""
    try:
        found = json.loads(text)
        json.dumps(found, allow_nan=False)  # infinity and the like would be passed on, and are not JSON
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"problems": ["its answer is of no known form"]}


async def _openapi(request: web.Request) -> web.StreamResponse:
    return _json(DOCUMENT)


def _json(body: Any, status: int = 200) -> web.Response:
    return web.json_response(body, status=status)


def _flag(request: web.Request, name: str) -> bool:
    value = request.query.get(name, "0")
    if value not in ("0", "1"):
        raise operators.Refused(400, f"{name}={quoted(value, 64)} is neither 0 nor 1")
    return value == "1"
