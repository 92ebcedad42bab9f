# Random worlds, compiled: the abstract packet filter says of random packets what the specification says, logs what it
# logs, and counts what staged policies would have dropped.
from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hostd.compiler import compile, walk
from hostd.compiler.desired import ClassChains
from hostd.compiler.host_chains import in_order
from hostd.compiler.ruleset import HOST_GUESTS, Family, Goto, Rule, Verdict
from hostd.revocation.judge import Judgement
from slash32 import verdict
from slash32.policy import Action, Direction
from slash32.verdict import Judge, Note, Packet, Stage, World
from tests.abstract_worlds import Filter, packets, worlds

FULL = os.environ.get("SLASH32_COUNTS") == "full"
PACKETS = 40
ENDS = {
    "egress": Direction.EGRESS, "host_egress": Direction.EGRESS,
    "ingress": Direction.INGRESS, "host_ingress": Direction.INGRESS,
}  # fmt: skip
GUESTS = ("egress", "ingress")
CALC, CHAINS, WALK, COMPILE = (f"hostd.compiler.{name}" for name in ("calc", "chains", "walk", "compile"))


def wrong(world: World, seed: int) -> Iterable[str]:
    made, model = Filter.of(world), Judge(world)
    for packet in packets(seed, PACKETS):
        yield from _compared(made, model, packet)


def _compared(made: Filter, model: Judge, packet: Packet) -> Iterable[str]:
    said, notes = model.walk(packet)
    asked = made.ask(model.world, packet)
    for end, direction in ENDS.items():
        stage, found = getattr(said, end), asked.get(end)
        if found is None or (stage is not None and stage.kind == "failsafe"):
            continue  # another host's, or the skeleton's
        if end == "host_ingress" and stage is not None and stage.domain == "h1":
            if made.desired.chains[HOST_GUESTS]:
                yield f"{packet}: guests may speak to a host that has no host endpoint for all"
            continue
        if _word(found) != _allowed(stage):
            yield f"{packet} {end}: {found} is not {stage}"
        noted = {n for n in notes if n.direction is direction and n.domain.startswith("guest") is (end in GUESTS)}
        yield from _noted(made, found, noted, f"{packet} {end}")


def _word(found: Judgement) -> bool:
    return found.accept is not False


def _allowed(stage: Stage | None) -> bool:
    return stage is None or stage.allowed


def _noted(made: Filter, found: Judgement, said: set[Note], where: str) -> Iterable[str]:
    logs = {(p.tier, p.name, p.rule) for p in (made.desired.logs[tag] for tag in found.logs)}
    if logs != {(n.tier, n.policy, n.rule) for n in said if n.what == "log"} or len(logs) < len(found.logs):
        yield f"{where}: logs {logs}, not {said}"
    points = [made.desired.staged[at] for at in found.counted]
    counted = {(p.tier, p.policy, p.rule) for p in points}
    if counted != {(n.tier, n.policy, n.rule) for n in said if n.what == "would drop"} or len(points) > 1:
        yield f"{where}: counted {points}, not {said}"


SETTINGS = settings(
    max_examples=6000 if FULL else 120, deadline=None, suppress_health_check=list(HealthCheck), database=None
)


@SETTINGS
@given(worlds(), st.integers(0, 1000))
def test_the_abstract_filter_says_what_the_model_says(world: World, seed: int) -> None:
    assert [*wrong(world, seed)] == []


# -- bugs that it must see --------------------------------------------------------------------------------------------

_rules, _rest, _walk, _parts = compile.compile_rules, walk._rest, walk.walk_of, compile.in_parts
_asks = compile._asks_family


def steps(change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda *args, **named: change(verdict.steps(*args, **named))


def rules(change: Callable[[Rule], Rule]) -> Callable[..., Any]:
    return lambda *args: tuple(each._replace(rule=change(each.rule)) for each in _rules(*args))


def instead(rule: Rule, of_pass: Verdict) -> Rule:
    return rule._replace(verdict=of_pass) if rule.verdict is Verdict.RETURN else rule


def become(**verdicts: Any) -> Callable[..., Any]:
    """Rules of that name of verdict say this instead."""
    return rules(lambda r: r._replace(verdict=verdicts.get(type(r.verdict).__name__, r.verdict)))


def turned(tiers: Any) -> Any:
    return [(tier, policies[::-1]) for tier, policies in tiers]


def always(action: Action) -> Callable[[Any], Any]:
    return lambda tiers: [(replace(tier, default_action=action), policies) for tier, policies in tiers]


BUGS: dict[str, tuple[str, Any]] = {
    "policies run backwards": (f"{CALC}.steps", steps(turned)),
    "tiers run backwards": (f"{CALC}.steps", steps(lambda tiers: tiers[::-1])),
    "only the first tier is asked": (f"{CALC}.steps", steps(lambda tiers: tiers[:1])),
    "every tier denies": (f"{CALC}.steps", steps(always(Action.DENY))),
    "every tier passes": (f"{CALC}.steps", steps(always(Action.PASS))),
    "egress is ingress": (f"{CALC}.ClassChains", lambda egress, ingress: ClassChains(ingress, egress)),
    "Pass denies": (f"{CHAINS}.compile_rules", rules(lambda r: instead(r, Verdict.DROP))),
    "Pass is ignored": (f"{CHAINS}.compile_rules", rules(lambda r: instead(r, Verdict.CONTINUE))),
    "who may pass on is taken for who lets all pass": (f"{WALK}.lets_pass", walk.passes_on),
    "Log decides": (f"{CHAINS}.compile_rules", become(Log=Verdict.ACCEPT)),
    "Pass leads to what comes next in the tier": (f"{WALK}.leaves", lambda *_: False),
    "a tier that is left has no end": (f"{WALK}._left", walk.leaves),
    "of a policy in parts the first is asked": (
        f"{CHAINS}.in_parts", lambda *args: (p := _parts(*args))._replace(asked=p.asked[:2]),
    ),
    "profiles are forgotten": (f"{CALC}.walk_of", lambda found, way, _: _walk(found, way, ())),
    "what is forwarded is asked as what is local": (f"{CALC}.walk_of", lambda f, way, p: _walk(f, way, p or ())),
    "staged policies are enforced": (f"{CHAINS}.only_counting", lambda found, _: compile.without_pass(found)),
    "staged policies count nothing": (
        f"{CHAINS}.only_counting", lambda found, there: tuple(r._replace(verdict=Goto(there)) for _, r in found),
    ),
    "staged policies count on": (f"{WALK}._enforced", tuple),
    "after a staged policy one is left out": (f"{WALK}._rest", lambda w, at, number: _rest(w, at, number + 1)),
    "the one for all interfaces goes first": (f"{CALC}.in_order", lambda found: in_order(found)[::-1]),
    "IPv6 is forgotten": (
        f"{CHAINS}.compile_rules", lambda *a: tuple(e for e in _rules(*a) if Family(6) not in e.rule.matches),
    ),
    "ICMPv6 is asked of IPv4, too": (
        f"{COMPILE}._asks_family", lambda rule: _asks(replace(rule, protocol=None)),
    ),
    "a rule's number is off by one": (
        f"{CHAINS}.compile_rules", lambda *args: tuple(e._replace(number=e.number + 1) for e in _rules(*args)),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def known_worlds() -> list[tuple[World, int]]:
    """Always the same, so that this proof does not depend on luck."""
    found: list[tuple[World, int]] = []

    @settings(SETTINGS, max_examples=500, derandomize=True, phases=[Phase.generate])
    @given(worlds(), st.integers(0, 1000))
    def gather(world: World, seed: int) -> None:
        found.append((world, seed))

    gather()
    return found


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_seen(bug: str, known_worlds: list[tuple[World, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BUGS[bug])
    assert any(_seen(*each) for each in known_worlds)


def _seen(world: World, seed: int) -> bool:
    try:
        return any(wrong(world, seed))
    except (ValueError, RecursionError):  # chains in a circle, or too deep
        return True
