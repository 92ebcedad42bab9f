# Sequences of states of a host, written by hand, and each also reversed, shuffled, with empty states in between, and
# squashed: hostd comes from any of them to any other, and what it does then follows from the state alone.
from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from hostd.change.plan import Limits
from hostd.change.settle import Settler
from hostd.compiler.chains import targets
from hostd.compiler.desired import Dirty
from hostd.compiler.forwarding import Link
from hostd.compiler.names import parts_of, policy_of
from hostd.compiler.ruleset import Guard
from hostd.state import Carrier, Local, Phase
from slash32.model import Endpoint, SharedAddress
from slash32.net import host_prefix, parse_address, parse_prefix
from slash32.pack import AddressSet, Kind, ObjectKey, Value
from slash32.policy import Action, Direction, HostEndpoint, Peer, Policy, Profile, Rule, Tier
from tests.fake_kernel import FakeKernel, Model
from tests.scenes import FULL, TAPS, Commit, Run, Scene, key, many, same

IN, OUT = (Direction.INGRESS,), (Direction.EGRESS,)
WEB, ALL = 'role == "web"', "all()"
ALLOW, DENY, LOG, PASS = map(Rule, (Action.ALLOW, Action.DENY, Action.LOG, Action.PASS))
PASSES = Action.PASS
FROM_WEB = Rule(Action.ALLOW, 6, source=Peer(selector=WEB))
NET = parse_prefix("10.66.0.0/26")


class State(NamedTuple):
    """Everything that counts: the dispatcher's objects and this host's guests."""

    objects: dict[ObjectKey, Value] = {}
    guests: tuple[Local, ...] = ()


def policy(name: str, *rules: Rule, whom: str = ALL, order: int = 1, **more: Any) -> tuple[ObjectKey, Value]:
    return ObjectKey(Kind.POLICY, name), Policy(name, whom, IN, order, rules, **more)


def staged(name: str, *rules: Rule, **more: Any) -> tuple[ObjectKey, Value]:
    return ObjectKey(Kind.STAGED, name), Policy(name, ALL, IN, 1, rules, staged=True, **more)


def tier(order: float, action: Action = Action.DENY) -> tuple[ObjectKey, Value]:
    return ObjectKey(Kind.TIER, "t"), Tier("t", order, action)


def host_endpoint(name: str, interface: str) -> tuple[ObjectKey, Value]:
    return ObjectKey(Kind.HOSTENDPOINT, name), HostEndpoint(name, "h1", interface, profiles=("p",))


def members(selector: str, count: int, *prefixes: str) -> tuple[ObjectKey, Value]:
    return ObjectKey(Kind.SET, selector), AddressSet(many(count), set(map(parse_prefix, prefixes)))


def route(address: str, *hosts: str) -> tuple[ObjectKey, Value]:
    return ObjectKey(Kind.ROUTE, parse_prefix(address)), hosts


H2 = ObjectKey(Kind.HOST, "h2"), (parse_address("192.0.2.1"),)
H2_MOVED = ObjectKey(Kind.HOST, "h2"), (parse_address("192.0.2.2"),)
OPEN = ObjectKey(Kind.POLICY, "out"), Policy("out", ALL, OUT, None, egress=(ALLOW,))


def guest(number: int, role: str = "web", phase: Phase = Phase.LIVE, tap: int = 0, **more: object) -> Local:
    addresses = (parse_address(f"10.65.0.{number + 1}"), parse_address(f"fd00:65::{number + 1:x}"))
    given = {"labels": {"role": role}, "addresses": addresses, **more}
    endpoint = Endpoint(key(number), f"guest{number}", **given)  # type: ignore[arg-type]
    index = tap or 100 + number
    granted = endpoint if phase is Phase.LIVE else None
    return Local(endpoint, "qemu", phase, Carrier(f"vnet{index}", index), granted)


def isolated(number: int) -> Local:
    return replace(guest(number), accepted=None)


P, PROFILED = ObjectKey(Kind.PROFILE, "p"), (guest(0, profiles=("p",)),)
MANY = guest(0), guest(1, "db"), guest(2, profiles=("p",))
VIP = {"shared": (SharedAddress(parse_address("10.9.0.9"), "vip"),)}
SEQUENCES: dict[str, list[State]] = {
    "guests come and go": [
        State(dict([OPEN]), (guest(0),)), State(dict([OPEN]), (guest(0), guest(1))), State(dict([OPEN]), (guest(1),)),
        State(dict([OPEN]), (guest(0, tap=200), guest(1))), State(dict([OPEN]), (isolated(0), guest(1))),
    ],
    "a guest changes": [
        State(dict([OPEN]), (guest(0),)), State(dict([OPEN]), (guest(0, "db"),)),
        State(dict([OPEN]), (guest(0, prefixes=(NET,)),)),
        State(dict([OPEN]), (guest(0, addresses=(), **VIP),)),
        State(dict([OPEN]), (guest(0, **VIP),)), State(dict([OPEN]), (guest(0, profiles=("p",)),)),
    ],
    "policies change": [
        State(dict([policy("a", ALLOW)]), (guest(0), guest(1, "db"))),
        State(dict([policy("a", DENY), policy("b", ALLOW)]), (guest(0), guest(1, "db"))),
        State(dict([policy("b", ALLOW, order=0), policy("a", DENY)]), (guest(0), guest(1, "db"))),
        State(dict([policy("b", ALLOW, whom=WEB)]), (guest(0), guest(1, "db"))),
        State(dict([policy("b", FROM_WEB), members(WEB, 3)]), (guest(0), guest(1, "db"))),
    ],
    "a set grows through its sizes": [
        State(dict([policy("a", FROM_WEB), members(WEB, count, *nets)]), (guest(0),))
        for count, nets in ((0, ()), (3, ()), (3, ("10.66.0.0/26",)), (129, ()), (600, ("10.66.0.0/24",)))
    ],
    "two policies share a set, then one does, then none": [
        State(dict([policy("a", FROM_WEB), policy("b", FROM_WEB), members(WEB, 300)]), (guest(0),)),
        State(dict([policy("b", FROM_WEB), members(WEB, 300)]), (guest(0),)),
        State(dict([policy("b", ALLOW)]), (guest(0),)),
    ],
    "a migration to here": [
        State(dict([OPEN, H2, route("10.65.0.1", "h2")]), ()),
        State(dict([OPEN, H2, route("10.65.0.1", "h2")]), (guest(0, phase=Phase.INCOMING),)),
        State(dict([OPEN, H2, route("10.65.0.1", "h2")]), (guest(0, phase=Phase.ARRIVED),)),
        State(dict([OPEN, H2, route("10.65.0.1", "h1")]), (guest(0),)),
    ],
    "routes to elsewhere": [
        State(dict([H2, route("10.65.0.9", "h2")])), State(dict([H2_MOVED, route("10.65.0.9", "h2")])),
        State(dict([H2, route("10.65.0.9", "h1", "h2")])), State(dict([route("10.65.0.9", "h2")])),
        State(dict([H2, route("10.65.0.1", "h2")]), (guest(0),)),
        State(dict([H2, route("10.9.0.9", "h2")]), (guest(0, **VIP),)),
    ],
    "a shared address on one, two, one": [
        State(dict([OPEN]), (guest(0, **VIP),)), State(dict([OPEN]), (guest(0, **VIP), guest(1, **VIP))),
        State(dict([OPEN]), (guest(1, **VIP),)),
    ],
    "tiers come, pass, turn round and go": [
        State(dict([policy("a", PASS), policy("b", FROM_WEB), members(WEB, 3)]), MANY),
        State(dict([policy("a", PASS, tier="t"), policy("b", FROM_WEB), members(WEB, 3)]), MANY),
        State(dict([policy("a", PASS, tier="t"), policy("b", FROM_WEB), members(WEB, 3), tier(0)]), MANY),
        State(dict([policy("a", PASS, tier="t"), policy("b", FROM_WEB), members(WEB, 300), tier(0, PASSES)]), MANY),
        State(dict([policy("a", DENY, tier="t"), policy("b", PASS, FROM_WEB), members(WEB, 300), tier(0)]), MANY),
        State(dict([policy("a", LOG, PASS, tier="t"), policy("b", PASS), members(WEB, 3), tier(9e6)]), MANY),
    ],
    "a policy is staged, then enforced": [
        State(dict([staged("a", FROM_WEB, DENY), members(WEB, 3)]), MANY),
        State(dict([staged("a", FROM_WEB, DENY), policy("b", PASS, order=2), members(WEB, 300)]), MANY),
        State(dict([staged("a", LOG, DENY), policy("a", FROM_WEB, DENY), members(WEB, 3)]), MANY),
        State(dict([policy("a", FROM_WEB, DENY), members(WEB, 3)]), MANY),
    ],
    "host endpoints": [
        State(dict([host_endpoint("e", "eth0"), policy("a", ALLOW)]), MANY),
        State(dict([host_endpoint("e", "eth0"), host_endpoint("f", "*"), policy("a", ALLOW)]), MANY),
        State(dict([host_endpoint("e", "*"), host_endpoint("f", "*"), policy("a", PASS, apply_on_forward=True)]), ()),
        State(dict([host_endpoint("f", "*"), staged("a", DENY, apply_on_forward=True)]), MANY),
        State(dict([policy("a", ALLOW)]), MANY),
    ],
    "profiles": [
        State({}, PROFILED), State({P: Profile("p", (ALLOW,))}, PROFILED),
        State({P: Profile("p", (ALLOW,), labels={"env": "x"})}, PROFILED),
        State(dict([policy("a", DENY)]) | {P: Profile("p", (ALLOW,))}, PROFILED),
    ],
}  # fmt: skip


def shuffled(states: Sequence[State]) -> list[State]:
    mixed = list(states) * 2
    random.Random(len(states)).shuffle(mixed)
    return mixed


VARIANTS: dict[str, Callable[[Sequence[State]], list[State]]] = {
    "as written": list,
    "reversed": lambda s: list(s)[::-1],
    "shuffled": shuffled,
    "with empty states": lambda s: [x for state in s for x in (state, State())],
    "each twice": lambda s: [x for state in s for x in (state, state)],
}


class Walk:
    def __init__(self) -> None:
        self.scene = Scene()
        self.model = Model(links={i: Link(i, f"vnet{i}", 0, bytes(6), True) for i in TAPS})
        self.settler = Settler(FakeKernel(self.model), self.scene.calc, Limits(Guard().group_base), ("vnet",))
        self.settler.resync()

    def become(self, state: State) -> None:
        gone = self.scene.content.keys() - state.objects.keys()
        values = [*((at, None) for at in gone), *state.objects.items()]
        if values:
            self.scene.take(Commit(tuple(values)))
        wanted = {local.endpoint.key: local for local in state.guests}
        for number in range(4):
            if self.scene.locals.get(key(number)) != wanted.get(key(number)):
                self.scene.take(Run(number, wanted.get(key(number))))

    def settle(self) -> None:
        self.scene.rest()
        dirty, self.scene.dirty = self.scene.dirty, Dirty()
        self.settler.settle(dirty)

    def check(self, state: State) -> None:
        assert self.settler.failures() == [] and list(self.settler.pending()) == []
        same(self.scene.calc.desired, self.scene.fresh().desired)
        opened = {i for i, link in self.model.links.items() if link.group}
        assert opened == {x.carrier.ifindex for x in state.guests if x.carrier and x.connected}


WAYS = list(itertools.product(SEQUENCES, VARIANTS))


@pytest.mark.parametrize(("sequence", "variant"), WAYS)
def test_each_state_is_settled_on_the_way(sequence: str, variant: str) -> None:
    walk = Walk()
    for state in VARIANTS[variant](SEQUENCES[sequence]):
        walk.become(state)
        walk.settle()
        walk.check(state)


@pytest.mark.parametrize(("sequence", "variant"), WAYS)
def test_squashed_only_the_last_state_counts(sequence: str, variant: str) -> None:
    walk = Walk()
    states = VARIANTS[variant](SEQUENCES[sequence])
    for state in states:
        walk.become(state)
    walk.settle()
    walk.check(states[-1])


def test_from_any_state_to_any_other() -> None:
    walk, states = Walk(), [state for sequence in SEQUENCES.values() for state in sequence]
    pairs = list(itertools.permutations(range(len(states)), 2))
    random.Random(1).shuffle(pairs)
    for one, other in pairs if FULL else pairs[:100]:
        for state in (states[one], states[other]):
            walk.become(state)
            walk.settle()
            walk.check(state)


def test_a_state_of_rest_writes_nothing() -> None:
    walk = Walk()
    for state in SEQUENCES["policies change"]:
        walk.become(state)
        walk.settle()
        before = walk.model.writes
        walk.become(state)
        walk.settle()
        walk.settler.resync()
        assert walk.model.writes == before


@pytest.mark.parametrize("refused", [0, 1])
def test_of_a_policy_in_parts_the_whole_last_form_stays(refused: int) -> None:
    """Not one part of the last and one of the next: together they may allow what neither does."""

    def state(*rules: Rule) -> State:
        return State(dict([policy("a", *rules, tier="t"), tier(0)]), (guest(0),))

    def asked() -> dict[str, tuple[object, ...]]:
        chains = walk.model.tables.chains
        (name,) = (name for name in chains if name.startswith("tier-in-"))
        return {name: chains[name]} | {target: chains[target] for target in targets(chains[name])}

    walk, passing = Walk(), Rule(Action.PASS, 6)
    walk.become(state(DENY, passing, ALLOW))
    walk.settle()
    before = asked()
    assert len(before) == 3
    parts = parts_of("a", Direction.INGRESS)
    walk.model.refuses = lambda what, item: (
        what == "put chain" and policy_of(str(item)) == parts and str(item).endswith(str(refused))
    )
    walk.become(state(ALLOW, passing, DENY))
    walk.settle()
    assert walk.settler.failures() and asked() == before
    walk.model.refuses = lambda _what, _item: False
    walk.settler.retry(0.0)
    walk.check(state(ALLOW, passing, DENY))
    assert len(asked()) == 3 and len(asked().keys() - before.keys()) == 2


def test_there_is_no_way_to_a_guest_of_this_host_that_is_not_here() -> None:
    """Its address is this host's, as far as the dispatcher knows: not by itself around the corner."""
    walk, here = Walk(), (ObjectKey(Kind.HOST, "h1"), (parse_address("192.0.2.254"),))
    walk.become(State(dict([here, H2, route("10.65.0.1", "h1"), route("10.65.0.2", "h1", "h2")])))
    walk.settle()
    assert {(str(r.prefix), r.via) for r in walk.model.routes if not r.oif} == {("10.65.0.2/32", H2[1][0])}


def test_a_guest_is_given_an_address_more() -> None:
    walk = Walk()
    for prefixes in ((), (NET,), ()):
        state = State(dict([OPEN]), (guest(0, prefixes=prefixes),))
        walk.become(state)
        walk.settle()
        walk.check(state)
        assert {g[2] for g in walk.model.tables.grants} >= set(prefixes)


def test_a_route_to_a_guest_of_this_host_is_to_its_tap() -> None:
    walk = Walk()
    walk.become(State(dict([H2, route("10.65.0.1", "h2")]), (guest(0),)))
    walk.settle()
    (found,) = [r for r in walk.model.routes if r.prefix == host_prefix(parse_address("10.65.0.1"))]
    assert found.oif == 100 and found.via is None
