# Owns: what each request of the operators' API becomes: a command for the core, in whose thread it runs; its answer, as
# JSON. Decides nothing. What may be asked, and how, is described in openapi.py; a test compares the two.
from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from slash32 import metrics as exposition
from slash32.errors import quoted
from slash32.process import usage
from slash32.resources import API_VERSION
from slash32.wire import MAX_QUESTION

from .. import metrics
from ..core import Core
from ..decisions.inputs import Refused
from ..hosts import questions
from ..loop import Loop
from ..operators import fleet
from ..operators import resources as operators
from ..store import backups
from ..store.commits import AUDIT_KEPT, Saved
from .bodies import MOST_OF_A_BACKUP, flag, read_fields, read_json, whole
from .events import Events
from .gate import gate_of
from .looks import Look
from .openapi import DOCUMENT
from .pouring import given, poured

MAX_DOCUMENTS = 10_000
MAX_WAIT = 600.0  # seconds
SLICE = 5.0  # seconds of waiting, between which we look whether anybody waits still
HEALTH = 5.0  # seconds in which a healthy core answers
CALLER = "slash32.caller"  # of a request

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Route:
    method: str
    path: str
    handler: Handler
    query: tuple[str, ...] = ()


class Routes:
    def __init__(self, loop: Loop, events: Events) -> None:
        self._loop = loop
        self._events = events

    def served(self) -> list[Route]:
        return [
            Route("POST", "/v1/apply", self._apply, ("dry_run", "wait")),
            Route("GET", "/v1/resources/{kind}", self._list),
            Route("GET", "/v1/resources/{kind}/{name}", self._get),
            Route("DELETE", "/v1/resources/{kind}/{name}", self._delete, ("wait",)),
            Route("GET", "/v1/endpoints", self._plain(fleet.endpoints)),
            Route("GET", "/v1/hosts", self._plain(fleet.hosts)),
            Route("POST", "/v1/hosts", self._add_host),
            Route("POST", "/v1/hosts/{name}/rotate", self._rotate),
            Route("POST", "/v1/hosts/{name}/fence", self._fence),
            Route("POST", "/v1/hosts/{name}/unfence", self._unfence),
            Route("GET", "/v1/revisions/{number}", self._revision, ("wait",)),
            Route("GET", "/v1/watch", self._events.watch, ("since",)),
            Route("GET", "/v1/audit", self._audit, ("since", "limit")),
            Route("GET", "/v1/backup", self._backup),
            Route("POST", "/v1/restore", self._restore, ("replace",)),
            Route("GET", "/v1/status", self._plain(fleet.status)),
            Route("GET", "/v1/dispatchers", self._plain(fleet.dispatchers)),
            Route("DELETE", "/v1/dispatchers/{name}", self._forget_dispatcher),
            Route("POST", "/v1/adopt", self._adopt),
            Route("POST", "/v1/ask", self._ask),
            Route("GET", "/v1/openapi.json", _openapi),
            *self.measured(),
        ]

    def measured(self) -> list[Route]:
        """What is served without a token, too, where that is switched on."""
        return [Route("GET", "/health", self._health), Route("GET", "/metrics", self._metrics)]

    async def _do(self, request: web.Request, command: Callable[[Core], Any]) -> web.Response:
        """What changes something, in the name of who asks."""
        return answer(await asyncio.wrap_future(self._loop.submit(command, request[CALLER].who)))

    async def _do_and_wait(self, request: web.Request, command: Callable[[Core], Any]) -> web.Response:
        """The same; with `?wait=`, it answers when all hosts have it or the seconds are over, with the progress."""
        seconds = _seconds(request.query.get("wait", "0"))
        if seconds == 0:
            return await self._do(request, command)
        until = asyncio.get_running_loop().time() + seconds
        future = self._loop.submit(command, request[CALLER].who, min(seconds, SLICE))
        done = await asyncio.wrap_future(future)
        if not done["progress"]["done"]:
            with contextlib.suppress(Refused):  # the dispatcher ends: what was done stands
                done["progress"] = await self._followed(request, done["revision"], until)
        return answer(done)

    async def _followed(self, request: web.Request, number: int, until: float) -> Any:
        """The revision's progress, when it is done, time is up, or nobody is there any more. Raises Refused."""
        clock, lost = asyncio.get_running_loop().time, gate_of(request).lost
        while True:
            left = max(0.0, until - clock())
            last = left <= SLICE or lost.is_set()
            try:
                found = await asyncio.wrap_future(self._loop.wait(number, min(left, SLICE)))
            except Refused as e:
                if last or e.status != 404 or number > self._loop.core.revision + 1:  # the next may still come
                    raise
            else:
                if found["done"] or last:
                    return found

    async def _look(self, command: Callable[[Core], Any]) -> Any:
        """Between two commits: what is seen is durable."""
        return await asyncio.wrap_future(self._loop.submit(command))

    def _plain(self, command: Callable[[Core], Any]) -> Handler:
        async def look() -> bytes:
            return json.dumps(await self._look(command)).encode()

        shared = Look(look)

        async def handle(request: web.Request) -> web.StreamResponse:
            return await given(request, await shared.ask())

        return handle

    # -- resources ----------------------------------------------------------------------------------------------------

    async def _apply(self, request: web.Request) -> web.StreamResponse:
        dry_run = flag(request, "dry_run")
        documents = (await read_fields(request, "documents")).get("documents")
        if not isinstance(documents, list):
            raise Refused(400, 'the body is not {"documents": [...]}')
        if len(documents) > MAX_DOCUMENTS:
            raise Refused(400, f"{len(documents)} documents; at most {MAX_DOCUMENTS} at once")
        if dry_run:
            _seconds(request.query.get("wait", "0"))  # refused as ever, though nothing is waited for
            return await self._do(request, lambda core: operators.apply(core, documents, True))
        return await self._do_and_wait(request, lambda core: operators.apply(core, documents, False))

    async def _list(self, request: web.Request) -> web.StreamResponse:
        kind = request.match_info["kind"]
        return answer(await self._look(lambda core: operators.get(core, kind)))

    async def _get(self, request: web.Request) -> web.StreamResponse:
        kind, name = request.match_info["kind"], request.match_info["name"]
        return answer(await self._look(lambda core: operators.get(core, kind, name)))

    async def _delete(self, request: web.Request) -> web.StreamResponse:
        kind, name = request.match_info["kind"], request.match_info["name"]
        return await self._do_and_wait(request, lambda core: operators.delete(core, kind, name))

    # -- hosts --------------------------------------------------------------------------------------------------------

    async def _add_host(self, request: web.Request) -> web.StreamResponse:
        body = await read_fields(request, "name", "publicKey", "nets", "labels", "addresses")
        if not isinstance(body.get("name"), str) or "publicKey" not in body:
            raise Refused(400, 'the body is not {"name": "...", "publicKey": "...", ...}')
        spec = {key: value for key, value in body.items() if key != "name"}
        document = {"apiVersion": API_VERSION, "kind": "Host", "metadata": {"name": body["name"]}, "spec": spec}
        return await self._do(request, lambda core: fleet.add_host(core, document))

    async def _rotate(self, request: web.Request) -> web.StreamResponse:
        name, key = request.match_info["name"], (await read_fields(request, "publicKey")).get("publicKey")
        if not isinstance(key, str):
            raise Refused(400, 'the body is not {"publicKey": "..."}')
        return await self._do(request, lambda core: fleet.rotate(core, name, key))

    async def _fence(self, request: web.Request) -> web.StreamResponse:
        name, body = request.match_info["name"], await read_fields(request, "reason")
        reason = body.get("reason", "no reason given")
        if not isinstance(reason, str) or not 0 < len(reason) <= 200 or not reason.isprintable():
            raise Refused(400, "reason: give one line of 1 to 200 characters")
        return await self._do(request, lambda core: fleet.fence(core, name, reason))

    async def _unfence(self, request: web.Request) -> web.StreamResponse:
        name, _ = request.match_info["name"], await read_fields(request)
        return await self._do(request, lambda core: fleet.unfence(core, name))

    async def _adopt(self, request: web.Request) -> web.StreamResponse:
        body = await read_fields(request, "hosts", "all")
        names = body.get("hosts")
        listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if len(body) != 1 or not (listed or body.get("all") is True):
            raise Refused(400, 'the body is neither {"hosts": [...]} nor {"all": true}')
        return await self._do(request, lambda core: fleet.adopt(core, names))

    async def _ask(self, request: web.Request) -> web.StreamResponse:
        body = await read_fields(request, "hosts", "question")
        names, question = body.get("hosts"), body.get("question")
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or not isinstance(question, dict):
            raise Refused(400, 'the body is not {"hosts": [...], "question": {...}}')
        wanted, text = list(dict.fromkeys(names)), json.dumps(question)
        if len(wanted) > questions.MOST:
            raise Refused(400, f"{len(wanted)} hosts; at most {questions.MOST} can be asked at once")
        if len(text) > MAX_QUESTION:
            raise Refused(400, f"the question has {len(text)} characters; at most {MAX_QUESTION}")
        asked = await asyncio.wrap_future(self._loop.call(lambda core: fleet.ask(core, wanted, text)))
        outcome: questions.Outcome = await asyncio.wrap_future(asked.future)
        answers = {host: _said(text) for host, text in sorted(outcome.answers.items())}
        return answer({"answers": answers, "silent": outcome.silent})

    # -- commits ------------------------------------------------------------------------------------------------------

    async def _revision(self, request: web.Request) -> web.StreamResponse:
        number = request.match_info["number"]
        if not (number.isascii() and number.isdigit() and len(number) < 20):
            raise Refused(404, f"revision {quoted(number, 64)} is not a number")
        until = asyncio.get_running_loop().time() + _seconds(request.query.get("wait", "0"))
        return answer(await self._followed(request, int(number), until))

    async def _audit(self, request: web.Request) -> web.StreamResponse:
        asked = request.query
        since, limit = whole(asked.get("since", "0"), "since"), whole(asked.get("limit", "100"), "limit")
        if not 1 <= limit <= AUDIT_KEPT:
            raise Refused(400, f"limit={limit}: give 1 to {AUDIT_KEPT}")
        return answer(await self._look(lambda core: fleet.audit(core, since, limit)))

    async def _backup(self, request: web.Request) -> web.StreamResponse:
        saved: Saved = await self._look(_image)
        made = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        return await poured(request, (piece.encode() for piece in backups.written(saved, made)))

    async def _restore(self, request: web.Request) -> web.StreamResponse:
        replace = flag(request, "replace")
        document = await read_json(request, MOST_OF_A_BACKUP)
        try:
            saved = await asyncio.get_running_loop().run_in_executor(None, backups.decode, document)
        except backups.BackupError as e:
            raise Refused(400, str(e)) from None
        return await self._do(request, lambda core: fleet.restore(core, saved, replace))

    async def _forget_dispatcher(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        return await self._do(request, lambda core: fleet.forget_dispatcher(core, name))

    # -- how it is ----------------------------------------------------------------------------------------------------

    async def _health(self, request: web.Request) -> web.StreamResponse:
        try:
            found = await _soon(self._loop.call(metrics.health))
        except TimeoutError:
            found = {"status": "failing", "problems": [f"the core has not answered for {HEALTH:.0f} s"]}
        except Refused as e:
            found = {"status": "failing", "problems": e.errors}
        return answer(found, 200 if found["status"] == "ok" else 503)

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        try:
            sampled = await _soon(self._loop.call(lambda core: metrics.collect(core, core.clock())))
        except TimeoutError:
            raise Refused(503, f"the core has not answered for {HEALTH:.0f} s") from None
        text = metrics.exposition(sampled, usage())
        return web.Response(body=text.encode(), headers={"Content-Type": exposition.CONTENT_TYPE})


def answer(body: Any, status: int = 200) -> web.Response:
    return web.json_response(body, status=status)


async def _soon(future: Future[Any]) -> Any:
    return await asyncio.wait_for(asyncio.wrap_future(future), HEALTH)


async def _openapi(request: web.Request) -> web.StreamResponse:
    return answer(DOCUMENT)


def _image(core: Core) -> Saved:
    """With what earlier commands of the same commit wrote: this is answered only when that is durable."""
    saved = core.ledger.saved()
    saved.revision += 1 if core.ledger.writes else 0
    return saved


def _seconds(text: str) -> float:
    try:
        seconds = float(text) if len(text) < 32 else math.nan
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= MAX_WAIT:
        raise Refused(400, f"wait={quoted(text, 64)} is not a number of seconds from 0 to {MAX_WAIT:.0f}")
    return seconds


def _said(text: str) -> dict[str, Any]:
    """What a host said; nonsense is its problem, and nobody else's."""
    try:
        found = json.loads(text)
        json.dumps(found, allow_nan=False)  # infinity and the like would be passed on, and are not JSON
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"problems": ["its answer is of no known form"]}
