# Owns: what changed since it was last asked: the net effect on objects, however often each was touched. Pure.
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from slash32.net import Address, Prefix
from slash32.pack import AddressSet, Kind, ObjectKey, Value
from slash32.wire import Change, Delete, Members, Put

Member = Address | Prefix


@dataclass(slots=True)
class Batch:
    """Net changes of objects, whose interest in which objects began or ended, and which hosts came and went."""

    changes: list[Change] = field(default_factory=list)
    gained: list[tuple[str, ObjectKey]] = field(default_factory=list)
    lost: list[tuple[str, ObjectKey]] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)


class Changes:
    def __init__(self) -> None:
        self._before: dict[ObjectKey, Value | None] = {}  # touched: the value when `take` was last called
        self._joined: dict[str, AddressSet] = {}  # of sets that were not touched as a whole
        self._parted: dict[str, AddressSet] = {}

    def touch(self, key: ObjectKey, before: Value | None) -> None:
        self._before.setdefault(key, before)

    def set_begins(self, text: str) -> None:
        self._before.setdefault(ObjectKey(Kind.SET, text), None)

    def set_ends(self, text: str, members: Iterable[Member]) -> None:
        """`members`: it had these until now; those when `take` was last called are what counts."""
        key = ObjectKey(Kind.SET, text)
        if key in self._before:
            return
        before = address_set(members)
        joined, parted = self._joined.pop(text, AddressSet()), self._parted.pop(text, AddressSet())
        before.addresses = before.addresses - joined.addresses | parted.addresses
        before.prefixes = before.prefixes - joined.prefixes | parted.prefixes
        self._before[key] = before

    def member(self, text: str, member: Member, joined: bool) -> None:
        if ObjectKey(Kind.SET, text) in self._before:
            return
        mine, other = (self._joined, self._parted) if joined else (self._parted, self._joined)
        _cancel(mine.setdefault(text, AddressSet()), other.setdefault(text, AddressSet()), member)

    def take(self, value: Callable[[ObjectKey], Value | None]) -> list[Change]:
        changes = []
        for key, before in self._before.items():
            now = value(key)
            if now != before:
                changes.append(_difference(key, before, now))
        for text in self._joined.keys() | self._parted.keys():
            add, remove = self._joined.get(text, AddressSet()), self._parted.get(text, AddressSet())
            if add or remove:
                changes.append(Members(text, add, remove))
        self._before, self._joined, self._parted = {}, {}, {}
        return changes


def address_set(members: Iterable[Member]) -> AddressSet:
    found = AddressSet()
    for member in members:
        if isinstance(member, Prefix):
            found.prefixes.add(member)
        else:
            found.addresses.add(member)
    return found


def _difference(key: ObjectKey, before: Value | None, now: Value | None) -> Change:
    if now is None:
        return Delete(*key)
    if isinstance(before, AddressSet) and isinstance(now, AddressSet):
        add = AddressSet(now.addresses - before.addresses, now.prefixes - before.prefixes)
        return Members(
            str(key.name), add, AddressSet(before.addresses - now.addresses, before.prefixes - now.prefixes)
        )
    return Put(*key, now)


def _cancel(mine: AddressSet, other: AddressSet, member: Member) -> None:
    """It joined (parted): undo what the other list says of it, else note it."""
    if isinstance(member, Prefix):
        if member in other.prefixes:
            other.prefixes.discard(member)
        else:
            mine.prefixes.add(member)
    elif member in other.addresses:
        other.addresses.discard(member)
    else:
        mine.addresses.add(member)
