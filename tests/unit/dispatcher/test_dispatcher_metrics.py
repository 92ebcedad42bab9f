# What a dispatcher measures: everything declared is exported, and it moves when what it measures moves.
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dispatcher import metrics
from dispatcher.core import Core
from dispatcher.decisions.inputs import Command
from dispatcher.operators import fleet
from dispatcher.operators import resources as operators
from dispatcher.store.commits import Failed, Foreign
from dispatcher.store.disk import Disk
from slash32 import wire
from slash32.metrics import Sampled, Usage
from slash32.model import Endpoint, EndpointKey
from slash32.net import parse_address
from slash32.process import usage
from slash32.wire import Ack, Hello, Report
from tests.exposition import Samples, faults, parsed, value

KEYS = {name: "x" * 39 + name[1] for name in ("h1", "h2", "h3")}


class Rig:
    def __init__(self, folder: Path) -> None:
        self.now = 100.0
        self.store = Disk(folder / "d.db")
        self.core = Core(self.store, lambda: self.now, lambda: 1.7e9)
        self.command(lambda core: operators.apply(core, [host(name) for name in KEYS], False))

    def command(self, run: Any) -> None:
        """What is sent is not what is looked at here."""
        self.core.turns.add(Command(self.core, run, "test"))
        self.core.flush()

    def hear(self, name: str, message: wire.FromHost) -> None:
        self.core.receive(name.encode() * 8, wire.encode_to_dispatcher(message), f"{name} {KEYS[name]}")
        self.core.flush()

    def connect(self, name: str, *endpoints: Endpoint) -> None:
        self.hear(name, Hello("", 0, 0))
        self.hear(name, Report(1, endpoints))

    def look(self) -> Samples:
        text = metrics.exposition(metrics.collect(self.core, self.now), usage())
        assert faults(text, metrics.FAMILIES) == []
        return parsed(text)

    def hosts(self) -> dict[str, float]:
        found = self.look()
        return {state: value(found, "slash32_hosts", state=state) for state in metrics.HOST_STATES}


def host(name: str) -> dict[str, Any]:
    spec = {"publicKey": KEYS[name], "addresses": [f"192.0.2.{name[1]}"]}
    return {"apiVersion": "slash32/v1", "kind": "Host", "metadata": {"name": name}, "spec": spec}


def profile(name: str) -> dict[str, Any]:
    return {"apiVersion": "slash32/v1", "kind": "Profile", "metadata": {"name": name}, "spec": {}}


def guest(number: int, address: str) -> Endpoint:
    key = EndpointKey(f"00000000-0000-0000-0000-{number:012}", "52:54:00:00:00:01")
    return Endpoint(key, f"g{number}", {}, addresses=(parse_address(address),))


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.store.close()


def test_hosts_by_state(rig: Rig) -> None:
    assert rig.hosts() == {"known": 3, "fenced": 0, "connected": 0, "in_sync": 0, "held": 0}
    rig.connect("h1")
    rig.hear("h1", Ack(rig.core.revision))
    rig.connect("h2")
    rig.hear("h3", Hello("another store", 7, 7))
    rig.hear("h3", Report(1, ()))
    assert rig.hosts() == {"known": 3, "fenced": 0, "connected": 3, "in_sync": 1, "held": 1}
    found = rig.look()
    assert [value(found, "slash32_host_in_sync", host=name) for name in KEYS] == [1, 0, 0]
    rig.command(lambda core: fleet.fence(core, "h2", "stolen"))
    assert rig.hosts()["fenced"] == 1
    rig.core.drop("h1", "gone")
    found = rig.look()
    assert value(found, "slash32_host_in_sync", host="h1") == 0
    assert ("slash32_host_lag_seconds", frozenset({("host", "h1")})) not in found, "nobody knows"


def test_a_change_that_takes_its_time(rig: Rig) -> None:
    rig.connect("h1")
    rig.hear("h1", Ack(rig.core.revision))
    before = rig.look()
    assert value(before, "slash32_host_lag_seconds", host="h1") == 0
    rig.connect("h2", guest(1, "10.0.0.1"))
    rig.now += 3
    found = rig.look()
    assert value(found, "slash32_host_lag_seconds", host="h1") == 3
    rig.hear("h1", Ack(rig.core.revision))
    rig.hear("h2", Ack(rig.core.revision))
    after = rig.look()
    assert value(after, "slash32_host_lag_seconds", host="h1") == 0
    name = "slash32_dispatcher_live_duration_seconds"
    assert value(after, f"{name}_count") == value(before, f"{name}_count") + 1
    assert value(after, f"{name}_sum") == value(before, f"{name}_sum") + 3
    assert value(after, f"{name}_bucket", le="2.5") == value(before, f"{name}_bucket", le="2.5")
    assert value(after, "slash32_revision") == rig.core.revision == value(before, "slash32_revision") + 1
    acks = "slash32_dispatcher_acknowledgements_total"
    assert value(after, acks) == value(before, acks) + 2


def test_claims(rig: Rig) -> None:
    rig.connect("h1", guest(1, "10.0.0.1"))
    rig.connect("h2", guest(2, "10.0.0.1"), guest(3, "10.0.0.3"))
    rig.hear("h2", Report(2, (guest(2, "10.0.0.1"), guest(3, "10.0.0.3"))))  # once more
    found = rig.look()
    assert value(found, "slash32_dispatcher_claims_total", result="granted") == 2
    assert value(found, "slash32_dispatcher_claims_total", result="refused") == 2
    assert value(found, "slash32_claim_alarms") == 1
    assert value(found, "slash32_endpoints") == 2


def test_a_window_that_is_full(rig: Rig) -> None:
    rig.connect("h1")
    rig.hear("h1", Ack(rig.core.revision))
    rig.connect("h2")
    rig.hear("h2", Ack(rig.core.revision))
    for number in range(20):
        rig.hear("h2", wire.Claim(number, guest(number + 1, f"10.0.0.{number + 1}")))
        rig.hear("h2", Ack(rig.core.revision))
    assert value(rig.look(), "slash32_dispatcher_window_blocked_hosts") == 1
    rig.hear("h1", Ack(rig.core.revision))
    assert value(rig.look(), "slash32_dispatcher_window_blocked_hosts") == 0, "the control"


def test_the_store(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    before = rig.look()
    assert metrics.health(rig.core) == {"status": "ok", "problems": []}
    rig.command(lambda core: operators.apply(core, [profile("p")], False))
    found = rig.look()
    commits = "slash32_dispatcher_commits_total"
    assert value(found, commits) == value(before, commits) + 1
    assert value(found, "slash32_dispatcher_commit_duration_seconds_count") == value(found, commits)
    assert value(found, "slash32_resources", kind="Profile") == 1
    monkeypatch.setattr(rig.store, "propose", lambda commit: rig.store._outcomes.append(Failed("disk\nfull")))
    rig.command(lambda core: operators.apply(core, [profile("q")], False))
    found = rig.look()
    assert value(found, "slash32_dispatcher_store_failures_total") == 1
    assert value(found, "slash32_dispatcher_store_trouble") == 1
    assert value(found, "slash32_resources", kind="Profile") == 1
    problem = "the store takes no commits: disk\\nfull"
    assert metrics.health(rig.core) == {"status": "degraded", "problems": [problem]}
    monkeypatch.undo()
    rig.command(lambda core: operators.apply(core, [profile("q")], False))
    assert metrics.health(rig.core)["status"] == "ok"
    assert value(rig.look(), "slash32_dispatcher_store_trouble") == 0


def test_another_dispatchers_commit_comes_first(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def first(commit: Any) -> None:
        monkeypatch.undo()
        rig.store._outcomes.append(Foreign(commit._replace(writes=())))

    monkeypatch.setattr(rig.store, "propose", first)
    rig.command(lambda core: operators.apply(core, [profile("p")], False))
    found = rig.look()
    assert value(found, "slash32_dispatcher_store_conflicts_total") == 1
    assert value(found, "slash32_resources", kind="Profile") == 1, "decided again"


def test_what_others_count(rig: Rig) -> None:
    counts = rig.core.counts
    counts.deliveries, counts.delivered_bytes, counts.handshakes_refused, counts.watchers = 3, 900, 2, 1
    counts.busy = 1.5
    counts.requests[200] += 2
    counts.requests[503] += 1
    found = rig.look()
    assert value(found, "slash32_dispatcher_deliveries_total") == 3
    assert value(found, "slash32_dispatcher_delivered_bytes_total") == 900
    assert value(found, "slash32_dispatcher_handshakes_refused_total") == 2
    assert value(found, "slash32_dispatcher_loop_busy_seconds_total") == 1.5
    assert value(found, "slash32_dispatcher_api_requests_total", code="503") == 1
    assert value(found, "slash32_dispatcher_watchers") == 1


def test_what_was_collected_stands_still(rig: Rig) -> None:
    """It is written out by another thread."""
    def written(sampled: list[Sampled]) -> str:
        return metrics.exposition(sampled, Usage(1, 1.0, 1, 1, 1.0))

    collected = metrics.collect(rig.core, rig.now)
    before = written(collected)
    rig.connect("h1", guest(1, "10.0.0.1"))
    rig.core.counts.requests[200] += 1
    assert written(collected) == before
    assert written(metrics.collect(rig.core, rig.now)) != before, "the control"
