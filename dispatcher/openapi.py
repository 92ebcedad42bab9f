# Owns: the operators' API as an OpenAPI document; a test compares its paths with those that are served. Pure data.
from __future__ import annotations

from typing import Any

_ERRORS = {
    "description": "Refused: one line for each error",
    "content": {
        "application/json": {
            "schema": {"type": "object", "properties": {"errors": {"type": "array", "items": {"type": "string"}}}}
        }
    },
}


def _operation(summary: str, *parameters: dict[str, Any], body: dict[str, Any] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "summary": summary,
        "parameters": list(parameters),
        "responses": {
            "200": {"description": "Done", "content": {"application/json": {"schema": {"type": "object"}}}},
            "default": _ERRORS,
        },
    }
    if body is not None:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return found


def _path(name: str, kind: str = "string") -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": kind}}


def _query(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema}


_DOCUMENTS = {
    "type": "object",
    "required": ["documents"],
    "additionalProperties": False,
    "properties": {"documents": {"type": "array", "items": {"type": "object"}}},
}

_ADOPT: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "hosts": {"type": "array", "items": {"type": "string"}},
        "all": {"type": "boolean", "enum": [True]},
    },
}

_ASK: dict[str, Any] = {
    "type": "object",
    "required": ["hosts", "question"],
    "additionalProperties": False,
    "properties": {
        "hosts": {"type": "array", "items": {"type": "string"}, "maxItems": 64},
        "question": {"type": "object"},
    },
}

DOCUMENT: dict[str, Any] = {
    "openapi": "3.0.3",
    "info": {"title": "slash32-dispatcher", "version": "1"},
    "paths": {
        "/v1/apply": {
            "post": _operation(
                "Create or change resources: all of them, or none",
                _query("dry_run", {"type": "integer", "enum": [0, 1]}),
                body=_DOCUMENTS,
            )
        },
        "/v1/resources/{kind}": {"get": _operation("All resources of a kind", _path("kind"))},
        "/v1/resources/{kind}/{name}": {
            "get": _operation("One resource", _path("kind"), _path("name")),
            "delete": _operation("Delete it; a Host goes with its endpoints", _path("kind"), _path("name")),
        },
        "/v1/endpoints": {"get": _operation("Live endpoints and the hosts that own them")},
        "/v1/hosts": {"get": _operation("Hosts: connection, revision, failures")},
        "/v1/revisions/{number}": {
            "get": _operation(
                "How far a revision has got; with wait, answers when every host has it or the seconds are over",
                _path("number", "integer"),
                _query("wait", {"type": "number", "minimum": 0, "maximum": 600}),
            )
        },
        "/v1/status": {"get": _operation("The dispatcher: revision, hosts, alarms")},
        "/v1/adopt": {
            "post": _operation("Hosts that keep another store's state take this one's (named, or all)", body=_ADOPT)
        },
        "/v1/ask": {
            "post": _operation("What hosts answer to a question: {answers: {host: answer}, silent: [host]}", body=_ASK)
        },
        "/v1/openapi.json": {"get": _operation("This document")},
    },
}
