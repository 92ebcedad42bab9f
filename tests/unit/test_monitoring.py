# The dashboard, the alerts and the manual name what the daemons export, and all that they export is in the manual.
from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dispatcher import metrics as dispatcher
from hostd.reporting import metrics as hostd
from slash32.metrics import COMMON, Family, Kind
from tests.exposition import names_of
from tests.promql import faults, named

REPO = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((REPO / "examples/grafana/slash32.json").read_text())
ALERTS = yaml.safe_load((REPO / "examples/prometheus/alerts.yaml").read_text())
PAGE = (REPO / "docs/monitoring.md").read_text()
FAMILIES: dict[str, Family] = {f.name: f for f in (*dispatcher.FAMILIES, *hostd.FAMILIES)}
SERIES = {name: labels for family in FAMILIES.values() for name, labels in names_of(family).items()}
COUNTERS = {
    "slash32_process_start_time_seconds",  # of which changes are counted
    *(name for family in FAMILIES.values() if family.kind is not Kind.GAUGE for name in names_of(family)),
}
KNOWN = {
    ("slash32_build_info", "daemon"): {"dispatcher", "hostd"},
    ("slash32_hosts", "state"): set(dispatcher.HOST_STATES),
    ("slash32_dispatcher_claims_total", "result"): {"granted", "refused"},
    ("slash32_hostd_endpoints", "state"): set(hostd.STATES),
    ("slash32_hostd_hook_answers_total", "result"): set(hostd.RESULTS),
    ("slash32_hostd_hook_answers_total", "operation"): {*hostd.OPERATIONS, "other"},
    ("slash32_hostd_packet_filter_info", "packet_filter"): {"nftables", "iptables"},
}


def wrong(query: str) -> list[str]:
    return faults(query, SERIES, KNOWN, COUNTERS)


def panels() -> Iterator[dict[str, Any]]:
    for panel in DASHBOARD["panels"]:
        yield panel
        yield from panel.get("panels", ())


def rules() -> Iterator[dict[str, Any]]:
    for group in ALERTS["groups"]:
        yield from group["rules"]


QUERIES = [(panel["title"], target["expr"]) for panel in panels() for target in panel.get("targets", ())]
ALERTED = [(rule["alert"], rule["expr"]) for rule in rules()]


@pytest.mark.parametrize(("title", "query"), [*QUERIES, *ALERTED])
def test_a_query_names_what_there_is(title: str, query: str) -> None:
    assert wrong(query) == [], query


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("slash32_revisions", "slash32_revisions is not exported"),
        ("max(slash32_hosts{status=\"held\"})", "slash32_hosts has no label status"),
        ("max(slash32_hosts{state=\"holding\"})", 'slash32_hosts never has state="holding"'),
        ("sum by (hosts) (slash32_host_in_sync)", "nothing here has a label hosts"),
        ("sum by (le) (slash32_host_in_sync)", "nothing here has a label le"),
        ("rate(slash32_host_lag_seconds[5m])", "slash32_host_lag_seconds: counters have rates, and only they"),
        ("slash32_hostd_healed_total > 0", "slash32_hostd_healed_total: counters have rates, and only they"),
        ("histogram_quantile(0.5, rate(slash32_hostd_hook_duration_seconds_bucket[5m]))", "a quantile without le"),
        ("slash32_dispatcher_live_duration_seconds", "slash32_dispatcher_live_duration_seconds is not exported"),
        ("median(slash32_revision)", "median is no function"),
        ("rate(slash32_hostd_healed_total[5 minutes])", "[5 minutes] is no range"),
        ("sum(slash32_revision", "brackets do not match"),
        ("slash32_hosts{state=held}", "state = held is no matcher"),
        ("1 + 1", "it names no series"),
        ("sum(slash32_revision) § 2", "what is '§ 2'?"),
    ],
)
def test_a_broken_query_is_found(query: str, problem: str) -> None:
    """The control."""
    assert wrong(query) == [problem]


def test_a_query_is_taken_apart() -> None:
    found = named('sum by (host, le) (rate(a_total{x=~"b,}c",y!="d"}[5m])) / on (host) group_left (z) e{} > 0.5')
    assert [(name, [*map(tuple, matchers)]) for name, matchers in found.series] == [
        ("a_total", [("x", "=~", "b,}c"), ("y", "!=", "d")]),
        ("e", []),
    ]
    assert (found.grouped, found.rated) == ({"host", "le", "z"}, {"a_total"})


def test_everything_is_shown_somewhere() -> None:
    """What nobody looks at need not be exported."""
    shown = {name for _, query in (*QUERIES, *ALERTED) for name, _ in named(query).series}
    unseen = {f.name for f in FAMILIES.values() if not shown & names_of(f).keys()}
    of_one_host = ("in_sync", "connected", "held", "revision", "packet_filter_info")
    assert unseen <= {f"slash32_hostd_{word}" for word in of_one_host}


def test_the_dashboard_is_one() -> None:
    ids = [panel["id"] for panel in panels()]
    assert len(ids) == len(set(ids)) and len(QUERIES) > 40
    variables = {each["name"] for each in DASHBOARD["templating"]["list"]}
    text = json.dumps(DASHBOARD)
    used = set(re.findall(r"\$\{?([a-z]\w*)", text))
    assert used == variables, "Grafana's own begin with __"
    assert wrong(DASHBOARD["templating"]["list"][1]["definition"].replace(", host", "")) == []
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
        for target in panel.get("targets", ()):
            legend = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert legend <= labels_of(target["expr"]), panel["title"]


def labels_of(query: str) -> set[str]:
    """That the result may have."""
    found = named(query)
    if found.grouped and re.match(r"(topk\(\d+, )?(sum|max|min|count|histogram_quantile)\b", query):
        return set(found.grouped)
    return {label for name, _ in found.series for label in SERIES.get(name, ())} | {"instance", "job"}


def test_alerts_say_what_to_do() -> None:
    alerts = [rule["alert"] for rule in rules()]
    assert len(alerts) == len(set(alerts)) and all(name.startswith("Slash32") for name in alerts)
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning", "info"), rule["alert"]
        assert {"summary", "description"} == rule["annotations"].keys()
        used = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
        assert used <= labels_of(rule["expr"]), rule["alert"]
        assert f"| {rule['alert']} |" in PAGE, rule["alert"]
    assert set(re.findall(r"^\| (Slash32\w+) \|", PAGE, re.M)) == set(alerts)


def test_the_page_has_every_metric_as_it_is() -> None:
    rows = re.findall(r"^\| `(slash32_\w+)` \| (\w+) \| ([^|]*) \| (.+) \|$", PAGE, re.M)
    assert len(rows) == len({name for name, *_ in rows})
    said = {name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels, _ in rows}
    assert said == {family.name: (family.kind.value, family.labels) for family in FAMILIES.values()}
    meanings = {name: meaning for name, _, _, meaning in rows}
    assert [name for name, f in FAMILIES.items() if not meanings[name].startswith(f.help.rstrip("."))] == []


def test_the_daemons_agree_on_names() -> None:
    assert set(dispatcher.FAMILIES) & set(hostd.FAMILIES) == set(COMMON)
    assert len(FAMILIES) == len(dispatcher.FAMILIES) + len(hostd.FAMILIES) - len(COMMON)
