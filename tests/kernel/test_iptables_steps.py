# No packet passes during a change that passes neither before nor after it: every single step of every change is
# followed by real packets. ipset and iptables know no transaction over several sets and tables; here is the order that
# makes up for it, and the gate where no order does.
from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import filters
import pytest
from netns import Namespace
from nft_rig import BASE, Rig

from hostd.compiler.ruleset import InSet, Rule, SetKind, SetSpec, Side, Verdict
from hostd.dataplane.filter import IPTABLES
from hostd.dataplane.iptables import restore, steps
from hostd.dataplane.iptables.sets import Sets
from slash32.net import parse_address

SPEC = SetSpec(SetKind.ADDR4, 256)
WHO = [f"10.66.1.{n}" for n in range(1, 7)]  # alice's, behind her
SETS = ("addr4-a", "addr4-b", "addr4-c")
CLASS = BASE + 7
Wanted = tuple[tuple[Rule, ...], dict[str, frozenset[str]]]


@pytest.fixture
def rig(netns: Namespace, peer: Namespace) -> Iterator[Rig]:
    filters.chosen = IPTABLES
    try:
        made = Rig(peer)
        yield made
        made.close()
    finally:
        filters.chosen = filters.NFTABLES


class Probe:
    """Sends one packet from each of alice's to bob, a new flow each time."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.port, self.seen = rig, itertools.count(2000), list[frozenset[str]]()

    def passing(self) -> frozenset[str]:
        rig, port = self.rig, next(self.port)
        rig.bob.heard()
        for who in WHO:
            rig.alice.wire.send(rig.alice.to(rig.bob).but(source=who).udp(1, port, who.encode()))
        rig.settle()
        heard = rig.bob.heard()
        return frozenset(who for who in WHO if any(frame.endswith(who.encode()) for frame in heard))

    def look(self) -> None:
        self.seen.append(self.passing())


def begin(rig: Rig) -> None:
    change = rig.table.transaction()
    for name in SETS:
        change.add_set(name, SPEC, 0)
    change.put_chain("to-b", [], 0)
    change.put_class(CLASS, "from-all", "to-b", 0)
    change.commit()
    rig.group(rig.bob, CLASS)


def some(chance: random.Random) -> Wanted:
    rules = tuple(
        Rule(
            (InSet(Side.SRC, chance.choice(SETS), SetKind.ADDR4, chance.random() < 0.4),),
            chance.choice((Verdict.ACCEPT, Verdict.ACCEPT, Verdict.DROP)),
        )
        for _ in range(chance.randint(1, 3))
    )
    return rules, {name: frozenset(chance.sample(WHO, chance.randint(0, 4))) for name in SETS}


def change_to(rig: Rig, old: Wanted, new: Wanted) -> None:
    change = rig.table.transaction()
    for name in SETS:
        for members, verb in ((old[1][name] - new[1][name], change.delete_members),
                              (new[1][name] - old[1][name], change.add_members)):  # fmt: skip
            if members:
                verb(name, SetKind.ADDR4, map(parse_address, sorted(members)), 0)
    if old[0] != new[0]:
        change.put_chain("to-b", new[0], 0)
    change.commit()


def stepwise(probe: Probe, patch: pytest.MonkeyPatch) -> None:
    """After every message to ipset and every table a look."""
    carry_out, write = Sets.carry_out, restore.write

    def each(self: Sets, tasks: list[object]) -> None:
        for task in tasks:
            carry_out(self, [task])  # type: ignore[list-item]
            probe.look()

    def table(version: int, edits: dict[str, restore.Edit]) -> None:
        for name, edit in edits.items():
            write(version, {name: edit})
            probe.look()

    patch.setattr(Sets, "carry_out", each)
    patch.setattr(restore, "write", table)


@pytest.mark.parametrize("rules_change", [False, True])
def test_at_no_step_passes_what_neither_side_lets_pass(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, rules_change: bool
) -> None:
    begin(rig)
    probe, chance = Probe(rig), random.Random(5)
    old: Wanted = ((), dict.fromkeys(SETS, frozenset()))
    before, gates, looks = probe.passing(), 0, 0
    closed = steps._closing

    def counted(version: int) -> steps.Edits:
        nonlocal gates
        gates += version == 4
        return closed(version)

    monkeypatch.setattr(steps, "_closing", counted)
    for _ in range(25):
        new = some(chance)
        if not rules_change and old[0]:
            new = old[0], new[1]
        probe.seen.clear()
        with monkeypatch.context() as patch:
            stepwise(probe, patch)
            change_to(rig, old, new)
        after = probe.passing()
        looks += len(probe.seen)
        assert after == by_the_model(new), "and in the end it is what was asked for"
        for passing in probe.seen:
            assert passing <= before | after, (old, new)
        old, before = new, after
    assert looks > 60 and gates < 25


def by_the_model(wanted: Wanted) -> frozenset[str]:
    rules, members = wanted
    found = set()
    for who in WHO:
        for rule in rules:
            (match,) = rule.matches
            assert isinstance(match, InSet)
            if (who in members[match.set]) != match.negate:
                if rule.verdict is Verdict.ACCEPT:
                    found.add(who)
                break
    return frozenset(found)


def test_without_the_order_it_would(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: what opens first."""
    begin(rig)
    probe, chance = Probe(rig), random.Random(5)
    ordered = steps._ordered

    def backwards(*args: object) -> object:
        closing, opening, _ = ordered(*args)  # type: ignore[arg-type]
        return opening, closing, False

    monkeypatch.setattr(steps, "_ordered", backwards)
    old: Wanted = ((), dict.fromkeys(SETS, frozenset()))
    before, leaks = probe.passing(), 0
    for _ in range(25):
        new = some(chance)
        probe.seen.clear()
        with monkeypatch.context() as patch:
            stepwise(probe, patch)
            change_to(rig, old, new)
        after = probe.passing()
        leaks += sum(not passing <= before | after for passing in probe.seen)
        old, before = new, after
    assert leaks


def test_the_gate_of_one_that_ended_on_the_way_stays_closed_until_all_was_compared(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Members have gone from a set, the rule that asks it is still the old one: half of a change lets them pass."""
    begin(rig)
    probe = Probe(rig)
    again = Rule((InSet(Side.SRC, "addr4-a", SetKind.ADDR4),), Verdict.ACCEPT)
    banned = Rule((InSet(Side.SRC, "addr4-a", SetKind.ADDR4),), Verdict.DROP)
    welcome = Rule((InSet(Side.SRC, "addr4-b", SetKind.ADDR4),), Verdict.ACCEPT)
    bans: Wanted = ((banned, welcome), {"addr4-a": frozenset(WHO), "addr4-b": frozenset(WHO), "addr4-c": frozenset()})
    none: Wanted = ((), dict.fromkeys(SETS, frozenset()))
    change_to(rig, none, bans)
    assert not probe.passing()

    def ends(*_: object) -> None:
        raise OSError("hostd was killed")

    with monkeypatch.context() as patch:
        patch.setattr(steps, "_edits", ends)
        with pytest.raises(OSError, match="killed"):
            change_to(rig, bans, ((again,), none[1] | {"addr4-b": frozenset(WHO)}))
    rig.table.close()
    rig.table = filters.make()
    rig.table.load()
    assert not probe.passing(), "the guard stands, and the gate is as it was found"
    small = rig.table.transaction()
    small.add_members("addr4-c", SetKind.ADDR4, [parse_address("10.66.1.1")], 0)
    small.put_chain("to-other", [], 0)
    small.commit()
    assert not probe.passing(), "a change of something else says nothing of what was left half done"
    strays = rig.table.read().strays
    assert rig.table.stands()
    whole = rig.table.transaction()
    whole.put_chain("to-b", [welcome], 0)
    whole.sweep(strays, 0)
    whole.commit()
    assert probe.passing() == set(WHO), "who has compared everything opens it"
    assert not rig.table.read().strays
