# Owns: which kernel sets the loaded policies and profiles need, and what changes in them. Incremental. Pure.
from __future__ import annotations

from collections.abc import Collection, Mapping

from slash32.net import Prefix
from slash32.pack import AddressSet

from .compile import ADDRESSES, SelectorSet, kind_of, members_of
from .desired import Desired, Dirty, Member
from .ruleset import SetKind, SetSpec

Owner = tuple[str, str]  # kind and name of a policy or profile
Specs = Mapping[SetKind, tuple[str, SetSpec]]


class Sets:
    """Fills `desired.sets`; `values` are the members by canonical selector, as they are now."""

    def __init__(self, desired: Desired, values: Mapping[str, AddressSet]) -> None:
        self.desired = desired
        self.values = values
        self._sets: dict[str, SelectorSet] = {}  # by selector, those that a loaded rule names
        self._users: dict[str, set[Owner]] = {}  # by selector
        self._by_set: dict[str, tuple[str, SetKind]] = {}  # kernel set name -> selector, kind

    def need(self, name: str, dirty: Dirty) -> SelectorSet:
        """The kernel sets of a selector; say with use() for whom."""
        found = self._sets.get(name)
        if found is None:
            found = self._sets[name] = SelectorSet(name, self._value(name))
            self._declare(name, found, dirty)
        return found

    def use(self, owner: Owner, selectors: set[str], dirty: Dirty) -> None:
        """That owner uses these now, and no others."""
        for name in selectors:
            self._users.setdefault(name, set()).add(owner)
        for name in [n for n, users in self._users.items() if owner in users and n not in selectors]:
            self._users[name].discard(owner)
            if not self._users[name]:
                del self._users[name]
                self._undeclare(self._sets.pop(name).specs, dirty)

    def users(self, name: str) -> tuple[Owner, ...]:
        return tuple(self._users.get(name, ()))

    def changed(self, name: str, add: Collection[Member], remove: Collection[Member], dirty: Dirty) -> bool:
        """A selector's members changed (`values` shows it). True: its users are to be compiled anew."""
        found = self._sets.get(name)
        if found is None:
            return False  # no rule uses it: nothing in the kernel
        stay = before = found.specs
        anew = found.changed(add, remove)
        if anew:
            self._redeclare(name, before, found, dirty)
            stay = {kind: spec for kind, spec in found.specs.items() if before.get(kind) == spec}
        for members, adding in ((add, True), (remove, False)):
            for member in members:
                kernel, _ = stay.get(kind_of(member), ("", None))
                if kernel and isinstance(member, Prefix):
                    dirty.refill.add(kernel)  # intervals that touch are one: write them anew
                elif kernel:
                    dirty.change_members(kernel, (member,) if adding else (), () if adding else (member,))
        return anew

    def replaced(self, name: str, dirty: Dirty) -> bool:
        """Its members were sent whole, or are gone: what it held before is not known here. As changed()."""
        old = self._sets.get(name)
        if old is None:
            return False
        new = self._sets[name] = SelectorSet(name, self._value(name))
        if old.specs != new.specs:
            self._redeclare(name, old.specs, new, dirty)
        dirty.refill.update(kernel for kernel, _ in new.specs.values())
        return old.specs != new.specs

    def members(self, kernel: str) -> Collection[Member]:
        selector, kind = self._by_set[kernel]
        value, only = self._value(selector), self._sets[selector].only
        if only is not None and kind in ADDRESSES:  # each look at 100,000 takes milliseconds
            return value.addresses if kind is only else ()
        return members_of(value, kind)

    def _value(self, selector: str) -> AddressSet:
        return self.values.get(selector) or AddressSet()

    def _redeclare(self, name: str, before: Specs, found: SelectorSet, dirty: Dirty) -> None:
        """Other kernel sets than before, for some of its kinds."""
        self._undeclare({kind: old for kind, old in before.items() if found.specs.get(kind) != old}, dirty)
        self._declare(name, found, dirty)

    def _declare(self, name: str, found: SelectorSet, dirty: Dirty) -> None:
        for kind, (kernel, spec) in found.specs.items():
            if kernel not in self.desired.sets:
                self.desired.sets[kernel] = spec
                self._by_set[kernel] = (name, kind)
                dirty.sets.add(kernel)
                dirty.refill.add(kernel)  # one of this name may still be there, with members of then

    def _undeclare(self, specs: Specs, dirty: Dirty) -> None:
        for kernel, _ in specs.values():
            self.desired.sets.pop(kernel, None)
            self._by_set.pop(kernel, None)
            dirty.sets.add(kernel)
