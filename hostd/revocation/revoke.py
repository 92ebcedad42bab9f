# Owns: what a change of the packet filter can take away from flows that are open: what is in force, which taps' flows
# must be judged, and how what was there before is known. Pure: trial.py judges, hostd.dataplane.flows walks.
#
# Nothing is judged where nothing can have been taken: a member that joins a set by which rules only allow, a new class.
from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from slash32.net import Address
from slash32.verdict import Packet

from ..change.plan import AddMembers, AddSet, DelMembers, DelSet, FlushSet, Grow, Plan, Scope
from ..compiler.desired import Admitted, ClassChains, Dirty, Member
from ..compiler.ruleset import HOST_CHAINS, Goto, InSet, Jump, Rule, Verdict
from .gives import only_gives

EGRESS, INGRESS = 0, 1  # places in ClassChains
HOST = -1  # in place of a tap's ifindex: the host itself
Side = tuple[int, int]  # a tap's ifindex, EGRESS or INGRESS; or HOST, place in HOST_CHAINS
Difference = tuple[Collection[Member], Collection[Member]]  # what came, what went

_BY_ADDING, _BY_REMOVING = 1, 2  # a member may take a permission away
_KEPT_MOST = 65536  # flows of which it is known that they were kept


class Flow(NamedTuple):
    name: bytes  # as the kernel knows it, and no later one by the same addresses and ports
    packet: Packet  # that began it, as the filter saw it: its destination translated, its source not yet


class OwnSocket(NamedTuple):
    """A TCP session's end at the host itself."""

    address: Address
    port: int
    far: Address
    far_port: int


@dataclass(slots=True)
class Change:
    """What a change can take away, known before it is carried out. False: nothing."""

    sides: dict[Side, bool] = field(default_factory=dict)  # True: what they were allowed before is known
    classes: dict[int, ClassChains] = field(default_factory=dict)  # before, of taps in `sides`
    chains: dict[str, tuple[Rule, ...]] = field(default_factory=dict)  # before, of those that change
    sets: dict[str, Difference] = field(default_factory=dict)
    whole: dict[str, Collection[Member]] = field(default_factory=dict)  # before, of sets that are written anew, or go
    near: set[Member] | None = None  # only flows from or to these can lose, if not None

    def __bool__(self) -> bool:
        return bool(self.sides)


class InForce:
    """The chains and sets that are in the kernel, as far as they are known, and which chains rest on what."""

    def __init__(self) -> None:
        self.chains: dict[str, tuple[Rule, ...]] = {}
        self.kept: dict[bytes, None] = {}  # flows that a policy keeps, in the order in which it did
        self.owed: set[int] = set()  # taps whose flows could not be judged, or not ended
        self.members: dict[str, set[Member] | tuple[Member, ...]] = {}  # as it was written, until it is asked
        self._unread: set[str] = set()
        self._callers: dict[str, set[str]] = {}  # chain -> who jumps there
        self._askers: dict[str, dict[str, int]] = {}  # set -> who asks it, and what can take a permission away
        self._mentions: dict[str, tuple[frozenset[str], Mapping[str, int]]] = {}  # chain -> chains, sets

    # -- before the change ----------------------------------------------------------------------------------------

    def ahead(self, scope: Scope, todo: Plan, fingerprints: Callable[[tuple[Rule, ...]], tuple[str, ...]]) -> Change:
        """`fingerprints`: of rules, as the packet filter has them."""
        change = Change()
        if self._only_gives(scope):
            return change
        changed, unsure = self._chains_that_change(scope, change, fingerprints)
        askers, vague = self._sets_that_change(scope, todo, change)
        unsure |= vague
        touched = self._resting_on(changed | unsure | askers)
        blurred = self._resting_on(unsure)
        _mark_moving(scope, change, blurred, lambda old, new: old not in touched and self._only_more(scope, old, new))
        if not (change or changed or unsure or self.owed):
            change.near = {m for diff in change.sets.values() for part in diff for m in part}
        if touched:
            _mark_touched(scope, change, touched, blurred)
        for ifindex in self.owed:
            places = range(len(HOST_CHAINS)) if ifindex == HOST else (EGRESS, INGRESS)
            change.sides.update({(ifindex, place): False for place in places})
        return change

    def _only_gives(self, scope: Scope) -> bool:
        """The commonest change of all, that of a member, takes nothing where no rule asks the set against it."""
        dirty, known = scope.dirty, self.members
        if dirty.chains or dirty.taps or dirty.sets or dirty.refill or self.owed or scope.actual.members is not None:
            return False
        if self._unread:
            self._read()
        for name, (came, went) in dirty.members.items():
            kinds = (_BY_ADDING if came else 0) | (_BY_REMOVING if went else 0)
            if name not in known or any(by & kinds for by in self._askers.get(name, {}).values()):
                return False
        return True

    def _only_more(self, scope: Scope, before: str, after: str) -> bool:
        """Chain `before` is asked as ever, and `after` allows all that it does: also where the kernel refuses a part of
        what it is asked to change."""
        if scope.actual.members is not None or before not in self.chains:
            return False

        def known(name: str) -> tuple[Rule, ...] | None:
            changes = name in scope.dirty.chains and name in scope.actual.chains
            return None if changes else scope.desired.chains.get(name)

        there = known(after)
        return there is not None and only_gives(self.chains[before], there, known)

    def owe_all(self, taps: Iterable[int]) -> None:
        """Nobody knows what was in force: all flows are judged with the next change."""
        self.owed.update(taps, (HOST,))

    def _chains_that_change(
        self, scope: Scope, change: Change, fingerprints: Callable[[tuple[Rule, ...]], tuple[str, ...]]
    ) -> tuple[set[str], set[str]]:
        """Those whose rules before are known, and those of which they are not."""
        actual, looked = scope.actual, scope.actual.members is not None
        unsure: set[str] = set()
        for name in scope.dirty.chains:
            have, before = actual.chains.get(name), self.chains.get(name)
            if name in HOST_CHAINS and not have:
                have, before = (), ()  # is always there, and decides nothing
            if have is not None and have == scope.fingerprints.get(name):
                self.put(name, scope.desired.chains[name])
            elif have is None:
                self.drop(name)
            elif before is None or (looked and before and fingerprints(before) != have):
                unsure.add(name)
                self.drop(name)
            else:
                change.chains[name] = before
        return set(change.chains), unsure

    def _sets_that_change(self, scope: Scope, todo: Plan, change: Change) -> tuple[set[str], set[str]]:
        """The chains from which the members take something, and those of which one cannot know."""
        actual, desired, dirty = scope.actual, scope.desired, scope.dirty
        vague: set[str] = set()
        for name in (dirty.refill | (dirty.sets - desired.sets.keys())) & actual.sets.keys():
            before = self.held(name) if actual.members is None else actual.members.get(name, ())
            if before is None:
                vague.add(name)
            else:
                change.whole[name] = before
                after = _written(todo, name)
                change.sets[name] = after.difference(before), set(before) - after
        for name, difference in dirty.members.items():
            if name in actual.sets and name not in change.whole:
                change.sets[name] = difference
                if name not in self.members and actual.members is None:
                    vague.add(name)
        askers: set[str] = set()
        if vague or change.sets:
            self._read()
        for name, (came, went) in change.sets.items():
            kinds = bool(came) * _BY_ADDING | bool(went) * _BY_REMOVING
            askers |= {chain for chain, by in self._askers.get(name, {}).items() if by & kinds}
        return askers, {chain for name in vague for chain in self._askers.get(name, ())}

    def _resting_on(self, chains: set[str]) -> set[str]:
        """With all that jump there, over however many jumps."""
        if chains:
            self._read()
        found, fresh = set(chains), set(chains)
        while fresh:
            fresh = {caller for name in fresh for caller in self._callers.get(name, ())} - found
            found |= fresh
        return found

    # -- after it -------------------------------------------------------------------------------------------------

    def came(self, scope: Scope, todo: Plan, refused: Iterable[Dirty]) -> None:
        """It was carried out but for what was refused (the scopes of that)."""
        for name in scope.dirty.chains:
            have = scope.actual.chains.get(name)
            if have is None:
                self.drop(name)
            elif have == scope.fingerprints.get(name):
                self.put(name, scope.desired.chains[name])
        if scope.actual.members is not None:
            here = scope.actual.sets.keys() & scope.desired.sets.keys()
            self.members = {name: set(scope.desired.members(name)) for name in here}
        else:
            for op in todo.filter:
                self._wrote(op)
        for end in todo.collect:
            if isinstance(end, DelSet) and end.name not in scope.actual.sets:
                self.members.pop(end.name, None)
        for part in refused:
            for name in part.refill | (part.sets - scope.actual.sets.keys()):
                self.members.pop(name, None)

    def _wrote(self, op: Grow) -> None:
        match op:
            case AddSet(name) | FlushSet(name):
                self.members[name] = set()
            case AddMembers(name, _, members):
                if self.members.get(name) == set():
                    self.members[name] = members
                elif (held := self.held(name)) is not None:
                    held.update(members)
            case DelMembers(name, _, members):
                if (held := self.held(name)) is not None:
                    held.difference_update(members)

    def held(self, name: str) -> set[Member] | None:
        """The members of a set, if they are known."""
        found = self.members.get(name)
        if isinstance(found, tuple):
            found = self.members[name] = set(found)
        return found

    def keep(self, names: Iterable[bytes]) -> None:
        self.kept.update(dict.fromkeys(names))
        while len(self.kept) > _KEPT_MOST:
            del self.kept[next(iter(self.kept))]

    def put(self, name: str, rules: tuple[Rule, ...]) -> None:
        if self.chains.get(name) is not rules:
            self.chains[name] = rules
            self._unread.add(name)

    def drop(self, name: str) -> None:
        if self.chains.pop(name, None) is not None:
            self._unread.add(name)

    def _read(self) -> None:
        """Which chain rests on what: found out when it is asked."""
        for name in self._unread:
            chains, sets = self._mentions.pop(name, (frozenset(), {}))
            for other in chains:
                self._callers[other].discard(name)
            for other in sets:
                del self._askers[other][name]
            if name in self.chains:
                chains, sets = self._mentions[name] = _mentioned(self.chains[name])
                for other in chains:
                    self._callers.setdefault(other, set()).add(name)
                for other, by in sets.items():
                    self._askers.setdefault(other, {})[name] = by
        self._unread.clear()


def _mentioned(rules: tuple[Rule, ...]) -> tuple[frozenset[str], Mapping[str, int]]:
    chains: set[str] = set()
    sets: dict[str, int] = {}
    for rule in rules:
        elsewhere = isinstance(rule.verdict, Jump | Goto) or rule.verdict is Verdict.RETURN
        if isinstance(rule.verdict, Jump | Goto):
            chains.add(rule.verdict.chain)
        for match in rule.matches:
            if isinstance(match, InSet) and (elsewhere or rule.verdict in (Verdict.ACCEPT, Verdict.DROP)):
                allows = (rule.verdict is Verdict.ACCEPT) is not match.negate
                by = _BY_ADDING | _BY_REMOVING if elsewhere else _BY_REMOVING if allows else _BY_ADDING
                sets[match.set] = sets.get(match.set, 0) | by
    return frozenset(chains), sets


def _written(todo: Plan, name: str) -> frozenset[Member]:
    """The members of a set that the plan writes whole."""
    return frozenset(m for op in todo.filter if isinstance(op, AddMembers) and op.name == name for m in op.members)


def _mark_moving(scope: Scope, change: Change, blurred: set[str], only_more: Callable[[str, str], bool]) -> None:
    """Taps that come into another class, if that may take something; and those that stood open, while somebody had
    taken their filter away."""
    for ifindex in scope.dirty.taps & scope.desired.taps.keys():
        have = scope.actual.taps.get(ifindex) or Admitted(group=scope.actual.foreign_groups.get(ifindex, 0))
        before, after = scope.actual.classes.get(have.group), scope.desired.taps[ifindex].chains
        if have.group and not (have.addresses or have.prefixes):
            change.sides.update({(ifindex, EGRESS): False, (ifindex, INGRESS): False})
        elif before is not None:
            for side in (EGRESS, INGRESS):
                if before[side] != after[side] and not only_more(before[side], after[side]):
                    change.classes[ifindex] = before
                    change.sides[ifindex, side] = before[side] not in blurred


def _mark_touched(scope: Scope, change: Change, touched: set[str], blurred: set[str]) -> None:
    for place, name in enumerate(HOST_CHAINS):
        if name in touched:
            change.sides[HOST, place] = name not in blurred
    hit = {group: chains for group, chains in scope.actual.classes.items() if not touched.isdisjoint(chains)}
    if not hit:
        return
    for ifindex, have in scope.actual.taps.items():
        chains = hit.get(have.group)
        if chains is not None and ifindex in scope.desired.taps:
            for side in (EGRESS, INGRESS):
                if chains[side] in touched and change.sides.get((ifindex, side), True):
                    change.classes[ifindex] = chains
                    change.sides[ifindex, side] = chains[side] not in blurred
