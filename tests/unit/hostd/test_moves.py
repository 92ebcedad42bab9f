# How taps come from one class to another: which device groups are turned, which taps are parked, and who is not moved.
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from hostd.change.moves import PARKED, parking, turned
from hostd.change.plan import AddMembers, AddSet, FilterOp, PutChain
from hostd.change.settle import Refused, Settler
from hostd.compiler.desired import Actual, Admitted, ClassChains, Tap
from hostd.compiler.forwarding import SetGroup
from hostd.compiler.ruleset import SetKind
from hostd.state import Carrier, Local, Phase
from slash32.model import Endpoint
from slash32.net import parse_address, parse_prefix
from slash32.pack import AddressSet, Kind, ObjectKey
from slash32.policy import Action, Direction, Peer, Policy, Rule
from tests.fake_kernel import FakeKernel
from tests.scenes import Commit, Run, key
from tests.unit.hostd.test_settle import BASE, TAP, Host

OLD, NEW, THIRD = (ClassChains(f"from-{n}", f"to-{n}") for n in "abc")


def tap(ifindex: int, chains: ClassChains) -> Tap:
    return Tap(ifindex, f"vnet{ifindex}", bytes(6), (), (), chains)


def actual(*groups: int, **more: object) -> Actual:
    taps = {ifindex: Admitted(group=group) for ifindex, group in enumerate(groups, 1)}
    return Actual(classes={7: OLD, 8: THIRD}, taps=taps, **more)  # type: ignore[arg-type]


def test_a_class_that_all_leave_for_the_same_new_one_is_turned() -> None:
    taps = {1: tap(1, NEW), 2: tap(2, NEW)}
    assert turned(taps, actual(7, 7), [NEW]) == {NEW: 7}


@pytest.mark.parametrize(
    ("there", "taps", "new"),
    [
        (actual(7, 7), {1: tap(1, NEW), 2: tap(2, OLD)}, [NEW]),  # one stays
        (actual(7), {1: tap(1, THIRD)}, []),  # that class is there
        (actual(7, foreign_groups={9: 7}), {1: tap(1, NEW)}, [NEW]),  # somebody else is in it
        (actual(0), {1: tap(1, NEW)}, [NEW]),  # it is in none
        (actual(7, 8), {1: tap(1, NEW), 2: tap(2, OLD)}, [NEW]),  # another comes into it
    ],
)
def test_others_are_not(there: Actual, taps: dict[int, Tap], new: list[ClassChains]) -> None:
    assert turned(taps, there, new) == {}


def test_who_leaves_alone_is_parked_where_more_changes() -> None:
    opening = [SetGroup(1, 8)]
    assert parking(opening, actual(7), 0x100000, alone=False) == [SetGroup(1, 0x100000 | PARKED)]
    assert parking(opening, actual(7), 0x100000, alone=True) == []
    assert len(parking([SetGroup(1, 8), SetGroup(2, 8)], actual(7, 7), 0, alone=True)) == 2
    assert parking([SetGroup(1, 8), SetGroup(3, 8)], actual(0), 0, alone=False) == [], "it is not open yet"


def test_who_is_parked_and_may_not_into_its_next_class_is_back_in_its_last() -> None:
    """And is not left where only what is established goes on."""
    host = Host()
    host.model.links[TAP + 1] = host.model.links[TAP]._replace(ifindex=TAP + 1, name="vnet101", group=0)
    other = Endpoint(key(1), "other", {}, (), (parse_address("10.65.0.2"),))
    host.scene.take(Run(1, Local(other, "qemu", Phase.LIVE, Carrier("vnet101", TAP + 1), other)))
    host.settle()
    deny = Policy("new", 'role == "web"', (Direction.INGRESS,), 1, ingress=(Rule(Action.DENY),))
    web = replace(other, labels={"role": "web"})
    host.scene.take(Run(1, Local(web, "qemu", Phase.LIVE, Carrier("vnet101", TAP + 1), web)))
    host.scene.take(Commit((
        (ObjectKey(Kind.POLICY, "new"), deny),
        (ObjectKey(Kind.SET, "all()"), AddressSet({parse_address("10.65.0.3")})),
    )))  # fmt: skip
    host.model.refuses = lambda what, item: what == "put chain" and item == "pi-new"
    host.settle()
    moves = [op.group for op in host.model.log if isinstance(op, SetGroup) and op.ifindex == TAP + 1]
    assert moves == [BASE + 1, BASE | PARKED, BASE + 1] and host.settler.failures()
    host.model.refuses = lambda *_: False
    host.settler.retry(0)
    assert host.whole() and host.model.links[TAP + 1].group == BASE + 2


def test_one_found_parked_is_brought_to_its_class() -> None:
    """hostd was killed meanwhile."""
    host = Host()
    host.model.links[TAP] = host.model.links[TAP]._replace(group=BASE | PARKED)
    again = Settler(FakeKernel(host.model), host.scene.calc, host.settler.limits, ("vnet",))
    again.resync()
    assert host.model.links[TAP].group == BASE + 1 and not again.failures()


def test_new_sets_of_prefixes_go_before_the_rules_that_ask_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else they are empty for a moment, and "in none of them" holds."""
    host, batches = Host(), list[list[object]]()
    real = FakeKernel._filter

    def spied(self: FakeKernel, ops: Sequence[FilterOp], actual: Actual) -> list[Refused]:
        batches.append([*ops])
        return real(self, ops, actual)

    monkeypatch.setattr(FakeKernel, "_filter", spied)
    rule = Rule(Action.ALLOW, source=Peer(not_selector="has(env)"))
    host.scene.take(Commit((
        (ObjectKey(Kind.SET, "has(env)"), AddressSet({parse_address("10.65.0.3")}, {parse_prefix("10.66.0.0/24")})),
        (ObjectKey(Kind.POLICY, "web"), Policy("web", "all()", (Direction.INGRESS,), ingress=(rule,))),
    )))  # fmt: skip
    host.settle()
    assert host.whole()
    first = [at for at, ops in enumerate(batches) for op in ops if isinstance(op, AddSet | AddMembers)
             and op.spec.kind is SetKind.NET4]  # fmt: skip
    asking = [at for at, ops in enumerate(batches) for op in ops if isinstance(op, PutChain)]
    assert len(first) == 2 and asking and max(first) < min(asking)
