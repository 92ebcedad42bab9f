# Owns: who bears which labels, and which selectors match them, kept up to date change by change. Pure. Bearers with
# equal labels form a class; classes and selectors find each other through an index of anchors, so that neither a new
# kind of labels asks all selectors nor a new selector all labels, and a bearer of a known kind asks none.
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from slash32 import selector as selectors
from slash32.pack import AddressSet, ObjectKey

from .anchors import Anchor, Anchors, anchors_in, anchors_of
from .changes import Changes, Member, address_set

T = TypeVar("T")
Labels = frozenset[tuple[str, str]]


@dataclass(slots=True, eq=False)
class Bearer:
    """What selectors find. Policies apply to it for the sake of `host`; "": none does, or its host is not there."""

    labels: Labels  # effective
    members: tuple[Member, ...]
    host: str


@dataclass(slots=True, eq=False)
class _Class:
    """All bearers with these labels."""

    labels: dict[str, str]
    bearers: set[Bearer] = field(default_factory=set)
    hosts: Counter[str] = field(default_factory=Counter)
    selections: set[_Selection] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class _Selection:
    """A selector that is in use."""

    text: str
    selector: selectors.Selector
    anchors: Anchors | None
    classes: set[_Class] = field(default_factory=set)
    applied: set[ObjectKey] = field(default_factory=set)  # policies that apply to what it selects
    users: int = 0  # policies and profiles whose rules name it: then it is a set
    members: Counter[Member] = field(default_factory=Counter)


class Selections:
    def __init__(self, changes: Changes, want: Callable[[str, ObjectKey, int], None]) -> None:
        self._changes = changes
        self._want = want
        self._classes: dict[Labels, _Class] = {}
        self._selections: dict[str, _Selection] = {}
        self._classes_with: dict[Anchor, set[_Class]] = {}
        self._selections_under: dict[Anchor, set[_Selection]] = {}
        self._anywhere: set[_Selection] = set()  # that no anchor holds

    # -- bearers --------------------------------------------------------------------------------------------------

    def enter(self, bearer: Bearer) -> None:
        group = self._class(bearer.labels)
        group.bearers.add(bearer)
        self._count(group.selections, bearer.members, 1)
        self._join(group, bearer.host)

    def leave(self, bearer: Bearer) -> None:
        group = self._classes[bearer.labels]
        group.bearers.discard(bearer)
        self._count(group.selections, bearer.members, -1)
        self._part(group, bearer.host)
        self._tidy(bearer.labels, group)

    def relabel(self, bearer: Bearer, labels: Labels) -> None:
        if labels == bearer.labels:
            return
        old, before, after = bearer.labels, self._classes[bearer.labels], self._class(labels)
        bearer.labels = labels
        after.bearers.add(bearer)
        before.bearers.discard(bearer)
        self._count(after.selections - before.selections, bearer.members, 1)
        self._count(before.selections - after.selections, bearer.members, -1)
        self._join(after, bearer.host)
        self._part(before, bearer.host)
        self._tidy(old, before)

    def _join(self, group: _Class, host: str) -> None:
        group.hosts[host] += 1
        if host and group.hosts[host] == 1:
            for selection in group.selections:
                for key in selection.applied:
                    self._want(host, key, 1)

    def _part(self, group: _Class, host: str) -> None:
        group.hosts[host] -= 1
        if group.hosts[host]:
            return
        del group.hosts[host]
        if host:
            for selection in group.selections:
                for key in selection.applied:
                    self._want(host, key, -1)

    def _count(self, selections: Iterable[_Selection], members: tuple[Member, ...], by: int) -> None:
        for selection in selections:
            if not selection.users:
                continue
            counts = selection.members
            for member in members:
                counts[member] += by
                if counts[member] == (1 if by > 0 else 0):
                    self._changes.member(selection.text, member, by > 0)
                    if by < 0:
                        del counts[member]

    def _class(self, labels: Labels) -> _Class:
        found = self._classes.get(labels)
        if found is None:
            found = self._classes[labels] = _Class(dict(labels))
            asked = set(self._anywhere)
            for anchor in anchors_in(found.labels):
                self._classes_with.setdefault(anchor, set()).add(found)
                asked |= self._selections_under.get(anchor, set())
            for selection in asked:
                _meet(selection, found)
        return found

    def _tidy(self, labels: Labels, group: _Class) -> None:
        if group.bearers:
            return
        for selection in group.selections:
            selection.classes.discard(group)
        for anchor in anchors_in(group.labels):
            _take_out(self._classes_with, anchor, group)
        del self._classes[labels]

    # -- selectors ------------------------------------------------------------------------------------------------

    def apply(self, text: str, key: ObjectKey) -> None:
        """From now on the policy applies to what this selects."""
        selection = self._selection(text)
        selection.applied.add(key)
        self._want_everywhere(selection, key, 1)

    def unapply(self, text: str, key: ObjectKey) -> None:
        selection = self._selections[text]
        self._want_everywhere(selection, key, -1)
        selection.applied.discard(key)
        self._forget(selection)

    def _want_everywhere(self, selection: _Selection, key: ObjectKey, by: int) -> None:
        for group in selection.classes:
            for host in group.hosts:
                if host:
                    self._want(host, key, by)

    def use(self, text: str) -> None:
        """Rules of one more object name it: it is a set."""
        selection = self._selection(text)
        selection.users += 1
        if selection.users == 1:
            self._changes.set_begins(text)
            for group in selection.classes:
                for bearer in group.bearers:
                    selection.members.update(bearer.members)

    def unuse(self, text: str) -> None:
        selection = self._selections[text]
        if selection.users == 1:
            self._changes.set_ends(text, selection.members)
            selection.members.clear()
        selection.users -= 1
        self._forget(selection)

    def members(self, text: str) -> AddressSet | None:
        """None: it is no set."""
        selection = self._selections.get(text)
        return address_set(selection.members) if selection is not None and selection.users else None

    def _selection(self, text: str) -> _Selection:
        found = self._selections.get(text)
        if found is not None:
            return found
        selector = selectors.parse(text)
        found = self._selections[text] = _Selection(text, selector, anchors_of(selector, self._weight))
        if found.anchors is None:
            self._anywhere.add(found)
            asked = set(self._classes.values())
        else:
            asked = set()
            for anchor in found.anchors:
                self._selections_under.setdefault(anchor, set()).add(found)
                asked |= self._classes_with.get(anchor, set())
        for group in asked:
            _meet(found, group)
        return found

    def _weight(self, anchors: Anchors) -> int:
        """How many would be asked, or would ask."""
        with_it, under_it = self._classes_with, self._selections_under
        return sum(len(with_it.get(anchor, ())) + len(under_it.get(anchor, ())) for anchor in anchors)

    def _forget(self, selection: _Selection) -> None:
        if selection.users or selection.applied:
            return
        for group in selection.classes:
            group.selections.discard(selection)
        self._anywhere.discard(selection)
        for anchor in selection.anchors or ():
            _take_out(self._selections_under, anchor, selection)
        del self._selections[selection.text]

    def __len__(self) -> int:
        """How much is kept: 0, once everything was taken back."""
        index = len(self._classes_with) + len(self._selections_under) + len(self._anywhere)
        return len(self._classes) + len(self._selections) + index


def _meet(selection: _Selection, group: _Class) -> None:
    if selection.selector.matches(group.labels):
        selection.classes.add(group)
        group.selections.add(selection)


def _take_out(index: dict[Anchor, set[T]], anchor: Anchor, item: T) -> None:
    index[anchor].discard(item)
    if not index[anchor]:
        del index[anchor]
