# Owns: one commit's worth of random changes of a random world: guests come, go and are tagged anew; policies, tiers,
# profiles, sets and host endpoints change.
from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from verdict_worlds import ELSEWHERE, HERE, Maker, key

from slash32.policy import HostEndpoint
from slash32.verdict import World


def changed(world: World, chance: random.Random, least: int = 1, most: int = 4) -> World:
    """Never the same world."""
    edits = _Edits(chance)
    while True:
        after = world
        for _ in range(chance.randint(least, most)):
            after = chance.choice(edits.every)(after)
        if after != world:
            return after


class _Edits:
    def __init__(self, chance: random.Random) -> None:
        self.chance, self.make = chance, Maker(chance)
        self.every: list[Callable[[World], World]] = [
            self.relabel, self.relabel, self.comes, self.goes, self.moves, self.policy, self.policy, self.policy_gone,
            self.policy_gone, self.another_order, self.tier, self.profile, self.network_set, self.host_endpoint,
        ]  # fmt: skip

    def other(self, items: Any, change: Callable[[Any], Any]) -> list[Any]:
        """One of them changed."""
        found = list(items)
        if found:
            at = self.chance.randrange(len(found))
            found[at] = change(found[at])
        return found

    def less(self, items: Any) -> list[Any]:
        found = list(items)
        if len(found) > 1:
            del found[self.chance.randrange(len(found))]
        return found

    def relabel(self, world: World) -> World:
        endpoints = self.other(world.endpoints, lambda e: replace(
            e, labels=self.make.labels(), profiles=self.chance.choice((e.profiles, e.profiles[::-1], ("one",))),
        ))  # fmt: skip
        return replace(world, endpoints=endpoints)

    def comes(self, world: World) -> World:
        there = {e.key for e in world.endpoints}
        number = self.chance.choice([*range(1, 7), 11, 12])
        if key(number) in there:
            return world
        places = {**world.places, key(number): HERE if number < 10 else ELSEWHERE}
        return replace(world, endpoints=[*world.endpoints, self.make.endpoint(number)], places=places)

    def goes(self, world: World) -> World:
        endpoints = self.less(world.endpoints)
        return replace(world, endpoints=endpoints, places={e.key: world.places[e.key] for e in endpoints})

    def moves(self, world: World) -> World:
        """Its addresses are others."""
        return replace(world, endpoints=self.other(
            world.endpoints, lambda e: replace(self.make.endpoint(int(e.key.mac[-2:], 16)), labels=e.labels)
        ))  # fmt: skip

    def policy(self, world: World) -> World:
        name, staged = f"p{self.chance.randrange(6)}", self.chance.random() < 0.2
        made = self.make.policy(name, ["default", *(tier.name for tier in world.tiers)], staged)
        return replace(world, policies=[p for p in world.policies if (p.name, p.staged) != (name, staged)] + [made])

    def policy_gone(self, world: World) -> World:
        return replace(world, policies=self.less(world.policies))

    def another_order(self, world: World) -> World:
        return replace(world, policies=self.other(
            world.policies, lambda p: replace(p, order=self.chance.choice((None, 0.0, 1.0, 3.0)))
        ))  # fmt: skip

    def tier(self, world: World) -> World:
        return replace(world, tiers=self.other(world.tiers, lambda tier: self.make.tier(tier.name)))

    def profile(self, world: World) -> World:
        return replace(world, profiles=self.other(world.profiles, lambda profile: self.make.profile(profile.name)))

    def network_set(self, world: World) -> World:
        return replace(world, sets=self.other(world.sets, lambda each: self.make.network_set(each.name)))

    def host_endpoint(self, world: World) -> World:
        hosts: list[HostEndpoint] = list(world.host_endpoints)
        if not hosts:
            return replace(world, host_endpoints=[self.make.host_endpoint(*each) for each in self.make.standing()])
        if self.chance.random() < 0.5:
            hosts = self.other(hosts, lambda each: self.make.host_endpoint(each.node, each.interface))
        else:
            hosts.remove(self.chance.choice(hosts))
        return replace(world, host_endpoints=hosts)
