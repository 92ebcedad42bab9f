# Owns: the way of a packet through the tiers of one class of endpoints, as a list of steps, and the chains that it
# becomes. A tail of the list is a chain of its own where something goes on there: after a Pass, and after a staged
# policy has decided. Pure.
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from slash32.policy import Action, Direction, Policy, Tier
from slash32.policy import Rule as PolicyRule

from .desired import StagedPoint
from .names import class_chain, policy_chain, profile_chain, tail_chain
from .ruleset import Goto, Jump, Rule, Verdict

_PASS = PolicyRule(Action.PASS)


class Stop(NamedTuple):
    """What is still to be asked of one tier."""

    tier: str
    deny: bool  # its default action; else Pass
    counts: bool  # an enforced policy of it applies, asked already or not; else only staged ones do
    policies: tuple[Policy, ...]


class Walk(NamedTuple):
    """Canonical: what cannot be reached is not in it, so that those that share what can share the chain."""

    direction: Direction
    stops: tuple[Stop, ...]
    profiles: tuple[str, ...] | None  # asked at the end, in order, and then it is dropped; None: at the end it passes


class Book(Protocol):
    """Where chains are written; each answers with the chain's name."""

    def tail(self, walk: Walk) -> str: ...
    def variant(self, policy: Policy, then: Walk) -> str: ...
    def staged(self, policy: Policy, then: Walk) -> str: ...


class Line(NamedTuple):
    """A rule of a chain, and what it counts."""

    rule: Rule
    counts: StagedPoint | None = None


def walk_of(
    steps: Sequence[tuple[Tier, Sequence[Policy]]], direction: Direction, profiles: tuple[str, ...] | None
) -> Walk:
    """`steps`: with staged policies, as slash32.verdict.steps gives them."""
    stops = (
        Stop(tier.name, tier.default_action is Action.DENY, not all(p.staged for p in policies), tuple(policies))
        for tier, policies in steps
    )
    return _canonical(Walk(direction, tuple(stops), profiles))


def class_name(walk: Walk) -> str:
    return class_chain(walk.direction, *_identity(walk))


def tail_name(walk: Walk) -> str:
    """Staged policies stand above the walk without them, and that above any shorter one."""
    staged = any(policy.staged for stop in walk.stops for policy in stop.policies)
    return tail_chain(4 * len(walk.stops) + (3 if staged else 1), walk.direction, *_identity(walk))


def lines(walk: Walk, book: Book) -> Iterator[Line]:
    """The chain of this walk. It always ends with a verdict."""
    for at, stop in enumerate(walk.stops):
        for number, policy in enumerate(stop.policies):
            yield Line(Rule((), Jump(_asked(walk, at, number, book))))
            if not policy.staged and lets_pass(policy, walk.direction):
                break
        else:
            if stop.deny:
                yield _end(walk, at, book)
                return
    if walk.profiles is None:
        yield Line(Rule((), Verdict.ACCEPT, "no policy denies it"))
        return
    for name in walk.profiles:
        yield Line(Rule((), Jump(profile_chain(name, walk.direction))))
    yield Line(Rule((), Verdict.DROP, "no policy allows it"))


def _asked(walk: Walk, at: int, number: int, book: Book) -> str:
    policy, direction = walk.stops[at].policies[number], walk.direction
    if policy.staged:
        return book.staged(policy, _rest(walk, at, number))
    if passes_on(policy, direction) and not lets_pass(policy, direction):
        return book.variant(policy, _canonical(walk._replace(stops=walk.stops[at + 1 :])))
    return policy_chain(policy.name, direction)


def passes_on(policy: Policy, direction: Direction) -> bool:
    return any(rule.action is Action.PASS for rule in policy.rules(direction))


def lets_pass(policy: Policy, direction: Direction) -> bool:
    """Whatever it does not decide passes on: falling out of its chain says the same, and it needs no chains of its own
    for those who go on. What follows in its tier is not asked."""
    rules = policy.rules(direction)
    first = next((at for at, rule in enumerate(rules) if rule.action is Action.PASS), len(rules))
    return rules[-1:] == (_PASS,) and all(rule.action is Action.PASS for rule in rules[first:])


def _end(walk: Walk, at: int, book: Book) -> Line:
    """Of a tier that denies by default; where only staged policies of it apply, that is counted."""
    stop = walk.stops[at]
    comment = f"tier {stop.tier[:40]}: default Deny"
    if stop.counts:
        return Line(Rule((), Verdict.DROP, comment))
    point = StagedPoint("", stop.tier, walk.direction, None)
    last = len(stop.policies) - 1
    return Line(Rule((), Goto(book.tail(_rest(walk, at, last))), f"staged: {comment}", counted=True), point)


def _rest(walk: Walk, at: int, number: int) -> Walk:
    """What is enforced after that policy of that stop."""
    stop = walk.stops[at]
    left = stop._replace(policies=_enforced(stop.policies[number + 1 :]))
    later = [s._replace(policies=_enforced(s.policies)) for s in walk.stops[at + 1 :] if s.counts]
    first = [left] if left.counts and (left.policies or left.deny) else []
    return _canonical(walk._replace(stops=(*first, *later)))


def _enforced(policies: Sequence[Policy]) -> tuple[Policy, ...]:
    return tuple(policy for policy in policies if not policy.staged)


def _canonical(walk: Walk) -> Walk:
    for at, stop in enumerate(walk.stops, 1):
        passing = any(passes_on(policy, walk.direction) for policy in stop.policies if not policy.staged)
        if stop.counts and stop.deny and not passing:
            return walk._replace(stops=walk.stops[:at], profiles=())
    return walk


def _identity(walk: Walk) -> Iterator[str]:
    """Of what the walk asks, not of what that says: a policy that changes does not change the class."""
    for stop in walk.stops:
        yield f"{'tier' if stop.counts else 'only staged'} {stop.tier}"
        yield from (f"{'staged' if policy.staged else 'policy'} {policy.name}" for policy in stop.policies)
    yield "accept" if walk.profiles is None else "profiles"
    yield from walk.profiles or ()
