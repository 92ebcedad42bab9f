# Owns: every state of the kernel on the way from one world to the next: what hostd writes is cut into single operations
# (those of one nf_tables transaction, and of one table of iptables, are one), and after each of them somebody looks.
# And the packets that are worth a look: those that neither world allows, but a mixture of the two would.
from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
from verdict_packets import Aim, Model, Shot, once
from verdict_worlds import HOST, OWN, UP0, UP1, Spot, spots

from hostd.dataplane.iptables import restore
from hostd.dataplane.iptables.sets import Sets
from hostd.dataplane.nft.transaction import Transaction
from hostd.dataplane.rtnl import Rtnl
from slash32.verdict import World

AT_MOST = 40  # shots at a time
MIXTURES = 10


class Killed(Exception):
    """hostd is no more."""


@contextlib.contextmanager
def looked_at(look: Callable[[], None]) -> Iterator[None]:
    """`look` after each operation; it may raise Killed."""
    change, commit, carry_out, write = Rtnl.change, Transaction.commit, Sets.carry_out, restore.write

    def links(self: Rtnl, operations: Sequence[Any]) -> list[Any]:
        failures = []
        for operation in operations:
            failures += change(self, [operation])
            look()
        return failures

    def transaction(self: Transaction) -> None:
        commit(self)
        look()

    def sets(self: Sets, tasks: Sequence[Any]) -> None:
        for task in tasks:
            carry_out(self, [task])
            look()

    def tables(version: int, edits: dict[str, Any]) -> None:
        for table, edit in edits.items():
            write(version, {table: edit})
            look()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rtnl, "change", links)
        patch.setattr(Transaction, "commit", transaction)
        patch.setattr(Sets, "carry_out", sets)
        patch.setattr(restore, "write", tables)
        yield


class Allowed:
    """The model's word in a world in which the ends of a shot may be missing."""

    def __init__(self, world: World) -> None:
        self.model, self.there = Model(world), {*spots(world)}

    def __call__(self, shot: Shot) -> bool:
        """To and from the uplink there may be anybody, whether or not there is a way."""
        ends = {Spot(shot.sender, shot.packet.source), Spot(shot.receiver, shot.packet.destination)}
        return all(spot in self.there or spot.where == UP0 for spot in ends) and self.model.judged(shot).word


def forbidden(old: World, new: World, chance: random.Random) -> list[Shot]:
    """What neither allows; first that which some mixture of the two does."""
    either = [Allowed(world) for world in (old, new)]
    closed = all(any(Spot(HOST, OWN[0]) == spot for spot in a.there) for a in either)  # else the host may do anything
    pool = [shot for one in either for shot in Aim(chance, one.model).shots() if _same_place(shot, either)]
    none = [shot for shot in once(pool) if not any(allowed(shot) for allowed in either)]
    none = [shot for shot in none if closed or HOST not in (shot.sender, shot.receiver)]
    mixed = [Allowed(world) for world in mixtures(old, new, chance)]
    tempting = [shot for shot in none if any(allowed(shot) for allowed in mixed)]
    return tempting[:AT_MOST]


def _same_place(shot: Shot, either: Sequence[Allowed]) -> bool:
    """Not to or from an address that changes hands: whose it is in between is not asked here."""
    ends = {(shot.packet.source, shot.sender), (shot.packet.destination, shot.receiver)}
    return all(where == spot.where for a in either for spot in a.there for address, where in ends
               if spot.address == address) and not {shot.sender, shot.receiver} <= {UP0, UP1}  # fmt: skip


_PARTS = [field.name for field in fields(World) if field.name != "places"]


def mixtures(old: World, new: World, chance: random.Random) -> Iterator[World]:
    """Of both; one part of the other, or item by item of either."""
    places = {**old.places, **new.places}
    for name in _PARTS:
        if getattr(old, name) != getattr(new, name):
            yield replace(old, places=places, **{name: getattr(new, name)})
            yield replace(new, places=places, **{name: getattr(old, name)})
    for _ in range(MIXTURES):
        yield World(**{name: _either(getattr(old, name), getattr(new, name), chance) for name in _PARTS}, places=places)


def _either(one: Sequence[Any], other: Sequence[Any], chance: random.Random) -> list[Any]:
    sides = [{_name(item): item for item in items} for items in (one, other)]
    found = (chance.choice(sides).get(name) for name in {**sides[0], **sides[1]})
    return [item for item in found if item is not None]


def _name(item: Any) -> object:
    return getattr(item, "key", None) or (item.name, getattr(item, "staged", False))
