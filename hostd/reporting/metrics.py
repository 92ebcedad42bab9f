# Owns: what hostd measures and what it says of its health. Pure: reads the agent, between two events. What is counted
# as it happens is in `Measured`; all else is looked up when it is asked for. docs/monitoring.md says what each means.
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from slash32 import __version__
from slash32.errors import visible
from slash32.metrics import COMMON, Family, Histogram, Kind, Sampled, Usage, common, render

from ..agent import Agent
from ..guests.operations import Request
from ..state import Local, Phase

_C, _G, _H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM

FILTER = Family("slash32_hostd_packet_filter_info", _G, "Always 1: what filters here.", ("packet_filter",))
IN_SYNC = Family("slash32_hostd_in_sync", _G, "1 while the host has all that the dispatcher has for it.")
CONNECTED = Family("slash32_hostd_connected", _G, "1 while a dispatcher is connected.")
HELD = Family("slash32_hostd_held", _G, "1 while the dispatcher's content is refused: slash32 adopt.")
REVISION = Family("slash32_hostd_revision", _G, "The last commit that this host has.")
ENDPOINTS = Family("slash32_hostd_endpoints", _G, "Endpoints of this host.", ("state",))
PROBLEMS = Family("slash32_hostd_problems", _G, "Lines of /health; 0 is healthy.")
LIBVIRT = Family("slash32_hostd_libvirt_connected", _G, "1 while libvirt's driver answers.", ("driver",))
SCAN = Family("slash32_hostd_libvirt_scan_duration_seconds", _H, "To look at all guests of a driver.", ("driver",))

HOOKS = Family("slash32_hostd_hook_answers_total", _C, "Answers to libvirt's hooks.", ("operation", "result"))
HOOK_TIME = Family("slash32_hostd_hook_duration_seconds", _H, "From a hook's question to its answer.", ("operation",))
REFUSED_CLAIMS = Family("slash32_hostd_claims_refused_total", _C, "Claims that the dispatcher refused.")

APPLY_TIME = Family("slash32_hostd_kernel_apply_duration_seconds", _H, "To write one change into the kernel.")
RESYNC_TIME = Family("slash32_hostd_resync_duration_seconds", _H, "To read the whole kernel, and to make good.")
PLANS = Family("slash32_hostd_plans_total", _C, "Changes that were planned.")
WRITES = Family("slash32_hostd_kernel_operations_total", _C, "Operations handed to the kernel.")
REFUSED = Family("slash32_hostd_kernel_refusals_total", _C, "Objects that the kernel did not take.")
FAILURES = Family("slash32_hostd_kernel_failures", _G, "Objects that the kernel does not take now.")
HEALED = Family("slash32_hostd_healed_total", _C, "Operations that undid somebody else's change.")
ENDED = Family("slash32_hostd_flows_ended_total", _C, "Open flows ended: what allowed them is gone.")
STAGED = Family("slash32_hostd_staged_drops_total", _C, "Packets a staged policy would drop.", ("policy",))
LOGGED = Family("slash32_hostd_logged_packets_total", _C, "Packets that Log rules told of.")
LOG_LOST = Family("slash32_hostd_logged_packets_lost_total", _C, "Packets of Log rules that went untold.")

FAMILIES = (
    *COMMON, FILTER, IN_SYNC, CONNECTED, HELD, REVISION, ENDPOINTS, PROBLEMS, LIBVIRT, SCAN, HOOKS, HOOK_TIME,
    REFUSED_CLAIMS, APPLY_TIME, RESYNC_TIME, PLANS, WRITES, REFUSED, FAILURES, HEALED, ENDED, STAGED, LOGGED, LOG_LOST,
)  # fmt: skip

STATES = ("connected", "isolated", *(phase.value for phase in Phase if phase is not Phase.LIVE))
RESULTS = ("allowed", "refused", "gone")
OPERATIONS = ("prepare", "migrate", "start", "started", "stopped", "release", "reconnect")
_SHOWN, _LINE = 20, 300  # problems in /health, characters of each


@dataclass(slots=True)
class Measured:
    """What is counted as it happens."""

    hooks: Counter[tuple[str, str]] = field(default_factory=Counter)  # operation, result
    hook_seconds: dict[str, Histogram] = field(default_factory=dict)
    scan_seconds: dict[str, Histogram] = field(default_factory=dict)  # by driver
    claims_refused: int = 0

    def hook(self, operation: str, result: str, seconds: float) -> None:
        known = operation if operation in OPERATIONS else "other"
        self.hooks[known, result] += 1
        self.hook_seconds.setdefault(known, Histogram()).observe(seconds)

    def scanned(self, driver: str, seconds: float) -> None:
        self.scan_seconds.setdefault(driver, Histogram()).observe(seconds)


@dataclass(frozen=True, slots=True)
class Present:
    """What there is besides the agent."""

    packet_filter: str
    libvirt: Mapping[str, bool]  # driver: it answers
    staged: Iterable[Mapping[str, Any]]  # StagedCounts.report
    logged: int  # packets of Log rules, and how many of them nobody was told of
    untold: int
    trouble: str  # why the disk does not hold the last state, or ""


class Timed:
    """A hook's question that notes how it was answered, and when. Where the hook does not wait any more, as that."""

    __slots__ = ("_begun", "_clock", "_measured", "_request", "driver", "operation", "suboperation", "xml")

    def __init__(self, request: Request, measured: Measured, clock: Callable[[], float]) -> None:
        self.driver, self.operation = request.driver, request.operation
        self.suboperation, self.xml = request.suboperation, request.xml
        self._request, self._measured, self._clock = request, measured, clock
        self._begun = clock()

    def answer(self, code: int, message: str = "") -> bool:
        told = self._request.answer(code, message)
        result = ("refused" if code else "allowed") if told else "gone"
        self._measured.hook(self.operation, result, self._clock() - self._begun)
        return told


def exposition(agent: Agent, measured: Measured, present: Present, usage: Usage) -> str:
    sampled = [*_host(agent, measured, present), *_work(agent, measured, present)]
    return render([*common("hostd", __version__, usage), *sampled])


def _host(agent: Agent, measured: Measured, present: Present) -> Iterator[Sampled]:
    feed = agent.feed
    states = Counter(state_of(agent, local) for local in agent.locals)
    yield FILTER.by({present.packet_filter: 1})
    yield IN_SYNC.of(feed is not None and feed.in_sync)
    yield CONNECTED.of(feed is not None and feed.connected)
    yield HELD.of(bool(agent.held))
    yield REVISION.of(feed.replica.revision if feed is not None else 0)
    yield ENDPOINTS.by({state: states[state] for state in STATES})
    yield PROBLEMS.of(len(problems(agent, present)))
    yield LIBVIRT.by({driver: int(up) for driver, up in present.libvirt.items()})
    yield SCAN.by(measured.scan_seconds)


def _work(agent: Agent, measured: Measured, present: Present) -> Iterator[Sampled]:
    settler, counters = agent.settler, agent.settler.counters
    yield Sampled(HOOKS, dict(sorted(measured.hooks.items())))
    yield HOOK_TIME.by(measured.hook_seconds)
    yield REFUSED_CLAIMS.of(measured.claims_refused)
    yield APPLY_TIME.of(settler.applied)
    yield RESYNC_TIME.of(settler.resynced)
    yield PLANS.of(counters.plans)
    yield WRITES.of(counters.writes)
    yield REFUSED.of(counters.refused)
    yield FAILURES.of(len(settler.refused))
    yield HEALED.of(counters.healed)
    yield ENDED.of(counters.ended)
    drops: Counter[str] = Counter()
    for line in present.staged:
        drops[line["policy"]] += line["packets"]
    yield STAGED.by(drops)
    yield LOGGED.of(present.logged)
    yield LOG_LOST.of(present.untold)


def state_of(agent: Agent, local: Local) -> str:
    """One of STATES: what `slash32-hostd status` says."""
    tap = agent.settler.actual.taps.get(local.carrier.ifindex) if local.carrier else None
    if tap is not None and tap.group != 0:
        return "connected"
    return "isolated" if local.phase is Phase.LIVE else local.phase.value


def problems(agent: Agent, present: Present) -> list[str]:
    """Why this host is not in sync, or its kernel not as desired. A guest whose claim was refused is no fault here."""
    feed, found = agent.feed, []
    if agent.held:
        found.append(f"held: {agent.held}")
    elif feed is not None and not feed.in_sync:
        why = "the dispatcher's state is not here yet" if feed.connected else f"no dispatcher: {feed.trouble}"
        found.append(why)
    found += [f"{failure.object}: {failure.message}" for failure in agent.settler.failures()]
    if present.trouble:
        found.append(f"disk: {present.trouble}")
    if feed is not None and feed.key_trouble:
        found.append(f"key: {feed.key_trouble}")
    if present.libvirt and not any(present.libvirt.values()):
        found.append("libvirt does not answer: guests that start are not seen")
    return found


def health(agent: Agent, present: Present) -> dict[str, Any]:
    found = problems(agent, present)
    shown = [visible(line[:_LINE]) for line in found[:_SHOWN]]
    if len(found) > _SHOWN:
        shown.append(f"and {len(found) - _SHOWN} more")
    return {"status": "degraded" if found else "ok", "problems": shown}
