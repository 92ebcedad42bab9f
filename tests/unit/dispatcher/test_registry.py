# The registry keeps by increments what a naive computation gets from scratch; and it refuses what a host may not have.
from __future__ import annotations

import os
import re
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dispatcher.hosts.fanout import COMMON, Fanout
from dispatcher.registry.registry import Registry
from slash32 import selector as selectors
from slash32 import wire
from slash32.model import Endpoint, EndpointKey, Host, SharedAddress
from slash32.net import host_prefix, parse_address, parse_prefix
from slash32.pack import AddressSet, Kind, ObjectKey, Value
from slash32.policy import Action, Direction, HostEndpoint, NetworkSet, Peer, Policy, Profile, Rule, Tier
from slash32.sync import Applied, Replica
from slash32.verdict import effective_labels
from slash32.wire import Snapshot

EXAMPLES = 400 if os.environ.get("SLASH32_COUNTS") == "full" else 120
HOSTS = ("h1", "h2", "h3")
SELECTORS = (
    "all()", 'role == "web"', 'role == "db"', 'env == "prod"', "has(zone)", '!(role == "web")',
    'role in {"app", "web"}',
)  # fmt: skip


def key(n: int) -> EndpointKey:
    return EndpointKey(f"00000000-0000-0000-0000-{n:012x}", f"52:54:00:00:00:{n:02x}")


def guest(n: int, labels: dict[str, str] | None = None, *addresses: str, **more: Any) -> Endpoint:
    return Endpoint(key(n), f"g{n}", labels or {}, addresses=tuple(map(parse_address, addresses)), **more)


def allow(selector: str | None = None, not_selector: str | None = None) -> Rule:
    return Rule(Action.ALLOW, source=Peer(selector=selector, not_selector=not_selector))


def policy(name: str, selector: str, *named: str) -> Policy:
    return Policy(name, selector, (Direction.INGRESS,), None, tuple(allow(s) for s in named))


def needs(registry: Registry, host: str) -> dict[ObjectKey, Value]:
    """From scratch: what this host needs."""
    claims = list(registry.endpoints.values())
    own = [h for h in registry.host_endpoints.values() if h.node == host]
    mine = [c.endpoint for c in claims if c.host == host] + own
    named: dict[ObjectKey, Policy | Profile] = {}
    for kind, policies in ((Kind.POLICY, registry.policies), (Kind.STAGED, registry.staged)):
        for p in policies.values():
            chosen = selectors.parse(p.selector)
            if any(chosen.matches(effective_labels(e, registry.profiles)) for e in mine):
                named[ObjectKey(kind, p.name)] = p
    for e in mine:
        for name in e.profiles:
            if name in registry.profiles:
                named[ObjectKey(Kind.PROFILE, name)] = registry.profiles[name]
    found: dict[ObjectKey, Value] = dict(named) | {ObjectKey(Kind.HOSTENDPOINT, h.name): h for h in own}
    for owner in named.values():
        if isinstance(owner, Policy) and owner.tier in registry.tiers:
            found[ObjectKey(Kind.TIER, owner.tier)] = registry.tiers[owner.tier]
        for rule in owner.ingress + owner.egress:
            for text in (rule.source.selector, rule.source.not_selector):
                if text is not None:
                    found[ObjectKey(Kind.SET, text)] = members(registry, text)
    for name in registry.hosts:
        if registry.next_hops(name):
            found[ObjectKey(Kind.HOST, name)] = registry.next_hops(name)
    routes: dict[ObjectKey, set[str]] = {}
    for c in claims:
        for prefix in [*map(host_prefix, c.endpoint.all_addresses()), *c.endpoint.prefixes]:
            routes.setdefault(ObjectKey(Kind.ROUTE, prefix), set()).add(c.host)
    return found | {k: tuple(sorted(v)) for k, v in routes.items()}


def members(registry: Registry, text: str) -> AddressSet:
    chosen, found = selectors.parse(text), AddressSet()
    for c in registry.endpoints.values():
        if chosen.matches(effective_labels(c.endpoint, registry.profiles)):
            found.addresses |= set(c.endpoint.all_addresses())
            found.prefixes |= set(c.endpoint.prefixes)
    for h in registry.host_endpoints.values():
        if chosen.matches(effective_labels(h, registry.profiles)):
            found.addresses |= set(h.addresses)
    for s in registry.network_sets.values():
        if chosen.matches(s.labels):
            single = {n for n in s.nets if n.length == 8 * len(n.network) and any(n.network)}
            found.addresses |= {n.network for n in single}
            found.prefixes |= set(s.nets) - single
    return found


class Fleet:
    """A registry, the fan-out that follows it, and a replica per host that follows the fan-out."""

    def __init__(self) -> None:
        self.registry, self.fanout, self.revision = Registry(), Fanout(), 0
        self.replicas: dict[str, Replica] = {}

    def host(self, name: str) -> None:
        number = int(name[1:])
        self.registry.put_host(Host(name, addresses=(parse_address(f"192.0.2.{number}"),)))
        self.fanout.add_host(name)
        self.commit()
        self.replicas[name] = Replica()
        self.deliver(name, self.fanout.open(name, self.replicas[name].hello(), "e", self.revision, False))

    def commit(self) -> list[str]:
        """Names of the hosts that were told."""
        self.revision += 1
        told = self.fanout.publish(self.revision, self.registry.take())
        for name, frames in told:
            assert frames is not None
            self.deliver(name, frames)
        return [name for name, _ in told]

    def deliver(self, name: str, frames: list[bytes]) -> None:
        message = wire.decode_from_dispatcher(frames)
        assert not isinstance(message, wire.Claimed | wire.Refused)
        (outcome,) = self.replicas[name].receive(message)
        assert isinstance(outcome, Applied), outcome
        assert isinstance(message, Snapshot) or outcome.changes, "a message without a change"
        self.fanout.publishers[name].ack(outcome.revision)

    def check(self) -> None:
        for name, replica in self.replicas.items():
            have = {ObjectKey(kind, n): v for kind in Kind for n, v in replica.objects(kind).items()}
            assert have == needs(self.registry, name)
            assert replica.digest == self.fanout.digest(name)


WORDS = st.sampled_from(["web", "db", "app", "prod"])
LABELS = st.dictionaries(st.sampled_from(["role", "env", "zone"]), WORDS, max_size=3)
PROFILES = st.lists(st.sampled_from("xyz"), max_size=2, unique=True)
NAMED = st.lists(st.sampled_from(SELECTORS), max_size=2)
TIERS = st.sampled_from(["default", "first", "second"])
NETS = ("10.65.0.1/32", "10.65.0.0/24", "10.66.1.0/24", "fd00::1/128", "0.0.0.0/0")
STEP = st.one_of(
    st.tuples(st.just("claim"), st.integers(0, 5), st.sampled_from(HOSTS), LABELS, PROFILES, st.integers(0, 7)),
    st.tuples(st.just("release"), st.integers(0, 5)),
    st.tuples(st.just("policy"), st.sampled_from("abc"), st.sampled_from(SELECTORS), NAMED, TIERS, st.booleans()),
    st.tuples(st.just("no policy"), st.sampled_from("abc"), st.booleans()),
    st.tuples(st.just("tier"), TIERS, st.sampled_from([None, 1.0, 2.0])),
    st.tuples(st.just("no tier"), TIERS),
    st.tuples(st.just("set"), st.sampled_from("st"), LABELS, st.lists(st.sampled_from(NETS), max_size=3)),
    st.tuples(st.just("no set"), st.sampled_from("st")),
    st.tuples(st.just("card"), st.sampled_from("ij"), st.sampled_from(HOSTS), LABELS, PROFILES),
    st.tuples(st.just("no card"), st.sampled_from("ij")),
    st.tuples(st.just("profile"), st.sampled_from("xyz"), NAMED, LABELS),
    st.tuples(st.just("no profile"), st.sampled_from("xyz")),
    st.tuples(st.just("commit")),
    st.tuples(st.just("host"), st.sampled_from(HOSTS)),
    st.tuples(st.just("no host"), st.sampled_from(HOSTS)),
)  # fmt: skip


def step(fleet: Fleet, what: str, *a: object) -> None:
    registry = fleet.registry
    match what, *a:
        case "claim", int(n), str(host), dict(labels), list(profiles), int(extra):
            shared = (SharedAddress(parse_address("10.65.9.1"), "vip"),) if extra & 1 else ()
            prefixes = (parse_prefix(f"10.66.{n}.0/24"),) if extra & 2 else ()
            e = guest(n, labels, f"10.65.0.{n}", profiles=tuple(profiles), shared=shared, prefixes=prefixes)
            if host in registry.hosts and registry.refusal(host, e) is None:
                registry.claim(host, e)
        case "release", int(n):
            if key(n) in registry.endpoints:
                registry.release(key(n))
        case "policy", str(name), str(selector), list(named), str(tier), bool(staged):
            registry.put_policy(replace(policy(name, selector, *named), tier=tier, staged=staged))
        case "no policy", str(name), bool(staged):
            if name in (registry.staged if staged else registry.policies):
                registry.delete_policy(name, staged)
        case "tier", str(name), order:
            if name != "default":
                registry.put_tier(Tier(name, order))  # type: ignore[arg-type]
        case "no tier", str(name):
            if name in registry.tiers:
                registry.delete_tier(name)
        case "set", str(name), dict(labels), list(nets):
            registry.put_network_set(NetworkSet(name, labels, tuple(map(parse_prefix, nets))))
        case "no set", str(name):
            if name in registry.network_sets:
                registry.delete_network_set(name)
        case "card", str(name), str(node), dict(labels), list(profiles):
            addresses = (parse_address(f"10.65.0.{len(labels)}"),)
            registry.put_host_endpoint(HostEndpoint(name, node, "eth0", labels, addresses, tuple(profiles)))
        case "no card", str(name):
            if name in registry.host_endpoints:
                registry.delete_host_endpoint(name)
        case "host", str(name):
            if name not in registry.hosts:
                fleet.commit()
                fleet.host(name)
        case "profile", str(name), list(named), dict(labels):
            registry.put_profile(Profile(name, tuple(allow(None, s) for s in named), (), labels))
        case "no profile", str(name):
            if name in registry.profiles:
                registry.delete_profile(name)
        case "no host", str(name):
            if name in registry.hosts:
                registry.delete_host(name)
                fleet.fanout.publishers[name].close()
                del fleet.replicas[name]
        case _:
            fleet.commit()
            fleet.check()


@given(st.lists(STEP, min_size=15, max_size=60))
@example([("claim", 0, "h1", {}, ["x"], 0), ("commit",), ("profile", "x", [], {}), ("claim", 0, "h1", {}, [], 0)])
@settings(max_examples=EXAMPLES, deadline=None)
def test_increments_equal_from_scratch(steps: list[tuple[object, ...]]) -> None:
    fleet = Fleet()
    for name in HOSTS:
        fleet.host(name)
    for what in [*steps, ("commit",)]:
        step(fleet, *what)
    for name in list(fleet.replicas):  # and a snapshot says the same as all those deltas
        fresh = fleet.replicas[name] = Replica()
        fleet.deliver(name, fleet.fanout.open(name, fresh.hello(), "e", fleet.revision, False))
    fleet.check()


@given(st.lists(STEP, min_size=10, max_size=40))
@settings(max_examples=EXAMPLES // 2, deadline=None)
def test_nothing_is_left_behind(steps: list[tuple[object, ...]]) -> None:
    """After everything is taken away, the structures are empty: no leak, whatever the history."""
    fleet = Fleet()
    for name in HOSTS:
        fleet.host(name)
    for what in steps:
        step(fleet, *what)
    r = fleet.registry
    for n in list(r.endpoints):
        r.release(n)
    for name in list(r.policies):
        r.delete_policy(name)
    for name in list(r.staged):
        r.delete_policy(name, staged=True)
    for name in list(r.tiers):
        r.delete_tier(name)
    for name in list(r.network_sets):
        r.delete_network_set(name)
    for name in list(r.profiles):
        r.delete_profile(name)
    for name in list(r.hosts):
        r.delete_host(name)
        fleet.fanout.publishers[name].close()
    for name in list(r.host_endpoints):
        r.delete_host_endpoint(name)
    fleet.replicas.clear()
    fleet.commit()
    assert not any((len(r._selections), list(r._interest), len(r._segment), r._by_profile, r._by_node, r._bearers))
    assert not any(r._by_host.values()) and not r._sets
    assert not list(r._segment.ownership.overlapping(parse_prefix("0.0.0.0/0")))
    assert not fleet.fanout._objects and not fleet.fanout._common and fleet.fanout._common_digest == 0


# --- interest --------------------------------------------------------------------------------------------------------


def test_no_message_for_the_uninterested() -> None:
    fleet = Fleet()
    for name in HOSTS:
        fleet.host(name)
    fleet.registry.put_policy(policy("p", 'role == "db"', 'role == "web"'))
    assert fleet.commit() == [], "nobody has a db"
    fleet.registry.claim("h1", guest(1, {"role": "db"}))
    assert fleet.commit() == ["h1"]
    fleet.registry.claim("h2", guest(2, {"role": "other"}))
    assert fleet.commit() == []
    fleet.registry.claim("h2", guest(3, {"role": "web"}, "10.65.0.3"))
    assert sorted(fleet.commit()) == ["h1", "h2", "h3"], "its route concerns all"
    fleet.check()
    assert fleet.replicas["h3"].objects(Kind.SET) == {}
    fleet.registry.put_policy(policy("p", 'role == "nothing"', 'role == "web"'))
    assert fleet.commit() == ["h1"]
    assert fleet.replicas["h1"].objects(Kind.SET) == {} and fleet.replicas["h1"].objects(Kind.POLICY) == {}


def test_a_profile_that_names_a_set_no_more_ends_the_interest_in_it() -> None:
    fleet = Fleet()
    for name in HOSTS:
        fleet.host(name)
    fleet.registry.put_policy(policy("p", 'role == "db"', "all()"))
    fleet.registry.put_profile(Profile("x", (allow("all()"),)))
    fleet.registry.claim("h1", guest(1, {"role": "db"}))
    fleet.registry.claim("h2", guest(2, {}, profiles=("x",)))
    fleet.commit()
    fleet.check()
    assert "all()" in fleet.replicas["h2"].objects(Kind.SET)
    fleet.registry.put_profile(Profile("x"))
    assert fleet.commit() == ["h2"]
    fleet.check()


def test_a_change_is_encoded_once() -> None:
    fleet = Fleet()
    for name in HOSTS:
        fleet.host(name)
        fleet.registry.claim(name, guest(int(name[1:]), {"role": "db"}))
    fleet.registry.put_policy(policy("p", 'role == "db"', 'role == "web"'))
    fleet.commit()
    many = [f"10.{n >> 8}.{n & 255}.1" for n in range(256, 8000)]
    fleet.registry.claim("h1", guest(9, {"role": "web"}, *many))
    told = fleet.fanout.publish(99, fleet.registry.take())
    sets = [{id(f) for f in frames or [] if len(f) > wire.INLINE} for _, frames in told]
    assert len(told) == 3 and sets[0] & sets[1] & sets[2]


# --- ownership -------------------------------------------------------------------------------------------------------


def registry(**hosts: Host) -> Registry:
    found = Registry()
    for name in ("h1", "h2"):
        found.put_host(hosts.get(name, Host(name, addresses=(parse_address(f"192.0.2.{name[1:]}"),))))
    return found


def shared(n: int, group: str) -> Endpoint:
    return guest(n, shared=(SharedAddress(parse_address("10.65.9.1"), group),))


def behind(n: int, text: str) -> Endpoint:
    return guest(n, prefixes=(parse_prefix(text),))


@pytest.mark.parametrize(
    ("held", "asked", "says"),
    [
        (guest(1, {}, "10.65.0.2"), guest(2, {}, "10.65.0.2"), "address 10.65.0.2 is in use by g1 on h1"),
        (guest(1, {}, "fd00::2"), guest(2, {}, "fd00::2"), "address fd00::2 is in use by g1 on h1"),
        (guest(1, {}, "10.65.0.2"), guest(1, {}, "10.65.0.2"), "address 10.65.0.2 is in use by g1 on h1"),
        (guest(1), guest(1), f"endpoint {key(1)} is in use by g1 on h1"),
        (shared(1, "vip"), shared(2, "other"), "address 10.65.9.1 is in use by g1 on h1"),
        (shared(1, "vip"), guest(2, {}, "10.65.9.1"), "address 10.65.9.1 is in use by g1 on h1"),
        (guest(1, {}, "10.65.9.1"), shared(2, "vip"), "address 10.65.9.1 is in use by g1 on h1"),
        (behind(1, "10.66.0.0/24"), guest(2, {}, "10.66.0.9"), r"in use by g1 on h1 \(its prefix 10.66.0.0/24\)"),
        (guest(1, {}, "10.66.0.9"), behind(2, "10.66.0.0/24"), r"10.66.0.0/24 is in use by g1 on h1 \(its address"),
        (behind(1, "10.66.0.0/24"), behind(2, "10.66.0.0/25"), "in use by g1"),
        (behind(1, "10.66.0.0/24"), behind(2, "10.64.0.0/10"), "in use by g1"),
        (guest(1), guest(2, {}, "192.0.2.2"), "address 192.0.2.2 is in use by the hypervisor h2 itself"),
        (guest(1), behind(2, "192.0.0.0/16"), "is in use by the hypervisor"),
        (guest(1), guest(2, {}, "169.254.1.1"), "link-local"),
        (guest(1), guest(2, {}, "127.0.0.1"), "loopback"),
        (guest(1), guest(2, {}, "224.0.0.5"), "multicast"),
        (guest(1), guest(2, {}, "fe80::1"), "link-local"),
        (guest(1), behind(2, "0.0.0.0/0"), "is or holds"),
        (guest(1), behind(2, "::/0"), "is or holds"),
    ],
)  # fmt: skip
def test_what_another_holds_is_refused_until_it_is_released(held: Endpoint, asked: Endpoint, says: str) -> None:
    fleet = registry()
    assert fleet.refusal("h1", held) is None
    fleet.claim("h1", held)
    refusal = fleet.refusal("h2", asked)
    assert refusal is not None and re.search(says, refusal) and "\n" not in refusal
    if "g1 on h1" in says:
        fleet.release(held.key)
        assert fleet.refusal("h2", asked) is None, "an address moves once it was released"


def test_shared_addresses_have_many_claimants_of_one_group() -> None:
    fleet = registry()
    for n, host in ((1, "h1"), (2, "h2"), (3, "h2")):
        assert fleet.refusal(host, shared(n, "vip")) is None
        fleet.claim(host, shared(n, "vip"))
    route = ObjectKey(Kind.ROUTE, parse_prefix("10.65.9.1/32"))
    assert fleet._value(route) == ("h1", "h2")
    fleet.release(key(2))
    assert fleet._value(route) == ("h1", "h2")
    fleet.release(key(3))
    assert fleet._value(route) == ("h1",)


def test_an_endpoint_may_change_what_it_holds() -> None:
    fleet = registry()
    fleet.claim("h1", guest(1, {}, "10.65.0.2"))
    changed = guest(1, {"role": "db"}, "10.65.0.2", "10.65.0.3")
    assert fleet.refusal("h1", changed) is None
    assert fleet.claim("h1", changed) and not fleet.claim("h1", changed)


def test_bounds_of_a_host() -> None:
    fleet = registry(h1=Host("h1", nets=(parse_prefix("10.65.0.0/16"),), labels={"role": ("web", "app")}))
    fleet.put_profile(Profile("evil", labels={"role": "db"}))
    assert fleet.refusal("h1", guest(1, {"role": "web", "any": "x"}, "10.65.0.2")) is None
    assert "spec.nets" in (fleet.refusal("h1", guest(1, {}, "10.64.0.2")) or "")
    assert "spec.nets" in (fleet.refusal("h1", behind(1, "10.0.0.0/8")) or "")
    assert "spec.nets" in (fleet.refusal("h1", guest(1, {}, "fd00::1")) or "")
    assert "spec.labels" in (fleet.refusal("h1", guest(1, {"role": "db"})) or "")
    assert "spec.labels" in (fleet.refusal("h1", guest(1, profiles=("evil",))) or "")
    assert fleet.refusal("h2", guest(1, {"role": "db"}, "10.64.0.2")) is None, "the other host is free"


def test_a_host_cannot_name_anothers_address_as_its_own() -> None:
    fleet = Registry()
    fleet.put_host(Host("h1"))
    fleet.put_host(Host("h2", addresses=(parse_address("192.0.2.2"),)))
    fleet.claim("h2", guest(1, {}, "10.65.0.2"))
    assert "in use by g1" in (fleet.refuses_next_hops("h1", (parse_address("10.65.0.2"),)) or "")
    assert "hypervisor h2" in (fleet.refuses_next_hops("h1", (parse_address("192.0.2.2"),)) or "")
    assert fleet.next_hops("h1") == ()
    assert fleet.refuses_next_hops("h1", (parse_address("192.0.2.1"),)) is None
    fleet.report_addresses("h1", (parse_address("192.0.2.1"),))
    assert fleet.next_hops("h1") == (parse_address("192.0.2.1"),)


def test_cost_of_a_known_kind_of_guest_does_not_grow() -> None:
    """One more guest touches its class, not the fleet: no selector is asked again."""
    asked = count()

    class Counting:
        def matches(self, labels: object) -> bool:
            next(asked)
            return True

    fleet = registry()
    for n in range(50):
        fleet.put_policy(policy(f"p{n}", f'role == "r{n}"', f'role == "s{n}"'))
    fleet.claim("h1", guest(1, {"role": "r1"}, "10.65.0.1"))
    for selection in fleet._selections._selections.values():
        selection.selector = Counting()  # type: ignore[assignment]
    fleet.claim("h1", guest(2, {"role": "r1"}, "10.65.0.2"))
    fleet.release(key(1))
    assert next(asked) == 0
    assert COMMON == (Kind.HOST, Kind.ROUTE)
