# Owns: the way from what is known (the replica's objects, this host's endpoints) to what the kernel is to hold.
# Incremental: every method returns which objects it touched, at a cost that follows the change; the result depends
# on the current state only (a test compares every sequence of changes with a fresh build). Pure.
from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Set

from slash32.model import EndpointKey
from slash32.net import Prefix, host_prefix, pack_mac
from slash32.pack import Kind
from slash32.policy import Direction, HostEndpoint, Policy, Profile
from slash32.verdict import effective_labels, steps

from ..state import Locals, Phase
from .chains import Chains
from .compile import admitted
from .desired import ClassChains, Desired, Dirty, Member, Tap
from .forwarding import GATEWAY4_ROUTE, Route
from .host_chains import Standing, host_chains, in_order
from .ruleset import HOST_CHAINS
from .sets import Owner, Sets
from .walk import walk_of
from .world import World

_ITEMS = (Kind.PROFILE, Kind.POLICY, Kind.STAGED)  # what has rules
_Memo = tuple[tuple[tuple[str, str], ...], tuple[str, ...]]  # labels in order, profiles


class Calculation:
    """`desired` always follows from `world` and `locals`; call a method for what changed in them."""

    def __init__(self, host: str, world: World, locals_: Locals) -> None:
        self.host = host
        self.world = world
        self.locals = locals_
        self.desired = Desired(routes={GATEWAY4_ROUTE.prefix: GATEWAY4_ROUTE})
        self._sets = Sets(self.desired, world.sets)
        self.desired.members = self._sets.members
        self._chains = Chains(self.desired, self._sets)
        self._classes: dict[_Memo, ClassChains] = {}
        self._memo_of: dict[EndpointKey, _Memo] = {}  # of those that have a tap
        self._tap_of: dict[EndpointKey, int] = {}
        self._claims: dict[Prefix, dict[EndpointKey, Route]] = {}  # local candidates of a prefix
        self._routed: dict[EndpointKey, tuple[Prefix, ...]] = {}

    @classmethod
    def build(cls, host: str, world: World, locals_: Locals) -> Calculation:
        """Everything from nothing (at start)."""
        self = cls(host, world, locals_)
        dirty = Dirty()
        for kind in _ITEMS:
            for item in self._items(kind).values():
                self._chains.load(item, dirty)
        for local in self.locals:
            self.local_changed(local.endpoint.key)
        self._place_host_endpoints(dirty)
        for prefix in self.world.routes:
            self._choose_route(prefix, dirty)
        return self

    # -- what the dispatcher sent -------------------------------------------------------------------------------

    def rules_changed(self, names: Mapping[Kind, Collection[str]]) -> Dirty:
        """Policies, staged ones, profiles, tiers, host endpoints: those of these names came, changed or went."""
        dirty, gone = Dirty(), list[Owner]()
        for kind in _ITEMS:
            items = self._items(kind)
            for name in names.get(kind, ()):
                if name in items:
                    self._chains.load(items[name], dirty)
                else:
                    gone.append((kind.value, name))
        self._derive_classes(dirty, frozenset(names.get(Kind.PROFILE, ())))
        for owner in gone:
            self._chains.drop(owner, dirty)
        dirty.merge(self.collect_classes())
        return dirty

    def sets_changed(
        self, changes: Iterable[tuple[str, Collection[Member], Collection[Member]]], whole: Iterable[str]
    ) -> Dirty:
        """Selectors' members changed: each with those added and removed (`world.sets` already shows it). Those of
        `whole` were sent whole, or are gone: what they held before is not known here.

        All are counted before any user is compiled anew: it may be the first to need another of them, which it finds
        as it is now.
        """
        dirty = Dirty()
        anew = [name for name, add, remove in changes if self._sets.changed(name, add, remove, dirty)]
        anew += [name for name in whole if self._sets.replaced(name, dirty)]
        users = {owner: None for name in anew for owner in self._sets.users(name)}
        for kind, name in users:
            item = self._items(Kind(kind)).get(name)
            if item is not None:  # else it went in the same batch, and is dropped in its turn
                self._chains.load(item, dirty)
        return dirty

    def hosts_changed(self, names: Iterable[str]) -> Dirty:
        dirty, wanted = Dirty(), set(names)
        for prefix, owners in self.world.routes.items():
            if wanted.intersection(owners):
                self._choose_route(prefix, dirty)
        return dirty

    def routes_changed(self, prefixes: Iterable[Prefix]) -> Dirty:
        dirty = Dirty()
        for prefix in prefixes:
            self._choose_route(prefix, dirty)
        return dirty

    # -- what runs here -----------------------------------------------------------------------------------------

    def local_changed(self, key: EndpointKey) -> Dirty:
        dirty = Dirty()
        local = self.locals.get(key)
        endpoint = local.connected if local is not None else None
        tap, hops = None, dict[Prefix, Route]()
        self._memo_of.pop(key, None)
        if local is not None and endpoint is not None and local.carrier is not None:
            labels = effective_labels(endpoint, self.world.profiles)
            memo = self._memo_of[key] = tuple(sorted(labels.items())), endpoint.profiles
            tap = Tap(
                local.carrier.ifindex,
                local.carrier.tap,
                pack_mac(endpoint.key.mac),
                endpoint.all_addresses(),
                admitted(endpoint.prefixes),
                self._class_of(memo, dirty),
            )
            if local.phase is Phase.LIVE:
                hops = _local_hops(tap, endpoint.prefixes)
        self._place_tap(key, tap, dirty)
        self._place_routes(key, hops, dirty)
        return dirty

    def collect_classes(self) -> Dirty:
        """Forget the classes that no tap is in, and what only they need."""
        used = {name for tap in self.desired.taps.values() for name in tap.chains}
        dirty = Dirty()
        for memo, chains in list(self._classes.items()):
            if not used.issuperset(chains):
                del self._classes[memo]
        self._chains.collect(used.union(HOST_CHAINS), dirty)
        return dirty

    # -- inside -------------------------------------------------------------------------------------------------

    def _items(self, kind: Kind) -> Mapping[str, Policy | Profile]:
        if kind is Kind.PROFILE:
            return self.world.profiles
        return self.world.staged if kind is Kind.STAGED else self.world.policies

    def _derive_classes(self, dirty: Dirty, profiles: Set[str]) -> None:
        """Which policies apply, their order, or where they pass on may have changed. It costs by the classes, and by
        the endpoints that get labels from one of these `profiles`, for theirs may be others."""
        self._classes.clear()
        self._chains.forget()
        if profiles:
            having = [key for key, memo in self._memo_of.items() if not profiles.isdisjoint(memo[1])]
            for key in having:
                dirty.merge(self.local_changed(key))
        for key, memo in self._memo_of.items():
            tap, chains = self.desired.taps[self._tap_of[key]], self._class_of(memo, dirty)
            if tap.chains != chains:
                self._place_tap(key, tap._replace(chains=chains), dirty)
        self._place_host_endpoints(dirty)

    def _place_host_endpoints(self, dirty: Dirty) -> None:
        standing = [
            Standing(endpoint, self._local_chains(endpoint, dirty), self._forward_chains(endpoint, dirty))
            for endpoint in in_order(self.world.host_endpoints.values())
        ]
        self._chains.put_host(host_chains(standing), dirty)

    def _local_chains(self, endpoint: HostEndpoint, dirty: Dirty) -> ClassChains:
        labels = effective_labels(endpoint, self.world.profiles)
        return self._chains_of(labels, endpoint.profiles, dirty)

    def _forward_chains(self, endpoint: HostEndpoint, dirty: Dirty) -> tuple[str | None, str | None]:
        labels = effective_labels(endpoint, self.world.profiles)
        forward = [policy for policy in self._policies() if policy.apply_on_forward]
        found: list[str | None] = []
        for direction in (Direction.EGRESS, Direction.INGRESS):
            asked = steps(forward, self.world.tiers.values(), labels, direction, staged=True)
            walk = walk_of(asked, direction, None)
            found.append(self._chains.of_class(walk, dirty) if asked else None)
        return found[0], found[1]

    def _policies(self) -> list[Policy]:
        return [*self.world.policies.values(), *self.world.staged.values()]

    def _class_of(self, memo: _Memo, dirty: Dirty) -> ClassChains:
        found = self._classes.get(memo)
        if found is None:
            found = self._classes[memo] = self._chains_of(dict(memo[0]), memo[1], dirty)
        return found

    def _chains_of(self, labels: Mapping[str, str], profiles: tuple[str, ...], dirty: Dirty) -> ClassChains:
        known = tuple(name for name in profiles if name in self.world.profiles)
        names = {
            direction: self._chains.of_class(
                walk_of(steps(self._policies(), self.world.tiers.values(), labels, direction, True), direction, known),
                dirty,
            )
            for direction in Direction
        }
        return ClassChains(names[Direction.EGRESS], names[Direction.INGRESS])

    def _place_tap(self, key: EndpointKey, tap: Tap | None, dirty: Dirty) -> None:
        old = self._tap_of.pop(key, None)
        if old is not None and (tap is None or tap.ifindex != old):
            self.desired.taps.pop(old, None)
            dirty.taps.add(old)
        if tap is not None:
            self._tap_of[key] = tap.ifindex
            if self.desired.taps.get(tap.ifindex) != tap:
                self.desired.taps[tap.ifindex] = tap
                dirty.taps.add(tap.ifindex)

    def _place_routes(self, key: EndpointKey, hops: dict[Prefix, Route], dirty: Dirty) -> None:
        before = self._routed.pop(key, ())
        for prefix in before:
            if prefix not in hops:
                self._claims[prefix].pop(key, None)
        for prefix, hop in hops.items():
            self._claims.setdefault(prefix, {})[key] = hop
        if hops:
            self._routed[key] = tuple(hops)
        for prefix in {*before, *hops}:
            self._choose_route(prefix, dirty)

    def _choose_route(self, prefix: Prefix, dirty: Dirty) -> None:
        """A guest of this host first; of several claimants (shared addresses) the first key, the first host."""
        here = self._claims.get(prefix)
        if here is not None and not here:
            del self._claims[prefix]
        hop = here[min(here)] if here else self._remote_hop(prefix)
        if hop is None:
            if self.desired.routes.pop(prefix, None) is not None:
                dirty.routes.add(prefix)
        elif self.desired.routes.get(prefix) != hop:
            self.desired.routes[prefix] = hop
            dirty.routes.add(prefix)

    def _remote_hop(self, prefix: Prefix) -> Route | None:
        width = len(prefix.network)
        owners = self.world.routes.get(prefix, ())
        for host in sorted(owners) if len(owners) > 1 else owners:
            if host != self.host:
                for via in self.world.hosts.get(host, ()):
                    if len(via) == width:
                        return Route(prefix, 0, via)
        return None


def _local_hops(tap: Tap, prefixes: Iterable[Prefix]) -> dict[Prefix, Route]:
    """An address is on its tap's link; a prefix behind the guest is reached through the guest's first address."""
    hops = {(prefix := host_prefix(address)): Route(prefix, tap.ifindex) for address in tap.addresses}
    for prefix in prefixes:
        via = next((a for a in tap.addresses if len(a) == len(prefix.network)), None)
        hops[prefix] = Route(prefix, tap.ifindex, via, onlink=via is not None)
    return hops
