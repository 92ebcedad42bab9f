# Owns: `get`, `describe` and `status`: asking the dispatcher and laying the answer out for people or programs.
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import click

from slash32 import selector as selectors
from slash32.documents import dump_yaml
from slash32.errors import Slash32Error, quoted
from slash32.model import Endpoint, EndpointKey
from slash32.policy import Direction, Policy, Profile
from slash32.resources import API_VERSION, decode, find_kind
from slash32.verdict import applicable, effective_labels

from . import text
from .client import Client, Json

ENDPOINTS = ("endpoints", "endpoint", "ep")
KIND_HELP = "endpoints (ep), hosts, globalnetworkpolicies (gnp), profiles"


def kind_word(word: str) -> str:
    """`Endpoint`, or the name of a resource's kind. Raises click.UsageError."""
    if word.lower() in ENDPOINTS:
        return "Endpoint"
    kind = find_kind(word)
    if kind is None:
        raise click.UsageError(f"there is no kind {quoted(word, 40)}; known: {KIND_HELP}")
    return kind.name


def get(client: Client, kind: str, name: str | None, output: str) -> str:
    if kind == "Endpoint":
        items = _endpoints(client, name)
    elif kind == "Host" and output in ("table", "wide"):
        items = [item for item in client.items("hosts") if name in (None, item.get("name"))]
    elif name is None:
        items = client.items("resources", kind)
    else:
        items = [client.get("resources", kind, name)]
    if name is not None and not items:
        raise Slash32Error(f"{kind} {quoted(name, 64)}: there is none")
    if output in ("yaml", "json"):
        return dump(items[0] if name is not None and len(items) == 1 else _listed(items), output)
    return _TABLES[kind](items, output == "wide") if items else f"no {kind} yet"


def names(client: Client, kind: str) -> list[str]:
    """What `get KIND` may be given: names, or the domains of endpoints."""
    if kind == "Endpoint":
        return sorted({str(item.get("domain")) for item in client.items("endpoints")})
    return sorted(str((item.get("metadata") or {}).get("name")) for item in client.items("resources", kind))


def dump(value: object, output: str) -> str:
    if output == "json":
        return json.dumps(value, indent=2, ensure_ascii=False)
    return dump_yaml(value)


def _listed(items: Sequence[Json]) -> Json:
    return {"apiVersion": API_VERSION, "kind": "List", "items": list(items)}


def _endpoints(client: Client, name: str | None) -> list[Json]:
    items = client.items("endpoints")
    if name is None:
        return items
    return [i for i in items if name in (i.get("domain"), i.get("uuid"), i.get("mac"), *i.get("addresses", ()))]


def _endpoint_table(items: Sequence[Json], wide: bool) -> str:
    head = ["DOMAIN", "HOST", "ADDRESSES", "LABELS", "PROFILES"] + ["MAC", "SHARED", "PREFIXES", "UUID"] * wide
    rows = []
    for item in sorted(items, key=lambda i: (str(i.get("domain")), str(i.get("mac")))):
        row = [item.get("domain"), item.get("host"), _join(item, "addresses"), text.labels(item.get("labels") or {})]
        row.append(_join(item, "profiles"))
        if wide:
            row += [item.get("mac"), _shared(item), _join(item, "prefixes"), item.get("uuid")]
        rows.append([_cell(value) for value in row])
    return text.table(head, rows)


def _shared(item: Json) -> str:
    return ",".join(f"{s.get('address')}({s.get('group')})" for s in item.get("shared") or ())


def _join(item: Json, key: str) -> str:
    return ",".join(map(str, item.get(key) or ()))


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def _host_table(items: Sequence[Json], wide: bool) -> str:
    head = ["NAME", "CONNECTED", "REVISION", "IN-SYNC", "ADDRESSES"] + ["ENDPOINTS", "HELD", "FAILURES"] * wide
    rows = []
    for item in sorted(items, key=lambda i: str(i.get("name"))):
        row = [item.get("name"), item.get("connected"), item.get("revision"), item.get("in_sync")]
        row += [_join(item, "addresses"), item.get("endpoints"), item.get("held"), _failures(item)]
        rows.append([_cell(value) for value in row[: len(head)]])
    return text.table(head, rows)


def _failures(item: Json) -> str:
    return "; ".join(f"{f.get('object')}: {f.get('message')}" for f in item.get("failures") or ())


def _policy_table(items: Sequence[Json], wide: bool) -> str:
    policies = sorted((p for p in map(_decoded, items) if isinstance(p, Policy)), key=Policy.sort_key)
    head = ["NAME", "ORDER", "SELECTOR", "TYPES"] + ["INGRESS-RULES", "EGRESS-RULES"] * wide
    rows = []
    for p in policies:
        order = "" if p.order is None else f"{p.order:g}"
        row = [p.name, order, p.selector if wide else _cut(p.selector, 60), ",".join(t.value for t in p.types)]
        rows.append(row + [str(len(p.ingress)), str(len(p.egress))] * wide)
    return text.table(head, rows)


def _profile_table(items: Sequence[Json], wide: bool) -> str:
    profiles = sorted((p for p in map(_decoded, items) if isinstance(p, Profile)), key=lambda p: p.name)
    rows = [[p.name, str(len(p.ingress)), str(len(p.egress)), text.labels(p.labels)] for p in profiles]
    return text.table(["NAME", "INGRESS-RULES", "EGRESS-RULES", "LABELS"], rows)


def _cut(value: str, at_most: int) -> str:
    return value if len(value) <= at_most else value[: at_most - 3] + "..."


def _decoded(document: Json) -> Any:
    return decode(document, stored=True)


_TABLES: dict[str, Callable[[Sequence[Json], bool], str]] = {
    "Endpoint": _endpoint_table,
    "Host": _host_table,
    "GlobalNetworkPolicy": _policy_table,
    "Profile": _profile_table,
}


def describe(client: Client, kind: str, name: str) -> str:
    if kind == "Endpoint":
        found = _endpoints(client, name)
        if not found:
            raise Slash32Error(f"Endpoint {quoted(name, 64)}: there is none; name a domain, a MAC or an address")
        return "\n\n".join(_describe_endpoint(client, item) for item in found)
    document = client.get("resources", kind, name)
    body = dump_yaml(document.get("spec"))
    if kind == "Host":
        state = [item for item in client.items("hosts") if item.get("name") == name]
        about = [(k.replace("_", "-"), _cell(v)) for k, v in (state[0] if state else {}).items() if _plain(v)]
        about += [("failures", _failures(state[0]) if state else "")]
        return f"{text.fields([('kind', kind), *about])}\n\n{body}"
    users = _users(client, kind, name)
    about = [("kind", kind), ("name", name), ("applies to", f"{text.count(len(users), 'endpoint')}")]
    about += [("endpoints", text.names(users, 50))]
    return f"{text.fields(about)}\n\n{body}"


def _plain(value: object) -> bool:
    return isinstance(value, (str, int, float, bool))


def _users(client: Client, kind: str, name: str) -> list[str]:
    profiles = _profiles(client)
    endpoints = [(item, _model(item)) for item in client.items("endpoints")]
    if kind == "Profile":
        return sorted(str(item.get("domain")) for item, endpoint in endpoints if name in endpoint.profiles)
    policy = _decoded(client.get("resources", kind, name))
    chosen = selectors.parse(policy.selector)
    return sorted(e.domain for _, e in endpoints if chosen.matches(effective_labels(e, profiles)))


def _profiles(client: Client) -> dict[str, Profile]:
    return {p.name: p for p in map(_decoded, client.items("resources", "Profile"))}


def _model(item: Json) -> Endpoint:
    key = EndpointKey(str(item.get("uuid")), str(item.get("mac")))
    return Endpoint(key, str(item.get("domain")), item.get("labels") or {}, tuple(item.get("profiles") or ()))


def _describe_endpoint(client: Client, item: Json) -> str:
    policies = [_decoded(document) for document in client.items("resources", "GlobalNetworkPolicy")]
    endpoint, profiles = _model(item), _profiles(client)
    have = effective_labels(endpoint, profiles)
    about: list[tuple[str, object]] = [("kind", "Endpoint")]
    about += [(key, _cell(item.get(key))) for key in ("domain", "host", "uuid", "mac")]
    about += [(key, _join(item, key)) for key in ("addresses", "prefixes", "profiles")]
    about += [("shared", _shared(item)), ("labels", text.labels(have))]
    for direction in Direction:
        found = [p.name for p in applicable(policies, have, direction)]
        known = [name for name in endpoint.profiles if name in profiles]
        who = text.names(found) or (f"profiles {text.names(known)}" if known else "nothing applies: all is dropped")
        about.append((direction.value.lower(), who))
    return text.fields(about)


def status(client: Client, output: str) -> str:
    found = client.get("status")
    hosts = client.items("hosts")
    if output in ("yaml", "json"):
        return dump({**found, "hosts": hosts}, output)
    counted = ("hosts", "connected", "inSync")  # said with names below
    about = [(key, _cell(value)) for key, value in found.items() if _plain(value) and key not in counted]
    held = found.get("held") or ()
    about += [("held until adopted", text.names(sorted(held)))] if held else []
    away = sorted(str(h.get("name")) for h in hosts if not h.get("connected"))
    behind = sorted(str(h.get("name")) for h in hosts if h.get("connected") and not h.get("in_sync"))
    failing = sorted(str(h.get("name")) for h in hosts if h.get("failures"))
    about.append(("connected", f"{len(hosts) - len(away)} of {text.count(len(hosts), 'host')}"))
    for what, who in (("not connected", away), ("not in sync", behind), ("failing", failing)):
        about += [(what, text.names(who))] if who else []
    about += [("alarm", f"{a.get('host')}: {a.get('endpoint')}: {a.get('message')}") for a in found.get("alarms") or ()]
    return text.fields(about)
