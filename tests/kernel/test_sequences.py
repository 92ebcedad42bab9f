# Random worlds that follow each other on both packet filters: after every change the kernel holds what a fresh build of
# the last world holds; and on the way, and where hostd is killed on the way, nothing passes that neither the world
# before nor the one after allows. Every single operation is looked at; and a sender that never stops looks between.
from __future__ import annotations

import os
import random
import secrets
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from fabric import Fabric, one_cpu, shown
from findings import as_yaml
from sender import Sender, steady
from stepping import Allowed, Killed, forbidden, looked_at
from three import KINDS
from verdict_changes import changed
from verdict_packets import Case, Shot, case

from hostd.compiler.desired import Actual
from hostd.dataplane.filter import IPTABLES, NFTABLES
from hostd.dataplane.iptables import steps
from hostd.dataplane.kernel import Kernel
from slash32.policy import Peer, Rule
from slash32.verdict import World

FULL = os.environ.get("SLASH32_COUNTS") == "full"
SEED = int(os.environ.get("SLASH32_SEED", "0")) or secrets.randbelow(10**9)
LIVES = {NFTABLES: 200 if FULL else 10, IPTABLES: 200 if FULL else 6}
STEPS = 4  # of a life
SENT = 150 if FULL else 6  # changes under the sender's eyes


@pytest.fixture(params=KINDS)
def fabric(request: pytest.FixtureRequest) -> Iterator[Fabric]:
    with one_cpu():
        made = Fabric(request.param)
        yield made
        made.close()


@pytest.fixture
def fresh(fabric: Fabric) -> Iterator[Fabric]:
    made = Fabric(fabric.kind)
    yield made
    made.close()


def same(world: World) -> World:
    return world


class Life:
    """One world after the other on a fabric."""

    def __init__(self, fabric: Fabric, seed: int, but: Callable[[World], World] = same) -> None:
        """`but`: what is made of each of its worlds."""
        self.fabric, self.seed, self.chance, self.but = fabric, seed, random.Random(seed), but
        self.world = but(case(seed).world)
        self.looks = self.tempting = 0
        with fabric.home.entered():
            fabric.load(Case(seed, self.world))

    def next(self) -> World:
        return self.but(changed(self.world, self.chance, 2, 5))

    def step(self, die: bool = False) -> str:
        """To the next world, looking after each operation; what passed that should not, or ''."""
        new = self.next()
        shots = forbidden(self.world, new, self.chance)
        self.tempting += bool(shots)
        left = self.chance.randint(1, 20) if die else -1
        found: list[str] = []

        def look() -> None:
            nonlocal left
            self.looks += 1
            left -= 1
            if shots and not found:
                found.extend(self.passed(shots, new))
            if left == 0:
                raise Killed

        with self.fabric.home.entered(), looked_at(look):
            try:
                self.fabric.change(Case(self.seed, new))
            except Killed:
                self.fabric.begin_again()
        self.world = new
        return "\n".join(found)

    def passed(self, shots: list[Shot], new: World) -> Iterator[str]:
        for number in self.fabric.send(shots):
            yield f"seed {self.seed}, {self.fabric.kind}: {shown(shots[number])} passes on the way from"
            yield f"{as_yaml(self.world)}\n### to\n{as_yaml(new)}"
            return


def read(kernel: Kernel) -> object:
    """Without the numbers of classes, which are as it came, and without classes that no tap is in just now."""
    actual = kernel.read()
    members = {name: frozenset(found) for name, found in (actual.members or {}).items()}
    return actual.sets, members, actual.chains, _taps(actual), actual.routes, actual.strays


def _taps(actual: Actual) -> dict[int, object]:
    return {
        ifindex: (tap.mac, tap.addresses, tap.prefixes, tap.neighbours, tap.gateway, actual.classes.get(tap.group))
        for ifindex, tap in actual.taps.items()
    }


def same_as_fresh(life: Life, fresh: Fabric) -> None:
    fabric = life.fabric
    with fresh.home.entered():
        fresh.load(Case(life.seed, World(())))
        fresh.load(Case(life.seed, life.world))
        wanted = read(fresh.kernel)
    with fabric.home.entered():
        assert read(fabric.kernel) == wanted, f"seed {life.seed}: not what a fresh build holds\n{as_yaml(life.world)}"
        assert list(fabric.settler.pending()) == []


@pytest.mark.parametrize("die", [False, True], ids=["lives", "dies on the way"])
@pytest.mark.timeout(1200 if FULL else 300)
def test_nothing_passes_on_the_way_and_the_end_is_the_end(fabric: Fabric, fresh: Fabric, die: bool) -> None:
    print(f"SLASH32_SEED={SEED}")
    looks = tempting = 0
    for seed in range(SEED, SEED + LIVES[fabric.kind]):
        life = Life(fabric, seed)
        for _ in range(STEPS):
            assert not (found := life.step(die)), found
            same_as_fresh(life, fresh)
        looks, tempting = looks + life.looks, tempting + life.tempting
    print(f"{fabric.kind}: {LIVES[fabric.kind] * STEPS} changes, {tempting} of them tempting, {looks} looks")
    assert looks > LIVES[fabric.kind] * STEPS


# -- orders that are wrong --------------------------------------------------------------------------------------------

_filter, _ordered = Kernel._filter, steps._ordered


def one_by_one(self: Kernel, ops: Any, actual: Actual) -> Any:
    """No transaction for them all."""
    return [refused for op in ops for refused in _filter(self, [op], actual)]


def backwards(known: Any, batch: Any, asked: Any) -> Any:
    """What opens first, and no gate."""
    closing, opening, _ = _ordered(known, batch, asked)
    return opening, closing, False


WRONG: dict[str, dict[str, tuple[tuple[str, Any], ...]]] = {
    NFTABLES: {
        "operation by operation": (("hostd.dataplane.kernel.Kernel._filter", one_by_one),),
        "who changes class is not parked, no class is turned": (
            ("hostd.change.plan.parking", lambda *_: []), ("hostd.change.plan.turned", lambda *_: {}),
        ),
    },
    IPTABLES: {
        "sets that open go before the tables": (("hostd.dataplane.iptables.steps._ordered", backwards),),
        "who changes class is not parked, no class is turned": (
            ("hostd.change.plan.parking", lambda *_: []), ("hostd.change.plan.turned", lambda *_: {}),
        ),
    },
}  # fmt: skip


TELLING = {"sets that open go before the tables": 45}  # the first life in which it can be seen


def caught(fabric: Fabric, look: Callable[[Life], str], but: Callable[[World], World], first: int) -> int | None:
    for seed in range(first, first + 60):  # always the same, so that this proof does not depend on luck
        life = Life(fabric, seed, but)
        if any(look(life) for _ in range(STEPS)):
            return seed
    return None


def test_wrong_orders_are_seen(fabric: Fabric) -> None:
    found = {}
    for name, patches in WRONG[fabric.kind].items():
        with pytest.MonkeyPatch.context() as patch:
            for each in patches:
                patch.setattr(*each)
            found[name] = caught(fabric, Life.step, same, TELLING.get(name, 0))
    print(f"{fabric.kind}: in which life each is seen: {found}")
    assert None not in found.values(), found


# -- who never stops sending ------------------------------------------------------------------------------------------


def plain(world: World) -> World:
    """Without sets of intervals: what they hold changes with nf_tables' commit, but not in the moment of the rules."""
    def peer(peer: Peer) -> Peer:
        return replace(peer, nets=peer.nets[:1], not_nets=peer.not_nets[:1], ports=peer.ports[:1],
                       not_ports=peer.not_ports[:1])  # fmt: skip

    def rule(rule: Rule) -> Rule:
        return replace(rule, source=peer(rule.source), destination=peer(rule.destination))

    def rules(item: Any) -> Any:
        return replace(item, ingress=tuple(map(rule, item.ingress)), egress=tuple(map(rule, item.egress)))

    return replace(
        world,
        endpoints=[replace(e, prefixes=()) for e in world.endpoints],
        policies=[rules(p) for p in world.policies],
        profiles=[rules(p) for p in world.profiles],
        sets=[replace(s, nets=tuple(n for n in s.nets if n.length == 8 * len(n.network))) for s in world.sets],
    )


def under_fire(life: Life) -> tuple[int, int]:
    """To the next world while packets that neither allows are sent as fast as they can: sent, passed."""
    fabric, new = life.fabric, life.next()
    either = Allowed(life.world), Allowed(new)
    shots = forbidden(life.world, new, life.chance)
    shots = steady(shots, lambda shot: not any(allowed(shot) for allowed in either))
    life.world = new
    with fabric.home.entered():
        if not shots:
            fabric.change(Case(life.seed, new))
            return 0, 0
        list(fabric.heard())
        with Sender(fabric, shots) as sender:
            sender.twice()
            fabric.change(Case(life.seed, new))
            sender.twice()
        return sender.sent, sender.passed()


@pytest.mark.timeout(1200 if FULL else 300)
def test_a_sender_that_never_stops_gets_nothing_through(fabric: Fabric) -> None:
    print(f"SLASH32_SEED={SEED}")
    total = changes = 0
    seed = SEED
    while changes < SENT:
        life = Life(fabric, seed, plain)
        for _ in range(STEPS):
            sent, passed = under_fire(life)
            assert passed < 3, f"seed {seed}, {fabric.kind}: {passed} of {sent} packets passed"
            total, changes = total + sent, changes + bool(sent)
        seed += 1
    print(f"{fabric.kind}: {total} packets while {changes} tempting changes were made")


def test_a_sender_sees_what_is_not_one_transaction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kernel, "_filter", one_by_one)
    with one_cpu():
        fabric = Fabric(NFTABLES)
        assert caught(fabric, lambda life: "seen" if under_fire(life)[1] >= 3 else "", plain, 16) is not None
        fabric.close()
