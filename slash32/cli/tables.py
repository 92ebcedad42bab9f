# Owns: resources and endpoints as tables, one for each kind. Pure.
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from slash32.net import format_address
from slash32.policy import HostEndpoint, NetworkSet, Policy, Profile, Tier
from slash32.resources import Resource, decode

from . import text
from .client import Json


def table(kind: str, items: Sequence[Json], wide: bool) -> str:
    """`kind` as documents spell it, or Endpoint."""
    return _TABLES[kind](items, wide)


def decoded(document: Json) -> Any:
    return decode(document, stored=True)


def cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def join(item: Json, key: str) -> str:
    return ",".join(map(str, item.get(key) or ()))


def shared(item: Json) -> str:
    return ",".join(f"{s.get('address')}({s.get('group')})" for s in item.get("shared") or ())


def failures(item: Json) -> str:
    return "; ".join(f"{f.get('object')}: {f.get('message')}" for f in item.get("failures") or ())


def order(resource: Policy | Tier) -> str:
    return "" if resource.order is None else f"{resource.order:.12g}"


def _endpoints(items: Sequence[Json], wide: bool) -> str:
    head = ["DOMAIN", "HOST", "ADDRESSES", "LABELS", "PROFILES"] + ["MAC", "SHARED", "PREFIXES", "UUID"] * wide
    rows = []
    for item in sorted(items, key=lambda i: (str(i.get("domain")), str(i.get("mac")))):
        row = [item.get("domain"), item.get("host"), join(item, "addresses"), text.labels(item.get("labels") or {})]
        row.append(join(item, "profiles"))
        if wide:
            row += [item.get("mac"), shared(item), join(item, "prefixes"), item.get("uuid")]
        rows.append([cell(value) for value in row])
    return text.table(head, rows)


def _hosts(items: Sequence[Json], wide: bool) -> str:
    head = ["NAME", "CONNECTED", "REVISION", "SYNC", "LAG", "VERSION", "FILTER", "LAST-SEEN", "ENDPOINTS"]
    head += ["ADDRESSES", "HELD", "FENCED", "NEXT-KEY", "FAILURES"] * wide
    rows = []
    for item in sorted(items, key=lambda i: str(i.get("name"))):
        connected = (item.get("dispatcher") or True) if item.get("connected") else False  # which one, where it is told
        revision = item.get("revision") if connected else item.get("revision") or None  # 0: nobody knows
        row = [item.get("name"), connected, revision, _sync(item), _lag(item)]
        row += [item.get("version"), item.get("filter"), item.get("last_seen"), item.get("endpoints")]
        row += [join(item, "addresses"), item.get("held"), item.get("fenced"), item.get("nextPublicKey")]
        rows.append([cell(value) for value in [*row, failures(item)][: len(head)]])
    return text.table(head, rows)


def _sync(item: Json) -> str:
    state = "held" if item.get("held") else cell(bool(item.get("in_sync")))
    return f"{state},fenced" if item.get("fenced") else state


def _lag(item: Json) -> str:
    seconds = item.get("lag_seconds")
    return text.age(seconds) if isinstance(seconds, int | float) else ""


def _dispatchers(items: Sequence[Json], wide: bool) -> str:
    """Name first, then all that is told of them."""
    fields = dict.fromkeys(key for item in items for key, value in item.items() if isinstance(value, _PLAIN))
    keys = ["name", *(key for key in fields if key != "name" and (wide or key not in _LONG))]
    rows = [[cell(item.get(key)) for key in keys] for item in sorted(items, key=lambda i: str(i.get("name")))]
    return text.table([key.replace("_", "-").upper() for key in keys], rows)


def _policies(items: Sequence[Json], wide: bool) -> str:
    policies = sorted((p for p in _all(items) if isinstance(p, Policy)), key=lambda p: (p.tier, p.sort_key()))
    head = ["NAME", "TIER", "ORDER", "SELECTOR", "TYPES"] + ["INGRESS-RULES", "EGRESS-RULES", "FORWARD"] * wide
    rows = []
    for p in policies:
        chosen = p.selector if wide else _cut(p.selector, 60)
        row = [p.name, p.tier, order(p), chosen, ",".join(t.value for t in p.types)]
        rows.append(row + [str(len(p.ingress)), str(len(p.egress)), cell(p.apply_on_forward)] * wide)
    return text.table(head, rows)


def _tiers(items: Sequence[Json], wide: bool) -> str:
    tiers = sorted((t for t in _all(items) if isinstance(t, Tier)), key=Tier.sort_key)
    return text.table(["NAME", "ORDER", "DEFAULT-ACTION"], [[t.name, order(t), t.default_action.value] for t in tiers])


def _profiles(items: Sequence[Json], wide: bool) -> str:
    profiles = sorted((p for p in _all(items) if isinstance(p, Profile)), key=lambda p: p.name)
    rows = [[p.name, str(len(p.ingress)), str(len(p.egress)), text.labels(p.labels)] for p in profiles]
    return text.table(["NAME", "INGRESS-RULES", "EGRESS-RULES", "LABELS"], rows)


def _network_sets(items: Sequence[Json], wide: bool) -> str:
    sets = sorted((s for s in _all(items) if isinstance(s, NetworkSet)), key=lambda s: s.name)
    rows = []
    for s in sets:
        nets = ",".join(map(str, s.nets))
        rows.append([s.name, text.labels(s.labels), nets if wide else _cut(nets, 60)])
    return text.table(["NAME", "LABELS", "NETS"], rows)


def _host_endpoints(items: Sequence[Json], wide: bool) -> str:
    found = sorted((h for h in _all(items) if isinstance(h, HostEndpoint)), key=lambda h: (h.node, h.interface))
    rows = []
    for h in found:
        addresses = ",".join(map(format_address, h.addresses))
        rows.append([h.name, h.node, h.interface, addresses, text.labels(h.labels), ",".join(h.profiles)])
    return text.table(["NAME", "NODE", "INTERFACE", "ADDRESSES", "LABELS", "PROFILES"], rows)


def _all(items: Sequence[Json]) -> list[Resource]:
    return [decoded(item) for item in items]


def _cut(value: str, at_most: int) -> str:
    return value if len(value) <= at_most else value[: at_most - 3] + "..."


_PLAIN = (str, int, float, bool, type(None))
_LONG = ("publicKey",)
_TABLES: dict[str, Callable[[Sequence[Json], bool], str]] = {
    "Endpoint": _endpoints,
    "Host": _hosts,
    "Dispatcher": _dispatchers,
    "GlobalNetworkPolicy": _policies,
    "StagedGlobalNetworkPolicy": _policies,
    "Tier": _tiers,
    "GlobalNetworkSet": _network_sets,
    "HostEndpoint": _host_endpoints,
    "Profile": _profiles,
}
