# Owns: the chains that are desired: those of policies and profiles, those of classes with their tails, those of host
# endpoints; and the words for log tags and counted rules. Incremental; what is there follows from what is loaded and
# asked for, not from how it came about. Pure.
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from slash32.policy import Direction, Policy, Profile

from .compile import (
    Compiled,
    Parts,
    compile_rules,
    directions_of,
    in_parts,
    kind_of_item,
    only_counting,
    without_pass,
)
from .desired import Desired, Dirty, LogPoint, StagedPoint
from .names import policy_chain, profile_chain, staged_chain
from .ruleset import Goto, Jump, Log, Rule
from .sets import Owner, Sets
from .walk import Line, Walk, class_name, lines, tail_name, tier_lines, tier_name
from .walk import in_parts as is_in_parts


class _Loaded(NamedTuple):
    item: Policy | Profile
    compiled: Mapping[Direction, tuple[Compiled, ...]]
    parts: Mapping[Direction, Parts]
    own: tuple[str, ...]  # its chains that stand whether or not somebody asks it
    tags: tuple[str, ...]


class _Use(NamedTuple):
    """A chain made of a staged policy for those who go on there."""

    owner: Owner
    direction: Direction
    there: str


class Chains:
    """Fills `desired.chains`, `.logs` and `.staged`."""

    def __init__(self, desired: Desired, sets: Sets) -> None:
        self.desired = desired
        self.sets = sets
        self._loaded: dict[Owner, _Loaded] = {}
        self._uses: dict[str, _Use] = {}  # by chain
        self._tiers: dict[str, Walk] = {}  # by chain: that of the first tier
        self._built: set[str] = set()  # classes, tiers and tails that follow from what is known now
        self._derived: set[str] = set()  # all that stand for as long as a class needs them

    # -- policies and profiles ------------------------------------------------------------------------------------

    def load(self, item: Policy | Profile, dirty: Dirty) -> None:
        """It is new, or changed, or the sets that its rules name are others now."""
        owner, asked = owner_of(item), set[str]()

        def lookup(name: str) -> object:
            asked.add(name)
            return self.sets.need(name, dirty)

        compiled = {way: compile_rules(item, way, lookup) for way in directions_of(item)}  # type: ignore[arg-type]
        parts = {
            way: in_parts(item, way, found)
            for way, found in compiled.items()
            if isinstance(item, Policy) and is_in_parts(item, way)
        }
        own = dict(_own_chains(item, compiled, parts))
        self._unload(owner, dirty, keep=own.keys())
        self.sets.use(owner, asked, dirty)
        logs = dict(_logs(item, compiled))
        self.desired.logs.update(logs)
        self._loaded[owner] = _Loaded(item, compiled, parts, tuple(own), tuple(logs))
        for name, rules in own.items():
            self._put(name, rules, {}, dirty)
        for name, use in self._uses.items():
            if use.owner == owner:
                self._write_use(name, use, dirty)
        for name, walk in list(self._tiers.items()):
            if any(owner_of(policy) == owner for policy in walk.stops[0].policies):
                self._write(name, tier_lines(walk, _Book(self, dirty)), dirty)

    def drop(self, owner: Owner, dirty: Dirty) -> None:
        """After the last class that asks it was forgotten."""
        self._unload(owner, dirty, keep=())
        self.sets.use(owner, set(), dirty)

    def _unload(self, owner: Owner, dirty: Dirty, keep: Iterable[str]) -> None:
        old = self._loaded.pop(owner, None)
        if old is not None:
            for tag in old.tags:
                del self.desired.logs[tag]
            for name in old.own:
                if name not in keep:
                    self._remove(name, dirty)

    # -- who asks them --------------------------------------------------------------------------------------------

    def forget(self) -> None:
        """What classes are made of may have changed: each is derived anew when it is asked for, and what is no longer
        is collected."""
        self._built.clear()

    def of_class(self, walk: Walk, dirty: Dirty) -> str:
        return self._build(class_name(walk), lines(walk, _Book(self, dirty)), dirty)

    def put_host(self, chains: Mapping[str, tuple[Rule, ...]], dirty: Dirty) -> None:
        for name, rules in chains.items():
            self._put(name, rules, {}, dirty)

    def collect(self, roots: Iterable[str], dirty: Dirty) -> None:
        """What none of these needs goes."""
        keep: set[str] = set()
        todo = list(roots)
        while todo:
            name = todo.pop()
            if name not in keep:
                keep.add(name)
                todo += targets(self.desired.chains.get(name, ()))
                if name in self._uses:
                    todo.append(self._uses[name].there)  # also where no rule that can match says so
        for name in self._derived - keep:
            self._derived.discard(name)
            self._built.discard(name)
            self._uses.pop(name, None)
            self._tiers.pop(name, None)
            self._remove(name, dirty)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _build(self, name: str, made: Iterable[Line], dirty: Dirty) -> str:
        if name not in self._built:
            self._built.add(name)
            self._derived.add(name)
            self._write(name, made, dirty)
        return name

    def _write(self, name: str, made: Iterable[Line], dirty: Dirty) -> None:
        found = list(made)
        points = {at: line.counts for at, line in enumerate(found) if line.counts is not None}
        self._put(name, tuple(line.rule for line in found), points, dirty)

    def use(self, name: str, use: _Use, dirty: Dirty) -> str:
        if name not in self._uses:
            self._derived.add(name)
            self._uses[name] = use
            self._write_use(name, use, dirty)
        return name

    def _write_use(self, name: str, use: _Use, dirty: Dirty) -> None:
        item, compiled, *_ = self._loaded[use.owner]
        found = compiled.get(use.direction, ())
        assert isinstance(item, Policy)
        rules = only_counting(found, use.there)
        points = {
            at: StagedPoint(item.name, item.tier, use.direction, index)
            for at, ((index, _), rule) in enumerate(zip(found, rules, strict=True))
            if rule.counted
        }
        self._put(name, rules, points, dirty)

    def _put(self, name: str, rules: tuple[Rule, ...], points: Mapping[int, StagedPoint], dirty: Dirty) -> None:
        self._forget_points(name)
        for at, point in points.items():
            self.desired.staged[name, at] = point
        if self.desired.chains.get(name) != rules:
            self.desired.chains[name] = rules
            dirty.chains.add(name)

    def _remove(self, name: str, dirty: Dirty) -> None:
        self._forget_points(name)
        self.desired.chains.pop(name, None)
        dirty.chains.add(name)

    def _forget_points(self, name: str) -> None:
        for at, rule in enumerate(self.desired.chains.get(name, ())):
            if rule.counted:
                self.desired.staged.pop((name, at), None)


class _Book(NamedTuple):
    chains: Chains
    dirty: Dirty

    def tail(self, walk: Walk) -> str:
        return self.chains._build(tail_name(walk), lines(walk, self), self.dirty)

    def tier(self, walk: Walk) -> str:
        name = tier_name(walk)
        self.chains._tiers[name] = walk
        return self.chains._build(name, tier_lines(walk, self), self.dirty)

    def parts(self, policy: Policy, direction: Direction) -> Iterable[Rule]:
        found = self.chains._loaded[owner_of(policy)].parts.get(direction)
        return found.asked if found is not None else ()

    def staged(self, policy: Policy, then: Walk) -> str:
        there = self.tail(then)
        name = staged_chain(policy.name, then.direction, there)
        return self.chains.use(name, _Use(owner_of(policy), then.direction, there), self.dirty)


def owner_of(item: Policy | Profile) -> Owner:
    return kind_of_item(item), item.name


def targets(rules: Iterable[Rule]) -> Iterator[str]:
    """The chains that these jump or go to."""
    return (rule.verdict.chain for rule in rules if isinstance(rule.verdict, Jump | Goto))


def _own_chains(
    item: Policy | Profile, compiled: Mapping[Direction, tuple[Compiled, ...]], parts: Mapping[Direction, Parts]
) -> Iterator[tuple[str, tuple[Rule, ...]]]:
    """A staged policy has one for each continuation instead."""
    for direction, found in compiled.items():
        if isinstance(item, Profile):
            yield profile_chain(item.name, direction), without_pass(found)
        elif direction in parts:
            yield from parts[direction].chains.items()
        elif not item.staged:
            yield policy_chain(item.name, direction), without_pass(found)


def _logs(
    item: Policy | Profile, compiled: Mapping[Direction, tuple[Compiled, ...]]
) -> Iterator[tuple[str, LogPoint]]:
    tier = item.tier if isinstance(item, Policy) else ""
    for direction, rules in compiled.items():
        for index, rule in rules:
            if isinstance(rule.verdict, Log):
                yield rule.verdict.tag, LogPoint(kind_of_item(item), item.name, tier, direction, index)
