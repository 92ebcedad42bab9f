# Three verdicts, one answer: what the model says of a packet and what both packet filters do with it, in random worlds
# that are made, told and loaded by the product's own dispatcher and hostd. And the proof that it would be seen if the
# compiler were wrong.
from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from dataclasses import replace

import pytest
from fabric import Fabric, Unsettled, one_cpu
from findings import as_yaml, differs, explain_line, report, shrunk
from three import KINDS, Figures, outcomes, sequel
from verdict_bugs import BUGS, IPTABLES_BUGS, NO_BUGS, SKELETON_BUGS, Bug, patched
from verdict_packets import PACKETS, WELL, Case, Model, case

from hostd.dataplane.filter import IPTABLES, NFTABLES
from slash32.documents import load_yaml
from slash32.verdict import World
from slash32.worldfile import read_world

FULL = os.environ.get("SLASH32_COUNTS") == "full"
SEEDS = 2000 if FULL else 150  # of two worlds each
SEED = int(os.environ.get("SLASH32_SEED", "0")) or secrets.randbelow(10**9)


@pytest.mark.timeout(1200 if FULL else 300)
def test_the_kernels_do_what_the_model_says() -> None:
    print(f"SLASH32_SEED={SEED}")
    figures = Figures()
    for one in outcomes(range(SEED, SEED + SEEDS)):
        assert not one.finding, one.finding
        figures.add(one)
    print(figures)
    assert figures.worlds == 2 * SEEDS
    assert all(WELL[0] <= share <= WELL[1] for share in figures.allowed)
    assert sum(figures.deciding) / SEEDS > 0.35, f"too many rules decide nothing: {figures}"


# -- bugs that it must see --------------------------------------------------------------------------------------------

AGAINST = 60  # worlds at most: in each of them such a bug is likely to be seen
_cases: dict[int, tuple[Case, Case]] = {}


def cases(seed: int) -> tuple[Case, Case]:
    """Of fixed seeds, so that this proof does not depend on luck."""
    if seed not in _cases:
        first = case(seed)
        _cases[seed] = first, sequel(first)
    return _cases[seed]


@pytest.fixture(scope="module", params=KINDS)
def fabric(request: pytest.FixtureRequest) -> Iterator[Fabric]:
    with one_cpu():
        made = Fabric(request.param)
        yield made
        made.close()


def seen(fabric: Fabric, seed: int) -> bool:
    first, second = cases(seed)
    try:
        return bool(fabric.wrong(first) or fabric.wrong_after(second))
    except Unsettled:
        return True


def caught(fabric: Fabric, bug: Bug) -> int | None:
    with patched(bug):
        return next((seed for seed in range(AGAINST) if seen(fabric, seed)), None)


def bugs_of(kind: str) -> dict[str, Bug]:
    return {**BUGS, **IPTABLES_BUGS} if kind == IPTABLES and FULL else IPTABLES_BUGS if kind == IPTABLES else BUGS


def test_bugs_are_seen(fabric: Fabric) -> None:
    found = {name: caught(fabric, bug) for name, bug in bugs_of(fabric.kind).items()}
    print(f"{fabric.kind}: {len(found)} bugs, and in which world each is seen: {found}")
    assert [name for name, seed in found.items() if seed is None] == []


def test_bugs_of_the_skeleton_are_seen() -> None:
    for name, bug in SKELETON_BUGS.items():
        with one_cpu(), patched(bug):
            made = Fabric(NFTABLES)
            assert any(seen(made, seed) for seed in range(AGAINST)), name
            made.close()


def test_what_is_no_bug_is_not_seen(fabric: Fabric) -> None:
    for name, change in NO_BUGS.items():
        with patched(change):
            assert not any(seen(fabric, seed) for seed in range(6)), name


# -- findings ---------------------------------------------------------------------------------------------------------


def test_a_finding_is_made_small_and_can_be_asked_offline(fabric: Fabric) -> None:
    if fabric.kind == IPTABLES and not FULL:
        pytest.skip("with counts in full")
    with patched(BUGS["notSelector is forgotten"]):
        _made_small(fabric)


def _made_small(fabric: Fabric) -> None:
    seed = next(seed for seed in range(AGAINST) if fabric.wrong(cases(seed)[0]))
    asked = cases(seed)[0]
    shot = fabric.wrong(asked)[0]
    small = shrunk(asked.world, lambda world: differs(fabric, seed, world, shot))
    rules = [rule for p in (*small.policies, *small.profiles) for rule in (*p.ingress, *p.egress)]
    assert len(rules) <= 3 and len(small.policies) + len(small.profiles) <= 3, as_yaml(small)
    again = read_world(load_yaml(as_yaml(small), "world.yaml"))
    assert Model(_placed(again)).judged(shot).word == Model(small).judged(shot).word
    said = report(fabric, [asked], [shot], [fabric])
    assert "slash32 explain --offline" in said and "model" in said and "kernel" in said and "abstract" in said
    assert next(explain_line(shot)) in said


def _placed(world: World) -> World:
    return replace(world, places=dict(world.places))


def test_a_world_is_what_its_seed_says() -> None:
    one, again = case(7), case(7)
    assert one == again and one != case(8)
    assert len(one.shots) == PACKETS and WELL[0] <= one.allowed <= WELL[1]


def test_worlds_are_such_as_an_operator_may_write() -> None:
    for seed in range(40 if FULL else 10):
        world = cases(seed)[1].world
        again = read_world(load_yaml(as_yaml(world), "world.yaml"))
        assert (again.policies, again.profiles, again.tiers, again.sets, again.host_endpoints) == tuple(
            tuple(some) for some in (world.policies, world.profiles, world.tiers, world.sets, world.host_endpoints)
        )
        assert list(again.endpoints) == list(world.endpoints) and again.places == world.places
