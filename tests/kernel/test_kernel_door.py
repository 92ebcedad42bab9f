# The lives of a host of tests/unit/hostd/test_plan.py on the real kernel: what was settled is what a fresh look finds,
# who is killed on the way arrives after all, and what the kernel refuses stops only what rests on it.
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from netns import Namespace, run

from hostd.change.plan import Limits, Plan, Scope, everything, plan
from hostd.change.settle import Settler
from hostd.compiler.desired import Dirty
from hostd.compiler.forwarding import Failure, Link, Operation
from hostd.compiler.ruleset import Guard
from hostd.dataplane.kernel import Kernel
from hostd.dataplane.rtnl import Rtnl
from hostd.state import Carrier, Local, Phase
from slash32.model import Endpoint
from slash32.net import host_prefix, parse_address, parse_prefix
from slash32.pack import AddressSet, Kind, ObjectKey
from slash32.policy import Action, Direction, Peer, Policy, Rule
from tests.scenes import FULL, TAPS, Commit, Run, Scene, Settle, Step, key, lives

GUARD = Guard()
TAP = TAPS[0]
OWN4, OWN6 = parse_address("10.65.0.1"), parse_address("fd00:65::1")


class Killed(Exception):
    """hostd died here."""


def links_of(namespace: Namespace, peer: Namespace) -> None:
    """Taps of known indexes, and an uplink with the next hops on it."""
    for index, name in [(3, "up0"), *((index, f"vnet{index}") for index in TAPS)]:
        far = f"far{index}"
        run("ip", "link", "add", name, "index", str(index), "type", "veth", "peer", "name", far, "netns", peer.path)
        run("ip", "link", "set", name, "up")
        with peer.entered():
            run("ip", "link", "set", far, "up")
    run("ip", "address", "add", "192.0.2.254/24", "dev", "up0")
    run("ip", "address", "add", "2001:db8::ff/64", "dev", "up0", "nodad")


@pytest.fixture
def host(netns: Namespace, peer: Namespace) -> Iterator[Kernel]:
    links_of(netns, peer)
    kernel = Kernel(GUARD, owned=False)
    kernel.load()
    yield kernel
    kernel.close()


def settler_of(scene: Scene, kernel: Kernel) -> Settler:
    return Settler(kernel, scene.calc, Limits(GUARD.group_base), ("vnet",))


def settle(scene: Scene, settler: Settler) -> None:
    scene.absorb()
    dirty, scene.dirty = scene.dirty, Dirty()
    settler.settle(dirty)


def played(steps: Sequence[Step], kernel: Kernel) -> tuple[Scene, Settler]:
    """From whatever the example before has left."""
    scene = Scene()
    settler = settler_of(scene, kernel)
    settler.resync()
    assert settler.failures() == []
    for step in steps:
        if isinstance(step, Settle):
            settle(scene, settler)
        else:
            scene.take(step)
    scene.rest()
    settle(scene, settler)
    return scene, settler


def settled(scene: Scene, settler: Settler) -> None:
    assert settler.failures() == []
    assert list(settler.pending()) == []
    writes = settler.counters.writes
    settler.resync()
    assert settler.counters.writes == writes, "a resync of a settled host writes nothing"
    for ifindex, tap in scene.calc.desired.taps.items():
        assert settler.kernel.tap_sysctls_hold(tap.name)
        link = settler.kernel.link(ifindex)
        assert link is not None and settler.actual.classes[link.group] == tap.chains
    for index in set(TAPS) - scene.calc.desired.taps.keys():
        link = settler.kernel.link(index)
        assert link is not None and link.group == 0


def some(examples: int) -> Callable[..., Callable[..., None]]:
    count = examples * 10 if FULL else examples
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)


def test_the_real_kernel_comes_to_hold_what_is_desired(host: Kernel) -> None:
    @some(40)
    @given(lives())
    def lead(steps: list[Step]) -> None:
        settled(*played(steps, host))

    lead()
    listed = run("nft", "-nn", "list", "ruleset")
    run("nft", "-c", "-f", "-", stdin=f"flush ruleset\n{listed}")


class Dying(Rtnl):
    """Does so many operations, then hostd is no more."""

    left = 0

    def change(self, operations: Sequence[Operation]) -> list[Failure]:
        done, self.left = operations[: self.left], self.left - len(operations)
        failures = super().change(done) if done else []
        if self.left < 0:
            raise Killed
        return failures


def test_who_is_killed_on_the_way_arrives_after_all(host: Kernel) -> None:
    dying, rtnl = Dying(), host.rtnl

    @some(20)
    @given(lives(), lives(6), st.integers(0, 12))
    def lead(before: list[Step], after: list[Step], left: int) -> None:
        scene, settler = played(before, host)
        for step in after:
            scene.take(step)
        scene.rest()
        dying.left, host.rtnl = left, dying
        try:
            settle(scene, settler)
        except Killed:
            pass
        finally:
            host.rtnl = rtnl
        again = settler_of(scene, host)
        again.resync()
        settled(scene, again)

    try:
        lead()
    finally:
        host.rtnl = rtnl
        dying.close()


def test_any_first_stages_of_a_plan_are_made_whole(host: Kernel) -> None:
    @some(15)
    @given(lives(), lives(6), st.integers(1, 3))
    def lead(before: list[Step], after: list[Step], stages: int) -> None:
        scene, settler = played(before, host)
        for step in after:
            scene.take(step)
        scene.rest()
        actual, desired = host.read(), scene.calc.desired
        dirty = everything(desired, actual)
        prints = {name: host.fingerprints(rules) for name, rules in desired.chains.items()}
        todo = plan(Scope(desired, actual, dirty, prints, settler.limits))
        parts = [todo.close, todo.filter, todo.open][:stages]
        host.apply(Plan(*parts), actual)
        again = settler_of(scene, host)
        again.resync()
        settled(scene, again)

    lead()


# -- by hand --------------------------------------------------------------------------------------------------------


def guest(addresses: tuple[bytes, ...] = (OWN4, OWN6), prefixes: tuple[str, ...] = ()) -> Run:
    endpoint = Endpoint(key(0), "guest", {}, (), addresses, (), tuple(map(parse_prefix, prefixes)))
    return Run(0, Local(endpoint, "qemu", Phase.LIVE, Carrier(f"vnet{TAP}", TAP), endpoint))


def policy(members: set[bytes]) -> Commit:
    rule = Rule(Action.ALLOW, source=Peer(selector="all()"))
    web = Policy("web", "all()", (Direction.INGRESS,), ingress=(rule,))
    return Commit(((ObjectKey(Kind.POLICY, "web"), web), (ObjectKey(Kind.SET, "all()"), AddressSet(members))))


def group(kernel: Kernel) -> int:
    link = kernel.link(TAP)
    assert isinstance(link, Link)
    return link.group


def test_a_foreign_route_in_the_way_stops_that_route_only(host: Kernel) -> None:
    run("ip", "route", "add", "10.65.0.1/32", "dev", "up0")
    scene, settler = played([policy({OWN4}), guest()], host)
    (failure,) = settler.failures()
    assert failure.object == "route 10.65.0.1/32" and "remove it" in failure.message
    assert group(host) and host_prefix(OWN6) in settler.actual.routes
    settler.retry(0)
    assert settler.failures() == [failure]
    run("ip", "route", "del", "10.65.0.1/32", "dev", "up0")
    settler.retry(0)
    settled(scene, settler)


def test_a_foreign_set_in_the_way_stops_what_names_it(host: Kernel) -> None:
    scene, settler = played([policy({OWN4}), guest()], host)
    before, old = group(host), run("nft", "list", "chain", "inet", "slash32", "pi-web")
    (name,) = [n for n in scene.calc.desired.sets if n.startswith("addr4")]
    bigger = name.replace("-256", "-1024")
    run("nft", "add", "set", "inet", "slash32", bigger, "{ type ipv6_addr; }")
    scene.take(policy({bytes((10, 65, 1 + n // 200, n % 200)) for n in range(200)}))
    settle(scene, settler)
    assert {f"set {bigger}", "chain pi-web"} <= {f.object for f in settler.failures()}
    assert run("nft", "list", "chain", "inet", "slash32", "pi-web") == old, "the last good policy stays"
    assert group(host) == before
    run("nft", "delete", "set", "inet", "slash32", bigger)
    for _ in range(3):
        settler.retry(0)
    settled(scene, settler)


def test_prefixes_within_each_other_are_admitted(host: Kernel) -> None:
    inside = ("10.66.0.0/24", "10.66.0.0/26", "10.66.0.64/26", "fd66::/64", "fd66::/72")
    scene, settler = played([guest(prefixes=inside)], host)
    settled(scene, settler)
    assert {parse_prefix(p) for p in inside} <= settler.actual.routes.keys()


def test_a_tap_that_went_meanwhile_is_a_refusal_and_no_end(host: Kernel) -> None:
    scene, settler = played([guest()], host)
    run("ip", "link", "del", f"vnet{TAP}")
    assert host.tap_sysctls_hold(f"vnet{TAP}"), "what is not there lacks nothing"
    settler.audit()
    settle(scene, settler)
    scene.dirty.merge(settler.link_gone(TAP))
    settle(scene, settler)
    assert settler.failures(), "it is still desired, and cannot be"
    away = guest()
    assert away.local is not None
    scene.take(Run(0, replace(away.local, carrier=None, phase=Phase.RESERVED)))
    settle(scene, settler)
    assert settler.failures() == [] and list(settler.pending()) == []


def test_the_guard_is_put_up_again_with_all_that_stood_on_it(host: Kernel) -> None:
    scene, settler = played([policy({OWN4}), guest()], host)
    run("nft", "flush", "ruleset")
    settler.resync()
    settled(scene, settler)
    assert settler.counters.healed > 0
