# Owns: the shapes of what the operators' API takes and gives, as OpenAPI 3.0.3 has them. Pure data. Documents' shapes
# are those of slash32.schema, in the older dialect; what these let through may still be refused: sense, and selectors.
from __future__ import annotations

from typing import Any

from slash32 import hosts, resources
from slash32.decode import NAME, NAME_LIMIT
from slash32.schema import schema_of

from ..hosts.questions import MOST

Schema = dict[str, Any]
_UNKNOWN = ("$schema", "title", "propertyNames", "dependentRequired")  # to OpenAPI 3.0

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
LINES: Schema = {"type": "array", "items": TEXT}
TIME: Schema = {"type": "string", "format": "date-time"}
NUMBER: Schema = {"type": "number", "minimum": 0}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def maybe(schema: Schema) -> Schema:
    return {**schema, "nullable": True}


def given(*optional: str, **fields: Schema) -> Schema:
    """A mapping with these fields and no others; `optional` ones may be missing."""
    return {**shown(*optional, **fields), "additionalProperties": False}


def shown(*optional: str, **fields: Schema) -> Schema:
    """A mapping with these fields at least."""
    required = [name for name in fields if name not in optional]
    found: Schema = {"type": "object", "properties": fields}
    return {**found, "required": required} if required else found


def many(items: Schema, at_most: int | None = None) -> Schema:
    found: Schema = {"type": "array", "items": items}
    return found if at_most is None else {**found, "maxItems": at_most}


def _older(schema: Any) -> Any:
    """JSON Schema of 2020-12 as OpenAPI 3.0 takes it."""
    if isinstance(schema, list):
        return [_older(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return {"$ref": schema["$ref"].replace("#/$defs/", "#/components/schemas/")}
    found: Schema = {}
    for key, value in schema.items():
        if key == "const":
            found["enum"] = [value]
        elif key == "properties":
            found[key] = {name: _older(each) for name, each in value.items()}
        elif key not in _UNKNOWN:
            found[key] = value if key in ("enum", "default", "required") else _older(value)
    return found


def _documents() -> dict[str, Schema]:
    definitions: Any = schema_of()["$defs"]
    return {name: _older(each) for name, each in definitions.items() if name not in ("Any", "List")}


HOST_NAME: Schema = {"type": "string", "pattern": f"^({NAME.pattern})$", "maxLength": hosts.HOST_NAME_LIMIT}
DISPATCHER_NAME: Schema = {**HOST_NAME, "maxLength": NAME_LIMIT}
KEY: Schema = {"type": "string", "pattern": f"^({hosts.Z85.pattern})$", "maxLength": 40}
_HELD_KEY: Schema = {"type": "string", "maxLength": 40}
_FAILURE = shown(object=TEXT, message=TEXT)

SCHEMAS: dict[str, Schema] = {
    **_documents(),
    "Document": {"oneOf": [ref(kind) for kind in resources.KINDS], "discriminator": {"propertyName": "kind"}},
    "Errors": {**given(errors={**LINES, "minItems": 1}), "description": "One line for each."},
    "Resource": shown(
        apiVersion=TEXT,
        kind={"type": "string", "enum": list(resources.KINDS)},
        metadata=shown(name=TEXT),
        spec={"type": "object"},
    ),
    "Changed": shown(revision=WHOLE),
    "Applied": shown(
        revision=WHOLE,
        changes=many(
            shown(kind=TEXT, name=TEXT, change={"type": "string", "enum": ["created", "configured", "unchanged"]})
        ),
    ),
    "Endpoint": shown(
        uuid=TEXT, mac=TEXT, domain=TEXT, host=TEXT, labels={"type": "object", "additionalProperties": TEXT},
        effectiveLabels={"type": "object", "additionalProperties": TEXT}, profiles=LINES, addresses=LINES,
        shared=many(shown(address=TEXT, group=TEXT)), prefixes=LINES,
    ),
    "HostStatus": shown(
        name=TEXT, connected=FLAG, dispatcher=maybe(TEXT), revision=WHOLE, in_sync=FLAG, lag_seconds=maybe(NUMBER),
        held=TEXT, fenced=TEXT, version=TEXT, filter=TEXT, last_seen=maybe(TIME), addresses=LINES, endpoints=WHOLE,
        failures=many(_FAILURE), publicKey=_HELD_KEY, nextPublicKey=_HELD_KEY,
    ),
    "NewHost": given(
        "nets", "labels", "addresses", name=HOST_NAME, publicKey=KEY,
        nets=ref("HostNets"), labels=ref("HostLabels"), addresses=ref("HostAddresses"),
    ),
    "Progress": shown(
        revision=WHOLE, live=WHOLE, hosts=WHOLE, pending=LINES, disconnected=LINES,
        lagging=many(shown(host=TEXT, connected=FLAG, seconds=maybe(NUMBER))),
        failed=many(shown(host=TEXT, object=TEXT, message=TEXT)),
        milliseconds=maybe(NUMBER), p50=maybe(NUMBER), p99=maybe(NUMBER), counted=WHOLE, done=FLAG,
    ),
    "Status": shown(
        epoch=TEXT, revision=WHOLE, hosts=WHOLE, connected=WHOLE, inSync=WHOLE,
        held={"type": "object", "additionalProperties": TEXT}, endpoints=WHOLE, tiers=WHOLE, policies=WHOLE,
        stagedPolicies=WHOLE, profiles=WHOLE, networkSets=WHOLE, hostEndpoints=WHOLE,
        alarms=many(shown(host=TEXT, endpoint=TEXT, message=TEXT)),
    ),
    "Change": shown(revision=WHOLE, at=TIME, who=TEXT, what=TEXT, change=TEXT),
    "Dispatcher": shown(name=TEXT, address=TEXT, publicKey=TEXT),
    "Adopt": {
        "oneOf": [given(hosts=many(HOST_NAME)), given(all={"type": "boolean", "enum": [True]})],
    },
    "Question": given(hosts=many(HOST_NAME, MOST), question={"type": "object"}),
    "Answers": shown(answers={"type": "object", "additionalProperties": {"type": "object"}}, silent=LINES),
    "Backup": given(
        slash32Backup={"type": "integer", "enum": [1]}, epoch={"type": "string", "pattern": "^[0-9A-Za-z_-]{1,64}$"},
        revision={**WHOLE, "maximum": (1 << 63) - 1}, made=TEXT,
        records=many({
            "type": "array", "minItems": 3, "maxItems": 3, "items": {},
            "description": "table, key (an array of strings), the record as stores keep it (base64)",
        }),
    ),
    "Health": given(status={"type": "string", "enum": ["ok", "degraded", "failing"]}, problems=LINES),
}  # fmt: skip
_HOST = SCHEMAS["Host"]["properties"]["spec"]["properties"]
SCHEMAS |= {f"Host{name.capitalize()}": _HOST[name] for name in ("nets", "labels", "addresses")}
