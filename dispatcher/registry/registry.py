# Owns: the fleet as the dispatcher knows it (hosts, resources, endpoints) and what each host needs of it, kept up to
# date change by change. Pure. `take` hands over the net effect since the last `take`.
from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, replace

from slash32.model import Endpoint, EndpointKey, Host
from slash32.net import Address, Prefix
from slash32.pack import Kind, ObjectKey, Value
from slash32.policy import DEFAULT_TIER, HostEndpoint, NetworkSet, Policy, Profile, Rule, Tier
from slash32.verdict import effective_labels

from .changes import Batch, Changes, Member
from .interest import Interest
from .ownership import Owner, holdings, out_of_bounds, what
from .segment import Segment, no_next_hops
from .selections import Bearer, Labels, Selections

__all__ = ["Batch", "Claimed", "Registry"]


@dataclass(slots=True, eq=False)
class Claimed(Bearer):
    """A live claim: the endpoint, its effective labels, and whose it is."""

    endpoint: Endpoint


@dataclass(slots=True, eq=False)
class Expected(Bearer):
    """A guest that is on its way to a host: no member of anything there, but what applies to it is needed."""

    endpoint: Endpoint


class Registry:
    def __init__(self) -> None:
        self.hosts: dict[str, Host] = {}
        self.tiers: dict[str, Tier] = {}
        self.policies: dict[str, Policy] = {}
        self.staged: dict[str, Policy] = {}
        self.profiles: dict[str, Profile] = {}
        self.network_sets: dict[str, NetworkSet] = {}
        self.host_endpoints: dict[str, HostEndpoint] = {}
        self.endpoints: dict[EndpointKey, Claimed] = {}
        self.expected: dict[tuple[str, EndpointKey], Expected] = {}  # by the host where it is to be
        self.reported: dict[str, tuple[Address, ...]] = {}  # next hops that hosts named themselves
        self._changes = Changes()
        self._interest = Interest()
        self._selections = Selections(self._changes, self._interest.want)
        self._segment = Segment(self._changes)
        self._by_host: dict[str, set[EndpointKey]] = {}
        self._expected_at: dict[str, set[EndpointKey]] = {}
        self._by_node: dict[str, set[str]] = {}  # host endpoints, also of hosts that are not there
        self._by_profile: dict[str, dict[Bearer, Endpoint | HostEndpoint]] = {}
        self._bearers: dict[ObjectKey, Bearer] = {}  # of host endpoints
        self._sets: dict[str, Bearer] = {}  # of network sets
        self._known: dict[str, bool] = {}  # hosts that came or went: were they there when `take` was last called

    # -- hosts ----------------------------------------------------------------------------------------------------

    def put_host(self, host: Host) -> None:
        fresh = host.name not in self.hosts
        self._known.setdefault(host.name, not fresh)
        self.hosts[host.name] = host
        self._interest.add_host(host.name)
        self._set_next_hops(host.name)
        if fresh:
            self._place_anew(host.name)

    def delete_host(self, name: str) -> list[EndpointKey]:
        """Its endpoints go with it: they are returned. Its host endpoints wait for it to come again."""
        self._known.setdefault(name, True)
        gone = sorted(self._by_host.pop(name, ()))
        for key in gone:
            self.release(key)
        for key in sorted(self.expected_at(name)):
            self.expect_no_more(name, key)
        del self.hosts[name]
        self.reported.pop(name, None)
        self._set_next_hops(name)
        self._place_anew(name)
        self._interest.remove_host(name)
        return gone

    def _place_anew(self, node: str) -> None:
        """The host is there now, or is not any more."""
        for name in sorted(self._by_node.get(node, ())):
            self.put_host_endpoint(self.host_endpoints[name])

    def refuses_next_hops(self, name: str, addresses: tuple[Address, ...]) -> str | None:
        """Why these cannot be the host's next hops, in one line."""
        for conflict in (*no_next_hops(addresses), *self.next_hop_conflicts(name, addresses)):
            return f"names an address as its own that is not: {conflict}"
        return None

    def report_addresses(self, name: str, addresses: tuple[Address, ...]) -> None:
        """What the host says its next hops are: they count where its resource names none."""
        if addresses:
            self.reported[name] = addresses
        else:
            self.reported.pop(name, None)
        self._set_next_hops(name)

    def next_hop_conflicts(self, name: str, addresses: tuple[Address, ...]) -> Iterator[str]:
        return self._segment.conflicts(name, addresses)

    def next_hops(self, name: str) -> tuple[Address, ...]:
        return self._segment.next_hops(name)

    def _set_next_hops(self, name: str) -> None:
        host = self.hosts.get(name)
        self._segment.set_next_hops(name, () if host is None else host.addresses or self.reported.get(name, ()))

    # -- tiers, policies, profiles --------------------------------------------------------------------------------

    def put_tier(self, tier: Tier) -> None:
        self._changes.touch(ObjectKey(Kind.TIER, tier.name), self.tiers.get(tier.name))
        self.tiers[tier.name] = tier

    def delete_tier(self, name: str) -> None:
        self._changes.touch(ObjectKey(Kind.TIER, name), self.tiers.pop(name))

    def put_policy(self, policy: Policy) -> None:
        """Staged or not: they have names of their own."""
        key, mine = self._policies(policy.name, policy.staged)
        old = mine.get(policy.name)
        self._changes.touch(key, old)
        mine[policy.name] = policy
        self._refer(key, policy.ingress + policy.egress, policy.tier)
        if old is None or old.selector != policy.selector:
            self._selections.apply(policy.selector, key)
            if old is not None:
                self._selections.unapply(old.selector, key)

    def delete_policy(self, name: str, staged: bool = False) -> None:
        key, mine = self._policies(name, staged)
        policy = mine.pop(name)
        self._changes.touch(key, policy)
        self._selections.unapply(policy.selector, key)
        self._refer(key, ())

    def _policies(self, name: str, staged: bool) -> tuple[ObjectKey, dict[str, Policy]]:
        return (ObjectKey(Kind.STAGED, name), self.staged) if staged else (ObjectKey(Kind.POLICY, name), self.policies)

    def put_profile(self, profile: Profile) -> None:
        self._replace_profile(profile.name, profile)

    def delete_profile(self, name: str) -> None:
        self._replace_profile(name, None)

    def _replace_profile(self, name: str, profile: Profile | None) -> None:
        key, old = ObjectKey(Kind.PROFILE, name), self.profiles.pop(name, None)
        self._changes.touch(key, old)
        if profile is not None:
            self.profiles[name] = profile
        self._refer(key, profile.ingress + profile.egress if profile else ())
        if dict(old.labels if old else {}) != dict(profile.labels if profile else {}):
            for user, what_it_is in self._by_profile.get(name, {}).items():
                self._selections.relabel(user, self._labels(what_it_is))

    def _refer(self, key: ObjectKey, rules: tuple[Rule, ...], tier: str = DEFAULT_TIER) -> None:
        """What these rules name is needed with the object, and nothing else any more."""
        before, needs = self._interest.needs(key), _named(rules)
        if tier != DEFAULT_TIER:
            needs |= {ObjectKey(Kind.TIER, tier)}
        for needed in needs - before:
            if needed.kind is Kind.SET:
                self._selections.use(str(needed.name))
        self._interest.set_needs(key, needs)
        for needed in before - needs:
            if needed.kind is Kind.SET:
                self._selections.unuse(str(needed.name))

    # -- what bears labels besides endpoints ----------------------------------------------------------------------

    def put_network_set(self, found: NetworkSet) -> None:
        self.network_sets[found.name] = found
        members = tuple(net.network if _is_address(net) else net for net in found.nets)
        fresh, old = Bearer(frozenset(found.labels.items()), members, ""), self._sets.get(found.name)
        self._sets[found.name] = fresh
        self._selections.enter(fresh)
        if old is not None:
            self._selections.leave(old)

    def delete_network_set(self, name: str) -> None:
        del self.network_sets[name]
        self._selections.leave(self._sets.pop(name))

    def put_host_endpoint(self, found: HostEndpoint) -> None:
        key, old = ObjectKey(Kind.HOSTENDPOINT, found.name), self.host_endpoints.get(found.name)
        self._changes.touch(key, old)
        before = self._bearers.get(key)
        self.host_endpoints[found.name] = found
        host = found.node if found.node in self.hosts else ""
        fresh = self._bearers[key] = Bearer(self._labels(found), found.addresses, host)
        self._bear(fresh, found)
        if host:
            self._interest.want(host, key, 1)
        if old is not None and before is not None:
            self._withdraw_host_endpoint(key, old, before)
        self._by_node.setdefault(found.node, set()).add(found.name)

    def delete_host_endpoint(self, name: str) -> None:
        key, old = ObjectKey(Kind.HOSTENDPOINT, name), self.host_endpoints.pop(name)
        self._changes.touch(key, old)
        self._withdraw_host_endpoint(key, old, self._bearers.pop(key))

    def _withdraw_host_endpoint(self, key: ObjectKey, old: HostEndpoint, bearer: Bearer) -> None:
        self._unbear(bearer, old)
        if bearer.host:
            self._interest.want(bearer.host, key, -1)
        self._by_node[old.node].discard(old.name)
        if not self._by_node[old.node]:
            del self._by_node[old.node]

    # -- endpoints ------------------------------------------------------------------------------------------------

    def refusal(self, name: str, endpoint: Endpoint, coming: bool = False) -> str | None:
        """Why this host may not claim this endpoint, in one line; or, if it is `coming`, may not once it has come."""
        labels = effective_labels(endpoint, self.profiles)
        bounds = out_of_bounds(self.hosts[name], endpoint, labels)
        if bounds is not None:
            return bounds
        present = self.endpoints.get(endpoint.key)
        if present is not None and present.host != name and not coming:
            asked = next((what(prefix) for prefix, _ in holdings(name, endpoint)), f"endpoint {endpoint.key}")
            return f"{asked} is in use by {Owner(present.host, endpoint.key, present.endpoint.domain)}"
        return self._segment.ownership.conflict(name, endpoint)

    def claim(self, name: str, endpoint: Endpoint) -> bool:
        """After `refusal` said None. False where nothing changed."""
        present = self.endpoints.get(endpoint.key)
        if present is None:
            self._claim(name, endpoint)
            return True
        before = present.endpoint
        if before == endpoint and present.host == name:
            return False
        if present.host == name and replace(before, labels=endpoint.labels) == endpoint:
            present.endpoint = endpoint
            for profile in endpoint.profiles:
                self._by_profile[profile][present] = endpoint
            self._selections.relabel(present, self._labels(endpoint))
            return True
        self._segment.let_go(present.host, before)
        self._claim(name, endpoint)
        self._unbear(present, before)
        if present.host != name:
            self._by_host[present.host].discard(endpoint.key)
        return True

    def _claim(self, name: str, endpoint: Endpoint) -> None:
        claimed = Claimed(self._labels(endpoint), _members(endpoint), name, endpoint)
        self.endpoints[endpoint.key] = claimed
        self._by_host.setdefault(name, set()).add(endpoint.key)
        self._segment.hold(name, endpoint)
        self._bear(claimed, endpoint)

    def release(self, key: EndpointKey) -> None:
        claimed = self.endpoints.pop(key)
        if claimed.host in self._by_host:
            self._by_host[claimed.host].discard(key)
        self._unbear(claimed, claimed.endpoint)
        self._segment.let_go(claimed.host, claimed.endpoint)

    def expect(self, name: str, endpoint: Endpoint) -> None:
        before = self.expected.get((name, endpoint.key))
        coming = Expected(self._labels(endpoint), (), name, endpoint)
        self.expected[name, endpoint.key] = coming
        self._expected_at.setdefault(name, set()).add(endpoint.key)
        self._bear(coming, endpoint)
        if before is not None:
            self._unbear(before, before.endpoint)

    def expect_no_more(self, name: str, key: EndpointKey) -> None:
        coming = self.expected.pop((name, key))
        self._expected_at[name].discard(key)
        self._unbear(coming, coming.endpoint)

    def expected_at(self, name: str) -> Set[EndpointKey]:
        return self._expected_at.get(name, set())

    def of_host(self, name: str) -> Set[EndpointKey]:
        return self._by_host.get(name, set())

    def bearing(self, profile: str) -> list[EndpointKey]:
        """The endpoints that name it, whether it is there or not."""
        return [user.endpoint.key for user in self._by_profile.get(profile, {}) if isinstance(user, Claimed)]

    def held_with(self, name: str, endpoint: Endpoint) -> int:
        """Addresses and prefixes that the host's endpoints would hold, with this one as it is claimed."""
        present = self.endpoints.get(endpoint.key)
        before = len(present.members) if present is not None and present.host == name else 0
        return self._segment.held(name) - before + len(_members(endpoint))

    def _bear(self, bearer: Bearer, found: Endpoint | HostEndpoint) -> None:
        for profile in dict.fromkeys(found.profiles):
            self._by_profile.setdefault(profile, {})[bearer] = found
            if bearer.host:
                self._interest.want(bearer.host, ObjectKey(Kind.PROFILE, profile), 1)
        self._selections.enter(bearer)

    def _unbear(self, bearer: Bearer, found: Endpoint | HostEndpoint) -> None:
        self._selections.leave(bearer)
        for profile in dict.fromkeys(found.profiles):
            if bearer.host:
                self._interest.want(bearer.host, ObjectKey(Kind.PROFILE, profile), -1)
            del self._by_profile[profile][bearer]
            if not self._by_profile[profile]:
                del self._by_profile[profile]

    def _labels(self, found: Endpoint | HostEndpoint) -> Labels:
        return frozenset(effective_labels(found, self.profiles).items())

    # -- what changed ---------------------------------------------------------------------------------------------

    def take(self) -> Batch:
        known, self._known = self._known, {}
        fresh = [name for name, before in known.items() if not before and name in self.hosts]
        gone = [name for name, before in known.items() if before and name not in self.hosts]
        return Batch(self._changes.take(self._value), *self._interest.take(), fresh, gone)

    def _value(self, key: ObjectKey) -> Value | None:
        if isinstance(key.name, Prefix):
            return self._segment.behind(key.name) or None
        match key.kind:
            case Kind.SET:
                return self._selections.members(key.name)
            case Kind.HOST:
                return self.next_hops(key.name) or None
            case Kind.POLICY:
                return self.policies.get(key.name)
            case Kind.STAGED:
                return self.staged.get(key.name)
            case Kind.PROFILE:
                return self.profiles.get(key.name)
            case Kind.TIER:
                return self.tiers.get(key.name)
            case Kind.HOSTENDPOINT:
                return self.host_endpoints.get(key.name)
            case Kind.ROUTE:
                raise AssertionError("its name is a prefix")


def _named(rules: tuple[Rule, ...]) -> frozenset[ObjectKey]:
    """The selectors in rules: each is a set."""
    peers = [peer for rule in rules for peer in (rule.source, rule.destination)]
    texts = {text for p in peers for text in (p.selector, p.not_selector) if text is not None}
    return frozenset(ObjectKey(Kind.SET, text) for text in texts)


def _is_address(net: Prefix) -> bool:
    """0.0.0.0 and :: stay prefixes: they are nobody's address, and ipset's sets of addresses do not take them."""
    return net.length == 8 * len(net.network) and any(net.network)


def _members(endpoint: Endpoint) -> tuple[Member, ...]:
    return (*endpoint.all_addresses(), *endpoint.prefixes)
