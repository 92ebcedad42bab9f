# Owns: two worlds compared: for which owners of addresses, and for which traffic, the verdict is another one. Classes
# of addresses are compared (slash32.classes), never pairs of endpoints. Pure.
# Exact: a flow is in the answer when, and only when, slash32.verdict judges it otherwise in the other world.
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from slash32.classes import ANONYMOUS, Class, Classified, Side, classify
from slash32.matching import World
from slash32.reading import Seat
from slash32.traffic import Traffic

Where = Literal["", "same host", "other hosts"]  # "": wherever they are
Progress = Callable[[int, int], None]  # classes compared, of how many


class Flow(NamedTuple):
    version: int | None  # None: every IP version that both ends have
    traffic: Traffic


class Change(NamedTuple):
    """From each of the sources to each of the destinations, by an IP version that both have (but nobody to himself)."""

    allowed: bool  # after; before it was the other
    flows: tuple[Flow, ...]
    where: Where
    sources: tuple[int, ...]  # groups
    destinations: tuple[int, ...]
    pairs: int


@dataclass(slots=True)
class Comparison:
    found: Classified
    changes: list[Change] = field(default_factory=list)  # the widest first
    gaining: int = 0  # pairs of owners with traffic that is newly allowed
    losing: int = 0


Delta = tuple[int, int]  # traffic gained, lost
_Pair = tuple[int, int, Where]
_Row = tuple[bool, tuple[Flow, ...], Where]
_Rectangle = tuple[tuple[int, ...], tuple[int, ...]]


def compare(before: World, after: World, progress: Progress | None = None) -> Comparison:
    found = classify(before, after)
    deltas: dict[_Pair, dict[int, Delta]] = {}
    homes: dict[int, list[int]] = {}
    for number, group in enumerate(found.groups):
        for one in group.classes:
            homes.setdefault(one, []).append(number)
    for source, destination, where, delta in _changed(found, progress):
        for pair in ((a, b, where) for a in homes[source] for b in homes[destination]):
            by_version = deltas.setdefault(pair, {})
            version = found.classes[source].version
            old = by_version.get(version, (0, 0))
            by_version[version] = (old[0] | delta[0], old[1] | delta[1])
    result = Comparison(found)
    result.changes = _merged(found, deltas)
    result.gaining, result.losing = (_count(found, deltas, side) for side in (0, 1))
    return result


def _changed(found: Classified, progress: Progress | None) -> Iterator[tuple[int, int, Where, Delta]]:
    """Pairs of classes; only those of which one end is another than before. Sources of which a destination's programs
    ask the same, and whose own programs are the same, are judged once for it."""
    numbers: dict[object, int] = {}
    likes = [numbers.setdefault(_like(found, one), len(numbers)) for one in found.classes]
    everybody = list(enumerate(found.classes))
    active = [(number, one) for number, one in everybody if one.before != one.after]
    for destination, one in everybody:
        if progress:
            progress(destination, len(found.classes))
        asks = [_asks(found.judge.source, _as_end(side)) for side in (one.before, one.after)]
        known: dict[tuple[int, int, int], list[tuple[Where, Delta]]] = {}
        for source, other in everybody if one.before != one.after else active:
            if other.version != one.version:
                continue
            key = (likes[source], other.before.questions & asks[0], other.after.questions & asks[1])
            deltas = known.get(key)
            if deltas is None:
                deltas = known[key] = [each for each in _deltas(found, other, one) if each[1] != (0, 0)]
            for where, delta in deltas:
                yield source, destination, where, delta


def _like(found: Classified, one: Class) -> object:
    """A source as its own programs know it."""
    sides = []
    for side in (one.before, one.after):
        seats = frozenset(seat._replace(into=(), entering=(), to_host=()) for seat in side.seats)
        sides.append((seats, side.questions & _asks(found.judge.source, seats)))
    return one.version, *sides


def _as_end(side: Side) -> list[Seat]:
    return [seat._replace(out=(), leaving=(), to_guests=()) for seat in side.seats]


def _asks(questions: Sequence[int], seats: Iterable[Seat]) -> int:
    """The questions of all programs."""
    found = 0
    for seat in seats:
        for program in (*seat.out, *seat.into, *seat.leaving, *seat.entering, *seat.to_guests, *seat.to_host):
            found |= questions[program]
    return found


def _deltas(found: Classified, source: Class, destination: Class) -> list[tuple[Where, Delta]]:
    other = _delta(found, source, destination, False)
    if not (_anonymous(source) and _anonymous(destination)):
        return [("", other)]
    same = _delta(found, source, destination, True)
    return [("", other)] if same == other else [("same host", same), ("other hosts", other)]


def _anonymous(one: Class) -> bool:
    return any(seat.host == ANONYMOUS for side in (one.before, one.after) for seat in side.seats)


def _delta(found: Classified, source: Class, destination: Class, same: bool) -> Delta:
    before = _allowed(found, source.version, source.before, destination.before, same)
    after = _allowed(found, source.version, source.after, destination.after, same)
    return after & ~before, before & ~after


def _allowed(found: Classified, version: int, source: Side, destination: Side, same: bool) -> int:
    mask = found.spaces[version].whole
    for leaving in source.seats:
        for entering in destination.seats:
            for program in _asked(leaving, entering, same):
                mask &= found.judge.allowed(program, version, source.questions, destination.questions)
    return mask


def _asked(source: Seat, destination: Seat, same: bool) -> tuple[int, ...]:
    """The programs on the way, as slash32.verdict walks it."""
    between: tuple[int, ...] = ()
    if source.host and source.host == destination.host and (same or source.host != ANONYMOUS):
        if source.guest is not destination.guest:
            between = destination.to_host if source.guest else source.to_guests
    else:
        between = source.leaving + destination.entering
    return source.out + between + destination.into


def _pairs(found: Classified, pair: _Pair) -> int:
    first, second, where = pair
    source, destination = found.groups[first], found.groups[second]
    everything = len(source.members) * len(destination.members)
    self_pairs = len(source.members) if first == second else 0
    if not where:
        return everything - self_pairs
    at_home = sum(count * destination.hosts[host] for host, count in source.hosts.items() if host)
    return at_home - self_pairs if where == "same host" else everything - at_home


def _count(found: Classified, deltas: dict[_Pair, dict[int, Delta]], side: int) -> int:
    """Pairs with something gained (side 0) or lost (1); each counted once."""
    counted = {pair for pair, by_version in deltas.items() if any(delta[side] for delta in by_version.values())}
    once = [pair for pair in counted if not pair[2] or (pair[0], pair[1], "") not in counted]
    return sum(_pairs(found, pair) for pair in once)


def _merged(found: Classified, deltas: dict[_Pair, dict[int, Delta]]) -> list[Change]:
    """Equal changes together: as few rows as one of two simple ways gives."""
    changes = []
    for (allowed, flows, where), pairs in _rows(found, deltas).items():
        for sources, destinations in _rectangles(found, where, pairs):
            met = ((a, b) for a in sources for b in destinations if _meet(found, a, b))
            number = sum(_pairs(found, (*pair, where)) for pair in met)
            if number:  # else: somebody to himself
                changes.append(Change(allowed, flows, where, sources, destinations, number))
    return sorted(changes, key=lambda change: (not change.allowed, -change.pairs, change.sources, change.destinations))


def _rows(found: Classified, deltas: dict[_Pair, dict[int, Delta]]) -> dict[_Row, list[tuple[int, int]]]:
    rows: dict[_Row, list[tuple[int, int]]] = {}
    known: dict[tuple[tuple[int, int], ...], tuple[Flow, ...]] = {}
    single: list[tuple[int, _Row, tuple[int, int]]] = []  # with one IP version in common: they fit where it is named
    for (*pair, where), by_version in deltas.items():
        source, destination = pair
        for side, allowed in ((0, True), (1, False)):
            masks = tuple((version, delta[side]) for version, delta in by_version.items() if delta[side])
            if not masks:
                continue
            flows = known.get(masks) or known.setdefault(masks, _flows(found, dict(masks)))
            met = _meet(found, source, destination)
            if len(met) > 1:
                rows.setdefault((allowed, flows, where), []).append((source, destination))
            else:
                bare = tuple(flow._replace(version=None) for flow in flows)
                single.append((min(met), (allowed, bare, where), (source, destination)))
    for version, (allowed, bare, where), one in single:
        named = (allowed, tuple(flow._replace(version=version) for flow in bare), where)
        rows.setdefault(named if named in rows else (allowed, bare, where), []).append(one)
    return rows


def _rectangles(found: Classified, where: Where, pairs: list[tuple[int, int]]) -> list[_Rectangle]:
    def void(source: int, destination: int) -> bool:
        return not _meet(found, source, destination) or not _pairs(found, (source, destination, where))

    by_source = _sides(pairs, void)
    by_destination = _sides([(b, a) for a, b in pairs], lambda b, a: void(a, b))
    return min(by_source, [(b, a) for a, b in by_destination], key=len)


def _sides(pairs: Iterable[tuple[int, int]], void: Callable[[int, int], bool]) -> list[_Rectangle]:
    """Those with equal second sides together; a pair that cannot be fits anywhere."""
    reached: dict[int, set[int]] = {}
    for first, second in pairs:
        reached.setdefault(first, set()).add(second)
    rows: list[tuple[list[int], set[int]]] = []
    for first, seconds in sorted(reached.items(), key=lambda item: (-len(item[1]), item[0])):
        for firsts, have in rows:
            if seconds <= have and all(void(first, second) for second in have - seconds):
                firsts.append(first)
                break
        else:
            rows.append(([first], seconds))
    return [(tuple(sorted(firsts)), tuple(sorted(seconds))) for firsts, seconds in rows]


def _meet(found: Classified, source: int, destination: int) -> frozenset[int]:
    """The IP versions that both have."""
    return found.groups[source].versions & found.groups[destination].versions


def _flows(found: Classified, masks: dict[int, int]) -> tuple[Flow, ...]:
    """What both IP versions have alike is said once."""
    described = {version: found.spaces[version].describe(mask) for version, mask in masks.items()}
    both = [traffic for traffic in described.get(4, ()) if traffic in described.get(6, ())]
    flows = [Flow(None, traffic) for traffic in both]
    for version in sorted(described):
        flows += [Flow(version, traffic) for traffic in described[version] if traffic not in both]
    return tuple(flows)
