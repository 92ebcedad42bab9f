# Owns: what an operator may ask of the machines and do with them: hosts, endpoints, progress, fences, keys, status.
# Functions of the core, in its thread; the API hands over plain data and gets plain data back.
from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from slash32.errors import quoted
from slash32.hosts import public_key
from slash32.net import format_address

from ..core import Core
from ..decisions.inputs import Refused
from ..hosts import questions
from ..hosts.questions import Inquiry
from ..registry.registry import Claimed
from ..replicas.rolls import Presence
from ..store.commits import Holding, Saved, Table
from .resources import apply, bound

Json = dict[str, Any]
_COUNTED = {
    "tiers": "Tier",
    "policies": "GlobalNetworkPolicy",
    "stagedPolicies": "StagedGlobalNetworkPolicy",
    "profiles": "Profile",
    "networkSets": "GlobalNetworkSet",
    "hostEndpoints": "HostEndpoint",
}  # in `status`


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
    there = core.company.presences(core.clock())
    return {"items": [_host(core, name, *there.get(name, (None, None))) for name in sorted(core.registry.hosts)]}


def _host(core: Core, name: str, dispatcher: str | None, there: Presence | None) -> Json:
    state, left = core.ledger.host(name), core.left.get(name)
    settled, seen = (left.settled, core.wall() - (core.clock() - left.seen)) if left is not None else (0, None)
    if there is not None:
        settled, seen = there.settled, there.seen
    return {
        "name": name,
        "connected": there is not None,
        "dispatcher": dispatcher,
        "revision": settled,
        "in_sync": core.has(name, core.revision),
        "lag_seconds": round(there.lag, 3) if there else None,
        "held": there.held if there else "",
        "fenced": state.fenced,
        "version": there.version if there else "",
        "filter": there.filter if there else "",
        "last_seen": None if seen is None else _moment(seen),
        "addresses": [format_address(a) for a in core.registry.next_hops(name)],
        "endpoints": len(core.registry.of_host(name)),
        "failures": _failures(there),
        "publicKey": core.registry.hosts[name].public_key,
        "nextPublicKey": state.next_key,
    }


def _failures(there: Presence | None) -> list[Json]:
    return [{"object": what, "message": why} for what, why in (there.failures if there else ())]


def _moment(at: float) -> str:
    """RFC 3339."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def live(core: Core, revision: int) -> bool:
    """Every host has it."""
    return all(core.has(name, revision) for name in core.fanout.publishers)


def progress(core: Core, revision: int) -> Json:
    """How far a revision has got: live where the kernels have it; disconnected hosts are pending."""
    if not 0 <= revision <= core.revision:
        raise Refused(404, f"revision {revision} does not exist yet; the last one is {core.revision}")
    now = core.clock()
    durable = core.fanout.publishers  # not those that are being added or deleted
    pending = sorted(name for name in durable if not core.has(name, revision))
    took, there = core.commits.of(revision, now), core.company.presences(now, pending)
    return {
        "revision": revision,
        "live": len(durable) - len(pending),
        "hosts": len(durable),
        "pending": pending,
        "disconnected": [name for name in pending if name not in there],
        "lagging": [
            {"host": n, "connected": n in there, "seconds": round(there[n][1].lag, 3) if n in there else None}
            for n in pending
        ],
        "failed": [
            {"host": name, "object": what, "message": why}
            for name, found in sorted(core.company.failures(now).items())
            for what, why in found
        ],
        "milliseconds": took and round(took.last, 3),
        "p50": took and took.median and round(took.median, 3),
        "p99": took and took.p99 and round(took.p99, 3),
        "counted": took.counted if took else 0,
        "done": not pending,
    }


def status(core: Core) -> Json:
    there = core.company.presences(core.clock())
    return {
        "epoch": core.epoch,
        "revision": core.revision,
        "dispatcher": core.name,
        "store": core.store.trouble or core.turns.failing or "ok",
        "hosts": len(core.registry.hosts),
        "connected": len(there),
        "inSync": sum(core.has(name, core.revision) for name in core.registry.hosts),
        "held": {name: where.held for name, (_, where) in sorted(there.items()) if where.held},
        "endpoints": len(core.registry.endpoints),
        **{word: len(core.ledger.resources()[kind]) for word, kind in _COUNTED.items()},
        "alarms": [
            {"host": host, "endpoint": endpoint, "message": message}
            for host, alarms in sorted(core.company.alarms(core.clock()).items())
            for endpoint, message in sorted(alarms)
        ],
    }


def add_host(core: Core, document: Mapping[str, Any]) -> Json:
    """A Host that is not there yet, as a document's metadata.name and spec. Raises Refused."""
    name = document.get("metadata", {}).get("name")
    if isinstance(name, str) and name in core.registry.hosts:
        raise Refused(409, f"Host {name}: exists already; `slash32 host rotate` gives it another key")
    return apply(core, [document], dry_run=False)


def rotate(core: Core, name: str, key: str) -> Json:
    """From now on the host may connect with this key, too; when it does, it is its key."""
    _known(core, [name])
    try:
        public_key(key)
    except ValueError as e:
        raise Refused(400, f"Host {name}: publicKey: {e}") from None
    owner = core.ledger.keys.get(key)
    if owner is not None:
        raise Refused(409, f"Host {name}: publicKey: {key} is that of host {owner} already")
    core.ledger.set_host(name, core.ledger.host(name)._replace(next_key=key))
    core.ledger.note(core.wall(), f"Host {name}", "given a next key")
    return {"revision": core.revision + 1}


def fence(core: Core, name: str, reason: str) -> Json:
    """Nothing that the host claims is granted any more; what it held is free for others."""
    _known(core, [name])
    keys = sorted(core.registry.of_host(name))
    for key in keys:
        core.ledger.release(key)
    core.ledger.set_host(name, core.ledger.host(name)._replace(fenced=reason))
    core.ledger.note(core.wall(), f"Host {name}", "fenced")
    return {"revision": core.revision + 1, "released": len(keys)}


def unfence(core: Core, name: str) -> Json:
    _known(core, [name])
    if not core.ledger.host(name).fenced:
        raise Refused(409, f"Host {name}: is not fenced")
    core.ledger.set_host(name, core.ledger.host(name)._replace(fenced=""))
    core.ledger.note(core.wall(), f"Host {name}", "unfenced")
    return {"revision": core.revision + 1}


def audit(core: Core, since: int, limit: int) -> Json:
    """Who changed what, after revision `since`, the last ones first."""
    found = [(int(number), entry) for (number, _), entry in reversed(core.ledger.audit.items()) if int(number) > since]
    items = [{"revision": revision, **entry._asdict(), "at": _moment(entry.at)} for revision, entry in found[:limit]]
    return {"items": items}


def restore(core: Core, saved: Saved, replace: bool) -> Json:
    """All that the backup holds but what is live (claims, dispatchers) or tells what was done (audit). Raises Refused.

    Hosts that followed the store of the backup take this one's content, but those that have seen more than it holds.
    """
    live = (Table.ENDPOINT, Table.EXPECTED, Table.DISPATCHER, Table.AUDIT)
    mine = core.ledger.saved()
    if any(table not in live for table, _ in mine.records) and not replace:
        raise Refused(409, "this store is not empty: restore with replace=1 to give up what it holds")
    kept = {where: record for where, record in mine.records.items() if where[0] in live}
    wanted = {where: record for where, record in saved.records.items() if where[0] not in live}
    hosts = {key[1] for table, key in wanted if table is Table.RESOURCE and key[0] == "Host"}
    for where, record in list(kept.items()):
        host = record.host if isinstance(record, Holding) else where[1][0] if where[0] is Table.EXPECTED else None
        if host is not None and host not in hosts:
            del kept[where]
    if saved.epoch != core.epoch:
        wanted[Table.SUPERSEDED, (saved.epoch,)] = saved.revision
    changes = core.ledger.difference(Saved(core.epoch, core.revision, {**kept, **wanted})).writes
    for change in changes:
        core.ledger.write(*change)
    bound(core, sorted(core.registry.endpoints))  # by what hosts may claim now
    core.ledger.note(core.wall(), f"backup of revision {saved.revision}", "restored")
    return {"revision": core.revision + 1, "changes": len(changes)}


def dispatchers(core: Core) -> Json:
    found = sorted(core.ledger.dispatchers.items())
    return {"items": [{"name": name, "address": peer.address, "publicKey": peer.public_key} for name, peer in found]}


def forget_dispatcher(core: Core, name: str) -> Json:
    if name not in core.ledger.dispatchers:
        raise Refused(404, f"dispatcher {quoted(name, 64)}: there is none; `slash32 get dispatchers` lists them")
    if name == core.name:
        raise Refused(409, f"dispatcher {name}: is the one that you ask; stop it, and ask another")
    core.ledger.write(Table.DISPATCHER, (name,), None)
    core.ledger.note(core.wall(), f"dispatcher {name}", "removed")
    return {"revision": core.revision + 1}


def _known(core: Core, names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in core.registry.hosts]
    if unknown:
        raise Refused(404, *(f"Host {quoted(n, 64)}: there is none; `slash32 get hosts` lists them" for n in unknown))


def adopt(core: Core, names: list[str] | None) -> Json:
    """`names` None: all hosts. Refuses a name that is no host's."""
    _known(core, names or ())
    adopted = sorted({*core.adopt(names), *core.company.adopt(names, core.clock())})
    for name in adopted:
        core.ledger.note(core.wall(), f"Host {name}", "adopted")
    return {"adopted": adopted}


def ask(core: Core, names: Sequence[str], question: str) -> Inquiry:
    """Asks hosts a question (slash32.questions): the inquiry's future has their answers. Raises Refused."""
    _known(core, names)
    if len(core.questions) + len(names) > questions.MOST:
        raise Refused(503, f"{len(core.questions)} questions to hosts wait for their answers already; try again")
    return core.ask(names, question)
