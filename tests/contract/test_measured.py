# A real dispatcher with real hosts, asked over HTTP how it is and what it did; and its log, taken apart.
from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from dispatcher_rig import Rack, free_port, guest, policy, until

from dispatcher import metrics
from tests.exposition import Samples, asked, measured_at, value


class Measured:
    def __init__(self, folder: Path) -> None:
        self.rack, self.port = Rack(folder), free_port()
        config = self.rack.dispatcher.config
        more = f'metrics_listen = "http://127.0.0.1:{self.port}"\nlog_format = "json"\n'
        config.write_text(config.read_text() + more)

    def ask(self, path: str) -> tuple[int, str]:
        return asked(self.port, path)

    def look(self) -> Samples:
        return measured_at(self.port, metrics.FAMILIES)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Measured]:
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    made = Measured(tmp_path)
    yield made
    made.rack.end()


def test_a_change_shows(measured: Measured) -> None:
    rack = measured.rack
    h1, _ = rack.begin(2)
    h1.claim(guest(1, "web"))
    revision = rack.dispatcher.apply(policy("web", 'role == "web"', 'role == "db"'))
    rack.settle()
    rack.wait_live(revision)
    found = measured.look()
    assert value(found, "slash32_revision") == rack.dispatcher.get("/v1/status")["revision"]
    assert value(found, "slash32_hosts", state="in_sync") == value(found, "slash32_hosts", state="known") == 2
    assert value(found, "slash32_endpoints") == value(found, "slash32_dispatcher_claims_total", result="granted") == 1
    assert value(found, "slash32_resources", kind="GlobalNetworkPolicy") == 1
    assert value(found, "slash32_dispatcher_live_duration_seconds_count") >= 1
    assert 0 < value(found, "slash32_dispatcher_live_duration_seconds_sum") < 60
    assert value(found, "slash32_dispatcher_commit_duration_seconds_sum") > 0
    assert value(found, "slash32_dispatcher_deliveries_total") >= 4
    assert value(found, "slash32_dispatcher_delivered_bytes_total") > 100
    assert value(found, "slash32_dispatcher_acknowledgements_total") >= 2
    assert value(found, "slash32_dispatcher_loop_busy_seconds_total") > 0
    assert value(found, "slash32_dispatcher_api_requests_total", code="200") >= 2
    assert value(found, "slash32_host_lag_seconds", host="h1") == 0
    assert measured.ask("/health") == (200, json.dumps({"status": "ok", "problems": []}))
    assert measured.ask("/v1/status")[0] == 404, "health and metrics only"
    rack.dispatcher.call("DELETE", "/v1/resources/Host/h2")
    until(lambda: value(measured.look(), "slash32_hosts", state="connected") == 1, [h1])
    assert ("slash32_host_in_sync", frozenset({("host", "h2")})) not in measured.look()


def test_a_stranger_is_counted(measured: Measured) -> None:
    rack = measured.rack
    (h1,) = rack.begin(1)
    rack.settle()
    assert value(measured.look(), "slash32_dispatcher_handshakes_refused_total") == 0
    rack.dispatcher.call("DELETE", "/v1/resources/Host/h1")
    until(lambda: value(measured.look(), "slash32_dispatcher_handshakes_refused_total") > 0, [h1])


def test_its_log_is_json(measured: Measured) -> None:
    rack = measured.rack
    rack.begin(1)
    rack.settle()
    lines = [json.loads(line) for line in rack.dispatcher.log.read_text().splitlines()]
    assert any(line.get("host") == "h1" and "connected" in line["msg"] for line in lines), lines
    assert all({"ts", "level", "logger", "msg"} <= line.keys() for line in lines)
