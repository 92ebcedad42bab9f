# The calculation: whatever way led to a state, what the kernel is to hold follows from the state alone.
from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, given, settings

from hostd.compiler.names import is_derived
from hostd.compiler.ruleset import HOST_CHAINS
from hostd.state import Carrier, Local, Phase
from slash32.model import Endpoint
from slash32.net import Prefix, parse_prefix
from slash32.pack import AddressSet, Kind, ObjectKey
from slash32.policy import Action, Direction, Peer, Policy, Rule, Tier
from tests.scenes import ADDRESSES4, FULL, Absorb, Commit, Run, Scene, Step, key, lives, many, same

WEB = 'role == "web"'
SET = ObjectKey(Kind.SET, WEB)
IN = (Direction.INGRESS,)


def play(steps: list[Step]) -> Scene:
    scene = Scene()
    for step in steps:
        scene.take(step)
    scene.rest()
    return scene


@settings(max_examples=3000 if FULL else 100, deadline=None, suppress_health_check=list(HealthCheck))
@given(lives())
def test_what_is_desired_follows_from_the_state_alone(steps: list[Step]) -> None:
    scene = play(steps)
    same(scene.calc.desired, scene.fresh().desired)


def own(scene: Scene) -> set[str]:
    """Chains besides those that are always there."""
    return scene.calc.desired.chains.keys() - set(HOST_CHAINS)


def commit(*values: object) -> Commit:
    return Commit(tuple(values))  # type: ignore[arg-type]


def policy(name: str = "a", selector: str | None = WEB, nets: tuple[str, ...] = ()) -> tuple[ObjectKey, Policy]:
    peer = Peer(selector=selector, nets=tuple(map(parse_prefix, nets)))
    return ObjectKey(Kind.POLICY, name), Policy(name, "all()", IN, ingress=(Rule(Action.ALLOW, source=peer),))


def test_a_member_that_joins_with_the_first_prefix_is_told() -> None:
    """The prefix needs a kernel set more; the address still goes into the one that was there."""
    scene = play([commit(policy(), (SET, AddressSet()))])
    scene.dirty = type(scene.dirty)()
    scene.take(commit((SET, AddressSet({ADDRESSES4[1]}, {parse_prefix("10.66.0.0/24")}))))
    scene.rest()
    addresses = next(name for name in scene.calc.desired.sets if name.startswith("addr4"))
    nets = next(name for name in scene.calc.desired.sets if name.startswith("net4"))
    assert scene.dirty.members[addresses] == ({ADDRESSES4[1]}, set())
    assert nets in scene.dirty.sets and addresses not in scene.dirty.sets


def test_a_set_that_outgrew_its_kernel_set_and_came_back_is_filled_anew() -> None:
    scene = play([commit(policy(), (SET, AddressSet(many(100))))])
    (before,) = [name for name in scene.calc.desired.sets if name.startswith("addr4")]
    scene.dirty = type(scene.dirty)()
    scene.take(commit((SET, AddressSet(many(200)))))
    scene.take(commit((SET, AddressSet({ADDRESSES4[1]}))))
    scene.rest()
    assert before in scene.dirty.refill
    assert list(scene.calc.desired.members(before)) == [ADDRESSES4[1]]


def test_a_policy_that_goes_together_with_its_big_set() -> None:
    """Its chains may not be asked for any more when the set is looked at."""
    big = AddressSet(many(300), {parse_prefix("10.66.0.0/24")})
    scene = play([commit(policy("a"), policy("b"), (SET, big)), Absorb()])
    scene.take(commit((ObjectKey(Kind.POLICY, "a"), None), (ObjectKey(Kind.POLICY, "b"), None), (SET, None)))
    scene.rest()
    assert not scene.calc.desired.sets and not own(scene)


def test_two_sets_change_with_the_rules_that_name_the_second_for_the_first_time() -> None:
    """Whichever is looked at first: what it brings is counted once, so it is still there when half of it goes."""
    one, other = parse_prefix("10.66.0.0/24"), parse_prefix("10.67.0.0/24")
    for first, second in ((WEB, "all()"), ("all()", WEB)):
        sets = [ObjectKey(Kind.SET, first), ObjectKey(Kind.SET, second)]
        at, now = policy(selector=first)
        never = Rule(Action.DENY, ip_version=4, source=Peer(nets=(parse_prefix("fd00::/8"),), selector=second))
        then = replace(now, ingress=(*now.ingress, never))
        scene = play([commit((at, then), *((each, AddressSet()) for each in sets)), Absorb()])
        both = replace(now, ingress=(*now.ingress, replace(never, source=Peer(selector=second))))
        scene.take(commit((at, both), *((each, AddressSet(set(), {one, other})) for each in sets)))
        scene.rest()
        for left in ({one}, set[Prefix]()):
            scene.take(commit(*((each, AddressSet(set(), left)) for each in sets)))
            scene.rest()
            same(scene.calc.desired, scene.fresh().desired)


def test_a_rule_that_can_match_nothing_needs_no_set() -> None:
    never = Rule(Action.ALLOW, ip_version=4, source=Peer(nets=(parse_prefix("fd00::/8"),), selector=WEB))
    dead = Policy("a", "all()", IN, ingress=(never,))
    scene = play([commit((ObjectKey(Kind.POLICY, "a"), dead), (SET, AddressSet(many(3))))])
    assert not scene.calc.desired.sets
    scene.take(commit((ObjectKey(Kind.POLICY, "a"), None)))
    scene.rest()
    assert not own(scene)


def settled(*values: object) -> Scene:
    scene = play([commit(*values)])
    scene.dirty = type(scene.dirty)()
    return scene


def run(number: int, **labels: str) -> Run:
    endpoint = Endpoint(key(number), f"guest{number}", labels, addresses=(ADDRESSES4[number],))
    carrier = Carrier(f"vnet{number}", 100 + number)
    return Run(number, Local(endpoint, "qemu", Phase.LIVE, carrier, endpoint))


TIER = ObjectKey(Kind.TIER, "t"), Tier("t", 1.0)
PASSES = ObjectKey(Kind.POLICY, "b"), Policy("b", "all()", IN, ingress=(Rule(Action.PASS, 6),), tier="t")
STAGED = ObjectKey(Kind.STAGED, "a"), Policy("a", "all()", IN, ingress=(Rule(Action.DENY),), staged=True)


def test_a_guest_of_a_known_class_changes_no_chain() -> None:
    scene = settled(policy(), (SET, AddressSet()), TIER, PASSES, STAGED)
    scene.take(run(0, role="web"))
    scene.rest()
    assert scene.dirty.chains, "the control"
    scene.dirty = type(scene.dirty)()
    scene.take(run(1, role="web"))
    scene.rest()
    assert not scene.dirty.chains and not scene.dirty.sets and scene.dirty.taps == {101}


def test_a_set_of_a_staged_policy_only_is_there_and_one_that_logs_only_is_not() -> None:
    _, found = policy()
    waits = ObjectKey(Kind.STAGED, "a"), replace(found, staged=True)
    scene = settled(waits, (SET, AddressSet(many(3))))
    assert scene.calc.desired.sets
    logs = replace(found, staged=True, ingress=(replace(found.ingress[0], action=Action.LOG),))
    scene.take(commit((waits[0], logs)))
    scene.rest()
    assert not scene.calc.desired.sets


def test_a_tier_that_passes_now_changes_what_is_of_it() -> None:
    scene = settled(policy("x", None), TIER, PASSES, STAGED)
    for number in range(2):
        scene.take(run(number))
    scene.rest()
    scene.dirty = type(scene.dirty)()
    scene.take(commit((TIER[0], Tier("t", 1.0, Action.PASS))))
    scene.rest()
    assert scene.dirty.chains and all(map(is_derived, scene.dirty.chains)) and not scene.dirty.sets
    scene.dirty = type(scene.dirty)()
    scene.take(commit((ObjectKey(Kind.TIER, "other"), Tier("other"))))
    scene.rest()
    assert not scene.dirty, "nobody is in that one"


def test_what_came_and_went_before_the_kernel_was_told_is_no_change() -> None:
    scene = play([commit(policy(), (SET, AddressSet(many(3))))])
    scene.dirty = type(scene.dirty)()
    scene.take(commit((SET, AddressSet(many(4)))))
    scene.take(commit((SET, AddressSet(many(2)))))
    scene.take(commit((SET, AddressSet(many(3)))))
    scene.rest()
    (change,) = scene.dirty.members.values()
    assert change == (set(), set())
