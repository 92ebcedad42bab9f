# Owns: the operators' API as an OpenAPI document; a test compares its paths with those that are served. Pure data.
from __future__ import annotations

from typing import Any

from ..store.commits import AUDIT_KEPT
from .schemas import DISPATCHER_NAME, HOST_NAME, KEY, NUMBER, SCHEMAS, Schema, given, many, ref, shown

_REFUSED = {
    "400": "What was asked makes no sense: one line for each error",
    "401": "On TCP: a valid token is needed",
    "403": "On TCP: the token's role is not enough",
    "404": "There is no such thing",
    "408": "The body did not come in time",
    "409": "What is there now forbids it",
    "413": "Too much",
    "415": "Compressed bodies are not taken",
    "503": "The store takes no commits now, too many ask, or the dispatcher is stopping",
}
_BODY = ("408", "413", "415")
_INTEGER: Schema = {"type": "integer", "minimum": 0, "maximum": 10**18 - 1}
_BIT: Schema = {"type": "integer", "enum": [0, 1]}
_LAST = {"name": "Last-Event-ID", "in": "header", "required": False, "schema": _INTEGER}


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _content(type_: str) -> Schema:
    return {type_: {"schema": {"type": "string"}}}


def _does(summary: str, given: list[Schema], gives: Schema, *refused: str, body: Schema | None = None) -> Schema:
    """`gives`: the content of 200; `refused`: the statuses beside those that everything has."""
    statuses = sorted({"400", "401", "403", "503", *refused, *(_BODY if body is not None else ())})
    errors = {status: {"description": _REFUSED[status], "content": _json(ref("Errors"))} for status in statuses}
    found: Schema = {
        "summary": summary,
        "parameters": given,
        "responses": {"200": {"description": "Done", "content": gives}, **errors},
    }
    return found if body is None else {**found, "requestBody": {"required": True, "content": _json(body)}}


def _path(name: str, schema: Schema) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _query(name: str, schema: Schema, description: str = "") -> Schema:
    found = {"name": name, "in": "query", "required": False, "schema": schema}
    return {**found, "description": description} if description else found


def _items(name: str) -> Schema:
    return _json(shown(items=many(ref(name))))


_CHANGED = _json(ref("Changed"))
_PROGRESS = shown("progress", progress=ref("Progress"))  # with wait
_KIND = _path("kind", {"type": "string", "minLength": 1, "example": "Host"})
_NAME = _path("name", {"type": "string", "minLength": 1})
_HOST = _path("name", HOST_NAME)
_DISPATCHER = _path("name", DISPATCHER_NAME)
_REASON = {"type": "string", "minLength": 1, "maxLength": 200}
_NOTHING = given()
_WAIT = _query("wait", {**NUMBER, "maximum": 600}, "seconds")
_TOO = "seconds: the answer, with progress, comes when every host has it, or when they are over"
_WAIT_TOO = _query("wait", {**NUMBER, "maximum": 600}, _TOO)
_SINCE = _query("since", _INTEGER, "a revision: what came after it")
_LIMIT = _query("limit", {"type": "integer", "minimum": 1, "maximum": AUDIT_KEPT, "default": 100})

_RESOURCES: Schema = {
    "/v1/apply": {
        "post": _does(
            "Create or change resources: all of them, or none",
            [_query("dry_run", _BIT, "1: say what would change"), _WAIT_TOO],
            _json({"allOf": [ref("Applied"), _PROGRESS]}), "409",
            body=given(documents=many(ref("Document"), 10_000)),
        )
    },
    "/v1/resources/{kind}": {"get": _does("All resources of a kind", [_KIND], _items("Resource"), "404")},
    "/v1/resources/{kind}/{name}": {
        "get": _does("One resource", [_KIND, _NAME], _json(ref("Resource")), "404"),
        "delete": _does(
            "Delete it; a Host goes with its endpoints",
            [_KIND, _NAME, _WAIT_TOO], _json({"allOf": [ref("Changed"), _PROGRESS]}), "404", "409",
        ),
    },
    "/v1/endpoints": {"get": _does("Live endpoints and the hosts that own them", [], _items("Endpoint"))},
}  # fmt: skip
_HOSTS: Schema = {
    "/v1/hosts": {
        "get": _does("Hosts: connection, revision, failures", [], _items("HostStatus")),
        "post": _does("A host that is not there yet", [], _json(ref("Applied")), "409", body=ref("NewHost")),
    },
    "/v1/hosts/{name}/rotate": {
        "post": _does(
            "The host may come with this key, too; when it does, it is its key",
            [_HOST], _CHANGED, "404", "409", body=given(publicKey=KEY),
        )
    },
    "/v1/hosts/{name}/fence": {
        "post": _does(
            "Release all that the host holds, and grant it nothing more",
            [_HOST], _CHANGED, "404", "409", body=given("reason", reason=_REASON),
        )
    },
    "/v1/hosts/{name}/unfence": {
        "post": _does("Grant its claims again", [_HOST], _CHANGED, "404", "409", body=_NOTHING)
    },
    "/v1/adopt": {
        "post": _does(
            "Hosts that keep another store's state take this one's (named, or all)",
            [], _json(shown(adopted=many({"type": "string"}))), "404", body=ref("Adopt"),
        )
    },
    "/v1/ask": {
        "post": _does("What hosts answer to a question", [], _json(ref("Answers")), "404", body=ref("Question"))
    },
}  # fmt: skip
_COMMITS: Schema = {
    "/v1/revisions/{number}": {
        "get": _does(
            "How far a revision has got; with wait, answers when every host has it or the seconds are over. The next"
            " revision may be waited for before it is there",
            [_path("number", _INTEGER), _WAIT], _json(ref("Progress")), "404",
        )
    },
    "/v1/watch": {
        "get": _does(
            "Commits as server-sent events: `commit` {revision, changes: [{kind, name, change: put|deleted, object?}]};"
            " `reset` {revision} where what was missed is not known any more. Each has its revision as id",
            [_SINCE, _LAST], _content("text/event-stream"),
        )
    },
    "/v1/audit": {"get": _does("Who changed what, the last first", [_SINCE, _LIMIT], _items("Change"))},
    "/v1/backup": {"get": _does("All that the store holds, as of one revision", [], _json(ref("Backup")))},
    "/v1/restore": {
        "post": _does(
            "Take what a backup holds; not where there is something already, but with replace=1",
            [_query("replace", _BIT)], _CHANGED, "409", body=ref("Backup"),
        )
    },
}  # fmt: skip
_HEALTH = _does("ok, or what is wrong", [], _json(ref("Health")))
_HEALTH["responses"]["503"]["content"] = _json({"anyOf": [ref("Health"), ref("Errors")]})
_DISPATCHERS: Schema = {
    "/v1/status": {"get": _does("The dispatcher: revision, hosts, alarms", [], _json(ref("Status")))},
    "/v1/dispatchers": {"get": _does("The dispatchers of this store", [], _items("Dispatcher"))},
    "/v1/dispatchers/{name}": {
        "delete": _does("Forget one that is gone for good", [_DISPATCHER], _CHANGED, "404", "409")
    },
    "/v1/openapi.json": {"get": _does("This document", [], _json({"type": "object"}))},
    "/health": {"get": _HEALTH},
    "/metrics": {"get": _does("Prometheus's text format", [], _content("text/plain"))},
}

DOCUMENT: dict[str, Any] = {
    "openapi": "3.0.3",
    "info": {
        "title": "slash32-dispatcher",
        "version": "1",
        "description": "Unix socket: members of its group may do everything. TCP: a token, of role ro or admin.",
    },
    "paths": {**_RESOURCES, **_HOSTS, **_COMMITS, **_DISPATCHERS},
    "components": {"schemas": SCHEMAS, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    "security": [{"token": []}, {}],
}
