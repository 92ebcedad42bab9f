# Owns: names for groups of addresses (slash32.classes) by what distinguishes them: labels, prefixes, names. Pure.
# They hold what users wrote: whoever prints them escapes them.
from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

from slash32.classes import Classified, outermost

EXAMPLES = 3
_BARE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./-:")


class Names:
    """Of the groups of one comparison."""

    def __init__(self, found: Classified) -> None:
        self.found = found
        self.carriers: dict[tuple[str, str], int] = {}  # label -> how many endpoints have it
        self.endpoints = 0
        for group in found.groups:
            for owner in group.members if group.kind == "endpoint" else ():
                self.endpoints += 1
                for label in found.labels[owner.endpoint.key].items() if owner.endpoint else ():
                    self.carriers[label] = self.carriers.get(label, 0) + 1
        self._values: dict[int, dict[str, set[str]]] = {}
        self._known: dict[tuple[int, ...], str] = {}

    def of(self, numbers: Sequence[int]) -> str:
        """One line, for people."""
        key = tuple(numbers)
        if key not in self._known:
            self._known[key] = "; ".join(self._parts(key))
        return self._known[key]

    def _parts(self, numbers: tuple[int, ...]) -> list[str]:
        groups = [self.found.groups[number] for number in numbers]
        guests = [number for number in numbers if self.found.groups[number].kind == "endpoint"]
        parts = [self._guests(guests)] if guests else []
        hosts = [owner.name for group in groups if group.kind == "host" for owner in group.members]
        parts += [f"host {_listed(hosts)}" if len(hosts) == 1 else f"hosts {_listed(hosts)}"] if hosts else []
        addresses = [owner.name for group in groups if group.kind == "address" for owner in group.members]
        parts += [_listed(addresses)] if addresses else []
        behind = [owner for group in groups if group.kind == "behind" for owner in group.members]
        if behind:
            parts.append(_listed([f"{self.found.regions.all[o.region].prefix} behind {o.name}" for o in behind]))
        outside = [owner.region for group in groups if group.kind == "outside" for owner in group.members]
        return parts + ([self._outside(outside)] if outside else [])

    # --- guests: by their labels, if these name just them

    def _guests(self, numbers: list[int]) -> str:
        members = [owner.name for number in numbers for owner in self.found.groups[number].members]
        if len(members) == 1:
            return members[0]
        some = f"{len(members)} endpoints: {_listed(sorted(members))}"
        if len(members) == self.endpoints:
            return f"every endpoint ({some})"
        label = self._label(numbers, len(members))
        return f"{label} ({some})" if label else some

    def _label(self, numbers: list[int], size: int) -> str:
        values = [self._labels_of(number) for number in numbers]
        shared = set.intersection(*(set(one) for one in values))
        common = {key: set().union(*(one[key] for one in values)) for key in shared}
        keys = sorted(common, key=lambda key: (key not in self.found.keys, len(common[key]), key))
        for key in keys:
            if sum(self.carriers.get((key, value), 0) for value in common[key]) == size:
                return _equals(key, sorted(common[key]))
        constant = [(key, *common[key]) for key in keys if len(common[key]) == 1][:6]
        for first, second in combinations(constant, 2):
            if self._with(first, second) == size:
                return f"{_equals(first[0], first[1:])} and {_equals(second[0], second[1:])}"
        return ""

    def _labels_of(self, number: int) -> dict[str, set[str]]:
        """The labels that all of a group have, with their values; the ones selectors name, or that are few."""
        found = self._values.get(number)
        if found is None:
            found = {}
            count: dict[str, int] = {}
            members = self.found.groups[number].members
            for owner in members:
                for key, value in self.found.labels[owner.endpoint.key].items() if owner.endpoint else ():
                    found.setdefault(key, set()).add(value)
                    count[key] = count.get(key, 0) + 1
            found = {key: have for key, have in found.items() if count[key] == len(members) and len(have) <= EXAMPLES}
            self._values[number] = found
        return found

    def _with(self, first: tuple[str, ...], second: tuple[str, ...]) -> int:
        """How many endpoints have both labels."""
        return sum(
            self.found.labels[owner.endpoint.key].get(first[0]) == first[1]
            and self.found.labels[owner.endpoint.key].get(second[0]) == second[1]
            for group in self.found.groups
            for owner in group.members
            if group.kind == "endpoint" and owner.endpoint
        )

    # --- everybody else

    def _outside(self, regions: list[int]) -> str:
        covering, missing = outermost(self.found.regions, regions)
        everywhere = [prefix for prefix in covering if not prefix.length]
        named = [str(prefix) for prefix in covering if prefix.length]
        if not everywhere:
            inside = f" (but for {_listed(list(map(str, missing)))})" if missing else ""
            return _listed(named) + inside
        family = f" (IPv{everywhere[0].version})" if len(everywhere) == 1 else ""
        return "; ".join([*([_listed(named)] if named else []), f"anywhere else{family}"])


def _equals(key: str, values: Iterable[str]) -> str:
    shown = [value if value and _BARE.issuperset(value) else f'"{value}"' for value in values]
    return f"{key}={shown[0]}" if len(shown) == 1 else f"{key} in {{{_listed(shown, 6)}}}"


def _listed(names: Sequence[str], at_most: int = EXAMPLES) -> str:
    shown = ", ".join(names[:at_most])
    return shown if len(names) <= at_most else f"{shown}, ..."
