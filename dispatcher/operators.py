# Owns: what an operator may ask of the dispatcher, as functions of the core: apply, delete, list, progress, status.
# Runs in the core's thread; the API hands over plain data and gets plain data back.
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slash32 import resources
from slash32.errors import Slash32Error, quoted
from slash32.model import Host
from slash32.net import format_address
from slash32.policy import DEFAULT_TIER, THE_DEFAULT_TIER
from slash32.resources import Resource
from slash32.verdict import effective_labels
from slash32.wire import Refusal

from . import questions
from . import store as disk
from .clashes import clashes, still_needed
from .core import Core
from .ownership import out_of_bounds
from .questions import Inquiry
from .registry import Claimed

Json = dict[str, Any]
_COUNTED = {
    "tiers": "Tier",
    "policies": "GlobalNetworkPolicy",
    "stagedPolicies": "StagedGlobalNetworkPolicy",
    "profiles": "Profile",
    "networkSets": "GlobalNetworkSet",
    "hostEndpoints": "HostEndpoint",
}  # in `status`


class Refused(Exception):
    """`status` is HTTP's; each error is one line."""

    def __init__(self, status: int, *errors: str) -> None:
        super().__init__(*errors)
        self.status = status
        self.errors = list(errors)


def apply(core: Core, documents: Sequence[Any], dry_run: bool) -> Json:
    """All of them or, when anything is wrong with any, none. Raises Refused."""
    decoded, errors = _decoded(documents)
    errors += clashes(core.registry, decoded)
    if errors:
        raise Refused(400, *errors)
    changes: list[Json] = []
    for resource in decoded:
        kind, old = resources.kind_of(resource), _find(core, resources.kind_of(resource), resource.name)
        change = "created" if old is None else "unchanged" if old == resource else "configured"
        changes.append({"kind": kind, "name": resource.name, "change": change})
        if change != "unchanged" and not dry_run:
            core.writes.append(disk.put_resource(kind, resource.name, resources.encode(resource)))
            core.take(resource)
            if isinstance(resource, Host):
                _bound(core, resource, old)
    return {"revision": core.revision + (1 if core.writes else 0), "changes": changes}


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


def _bound(core: Core, host: Host, old: Resource | None) -> None:
    """A host's resource changed: claims that it forbids end, and another key needs another connection."""
    refused = []
    for key in sorted(core.registry.of_host(host.name)):
        endpoint = core.registry.endpoints[key].endpoint
        why = out_of_bounds(host, endpoint, effective_labels(endpoint, core.registry.profiles))
        if why is not None:
            core.registry.release(key)
            core.writes.append(disk.delete_endpoint(key))
            refused.append(Refusal(key, why))
            core.alarm(host.name, key, why)
    if isinstance(old, Host) and old.public_key != host.public_key:
        core.drop(host.name, "its key was changed", "this host's key was changed by an operator")
    elif refused:
        core.drop(host.name, "its claims are asked for again")


def delete(core: Core, word: str, name: str) -> Json:
    kind = _kind(word)
    if _find(core, kind, name) is None:
        raise Refused(404, f"{kind} {quoted(name)[1:-1]}: does not exist")
    needed = still_needed(core.registry, kind, name)
    if needed is not None:
        raise Refused(409, needed)
    core.writes.append(disk.delete_resource(kind, name))
    registry = core.registry
    match kind:
        case "GlobalNetworkPolicy" | "StagedGlobalNetworkPolicy":
            registry.delete_policy(name, staged=kind != "GlobalNetworkPolicy")
        case "Tier":
            registry.delete_tier(name)
        case "GlobalNetworkSet":
            registry.delete_network_set(name)
        case "HostEndpoint":
            registry.delete_host_endpoint(name)
        case "Profile":
            registry.delete_profile(name)
        case _:
            _delete_host(core, name)
    return {"revision": core.revision + 1}


def _delete_host(core: Core, name: str) -> None:
    core.drop(name, "was deleted", f"host {name} was deleted by an operator")
    core.forget_key(name)
    core.writes += [disk.delete_endpoint(key) for key in core.registry.delete_host(name)]
    core.writes.append(disk.delete_host(name))
    core.fanout.remove_host(name)
    core.ahead.pop(name, None)
    core.alarms.pop(name, None)


def get(core: Core, word: str, name: str | None = None) -> Json:
    kind = _kind(word)
    if name is None:
        return {"items": [resources.encode(r) for _, r in sorted(_all(core, kind).items())]}
    found = _find(core, kind, name)
    if found is None:
        raise Refused(404, f"{kind} {quoted(name)[1:-1]}: does not exist")
    return resources.encode(found)


def _kind(word: str) -> str:
    found = resources.find_kind(word)
    if found is None:
        known = ", ".join(resources.KINDS)
        raise Refused(404, f"kind {quoted(word, 64)} is unknown; known are {known}")
    return found.name


def _all(core: Core, kind: str) -> Mapping[str, Resource]:
    registry = core.registry
    known: dict[str, Mapping[str, Resource]] = {
        "GlobalNetworkPolicy": registry.policies,
        "StagedGlobalNetworkPolicy": registry.staged,
        "Tier": registry.tiers,
        "GlobalNetworkSet": registry.network_sets,
        "HostEndpoint": registry.host_endpoints,
        "Profile": registry.profiles,
        "Host": registry.hosts,
    }
    return known[kind]


def _find(core: Core, kind: str, name: str) -> Resource | None:
    if (kind, name) == ("Tier", DEFAULT_TIER):
        return THE_DEFAULT_TIER  # nobody stores it
    return _all(core, kind).get(name)


def endpoints(core: Core) -> Json:
    claims = sorted(core.registry.endpoints.values(), key=lambda c: (c.host, c.endpoint.domain, c.endpoint.key))
    return {"items": [_endpoint(claimed) for claimed in claims]}


def _endpoint(claimed: Claimed) -> Json:
    e = claimed.endpoint
    return {
        "uuid": e.key.uuid,
        "mac": e.key.mac,
        "domain": e.domain,
        "host": claimed.host,
        "labels": dict(sorted(e.labels.items())),
        "effectiveLabels": dict(sorted(claimed.labels)),
        "profiles": list(e.profiles),
        "addresses": [format_address(a) for a in e.addresses],
        "shared": [{"address": format_address(s.address), "group": s.group} for s in e.shared],
        "prefixes": [str(p) for p in e.prefixes],
    }


def hosts(core: Core) -> Json:
    return {"items": [_host(core, name) for name in sorted(core.registry.hosts)]}


def _host(core: Core, name: str) -> Json:
    session, publisher = core.connected.get(name), core.fanout.publishers[name]
    return {
        "name": name,
        "connected": session is not None,
        "revision": core.revision if publisher.has(core.revision) else _settled(core, name),
        "in_sync": publisher.has(core.revision),
        "held": publisher.held,
        "addresses": [format_address(a) for a in core.registry.next_hops(name)],
        "endpoints": len(core.registry.of_host(name)),
        "failures": [{"object": f.object, "message": f.message} for f in (session.failures if session else ())],
    }


def _settled(core: Core, name: str) -> int:
    """The last revision that is known to be in the host's kernel."""
    session, oldest = core.connected.get(name), core.fanout.publishers[name].unsettled
    if oldest:
        return oldest - 1
    return session.hello.revision if session is not None else 0


def progress(core: Core, revision: int) -> Json:
    """How far a revision has got: live where the kernels have it; disconnected hosts are pending."""
    if not 0 <= revision <= core.revision:
        raise Refused(404, f"revision {revision} does not exist yet; the last one is {core.revision}")
    publishers = core.fanout.publishers
    pending = sorted(name for name in core.registry.hosts if not publishers[name].has(revision))
    milliseconds = core.commits.milliseconds(revision, core.clock())
    return {
        "revision": revision,
        "live": len(core.registry.hosts) - len(pending),
        "hosts": len(core.registry.hosts),
        "pending": pending,
        "disconnected": [name for name in pending if name not in core.connected],
        "failed": [
            {"host": name, "object": failure.object, "message": failure.message}
            for name, session in sorted(core.connected.items())
            for failure in session.failures
        ],
        "milliseconds": None if milliseconds is None else round(milliseconds, 3),
        "done": not pending,
    }


def status(core: Core) -> Json:
    held = {name: p.held for name, p in sorted(core.fanout.publishers.items()) if p.held}
    return {
        "epoch": core.epoch,
        "revision": core.revision,
        "hosts": len(core.registry.hosts),
        "connected": len(core.connected),
        "inSync": sum(p.has(core.revision) for p in core.fanout.publishers.values()),
        "held": held,
        "endpoints": len(core.registry.endpoints),
        **{word: len(_all(core, kind)) for word, kind in _COUNTED.items()},
        "alarms": [
            {"host": host, "endpoint": str(key), "message": message}
            for host, alarms in sorted(core.alarms.items())
            for key, message in sorted(alarms.items())
        ],
    }


def adopt(core: Core, names: list[str] | None) -> Json:
    """`names` None: all hosts. Refuses a name that is no host's."""
    unknown = [name for name in names or () if name not in core.registry.hosts]
    if unknown:
        raise Refused(404, *(f"Host {quoted(n, 64)}: there is none; `slash32 get hosts` lists them" for n in unknown))
    return {"adopted": core.adopt(names)}


def ask(core: Core, names: Sequence[str], question: str) -> Inquiry:
    """Asks hosts a question (slash32.questions): the inquiry's future has their answers. Raises Refused."""
    unknown = [name for name in names if name not in core.registry.hosts]
    if unknown:
        raise Refused(404, *(f"Host {quoted(n, 64)}: there is none; `slash32 get hosts` lists them" for n in unknown))
    if len(core.questions) + len(names) > questions.MOST:
        raise Refused(503, f"{len(core.questions)} questions to hosts wait for their answers already; try again")
    return core.ask(names, question)
