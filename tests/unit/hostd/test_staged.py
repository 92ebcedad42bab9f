# What staged policies would have dropped: sums over counters that begin anew.
from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hostd.compiler.desired import StagedPoint
from hostd.reporting.staged import StagedCounts
from slash32.policy import Direction

WEB = StagedPoint("web", "security", Direction.INGRESS, 1)
END = StagedPoint("web", "security", Direction.INGRESS, None)
POINTS = {("pi-web", 1): WEB, ("to-1", 0): END}


def _packets(counts: StagedCounts) -> dict[object, tuple[int, int]]:
    return {line["rule"]: (line["packets"], line["bytes"]) for line in counts.report()}


def test_counters_become_lines() -> None:
    counts = StagedCounts()
    assert counts.saw(POINTS, {"pi-web": ((0, 0), (3, 180)), "to-1": ((1, 60),)})
    assert counts.report() == [
        {"policy": "web", "tier": "security", "direction": "Ingress", "rule": 1, "packets": 3, "bytes": 180},
        {"policy": "web", "tier": "security", "direction": "Ingress", "rule": None, "packets": 1, "bytes": 60},
    ]
    assert not counts.saw(POINTS, {"pi-web": ((0, 0), (3, 180)), "to-1": ((1, 60),)}), "nothing new"


def test_one_rule_in_several_chains_is_one_line() -> None:
    counts = StagedCounts()
    counts.saw({("a-1", 0): WEB, ("b-1", 0): WEB}, {"a-1": ((1, 10),), "b-1": ((2, 20),)})
    assert _packets(counts) == {1: (3, 30)}


def test_a_chain_that_is_not_shown_keeps_what_it_had() -> None:
    counts = StagedCounts()
    counts.saw(POINTS, {"to-1": ((5, 50),)})
    assert not counts.saw(POINTS, {})
    counts.saw(POINTS, {"to-1": ((6, 60),)})
    assert _packets(counts)[None] == (6, 60)


def test_what_is_no_longer_staged_is_forgotten() -> None:
    counts = StagedCounts()
    counts.saw(POINTS, {"to-1": ((5, 50),)})
    assert counts.saw({}, {"to-1": ((5, 50),)})
    assert counts.report() == []
    other = StagedPoint("db", "security", Direction.INGRESS, 0)
    counts.saw({("to-1", 0): other}, {"to-1": ((2, 20),)})
    assert _packets(counts) == {0: (2, 20)}, "another rule in the same place begins anew"


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=30))
def test_rewriting_loses_nothing_that_was_seen(steps: list[tuple[int, bool]]) -> None:
    """Looked at before each rewriting; a counter that grew past its old value within one look cannot be told."""
    counts, counter, total = StagedCounts(), 0, 0
    for more, rewritten in steps:
        if rewritten:
            counter = 0
            counts.saw(POINTS, {"to-1": ((0, 0),)})
        counter, total = counter + more, total + more
        counts.saw(POINTS, {"to-1": ((counter, 10 * counter),)})
    assert _packets(counts).get(None, (0, 0)) == (total, 10 * total)
