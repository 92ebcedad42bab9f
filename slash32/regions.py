# Owns: addresses cut by prefixes: a region is what lies in a prefix and in no smaller one. Pure.
from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field

from slash32.net import Address, Prefix

EVERYTHING = (Prefix(bytes(4), 0), Prefix(bytes(16), 0))


@dataclass(slots=True)
class Region:
    """All of `within[0]` but what smaller prefixes take away."""

    within: tuple[Prefix, ...]  # every prefix around it, the smallest first
    size: int  # addresses
    holes: list[Prefix] = field(default_factory=list)  # the largest of the smaller ones
    taken: int = 0  # addresses of it that stand for themselves

    @property
    def prefix(self) -> Prefix:
        return self.within[0]

    @property
    def version(self) -> int:
        return self.prefix.version

    def in_any(self, prefixes: Iterable[Prefix]) -> bool:
        wanted = prefixes if isinstance(prefixes, frozenset) else frozenset(prefixes)
        return not wanted.isdisjoint(self.within)


class Regions:
    """IPv4 and IPv6, cut by prefixes."""

    def __init__(self, prefixes: Iterable[Prefix]) -> None:
        self.all: list[Region] = []
        self._edges: dict[int, tuple[list[int], list[int]]] = {}  # length of address: first of interval, its region
        cuts = {*prefixes, *EVERYTHING}
        for width in (4, 16):
            self._cut(sorted(prefix for prefix in cuts if len(prefix.network) == width))

    def region_of(self, address: Address) -> int:
        """An index into `all`."""
        firsts, regions = self._edges[len(address)]
        return regions[bisect_right(firsts, int.from_bytes(address, "big")) - 1]

    def _cut(self, prefixes: list[Prefix]) -> None:
        firsts: list[int] = []
        regions: list[int] = []
        around: list[tuple[int, int]] = []  # (last address, region) of each prefix that is not left yet

        def enter(first: int, region: int) -> None:
            if firsts and firsts[-1] == first:
                regions[-1] = region
            else:
                firsts.append(first)
                regions.append(region)

        def leave(before: int) -> None:
            while around and around[-1][0] < before:
                last, _ = around.pop()
                if around and last < around[-1][0]:
                    enter(last + 1, around[-1][1])

        for prefix in prefixes:  # the larger of two that begin together comes first
            first, last = (int.from_bytes(bound, "big") for bound in prefix.bounds())
            leave(first)
            outer = self.all[around[-1][1]] if around else None
            if outer is not None:
                outer.size -= last - first + 1
                outer.holes.append(prefix)
            self.all.append(Region((prefix, *(outer.within if outer else ())), last - first + 1))
            around.append((last, len(self.all) - 1))
            enter(first, len(self.all) - 1)
        leave(1 << 128)
        self._edges[len(prefixes[0].network)] = (firsts, regions)
