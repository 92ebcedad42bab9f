# Owns: the fleet as the dispatcher knows it (hosts, policies, profiles, endpoints) and what each host needs of it, kept
# up to date change by change. Pure. Endpoints with equal labels form a class; selectors are matched against classes, so
# a guest of a known kind costs only what it changes. `take` hands over the net effect since the last `take`.
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field

from slash32 import selector as selectors
from slash32.model import Endpoint, EndpointKey, Host
from slash32.net import Address, Prefix
from slash32.pack import AddressSet, Kind, Name, ObjectKey, Value
from slash32.policy import Policy, Profile, Rule
from slash32.unicast import unusable
from slash32.verdict import effective_labels
from slash32.wire import Change, Delete, Members, Put

from .ownership import Owner, Ownership, holdings, out_of_bounds, what

Member = Address | Prefix
Labels = frozenset[tuple[str, str]]
HostNames = frozenset[str]


@dataclass(slots=True)
class Batch:
    """Net changes of objects, and whose interest in which objects began or ended."""

    changes: list[Change] = field(default_factory=list)
    gained: list[tuple[str, ObjectKey]] = field(default_factory=list)
    lost: list[tuple[str, ObjectKey]] = field(default_factory=list)


@dataclass(slots=True)
class Claimed:
    """A live claim: the endpoint and whose it is."""

    host: str
    endpoint: Endpoint
    labels: Labels  # effective


@dataclass(slots=True)
class _Class:
    """All endpoints with these effective labels."""

    keys: set[EndpointKey] = field(default_factory=set)
    hosts: Counter[str] = field(default_factory=Counter)
    selectors: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Selection:
    """A selector that is in use."""

    selector: selectors.Selector
    classes: set[Labels] = field(default_factory=set)
    policies: set[str] = field(default_factory=set)  # that apply to what it selects
    users: int = 0  # policies and profiles whose rules name it: then it is a set
    members: Counter[Member] = field(default_factory=Counter)


class Registry:
    def __init__(self) -> None:
        self.hosts: dict[str, Host] = {}
        self.policies: dict[str, Policy] = {}
        self.profiles: dict[str, Profile] = {}
        self.endpoints: dict[EndpointKey, Claimed] = {}
        self.reported: dict[str, tuple[Address, ...]] = {}  # next hops that hosts named themselves
        self.ownership = Ownership()
        self._by_host: dict[str, set[EndpointKey]] = {}
        self._held: Counter[str] = Counter()  # by host: addresses and prefixes of its endpoints
        self._by_profile: dict[str, set[EndpointKey]] = {}
        self._classes: dict[Labels, _Class] = {}
        self._selections: dict[str, _Selection] = {}
        self._refs: dict[ObjectKey, frozenset[str]] = {}  # the sets that a policy or profile names
        self._wants: dict[str, Counter[ObjectKey]] = {}  # host -> reasons for its interest
        self._routes: dict[Prefix, Counter[str]] = {}
        self._next_hops: dict[str, tuple[Prefix, ...]] = {}
        self._values: dict[ObjectKey, Value | None] = {}  # touched since the last take: the value before
        self._joined: dict[str, AddressSet] = {}
        self._parted: dict[str, AddressSet] = {}
        self._interest: dict[tuple[str, ObjectKey], bool] = {}  # touched: was it there before

    # -- resources ------------------------------------------------------------------------------------------------

    def put_host(self, host: Host) -> None:
        self.hosts[host.name] = host
        self._wants.setdefault(host.name, Counter())
        self._set_next_hops(host.name)

    def delete_host(self, name: str) -> list[EndpointKey]:
        """Its endpoints go with it: they are returned."""
        gone = sorted(self._by_host.get(name, ()))
        for key in gone:
            self.release(key)
        del self.hosts[name]
        self.reported.pop(name, None)
        self._set_next_hops(name)
        del self._wants[name]
        for pair in [p for p in self._interest if p[0] == name]:
            del self._interest[pair]
        return gone

    def report_addresses(self, name: str, addresses: tuple[Address, ...]) -> str | None:
        """What the host says its next hops are, where its resource names none. The refusal, in one line."""
        for conflict in (*_no_next_hops(addresses), *self.next_hop_conflicts(name, addresses)):
            return f"names an address as its own that is not: {conflict}"
        self.reported[name] = addresses
        self._set_next_hops(name)
        return None

    def next_hop_conflicts(self, name: str, addresses: tuple[Address, ...]) -> Iterator[str]:
        for prefix in map(_whole, addresses):
            for _, other in self.ownership.overlapping(prefix):
                if other.key is not None or other.host != name:
                    yield f"{what(prefix)} is in use by {other}"

    def _set_next_hops(self, name: str) -> None:
        host = self.hosts.get(name)
        addresses = () if host is None else host.addresses or self.reported.get(name, ())
        self._touch(ObjectKey(Kind.HOST, name), self.next_hops(name) or None)
        owner = Owner(name, None, name)
        for prefix in self._next_hops.pop(name, ()):
            self.ownership.remove(owner, prefix)
        for prefix in map(_whole, addresses):
            self.ownership.add(owner, prefix)
            self._next_hops[name] = (*self._next_hops.get(name, ()), prefix)

    def next_hops(self, name: str) -> tuple[Address, ...]:
        return tuple(prefix.network for prefix in self._next_hops.get(name, ()))

    def put_policy(self, policy: Policy) -> None:
        key, old = ObjectKey(Kind.POLICY, policy.name), self.policies.get(policy.name)
        rules = policy.ingress + policy.egress
        if old is not None and old.selector == policy.selector and self._refs[key] == _named(rules):
            self._touch(key, old)
            self.policies[policy.name] = policy
            return  # the same hosts need it, and the same sets
        if old is not None:
            self.delete_policy(policy.name)
        self._touch(key, None)
        self.policies[policy.name] = policy
        self._refer(key, rules)
        selection = self._selection(policy.selector)
        selection.policies.add(policy.name)
        for labels in selection.classes:
            for host in self._classes[labels].hosts:
                self._want(host, key, 1)

    def delete_policy(self, name: str) -> None:
        policy, key = self.policies[name], ObjectKey(Kind.POLICY, name)
        selection = self._selections[policy.selector]
        for labels in selection.classes:
            for host in self._classes[labels].hosts:
                self._want(host, key, -1)
        selection.policies.discard(name)
        self._forget(policy.selector)
        self._unrefer(key)
        self._touch(key, policy)
        del self.policies[name]

    def put_profile(self, profile: Profile) -> None:
        self._replace_profile(profile.name, profile)

    def delete_profile(self, name: str) -> None:
        self._replace_profile(name, None)

    def _replace_profile(self, name: str, profile: Profile | None) -> None:
        key, old = ObjectKey(Kind.PROFILE, name), self.profiles.get(name)
        wanting = [host for host, wants in self._wants.items() if key in wants]
        for host in wanting:
            self._want_refs(host, key, -1)
        if old is not None:
            self._unrefer(key)
        self._touch(key, old)
        self.profiles.pop(name, None)
        if profile is not None:
            self.profiles[name] = profile
            self._refer(key, profile.ingress + profile.egress)
        for host in wanting:
            self._want_refs(host, key, 1)
        if dict(old.labels if old else {}) != dict(profile.labels if profile else {}):
            for user in sorted(self._by_profile.get(name, ())):
                claimed = self.endpoints[user]
                self._leave(claimed)
                claimed.labels = self._labels(claimed.endpoint)
                self._enter(claimed)

    # -- endpoints ------------------------------------------------------------------------------------------------

    def refusal(self, name: str, endpoint: Endpoint) -> str | None:
        """Why this host may not claim this endpoint, in one line."""
        labels = effective_labels(endpoint, self.profiles)
        bounds = out_of_bounds(self.hosts[name], endpoint, labels)
        if bounds is not None:
            return bounds
        present = self.endpoints.get(endpoint.key)
        if present is not None and present.host != name:
            asked = next((what(prefix) for prefix, _ in holdings(name, endpoint)), f"endpoint {endpoint.key}")
            return f"{asked} is in use by {Owner(present.host, endpoint.key, present.endpoint.domain)}"
        return self.ownership.conflict(name, endpoint)

    def claim(self, name: str, endpoint: Endpoint) -> bool:
        """After `refusal` said None. False where nothing changed."""
        present = self.endpoints.get(endpoint.key)
        if present is not None:
            if present.endpoint == endpoint:
                return False
            self.release(endpoint.key)
        claimed = Claimed(name, endpoint, self._labels(endpoint))
        self.endpoints[endpoint.key] = claimed
        self._by_host.setdefault(name, set()).add(endpoint.key)
        for prefix, owner in holdings(name, endpoint):
            self.ownership.add(owner, prefix)
            self._held[name] += 1
            self._route(prefix, name, 1)
        for profile in set(endpoint.profiles):
            self._by_profile.setdefault(profile, set()).add(endpoint.key)
            self._want(name, ObjectKey(Kind.PROFILE, profile), 1)
        self._enter(claimed)
        return True

    def release(self, key: EndpointKey) -> None:
        claimed = self.endpoints.pop(key)
        self._leave(claimed)
        self._by_host[claimed.host].discard(key)
        for profile in set(claimed.endpoint.profiles):
            self._want(claimed.host, ObjectKey(Kind.PROFILE, profile), -1)
            self._by_profile[profile].discard(key)
            if not self._by_profile[profile]:
                del self._by_profile[profile]
        for prefix, owner in holdings(claimed.host, claimed.endpoint):
            self.ownership.remove(owner, prefix)
            self._held[claimed.host] -= 1
            self._route(prefix, claimed.host, -1)

    def of_host(self, name: str) -> Set[EndpointKey]:
        return self._by_host.get(name, set())

    def held_with(self, name: str, endpoint: Endpoint) -> int:
        """Addresses and prefixes that the host's endpoints would hold, with this one as it is claimed."""
        present = self.endpoints.get(endpoint.key)
        before = len(_members(present.endpoint)) if present is not None and present.host == name else 0
        return self._held[name] - before + len(_members(endpoint))

    def _labels(self, endpoint: Endpoint) -> Labels:
        return frozenset(effective_labels(endpoint, self.profiles).items())

    def _enter(self, claimed: Claimed) -> None:
        group = self._classes.get(claimed.labels)
        if group is None:
            group = self._classes[claimed.labels] = _Class()
            plain = dict(claimed.labels)
            for text, selection in self._selections.items():
                if selection.selector.matches(plain):
                    selection.classes.add(claimed.labels)
                    group.selectors.add(text)
        group.keys.add(claimed.endpoint.key)
        group.hosts[claimed.host] += 1
        if group.hosts[claimed.host] == 1:
            self._want_policies(group, claimed.host, 1)
        for text in group.selectors:
            if self._selections[text].users:
                self._count(text, claimed.endpoint, 1)

    def _leave(self, claimed: Claimed) -> None:
        group = self._classes[claimed.labels]
        for text in group.selectors:
            if self._selections[text].users:
                self._count(text, claimed.endpoint, -1)
        group.keys.discard(claimed.endpoint.key)
        group.hosts[claimed.host] -= 1
        if not group.hosts[claimed.host]:
            self._want_policies(group, claimed.host, -1)
            del group.hosts[claimed.host]
        if not group.keys:
            for text in group.selectors:
                self._selections[text].classes.discard(claimed.labels)
            del self._classes[claimed.labels]

    def _route(self, prefix: Prefix, host: str, by: int) -> None:
        self._touch(ObjectKey(Kind.ROUTE, prefix), self._value(ObjectKey(Kind.ROUTE, prefix)))
        hosts = self._routes.setdefault(prefix, Counter())
        hosts[host] += by
        if not hosts[host]:
            del hosts[host]
        if not hosts:
            del self._routes[prefix]

    # -- selectors and sets ---------------------------------------------------------------------------------------

    def _selection(self, text: str) -> _Selection:
        found = self._selections.get(text)
        if found is None:
            found = self._selections[text] = _Selection(selectors.parse(text))
            for labels, group in self._classes.items():
                if found.selector.matches(dict(labels)):
                    found.classes.add(labels)
                    group.selectors.add(text)
        return found

    def _forget(self, text: str) -> None:
        selection = self._selections[text]
        if selection.users or selection.policies:
            return
        for labels in selection.classes:
            self._classes[labels].selectors.discard(text)
        del self._selections[text]

    def _refer(self, key: ObjectKey, rules: tuple[Rule, ...]) -> None:
        self._refs[key] = _named(rules)
        for text in self._refs[key]:
            selection = self._selection(text)
            selection.users += 1
            if selection.users == 1:
                self._touch_set(text, exists=False)
                for labels in selection.classes:
                    for user in self._classes[labels].keys:
                        selection.members.update(_members(self.endpoints[user].endpoint))

    def _unrefer(self, key: ObjectKey) -> None:
        for text in self._refs.pop(key):
            selection = self._selections[text]
            if selection.users == 1:
                self._touch_set(text, exists=True)
            selection.users -= 1
            if not selection.users:
                selection.members.clear()
                self._forget(text)

    def _touch_set(self, text: str, exists: bool) -> None:
        """A set begins or ends: remember what members it had when `take` was last called."""
        key = ObjectKey(Kind.SET, text)
        if key in self._values:
            return
        before: AddressSet | None = None
        if exists:
            before = _address_set(self._selections[text].members)
            joined, parted = self._joined.pop(text, AddressSet()), self._parted.pop(text, AddressSet())
            before.addresses = before.addresses - joined.addresses | parted.addresses
            before.prefixes = before.prefixes - joined.prefixes | parted.prefixes
        self._values[key] = before

    def _count(self, text: str, endpoint: Endpoint, by: int) -> None:
        counts = self._selections[text].members
        tracked = ObjectKey(Kind.SET, text) not in self._values
        for member in _members(endpoint):
            counts[member] += by
            if counts[member] == (1 if by > 0 else 0):
                if tracked:
                    mine, other = (self._joined, self._parted) if by > 0 else (self._parted, self._joined)
                    _cancel(mine.setdefault(text, AddressSet()), other.setdefault(text, AddressSet()), member)
                if by < 0:
                    del counts[member]

    # -- interest -------------------------------------------------------------------------------------------------

    def _want_policies(self, group: _Class, host: str, by: int) -> None:
        for text in group.selectors:
            for name in self._selections[text].policies:
                self._want(host, ObjectKey(Kind.POLICY, name), by)

    def _want(self, host: str, key: ObjectKey, by: int) -> None:
        wants = self._wants[host]
        before = wants[key]
        self._interest.setdefault((host, key), before > 0)
        wants[key] = before + by
        if not wants[key]:
            del wants[key]
        if (before > 0) != (before + by > 0):
            self._want_refs(host, key, by)

    def _want_refs(self, host: str, key: ObjectKey, by: int) -> None:
        for text in self._refs.get(key, ()):
            self._want(host, ObjectKey(Kind.SET, text), by)

    def _touch(self, key: ObjectKey, before: Value | None) -> None:
        self._values.setdefault(key, before)

    # -- what changed ---------------------------------------------------------------------------------------------

    def _value(self, key: ObjectKey) -> Value | None:
        name = key.name
        match key.kind:
            case Kind.POLICY:
                return self.policies.get(str(name))
            case Kind.PROFILE:
                return self.profiles.get(str(name))
            case Kind.SET:
                selection = self._selections.get(str(name))
                return _address_set(selection.members) if selection is not None and selection.users else None
            case Kind.HOST:
                return self.next_hops(str(name)) or None
            case Kind.ROUTE:
                assert isinstance(name, Prefix)
                return tuple(sorted(self._routes.get(name, ()))) or None
            case _:
                return None

    def take(self) -> Batch:
        batch = Batch()
        for key, before in self._values.items():
            now = self._value(key)
            if now != before:
                batch.changes.append(_difference(key, before, now))
        for text in self._joined.keys() | self._parted.keys():
            add, remove = self._joined.get(text, AddressSet()), self._parted.get(text, AddressSet())
            if add or remove:
                batch.changes.append(Members(text, add, remove))
        for (host, key), before_that in self._interest.items():
            if (key in self._wants[host]) != before_that:
                (batch.lost if before_that else batch.gained).append((host, key))
        self._values, self._joined, self._parted, self._interest = {}, {}, {}, {}
        return batch


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


def _named(rules: tuple[Rule, ...]) -> frozenset[str]:
    """The selectors in rules: each is a set."""
    peers = [peer for rule in rules for peer in (rule.source, rule.destination)]
    return frozenset(text for p in peers for text in (p.selector, p.not_selector) if text is not None)


def _members(endpoint: Endpoint) -> tuple[Member, ...]:
    return (*endpoint.all_addresses(), *endpoint.prefixes)


def _address_set(members: Mapping[Member, int]) -> AddressSet:
    prefixes = {m for m in members if isinstance(m, Prefix)}
    return AddressSet({m for m in members if not isinstance(m, Prefix)}, prefixes)


def _no_next_hops(addresses: tuple[Address, ...]) -> Iterator[str]:
    for prefix in map(_whole, addresses):
        why = unusable(prefix)
        if why is not None:
            yield f"{what(prefix)} is {why}"
    if len({len(address) for address in addresses}) < len(addresses):
        yield "two addresses of one IP version"


def _whole(address: Address) -> Prefix:
    return Prefix(address, 8 * len(address))


__all__ = ["Batch", "Claimed", "Member", "Name", "Registry"]
