# Owns: what an operator may do with resources, as functions of the core: apply, delete, list. Machines: fleet.py.
# Runs in the core's thread; the API hands over plain data and gets plain data back.
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from slash32 import resources
from slash32.errors import Slash32Error, quoted
from slash32.model import EndpointKey, Host
from slash32.policy import DEFAULT_TIER, THE_DEFAULT_TIER, Profile
from slash32.resources import Resource
from slash32.verdict import effective_labels

from ..core import Core
from ..decisions.inputs import Refused
from ..registry.ownership import out_of_bounds
from .clashes import clashes, keys_of_others, still_needed

__all__ = ["Refused", "apply", "bound", "delete", "find", "get"]

Json = dict[str, Any]


def apply(core: Core, documents: Sequence[Any], dry_run: bool) -> Json:
    """All of them or, when anything is wrong with any, none. Raises Refused."""
    decoded, errors = _decoded(documents)
    errors += clashes(core.registry, decoded)
    errors += keys_of_others(core.ledger.hosts, core.ledger.dispatchers, decoded)
    if errors:
        raise Refused(400, *errors)
    changes: list[Json] = []
    moved: list[Resource] = []
    for resource in decoded:
        kind, old = resources.kind_of(resource), find(core, resources.kind_of(resource), resource.name)
        change = "created" if old is None else "unchanged" if old == resource else "configured"
        changes.append({"kind": kind, "name": resource.name, "change": change})
        if change != "unchanged" and not dry_run:
            core.ledger.put(resource)
            core.ledger.note(core.wall(), f"{kind} {resource.name}", change)
            moved.append(resource)
    for resource in moved:  # once all are there
        _rebound(core, resource)
    return {"revision": core.revision + (1 if core.ledger.writes else 0), "changes": changes}


def _decoded(documents: Sequence[Any]) -> tuple[list[Resource], list[str]]:
    found: dict[tuple[str, str], Resource] = {}
    errors: list[str] = []
    for index, document in enumerate(documents):
        if not isinstance(document, dict):
            errors.append(f"documents[{index}]: is not a mapping with apiVersion, kind, metadata and spec")
            continue
        try:
            resource = resources.decode(document)
        except Slash32Error as e:
            errors.append(str(e))
            continue
        key = (resources.kind_of(resource), resource.name)
        if key in found:
            errors.append(f"{key[0]} {key[1]}: is given twice; keep one")
        found[key] = resource
    return list(found.values()), errors


def _rebound(core: Core, resource: Resource) -> None:
    """It says what a host may claim, or gives labels: claims that are now forbidden end."""
    registry = core.registry
    if isinstance(resource, Host):
        bound(core, sorted(registry.of_host(resource.name)))
    elif isinstance(resource, Profile):
        bound(core, sorted(registry.bearing(resource.name)))


def bound(core: Core, keys: Iterable[EndpointKey]) -> None:
    """Of these endpoints those end that their hosts may not claim any more; so does every wait for one of that kind."""
    registry = core.registry
    for key in keys:
        claimed = registry.endpoints[key]
        host, labels = registry.hosts[claimed.host], effective_labels(claimed.endpoint, registry.profiles)
        why = out_of_bounds(host, claimed.endpoint, labels)
        if why is not None:
            core.ledger.release(key)
            core.claims.alarm(host.name, key, why)
    for name, key in sorted(registry.expected):
        coming = registry.expected[name, key].endpoint
        if out_of_bounds(registry.hosts[name], coming, effective_labels(coming, registry.profiles)) is not None:
            core.ledger.expect_no_more(name, key)


def delete(core: Core, word: str, name: str) -> Json:
    kind = _kind(word)
    if find(core, kind, name) is None:
        raise Refused(404, f"{kind} {quoted(name)[1:-1]}: does not exist")
    needed = still_needed(core.registry, kind, name)
    if needed is not None:
        raise Refused(409, needed)
    gone = core.ledger.resources()[kind][name]
    core.ledger.delete(kind, name)
    if isinstance(gone, Profile):  # another profile's label may come to light
        _rebound(core, gone)
    core.ledger.note(core.wall(), f"{kind} {name}", "deleted")
    return {"revision": core.revision + 1}


def get(core: Core, word: str, name: str | None = None) -> Json:
    kind = _kind(word)
    if name is None:
        return {"items": [resources.encode(r) for _, r in sorted(core.ledger.resources()[kind].items())]}
    found = find(core, kind, name)
    if found is None:
        raise Refused(404, f"{kind} {quoted(name)[1:-1]}: does not exist")
    return resources.encode(found)


def _kind(word: str) -> str:
    found = resources.find_kind(word)
    if found is None:
        known = ", ".join(resources.KINDS)
        raise Refused(404, f"kind {quoted(word, 64)} is unknown; known are {known}")
    return found.name


def find(core: Core, kind: str, name: str) -> Resource | None:
    if (kind, name) == ("Tier", DEFAULT_TIER):
        return THE_DEFAULT_TIER  # nobody stores it
    return core.ledger.resources()[kind].get(name)
