# Prometheus's text format as its own parser reads it; histograms; what a process says of itself.
from __future__ import annotations

import math
import os
import resource

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slash32.metrics import BOUNDS, COMMON, Family, Histogram, Kind, Sampled, Usage, common, render
from slash32.process import usage
from tests.exposition import faults, parsed, value

GAUGE = Family("slash32_x", Kind.GAUGE, "A thing.", ("host",))
TIME = Family("slash32_x_seconds", Kind.HISTOGRAM, "A time.", ("operation",))


@given(st.dictionaries(st.text(), st.floats() | st.integers(-(2**53), 2**53)))
def test_whatever_is_exported_is_read_back(values: dict[str, float]) -> None:
    found = parsed(render([GAUGE.by(values)]))
    assert len(found) == len(values)
    for label, was in values.items():
        now = value(found, "slash32_x", host=label)
        assert now == was or (math.isnan(now) and math.isnan(was))


def test_help_is_escaped() -> None:
    text = render([Family("slash32_x", Kind.GAUGE, "a\\b\nc").of(1)])
    assert text == "# HELP slash32_x a\\\\b\\nc\n# TYPE slash32_x gauge\nslash32_x 1\n"


@given(st.lists(st.floats(0, 100)))
def test_a_histogram_is_cumulative(seconds: list[float]) -> None:
    histogram = Histogram()
    for each in seconds:
        histogram.observe(each)
    found = parsed(render([TIME.by({"start": histogram})]))
    for bound in BOUNDS:
        text = str(int(bound)) if bound == int(bound) else str(bound)
        expected = sum(each <= bound for each in seconds)
        assert value(found, "slash32_x_seconds_bucket", operation="start", le=text) == expected
    assert value(found, "slash32_x_seconds_bucket", operation="start", le="+Inf") == len(seconds)
    assert value(found, "slash32_x_seconds_count", operation="start") == len(seconds)
    assert value(found, "slash32_x_seconds_sum", operation="start") == pytest.approx(sum(seconds))


def test_a_copy_stands_still() -> None:
    histogram = Histogram((1.0,))
    copy = histogram.copy()
    histogram.observe(0.5)
    assert (copy.counts, copy.total) == ([0, 0], 0.0)
    assert (histogram.counts, histogram.total) == ([1, 0], 0.5)


def test_the_wrong_number_of_labels_is_no_sample() -> None:
    with pytest.raises(ValueError, match="zip"):
        render([Sampled(GAUGE, {("h1", "h2"): 1.0})])


def test_every_daemon_says_what_it_is_and_uses() -> None:
    text = render(common("hostd", "1.2.3", usage()))
    assert faults(text, COMMON) == []
    found = parsed(text)
    assert value(found, "slash32_build_info", daemon="hostd", version="1.2.3") == 1
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    assert 1 << 20 < value(found, "slash32_process_resident_memory_bytes") <= most + (1 << 20)
    assert value(found, "slash32_process_open_fds") <= value(found, "slash32_process_max_fds")
    before = usage().files
    extra = os.open("/", os.O_RDONLY)
    try:
        assert usage().files == before + 1
    finally:
        os.close(extra)


def test_faults_are_found() -> None:
    """The control."""
    usual = common("hostd", "1", Usage(1, 1.0, 1, 1, 1.0))
    lacking = [each for each in usual if each.family.name != "slash32_process_open_fds"]
    assert faults(render(lacking), COMMON) == ["slash32_process_open_fds: is not exported"]
    assert faults(render([*usual, GAUGE.by({"h1": 1})]), COMMON) == [
        "slash32_x: has labels [('host', 'h1')]",
        "slash32_x: is not declared",
    ]
    odd = Family("slash32_time_ms", Kind.GAUGE, "What.", ("address",))
    assert [line.partition(": ")[2][:30] for line in faults(render([odd.by({"::1": 1})]), [odd])] == [
        "has a label that may take any ",
        "is not in a base unit",
    ]
    odd = Family("slash32_times", Kind.COUNTER, "What.")
    assert "slash32_times: only counters end in _total, all of them" in faults(render([odd.of(1)]), [odd])
