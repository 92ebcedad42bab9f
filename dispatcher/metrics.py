# Owns: what a dispatcher measures and what it says of its health. Pure: reads the core, between two messages.
# `Counts` is what others count as it happens; all else is looked up when it is asked for: docs/monitoring.md.
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from slash32 import __version__
from slash32.errors import visible
from slash32.metrics import COMMON, Family, Histogram, Kind, Sampled, Usage, common, render

if TYPE_CHECKING:
    from .core import Core

_C, _G, _H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM

REVISION = Family("slash32_revision", _G, "The last commit that this dispatcher has.")
STORE = Family("slash32_store_info", _G, "Always 1: which store, by its epoch.", ("epoch",))
STORE_TROUBLE = Family("slash32_dispatcher_store_trouble", _G, "1 while the store takes no commits.")
HOSTS = Family(
    "slash32_hosts", _G,
    "Hosts that are known or fenced; of those connected to this dispatcher: all, in sync, held.", ("state",),
)  # fmt: skip
ENDPOINTS = Family("slash32_endpoints", _G, "Endpoints that hosts were granted.")
RESOURCES = Family("slash32_resources", _G, "Resources of a kind.", ("kind",))
ALARMS = Family("slash32_claim_alarms", _G, "Endpoints whose claim stands refused.")
IN_SYNC = Family("slash32_host_in_sync", _G, "1 where the host's kernel has all that it needs.", ("host",))
LAG = Family(
    "slash32_host_lag_seconds", _G,
    "Age of the oldest commit that a connected host has not acknowledged; 0 in sync.", ("host",),
)  # fmt: skip

COMMITS = Family("slash32_dispatcher_commits_total", _C, "Commits of this dispatcher.")
COMMIT_TIME = Family("slash32_dispatcher_commit_duration_seconds", _H, "From a decision to its being durable.")
CONFLICTS = Family("slash32_dispatcher_store_conflicts_total", _C, "Proposals that another dispatcher's came before.")
FAILURES = Family("slash32_dispatcher_store_failures_total", _C, "Proposals that the store did not take.")
QUEUE = Family("slash32_dispatcher_queue_length", _G, "Inputs that wait to be decided and committed.")
LIVE_TIME = Family(
    "slash32_dispatcher_live_duration_seconds", _H,
    "From a commit's beginning to the last acknowledgement of the connected hosts it concerns.",
)  # fmt: skip
ACKS = Family("slash32_dispatcher_acknowledgements_total", _C, "Acknowledgements of hosts.")
DELIVERIES = Family("slash32_dispatcher_deliveries_total", _C, "Messages sent to hosts.")
DELIVERED = Family("slash32_dispatcher_delivered_bytes_total", _C, "Bytes sent to hosts, before encryption.")
BLOCKED = Family("slash32_dispatcher_window_blocked_hosts", _G, "Hosts for which changes wait until they acknowledge.")
CLAIMS = Family("slash32_dispatcher_claims_total", _C, "Claims of hosts: granted or refused.", ("result",))
HANDSHAKES = Family("slash32_dispatcher_handshakes_refused_total", _C, "Connections refused for their key.")
BUSY = Family("slash32_dispatcher_loop_busy_seconds_total", _C, "Time in which the core's thread did not wait.")
REQUESTS = Family("slash32_dispatcher_api_requests_total", _C, "Requests of operators, by HTTP status.", ("code",))
WATCHERS = Family("slash32_dispatcher_watchers", _G, "Operators' clients that watch changes.")

FAMILIES = (
    *COMMON, REVISION, STORE, STORE_TROUBLE, HOSTS, ENDPOINTS, RESOURCES, ALARMS, IN_SYNC, LAG, COMMITS, COMMIT_TIME,
    CONFLICTS, FAILURES, QUEUE, LIVE_TIME, ACKS, DELIVERIES, DELIVERED, BLOCKED, CLAIMS, HANDSHAKES, BUSY, REQUESTS,
    WATCHERS,
)  # fmt: skip

HOST_STATES = ("known", "fenced", "connected", "in_sync", "held")


@dataclass(slots=True)
class Counts:
    """Each is counted in one place, by one thread."""

    acknowledgements: int = 0  # core
    deliveries: int = 0  # loop: messages that zmq took
    delivered_bytes: int = 0
    claims_granted: int = 0  # core: answered, not merely repeated
    claims_refused: int = 0
    handshakes_refused: int = 0  # zap
    commits: int = 0  # core: landed
    busy: float = 0.0  # loop: seconds between poll's return and the next poll
    watchers: int = 0  # API
    requests: Counter[int] = field(default_factory=Counter)  # API: by status
    commit_seconds: Histogram = field(default_factory=Histogram)  # core: one of its own commits landed
    live_seconds: Histogram = field(default_factory=Histogram)  # live: the last acknowledgement of a commit came


def exposition(sampled: list[Sampled], usage: Usage) -> str:
    """In whatever thread."""
    return render([*common("dispatcher", __version__, usage), *sampled])


def collect(core: Core, now: float) -> list[Sampled]:
    """In the core's thread; what is returned is nobody else's. `now` is monotonic seconds."""
    return [*_fleet(core, now), *_work(core)]


def _fleet(core: Core, now: float) -> Iterator[Sampled]:
    registry, publishers = core.registry, core.fanout.publishers
    in_sync = {name: publisher.has(core.revision) for name, publisher in publishers.items()}
    yield REVISION.of(core.revision)
    yield STORE.by({core.epoch: 1})
    yield STORE_TROUBLE.of(bool(_trouble(core)))
    fenced = sum(bool(state.fenced) for state in core.ledger.hosts.values())
    held = sum(bool(publisher.held) for publisher in publishers.values())
    states = len(registry.hosts), fenced, len(core.connected), sum(in_sync.values()), held
    yield HOSTS.by(dict(zip(HOST_STATES, states, strict=True)))
    yield ENDPOINTS.of(len(registry.endpoints))
    yield RESOURCES.by({kind: len(found) for kind, found in core.ledger.resources().items()})
    yield ALARMS.of(sum(map(len, core.alarms.values())))
    yield IN_SYNC.by({name: int(has) for name, has in in_sync.items()})
    yield LAG.by({name: core.commits.lag(name, now) for name in core.connected})


def _work(core: Core) -> Iterator[Sampled]:
    counts = core.counts
    yield COMMITS.of(counts.commits)
    yield COMMIT_TIME.of(counts.commit_seconds.copy())
    yield CONFLICTS.of(core.turns.conflicts)
    yield FAILURES.of(core.turns.failures)
    yield QUEUE.of(core.turns.waiting())
    yield LIVE_TIME.of(counts.live_seconds.copy())
    yield ACKS.of(counts.acknowledgements)
    yield DELIVERIES.of(counts.deliveries)
    yield DELIVERED.of(counts.delivered_bytes)
    yield BLOCKED.of(sum(publisher.waiting for publisher in core.fanout.publishers.values()))
    yield CLAIMS.by({"granted": counts.claims_granted, "refused": counts.claims_refused})
    yield HANDSHAKES.of(counts.handshakes_refused)
    yield BUSY.of(counts.busy)
    yield REQUESTS.by({str(code): number for code, number in sorted(counts.requests.items())})
    yield WATCHERS.of(counts.watchers)


def health(core: Core) -> dict[str, Any]:
    """Of this dispatcher, not of the fleet: hosts that lag or hold are metrics, and no reason to restart it."""
    problems = [f"the store takes no commits: {visible(_trouble(core))}"] if _trouble(core) else []
    if core.company.removed:
        problems.append(
            "it was removed by an operator, the others do not hear it: stop it, or restart it to enter again"
        )
    return {"status": "degraded" if problems else "ok", "problems": problems}


def _trouble(core: Core) -> str:
    return core.store.trouble or core.turns.failing
