# Plans carried out by hostd's real door on a model of the kernel: they lead where they shall, from everywhere, also
# when hostd dies on the way or the kernel refuses something; at no moment is a guest connected as it never should be.
from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hostd.change.plan import Limits, Scope, everything, plan, whole_plan
from hostd.change.settle import Settler
from hostd.compiler.desired import Actual, Admitted, ClassChains, Desired, Dirty, Member, Tap
from hostd.compiler.forwarding import GATEWAY4_ROUTE, Delete, Link, Route, SetGroup
from hostd.compiler.ruleset import Guard, SetKind, SetSpec
from hostd.compiler.ruleset import Rule as Compiled
from hostd.dataplane.nft.rules import fingerprint
from hostd.state import Carrier, Local, Phase
from slash32.model import Endpoint
from slash32.net import parse_prefix
from slash32.pack import Kind, ObjectKey
from slash32.policy import Action, Direction, Policy, Rule
from tests.fake_kernel import FakeKernel, Killed, Model
from tests.scenes import ADDRESSES4, FULL, TAPS, Commit, Run, Scene, Settle, Step, key, lives
from tests.unit.hostd.fake_moments import Moments

BASE = Guard().group_base
COUNT = 20 if FULL else 1
MEMBERS: st.SearchStrategy[set[Member]] = st.sets(st.sampled_from([bytes((10, 65, 0, n)) for n in range(4)]))


def host() -> Model:
    return Model(links={i: Link(i, f"vnet{i}", 0, b"\xfe" + bytes(5), True) for i in TAPS})


def settler_of(scene: Scene, model: Model, prune: bool = True) -> Settler:
    return Settler(FakeKernel(model), scene.calc, Limits(BASE, prune), ("vnet",))


def many(examples: int) -> Callable[..., Callable[..., None]]:
    return settings(
        max_examples=examples * COUNT, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )


def played(steps: list[Step]) -> tuple[Scene, Model, Settler]:
    """The first steps are settled as they say."""
    scene, model = Scene(), host()
    settler = settler_of(scene, model)
    settler.resync()
    for step in steps:
        if isinstance(step, Settle):
            settle(scene, settler)
        else:
            scene.take(step)
    settle(scene, settler)
    return scene, model, settler


def settle(scene: Scene, settler: Settler) -> None:
    scene.absorb()
    dirty, scene.dirty = scene.dirty, Dirty()
    settler.settle(dirty)


def meant(chains: Mapping[str, tuple[Compiled, ...]]) -> dict[str, list[str]]:
    return {name: [fingerprint(rule) for rule in rules] for name, rules in chains.items()}


def holds(model: Model, desired: Desired) -> None:
    """What is in the kernel, compared without hostd's own reading of it."""
    tables = model.tables
    assert tables.sets == desired.sets
    assert tables.members == {name: set(desired.members(name)) for name in desired.sets}
    assert meant(tables.chains) == meant(desired.chains)
    grants = {(i, t.mac, source) for i, t in desired.taps.items() for source in (*t.addresses, *t.prefixes)}
    assert tables.grants == grants
    assert model.routes == set(desired.routes.values())
    assert model.neighbours == {(i, a, t.mac) for i, t in desired.taps.items() for a in t.addresses}
    assert {g.ifindex for g in model.gateways} == desired.taps.keys()
    for ifindex, link in model.links.items():
        tap = desired.taps.get(ifindex)
        assert tables.classes.get(link.group) == (tap.chains if tap else None)
        assert tap or link.group == 0
        assert not tap or tap.name in model.sysctls


def settled(scene: Scene, model: Model, settler: Settler) -> None:
    assert settler.failures() == []
    holds(model, scene.calc.desired)
    assert list(settler.pending()) == []
    before = model.writes
    settler.resync()
    assert model.writes == before, "a resync of a settled host writes nothing"


@many(50)
@given(lives())
def test_the_kernel_comes_to_hold_what_is_desired(steps: list[Step]) -> None:
    scene, model, settler = played(steps)
    scene.rest()
    settle(scene, settler)
    settled(scene, model, settler)


def _done(steps: list[Step]) -> tuple[object, ...]:
    """What becomes of the kernel, and every operation it was handed."""
    scene, model, operations = Scene(), host(), list[tuple[str, object]]()

    def noted(what: str, item: object) -> bool:
        operations.append((what, item))
        return False

    model.refuses = noted
    settler = settler_of(scene, model)
    settler.resync()
    for step in [*steps, Settle()]:
        if isinstance(step, Settle):
            settle(scene, settler)
        else:
            scene.take(step)
    return operations, model.log, model.tables, model.links, model.routes, settler.actual, settler.counters


@many(50)
@given(lives())
def test_the_short_way_of_members_is_the_long_one(steps: list[Step]) -> None:
    short = _done(steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hostd.change.settle.plan", whole_plan)
        patch.setattr("hostd.dataplane.kernel._MEMBERS", frozenset())
        assert _done(steps) == short


@given(st.dictionaries(st.sampled_from("abc"), st.tuples(MEMBERS, MEMBERS)), st.sets(st.sampled_from("abc")),
       st.sets(st.sampled_from("abc")), st.sets(st.sampled_from(["exempt", "stray", "extra"])))  # fmt: skip
def test_the_short_way_plans_the_same(
    members: dict[str, tuple[set[Member], set[Member]]], wanted: set[str], there: set[str], odd: set[str]
) -> None:
    spec = SetSpec(SetKind.ADDR4, 256)
    desired, dirty = Desired(sets=dict.fromkeys(sorted(wanted), spec)), Dirty(members=dict(members))
    actual = Actual(sets=dict.fromkeys(sorted(there), spec), exempt=frozenset({7} if "exempt" in odd else ()),
                    strays=frozenset("x" if "stray" in odd else ()),
                    extra_routes=(GATEWAY4_ROUTE,) if "extra" in odd else ())  # fmt: skip
    scope = Scope(desired, actual, dirty, {}, Limits(BASE))
    assert dirty.only_members and plan(scope) == whole_plan(scope)


@many(50)
@given(lives(), lives(6))
def test_no_moment_connects_a_guest_as_it_should_not_be(before: list[Step], after: list[Step]) -> None:
    scene, model, settler = played(before)
    for step in after:
        scene.take(step)
    scene.rest()
    moments = Moments(model, scene.calc.desired)
    settle(scene, settler)
    moments.close_first()


@many(20)
@given(lives(), lives(6), st.data())
def test_who_is_killed_on_the_way_arrives_after_all(before: list[Step], after: list[Step], data: st.DataObject) -> None:
    scene, model, _ = played(before)
    for step in after:
        scene.take(step)
    scene.rest()
    whole, interrupted = model.copied(), model.copied()
    again = settler_of(scene, whole)
    again.resync()
    assume(whole.writes)
    interrupted.left = data.draw(st.integers(0, whole.writes - 1))
    first, moments = settler_of(scene, interrupted), Moments(interrupted, scene.calc.desired)
    with pytest.raises(Killed):
        first.resync()
    interrupted.left = None
    second = settler_of(scene, interrupted)
    second.resync()
    settled(scene, interrupted, second)
    assert moments.count


@st.composite
def refusals(draw: st.DrawFn) -> Callable[[str, object], bool]:
    what = draw(st.sampled_from([
        "add set", "add members", "delete members", "flush set", "put chain", "put class", "admit", "expel",
        "delete chain", "delete class", "delete set", "sysctl", "SetGroup", "Add", "Replace", "Delete",
    ]))  # fmt: skip
    odd = draw(st.integers(0, 2))
    return lambda asked, item: asked == what and (odd == 2 or len(repr(item)) % 2 == odd)


@many(60)
@given(lives(), lives(6), refusals())
def test_a_refusal_stops_only_what_rests_on_it_and_is_made_good(
    before: list[Step], after: list[Step], refuses: Callable[[str, object], bool]
) -> None:
    scene, model, settler = played(before)
    for step in after:
        scene.take(step)
    scene.rest()
    hits: list[object] = []
    model.refuses = lambda what, item: refuses(what, item) and not hits.append(item)
    Moments(model, scene.calc.desired, smooth=False)
    settle(scene, settler)
    assert bool(hits) == bool(settler.failures())
    settler.retry(1)
    model.refuses = lambda _what, _item: False
    for now in range(6):
        settler.retry(now)
    settled(scene, model, settler)


def running(number: int) -> Run:
    endpoint = Endpoint(key(number), f"guest{number}", {}, addresses=(ADDRESSES4[number],))
    carrier = Carrier(f"vnet{100 + number}", 100 + number)
    return Run(number, Local(endpoint, "qemu", Phase.LIVE, carrier, endpoint))


@pytest.mark.parametrize("refused", [False, True])
def test_nobody_comes_into_a_group_that_was_to_be_turned_and_is_not(refused: bool) -> None:
    """One guest's class becomes another; the one that starts meanwhile is to come into it, and not into the old one."""
    scene, model, settler = played([running(0)])
    group, before = model.links[100].group, dict(model.tables.classes)
    now = Policy("a", "all()", (Direction.INGRESS,), ingress=(Rule(Action.DENY),))
    scene.take(Commit(((ObjectKey(Kind.POLICY, "a"), now),)))
    scene.take(running(1))
    model.refuses = lambda what, item: refused and what == "put class"
    settle(scene, settler)
    assert (model.links[100].group, model.links[101].group) == (group, 0 if refused else group)
    assert (model.tables.classes == before) == refused == bool(settler.failures())
    model.refuses = lambda _what, _item: False
    for moment in range(6):
        settler.retry(moment)
    settled(scene, model, settler)


@many(30)
@given(lives(), lives(6))
def test_who_may_not_prune_deletes_nothing(before: list[Step], after: list[Step]) -> None:
    """A hostd that remembers nothing finds a kernel full of what another life of it wrote."""
    _, model, _ = played(before)
    scene = Scene()
    for step in after:
        scene.take(step)
    scene.rest()
    was, desired = model.copied(), scene.calc.desired
    settler = settler_of(scene, model, prune=False)
    settler.resync()
    settle(scene, settler)
    assert was.tables.sets.keys() <= model.tables.sets.keys()
    assert was.tables.chains.keys() <= model.tables.chains.keys()
    for ifindex in was.links.keys() - desired.taps.keys():
        group = was.links[ifindex].group
        assert model.links[ifindex].group == group
        assert model.tables.classes.get(group) == was.tables.classes.get(group), "what it may is as it was"
        assert {g for g in was.tables.grants if g[0] == ifindex} <= model.tables.grants
        assert {n for n in was.neighbours if n.ifindex == ifindex} <= model.neighbours
    kept = {r for r in was.routes if r.prefix not in desired.routes}
    assert kept <= model.routes
    settler.limits = Limits(BASE)
    settler.resync()
    settled(scene, model, settler)


# -- by hand --------------------------------------------------------------------------------------------------------

WEB, DB = ClassChains("from-web", "to-web"), ClassChains("from-db", "to-db")
ONE, TWO = bytes((10, 0, 0, 1)), bytes((10, 0, 0, 2))


def tap(ifindex: int = 7, chains: ClassChains = WEB, address: bytes = ONE) -> Tap:
    return Tap(ifindex, f"vnet{ifindex}", b"\x52\x54\0\0\0\1", (address,), (), chains)


def planned(desired: Desired, actual: Actual, prune: bool = True) -> list[object]:
    dirty = everything(desired, actual)
    return list(plan(Scope(desired, actual, dirty, {}, Limits(BASE, prune))))


def open_tap(group: int = BASE + 1) -> Admitted:
    there = tap()
    near = frozenset({(ONE, there.mac)})
    return Admitted(there.mac, frozenset({ONE}), frozenset(), near, True, True, group)


def test_a_group_that_a_link_carries_is_not_given_to_another_class() -> None:
    """Neither one of ours, nor one that nobody knows."""
    desired = Desired(taps={9: tap(9, DB, TWO)})
    actual = Actual(taps={7: open_tap()}, foreign_groups={8: BASE + 2})
    groups = [op.group for op in planned(desired, actual, prune=False) if isinstance(op, SetGroup)]
    assert groups == [BASE + 3]


def test_an_unknown_link_with_a_group_of_ours_is_closed() -> None:
    assert planned(Desired(), Actual(foreign_groups={8: BASE + 2})) == [SetGroup(8, 0)]
    assert planned(Desired(), Actual(foreign_groups={8: BASE + 2}), prune=False) == []


def test_a_change_of_class_is_one_write() -> None:
    actual = Actual(taps={7: open_tap()}, classes={BASE + 1: WEB, BASE + 2: DB})
    assert planned(Desired(taps={7: tap(7, DB)}), actual) == [SetGroup(7, BASE + 2)]
    assert planned(Desired(taps={7: tap(7, WEB)}), actual) == []


def test_second_routes_go_when_pruning_is_allowed() -> None:
    extra = Route(parse_prefix("10.9.0.1"), 7)
    actual = Actual(routes={GATEWAY4_ROUTE.prefix: GATEWAY4_ROUTE}, extra_routes=(extra,))
    desired = Desired(routes={GATEWAY4_ROUTE.prefix: GATEWAY4_ROUTE})
    assert planned(desired, actual) == [Delete(extra)]
    assert planned(desired, actual, prune=False) == []
