# Owns: `get`, `describe` and `status`: asking the dispatcher and laying the answer out for people or programs.
from __future__ import annotations

import json
from collections.abc import Sequence

import click

from slash32.errors import Slash32Error, quoted
from slash32.resources import API_VERSION, KINDS, find_kind

from . import text
from .client import Client, Json
from .tables import cell, table

ENDPOINTS = ("endpoints", "endpoint", "ep")
DISPATCHERS = ("dispatchers", "dispatcher")
STATUS = (
    "connected", "dispatcher", "revision", "in_sync", "lag_seconds", "held", "fenced", "version", "filter", "last_seen",
    "addresses", "endpoints", "failures", "nextPublicKey",
)  # fmt: skip


def _kind_help() -> str:
    return ", ".join(f"{k.plural} ({k.short[0]})" if k.short else k.plural for k in KINDS.values())


KIND_HELP = f"endpoints (ep), {_kind_help()}"


def kind_word(word: str, listed: bool = False) -> str:
    """`Endpoint`, or the name of a resource's kind, or what can only be listed. Raises click.UsageError."""
    if word.lower() in ENDPOINTS:
        return "Endpoint"
    if listed and word.lower() in DISPATCHERS:
        return "Dispatcher"
    kind = find_kind(word)
    if kind is None:
        raise click.UsageError(f"there is no kind {quoted(word, 40)}; known: {KIND_HELP}")
    return kind.name


def get(client: Client, kind: str, name: str | None, output: str) -> str:
    if kind == "Endpoint":
        items = _endpoints(client, name)
    elif kind == "Dispatcher":
        items = [item for item in client.items("dispatchers") if name in (None, item.get("name"))]
    elif kind == "Host" and output in ("table", "wide"):
        items = [item for item in client.items("hosts") if name in (None, item.get("name"))]
    elif name is None:
        items = client.items("resources", kind)
    else:
        items = [client.get("resources", kind, name)]
    if kind == "Host" and output in ("yaml", "json"):
        items = _with_status(client, items)
    if name is not None and not items:
        raise Slash32Error(f"{kind} {quoted(name, 64)}: there is none")
    if output in ("yaml", "json"):
        return dump(items[0] if name is not None and len(items) == 1 else _listed(items), output)
    if not items:
        return "no dispatchers: the store is not shared" if kind == "Dispatcher" else f"no {kind} yet"
    return table(kind, items, output == "wide")


def names(client: Client, kind: str) -> list[str]:
    """What `get KIND` may be given: names, or the domains of endpoints."""
    if kind == "Endpoint":
        return sorted({str(item.get("domain")) for item in client.items("endpoints")})
    if kind == "Dispatcher":
        return sorted(str(item.get("name")) for item in client.items("dispatchers"))
    return sorted(str((item.get("metadata") or {}).get("name")) for item in client.items("resources", kind))


def dump(value: object, output: str) -> str:
    if output == "json":
        return json_text(value, 2)
    from slash32.documents import dump_yaml  # PyYAML only where YAML is made

    return dump_yaml(value)


def json_text(value: object, indent: int | None = None) -> str:
    """With nothing in it that a terminal obeys: json escapes only some of that."""
    whole = json.dumps(value, indent=indent, ensure_ascii=False)
    return whole if whole.isprintable() else "".join(map(_safe, whole))


def _safe(character: str) -> str:
    return character if character.isprintable() or character == "\n" else json.dumps(character)[1:-1]


def revision_of(item: Json) -> int:
    found = item.get("revision")
    return found if isinstance(found, int) else 0


def _listed(items: Sequence[Json]) -> Json:
    return {"apiVersion": API_VERSION, "kind": "List", "items": list(items)}


def _with_status(client: Client, documents: Sequence[Json]) -> list[Json]:
    """Host documents with how the hosts are: what tables show, spelled as documents are."""
    found = {item.get("name"): item for item in client.items("hosts")}
    items = []
    for document in documents:
        host = found.get((document.get("metadata") or {}).get("name"))
        status = {"status": {_camel(key): host[key] for key in STATUS if key in host}} if host else {}
        items.append({**document, **status})
    return items


def _camel(key: str) -> str:
    first, *more = key.split("_")
    return first + "".join(map(str.capitalize, more))


def _endpoints(client: Client, name: str | None) -> list[Json]:
    items = client.items("endpoints")
    if name is None:
        return items
    return [i for i in items if name in (i.get("domain"), i.get("uuid"), i.get("mac"), *i.get("addresses", ()))]


def describe(client: Client, kind: str, name: str) -> str:
    from .description import describe_endpoint, describe_resource  # the whole model, for this only

    if kind != "Endpoint":
        return describe_resource(client, kind, name)
    found = _endpoints(client, name)
    if not found:
        raise Slash32Error(f"Endpoint {quoted(name, 64)}: there is none; name a domain, a MAC or an address")
    return "\n\n".join(describe_endpoint(client, item) for item in found)


def status(client: Client, output: str) -> str:
    found = client.get("status")
    hosts = client.items("hosts")
    if output in ("yaml", "json"):
        return dump({**found, "hosts": hosts}, output)
    counted = ("hosts", "connected", "inSync")  # said with names below
    plain = [(key, value) for key, value in found.items() if isinstance(value, str | int | float)]
    about: list[tuple[str, object]] = [(key, cell(value)) for key, value in plain if key not in counted]
    held = found.get("held") or ()
    about += [("held until adopted", text.names(sorted(held)))] if held else []
    away = sorted(str(h.get("name")) for h in hosts if not h.get("connected"))
    behind = sorted(str(h.get("name")) for h in hosts if h.get("connected") and not h.get("in_sync"))
    fenced = sorted(str(h.get("name")) for h in hosts if h.get("fenced"))
    failing = sorted(str(h.get("name")) for h in hosts if h.get("failures"))
    about.append(("connected", f"{len(hosts) - len(away)} of {text.count(len(hosts), 'host')}"))
    for what, who in (("not connected", away), ("not in sync", behind), ("fenced", fenced), ("failing", failing)):
        about += [(what, text.names(who))] if who else []
    about += [("alarm", f"{a.get('host')}: {a.get('endpoint')}: {a.get('message')}") for a in found.get("alarms") or ()]
    return text.fields(about)
