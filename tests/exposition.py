# Owns: reading what a daemon exports, by Prometheus's own parser, and holding it against what it declares; and asking a
# daemon of this machine for it.
from __future__ import annotations

import http.client
import re
from collections.abc import Iterable, Mapping

from prometheus_client.parser import text_string_to_metric_families

from slash32.metrics import Family, Kind

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]

BASE_UNITS = ("seconds", "bytes", "info", "total")
_NAME = re.compile(r"slash32(_[a-z0-9]+)+")
_FEW = {
    "daemon", "version", "epoch", "state", "kind", "host", "result", "code", "packet_filter", "driver", "operation",
    "policy", "le", "dispatcher",
}  # fmt: skip


def parsed(text: str) -> Samples:
    """Each sample once."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def names_of(family: Family) -> Mapping[str, frozenset[str]]:
    """What a query may name: series and their labels."""
    labels = frozenset(family.labels)
    if family.kind is Kind.HISTOGRAM:
        return {f"{family.name}_bucket": labels | {"le"}, f"{family.name}_sum": labels, f"{family.name}_count": labels}
    return {family.name: labels}


def faults(text: str, declared: Iterable[Family]) -> list[str]:
    """Where text and declaration differ, and where a name breaks the conventions."""
    families = {family.name: family for family in declared}
    series = {name: labels for family in families.values() for name, labels in names_of(family).items()}
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.M))
    found = [f"{name}: is not declared" for name in types.keys() - families.keys()]
    found += [f"{name}: is not exported" for name in families.keys() - types.keys()]
    found += [f"{n}: is a {types[n]}" for n in types.keys() & families.keys() if types[n] != families[n].kind]
    for name, labels in parsed(text):
        if series.get(name) != {label for label, _ in labels}:
            found.append(f"{name}: has labels {sorted(labels)}")
    for family in families.values():
        found += _unconventional(family)
    return sorted(found)


def asked(port: int, path: str) -> tuple[int, str]:
    """Status and text."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def measured_at(port: int, declared: Iterable[Family]) -> Samples:
    status, text = asked(port, "/metrics")
    assert status == 200 and faults(text, declared) == []
    return parsed(text)


def _unconventional(family: Family) -> Iterable[str]:
    name = family.name
    if not _NAME.fullmatch(name):
        yield f"{name}: is not like slash32_that"
    if (family.kind is Kind.COUNTER) != name.endswith("_total"):
        yield f"{name}: only counters end in _total, all of them"
    if family.kind is Kind.HISTOGRAM and not name.endswith("_seconds"):
        yield f"{name}: measures something without its unit"
    if re.search(r"_(ms|milliseconds|kb|mb|percent|minutes)(_|$)", name):
        yield f"{name}: is not in a base unit"
    if not set(family.labels) <= _FEW:
        yield f"{name}: has a label that may take any number of values: {family.labels}"
    if not family.help.endswith(".") or len(family.help) > 110:
        yield f"{name}: its help is one sentence"
