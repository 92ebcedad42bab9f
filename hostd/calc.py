# Owns: the way from what is known (the replica's objects, this host's endpoints) to what the kernel is to hold.
# Incremental: every method returns which objects it touched, at a cost that follows the change; the result depends
# on the current state only (a test compares every sequence of changes with a fresh build). Pure.
from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from slash32.model import EndpointKey
from slash32.net import Prefix, host_prefix, pack_mac
from slash32.pack import AddressSet
from slash32.policy import Direction, Policy, Profile
from slash32.verdict import applicable, effective_labels

from .compile import (
    SelectorSet,
    admitted,
    class_chains,
    kind_of,
    members_of,
    policy_chain,
    policy_chains,
    profile_chain,
)
from .desired import ClassChains, Desired, Dirty, Member, Tap
from .forwarding import GATEWAY4_ROUTE, Route
from .ruleset import Rule, SetKind, SetSpec
from .state import Locals, Phase
from .world import World

Specs = Mapping[SetKind, tuple[str, SetSpec]]


class Calculation:
    """`desired` always follows from `world` and `locals`; call a method for what changed in them."""

    def __init__(self, host: str, world: World, locals_: Locals) -> None:
        self.host = host
        self.world = world
        self.locals = locals_
        self.desired = Desired(members=self._members, routes={GATEWAY4_ROUTE.prefix: GATEWAY4_ROUTE})
        self._sets: dict[str, SelectorSet] = {}  # by selector, those that a loaded rule names
        self._users: dict[str, set[str]] = {}  # selector -> chain names that use it
        self._owned: dict[tuple[str, str], tuple[str, ...]] = {}  # (kind, name) -> its chains
        self._by_set: dict[str, tuple[str, SetKind]] = {}  # kernel set name -> selector, kind
        self._classes: dict[object, ClassChains] = {}  # (labels, profiles) -> class
        self._tap_of: dict[EndpointKey, int] = {}
        self._claims: dict[Prefix, dict[EndpointKey, Route]] = {}  # local candidates of a prefix
        self._routed: dict[EndpointKey, tuple[Prefix, ...]] = {}

    @classmethod
    def build(cls, host: str, world: World, locals_: Locals) -> Calculation:
        """Everything from nothing (at start)."""
        self = cls(host, world, locals_)
        for policy in self.world.policies.values():
            self._load_chains(policy, Dirty())
        for item in self.world.profiles.values():
            self._load_chains(item, Dirty())
        for local in self.locals:
            self.local_changed(local.endpoint.key)
        for prefix in self.world.routes:
            self._choose_route(prefix, Dirty())
        return self

    # -- what the dispatcher sent -------------------------------------------------------------------------------

    def policies_changed(self, names: Iterable[str]) -> Dirty:
        return self._items_changed("policy", names, self.world.policies)

    def profiles_changed(self, names: Iterable[str]) -> Dirty:
        return self._items_changed("profile", names, self.world.profiles)

    def members_changed(self, name: str, add: Collection[Member], remove: Collection[Member]) -> Dirty:
        """A selector's members changed (`world.sets` already shows it)."""
        dirty = Dirty()
        found = self._sets.get(name)
        if found is None:
            return dirty  # no rule uses it: nothing in the kernel
        stay = before = found.specs
        if found.changed(add, remove):
            self._redeclare(name, before, found, dirty)
            stay = {kind: spec for kind, spec in found.specs.items() if before.get(kind) == spec}
        for members, adding in ((add, True), (remove, False)):
            for member in members:
                kernel, _ = stay.get(kind_of(member), ("", None))
                if kernel and isinstance(member, Prefix):
                    dirty.refill.add(kernel)  # intervals that touch are one: write them anew
                elif kernel:
                    dirty.change_members(kernel, (member,) if adding else (), () if adding else (member,))
        return dirty

    def set_replaced(self, name: str) -> Dirty:
        """A selector's members were sent whole, or the set is gone: what it held before is not known here."""
        dirty = Dirty()
        old = self._sets.get(name)
        if old is not None:
            new = self._sets[name] = SelectorSet(name, self._value(name))
            if old.specs != new.specs:
                self._redeclare(name, old.specs, new, dirty)
            dirty.refill.update(kernel for kernel, _ in new.specs.values())
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
        tap, hops = None, {}
        if local is not None and endpoint is not None and local.carrier is not None:
            tap = Tap(
                local.carrier.ifindex,
                local.carrier.tap,
                pack_mac(endpoint.key.mac),
                endpoint.all_addresses(),
                admitted(endpoint.prefixes),
                self._class_of(effective_labels(endpoint, self.world.profiles), endpoint.profiles, dirty),
            )
            if local.phase is Phase.LIVE:
                hops = _local_hops(tap, endpoint.prefixes)
        self._place_tap(key, tap, dirty)
        self._place_routes(key, hops, dirty)
        return dirty

    def collect_classes(self) -> Dirty:
        """Forget the classes that no tap is in."""
        used = {name for tap in self.desired.taps.values() for name in tap.chains}
        dirty = Dirty()
        for memo, chains in list(self._classes.items()):
            if not used.issuperset(chains):
                del self._classes[memo]
        keep = used | {name for chains in self._classes.values() for name in chains}
        for name in [n for n in self.desired.chains if n.startswith(("from-", "to-")) and n not in keep]:
            del self.desired.chains[name]
            dirty.chains.add(name)
        return dirty

    # -- inside -------------------------------------------------------------------------------------------------

    def _items_changed(self, kind: str, names: Iterable[str], items: Mapping[str, Policy | Profile]) -> Dirty:
        dirty = Dirty()
        gone = []
        for name in names:
            item = items.get(name)
            if item is None:
                gone.append(name)
            else:
                self._load_chains(item, dirty)
        self._classes.clear()  # which policies apply, or their order, may have changed: derive anew, memoised by labels
        for local in list(self.locals):
            dirty.merge(self.local_changed(local.endpoint.key))
        for name in gone:
            self._drop_chains((kind, name), dirty)
        dirty.merge(self.collect_classes())
        return dirty

    def _load_chains(self, item: Policy | Profile, dirty: Dirty) -> None:
        owner = ("policy" if isinstance(item, Policy) else "profile", item.name)
        fresh: set[str] = set()  # the selectors that a rule which can match a packet names

        def lookup(name: str) -> SelectorSet:
            fresh.add(name)
            return self._need_set(name, dirty)

        chains = policy_chains(item, lookup)
        for name in self._owned.get(owner, ()):
            self._forget_use(name, dirty, keep=fresh)
            if name not in chains:
                self.desired.chains.pop(name, None)
                dirty.chains.add(name)
        self._owned[owner] = tuple(chains)
        for name, rules in chains.items():
            for used in fresh:
                self._users.setdefault(used, set()).add(name)
            self._put_chain(name, rules, dirty)

    def _drop_chains(self, owner: tuple[str, str], dirty: Dirty) -> None:
        for name in self._owned.pop(owner, ()):
            self.desired.chains.pop(name, None)
            dirty.chains.add(name)
            self._forget_use(name, dirty, keep=())

    def _forget_use(self, chain: str, dirty: Dirty, keep: Iterable[str]) -> None:
        for name in [n for n, users in self._users.items() if chain in users]:
            self._users[name].discard(chain)
            if not self._users[name] and name not in keep:
                del self._users[name]
                self._undeclare(self._sets.pop(name).specs, dirty)

    def _put_chain(self, name: str, rules: tuple[Rule, ...], dirty: Dirty) -> None:
        if self.desired.chains.get(name) != rules:
            self.desired.chains[name] = rules
            dirty.chains.add(name)

    def _value(self, selector: str) -> AddressSet:
        return self.world.sets.get(selector) or AddressSet()

    def _need_set(self, name: str, dirty: Dirty) -> SelectorSet:
        found = self._sets.get(name)
        if found is None:
            found = self._sets[name] = SelectorSet(name, self._value(name))
            self._declare(name, found, dirty)
        return found

    def _redeclare(self, name: str, before: Specs, found: SelectorSet, dirty: Dirty) -> None:
        """Other kernel sets than before, for some of its kinds."""
        self._undeclare({kind: old for kind, old in before.items() if found.specs.get(kind) != old}, dirty)
        self._declare(name, found, dirty)
        self._reload_users(name, dirty)

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

    def _reload_users(self, name: str, dirty: Dirty) -> None:
        users = self._users.get(name, set())
        for kind, item_name in [owner for owner, chains in self._owned.items() if users.intersection(chains)]:
            item = (self.world.policies if kind == "policy" else self.world.profiles).get(item_name)
            if item is not None:  # else it went in the same batch, and is dropped in its turn
                self._load_chains(item, dirty)

    def _members(self, kernel: str) -> Sequence[Member]:
        selector, kind = self._by_set[kernel]
        return members_of(self._value(selector), kind)

    def _class_of(self, labels: Mapping[str, str], profiles: tuple[str, ...], dirty: Dirty) -> ClassChains:
        memo = (tuple(sorted(labels.items())), profiles)
        found = self._classes.get(memo)
        if found is None:
            egress = self._chains_for(labels, profiles, Direction.EGRESS)
            ingress = self._chains_for(labels, profiles, Direction.INGRESS)
            found, chains = class_chains(egress, ingress)
            self._classes[memo] = found
            for name, rules in chains.items():
                self._put_chain(name, rules, dirty)
        return found

    def _chains_for(self, labels: Mapping[str, str], profiles: tuple[str, ...], direction: Direction) -> list[str]:
        found = applicable(self.world.policies.values(), labels, direction)
        if found:
            return [policy_chain(p.name, direction) for p in found]
        return [profile_chain(name, direction) for name in profiles if name in self.world.profiles]

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
        if here == {}:
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
        for host in sorted(self.world.routes.get(prefix, ())):
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
