# Owns: a dispatcher without its wire, and h1's hostd without its libvirt: a world goes in, and comes out as what h1's
# kernel is to hold, by the product's own code all the way. Worlds follow each other by increments, or anew.
from __future__ import annotations

from collections.abc import Mapping

from verdict_worlds import ELSEWHERE, HERE, NEXT, OWN, tap_of

from dispatcher.hosts.fanout import Fanout
from dispatcher.registry.registry import Registry
from hostd.compiler.absorb import absorb
from hostd.compiler.calc import Calculation
from hostd.compiler.desired import Dirty
from hostd.compiler.world import world_of
from hostd.state import Carrier, Local, Locals, Phase
from slash32 import wire
from slash32.model import Endpoint, EndpointKey, Host
from slash32.pack import Kind
from slash32.sync import Applied, Replica
from slash32.verdict import World

Named = dict[tuple[str, str], object]


class Fleet:
    """h1 and h2, as the dispatcher has them. `taps`: interface indexes by name."""

    def __init__(self, taps: Mapping[str, int]) -> None:
        self.taps = taps
        self.registry, self.fanout, self.replica, self.locals = Registry(), Fanout(), Replica(), Locals({})
        self.revision = 1
        for name, addresses in ((HERE, OWN), (ELSEWHERE, NEXT)):
            self.registry.put_host(Host(name, addresses=addresses))
            self.fanout.add_host(name)
        self.fanout.publish(self.revision, self.registry.take())
        self._hear(self.fanout.open(HERE, self.replica.hello(), "e", self.revision, False))
        self.calc = Calculation.build(HERE, world_of(self.replica), self.locals)
        self._have: Named = {}

    def become(self, world: World) -> Dirty:
        """In one commit; what of h1's kernel may differ."""
        want = _named(world)
        for at in self._have.keys() - want.keys():
            self._delete(*at)
        for (kind, name), item in want.items():
            if kind != "endpoint" and self._have.get((kind, name)) != item:
                getattr(self.registry, f"put_{kind.removeprefix('staged_')}")(item)
        for endpoint in world.endpoints:
            where = world.places[endpoint.key]
            if self._have.get(("endpoint", str(endpoint.key))) != (endpoint, where):
                assert self.registry.refusal(where, endpoint) is None
                self.registry.claim(where, endpoint)
        self._have = want
        self.revision += 1
        dirty = Dirty()
        for host, frames in self.fanout.publish(self.revision, self.registry.take()):
            assert frames is not None
            if host == HERE:
                dirty.merge(absorb(self.calc, [self._hear(frames)]))
            else:
                self.fanout.publishers[host].ack(self.revision)
        self._run(world, dirty)
        dirty.merge(self.calc.collect_classes())
        return dirty

    def fresh(self) -> Calculation:
        return Calculation.build(HERE, world_of(self.replica), self.locals)

    def _delete(self, kind: str, name: str) -> None:
        if kind == "endpoint":
            uuid, _, mac = name.partition("/")
            self.registry.release(EndpointKey(uuid, mac))
        elif kind == "staged_policy":
            self.registry.delete_policy(name, staged=True)
        else:
            getattr(self.registry, f"delete_{kind}")(name)

    def _hear(self, frames: list[bytes]) -> Applied:
        message = wire.decode_from_dispatcher(frames)
        assert isinstance(message, wire.Snapshot | wire.Delta)
        (outcome,) = self.replica.receive(message)
        assert isinstance(outcome, Applied)
        self.fanout.publishers[HERE].ack(outcome.revision)
        return outcome

    def _run(self, world: World, dirty: Dirty) -> None:
        """What runs on h1; what ran before and does not now has ended."""
        here = {e.key: e for e in world.endpoints if world.places[e.key] == HERE}
        for local in list(self.locals):
            if local.endpoint.key not in here:
                self.locals.remove(local.endpoint.key)
                dirty.merge(self.calc.local_changed(local.endpoint.key))
        for key, endpoint in here.items():
            local = self._local(endpoint)
            if self.locals.get(key) != local:
                self.locals.put(local)
                dirty.merge(self.calc.local_changed(key))

    def _local(self, endpoint: Endpoint) -> Local:
        tap = tap_of(endpoint)
        return Local(endpoint, "qemu", Phase.LIVE, Carrier(tap, self.taps[tap]), endpoint)

    def sets(self) -> int:
        return len(self.replica.objects(Kind.SET))


def _named(world: World) -> Named:
    found: Named = {("policy" if not p.staged else "staged_policy", p.name): p for p in world.policies}
    found |= {("tier", each.name): each for each in world.tiers}
    found |= {("profile", each.name): each for each in world.profiles}
    found |= {("network_set", each.name): each for each in world.sets}
    found |= {("host_endpoint", each.name): each for each in world.host_endpoints}
    return found | {("endpoint", str(e.key)): (e, world.places[e.key]) for e in world.endpoints}
