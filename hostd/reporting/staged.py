# Owns: what staged policies would have dropped, added up over the kernel's counters, which begin anew whenever a chain
# is written. Pure.
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..compiler.desired import StagedPoint

Place = tuple[str, int]  # chain, position of the rule
Counted = tuple[int, int]  # packets, bytes


class StagedCounts:
    """What a chain counted between the last look and its rewriting is not known."""

    def __init__(self) -> None:
        self._seen: dict[Place, tuple[StagedPoint, Counted]] = {}
        self._totals: dict[StagedPoint, Counted] = {}

    def saw(self, points: Mapping[Place, StagedPoint], counters: Mapping[str, Sequence[Counted]]) -> bool:
        """What the kernel shows now; True if the report is another. At the first look all that it shows counts: a
        hostd that starts again goes on. A place that the kernel does not show (yet) keeps what it had."""
        before = dict(self._totals)
        self._totals = {point: self._totals.get(point, (0, 0)) for point in points.values()}
        self._seen = {place: seen for place, seen in self._seen.items() if points.get(place) == seen[0]}
        for place, point in points.items():
            chain, position = place
            rules = counters.get(chain, ())
            if position < len(rules):
                self._add(place, point, rules[position])
        return self._totals != before

    def _add(self, place: Place, point: StagedPoint, now: Counted) -> None:
        _, last = self._seen.get(place, (point, (0, 0)))
        self._seen[place] = point, now
        if now[0] < last[0] or now[1] < last[1]:
            last = 0, 0
        packets, size = self._totals[point]
        self._totals[point] = packets + now[0] - last[0], size + now[1] - last[1]

    def report(self) -> list[dict[str, Any]]:
        """One entry a rule, whatever number of chains it stands in; `rule` None: the end of the tier."""
        return [
            {
                "policy": point.policy,
                "tier": point.tier,
                "direction": point.direction.value,
                "rule": point.rule,
                "packets": packets,
                "bytes": size,
            }
            for point, (packets, size) in sorted(self._totals.items(), key=lambda item: _order(item[0]))
        ]


def _order(point: StagedPoint) -> tuple[str, str, str, int]:
    return point.tier, point.policy, point.direction.value, 1 << 31 if point.rule is None else point.rule
