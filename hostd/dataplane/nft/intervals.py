# Owns: ranges of numbers (ports, addresses): merging them, and the kernel's elements for them. Pure.
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from slash32.net import Prefix

from . import kernel as k

Interval = tuple[int, int]  # both ends inclusive


def merge(intervals: Iterable[Interval]) -> list[Interval]:
    """Sorted, disjoint, not even adjacent: the one form in which nft lists a set of them."""
    merged: list[Interval] = []
    for first, last in sorted(intervals):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    return merged


def prefix_interval(prefix: Prefix) -> Interval:
    first = int.from_bytes(prefix.network, "big")
    return first, first | ((1 << (8 * len(prefix.network) - prefix.length)) - 1)


def prefixes_of(interval: Interval, width: int) -> Iterator[Prefix]:
    """The fewest prefixes that make up an interval of addresses of `width` bytes."""
    first, last = interval
    while first <= last:
        bits = 8 * width if first == 0 else (first & -first).bit_length() - 1
        bits = min(bits, (last - first + 1).bit_length() - 1)
        yield Prefix(first.to_bytes(width, "big"), 8 * width - bits)
        first += 1 << bits


def disjoint(prefixes: Iterable[Prefix]) -> frozenset[Prefix]:
    """The fewest prefixes that cover the same addresses: what a NET set must be given and what read() gives back."""
    found: set[Prefix] = set()
    by_width: dict[int, list[Interval]] = {}
    for prefix in prefixes:
        by_width.setdefault(len(prefix.network), []).append(prefix_interval(prefix))
    for width, intervals in by_width.items():
        for interval in merge(intervals):
            found.update(prefixes_of(interval, width))
    return frozenset(found)


def interval_elements(intervals: Sequence[Interval], width: int) -> Iterator[bytes]:
    """Of an anonymous set; begins, as nft's own do, with the end of the gap below the first."""
    top = (1 << 8 * width) - 1
    if intervals[0][0]:
        yield k.interval_end(bytes(width))
    for first, last in intervals:
        yield k.element(first.to_bytes(width, "big"))
        if last != top:
            yield k.interval_end((last + 1).to_bytes(width, "big"))
