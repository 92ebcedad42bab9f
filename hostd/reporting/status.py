# Owns: what a running hostd says of itself, as plain data (`slash32-hostd status`). Pure.
from __future__ import annotations

from dataclasses import asdict
from typing import Any

from slash32.net import format_address

from ..agent import Agent
from ..state import Local


def signature(agent: Agent, trouble: str, staged: list[dict[str, Any]]) -> tuple[object, ...]:
    """Changes whenever `of` would say something else, and costs nothing to make."""
    feed, settler = agent.feed, agent.settler
    replica = feed.replica if feed is not None else None
    counters = settler.counters
    return (
        agent.generation,
        agent.held,
        trouble,
        *((feed.connected, feed.in_sync, feed.trouble, feed.endpoint, feed.key_trouble) if feed is not None else ()),
        *((replica.epoch, replica.revision) if replica is not None else ()),
        *(counters.plans, counters.writes, counters.resyncs, counters.healed),
        tuple(settler.refused),
        *(line["packets"] for line in staged),
        *(line["policy"] for line in staged),
    )


def of(agent: Agent, pid: int, trouble: str = "") -> dict[str, Any]:
    """`trouble`: why the disk does not hold the last state, or ""."""
    feed, settler = agent.feed, agent.settler
    replica = feed.replica if feed is not None else None
    said = [f"disk: {trouble}"] if trouble else []
    said += [f"key: {feed.key_trouble}"] if feed is not None and feed.key_trouble else []
    failures = [f"{f.object}: {f.message}" for f in settler.failures()]
    endpoints = sorted(agent.locals, key=lambda local: local.endpoint.domain)
    return {
        "pid": pid,
        "host": agent.calc.host,
        "dispatcher": None if feed is None else ("connected" if feed.connected else feed.trouble or "not connected"),
        "dispatcher_endpoint": feed.endpoint if feed is not None else "",
        "connected": feed is not None and feed.connected,
        "in_sync": feed is not None and feed.in_sync,
        "epoch": replica.epoch if replica else "",
        "revision": replica.revision if replica else 0,
        "held": agent.held,
        "endpoints": [_endpoint(agent, local) for local in endpoints],
        "exempt": [str(key) for key in sorted(agent.exempt.listed)],
        "failures": failures + said,
        "counters": asdict(settler.counters),
    }


def _endpoint(agent: Agent, local: Local) -> dict[str, Any]:
    endpoint, carrier = local.endpoint, local.carrier
    tap = agent.settler.actual.taps.get(carrier.ifindex) if carrier else None
    return {
        "domain": endpoint.domain,
        "uuid": endpoint.key.uuid,
        "mac": endpoint.key.mac,
        "driver": local.driver,
        "tap": carrier.tap if carrier else None,
        "ifindex": carrier.ifindex if carrier else None,
        "phase": local.phase.value,
        "connected": tap is not None and tap.group != 0,
        "addresses": [format_address(a) for a in endpoint.all_addresses()],
        "prefixes": [str(p) for p in endpoint.prefixes],
        "labels": dict(endpoint.labels),
        "problem": local.problem,
    }
