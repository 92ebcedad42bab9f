# Owns: the way of a packet through the tiers of one class of endpoints, as a list of steps, and the chains that it
# becomes. A tier that a Pass leaves is a chain of its own; so is what is left of the list where a staged policy has
# decided, and only what is enforced is asked on. Pure.
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from slash32.policy import Action, Direction, Policy, Tier
from slash32.policy import Rule as PolicyRule

from .desired import StagedPoint
from .names import class_chain, policy_chain, profile_chain, tail_chain, tier_chain
from .ruleset import Goto, Jump, Rule, Verdict

_PASS = PolicyRule(Action.PASS)
_TIER, _TAIL, _STAGED_TIER = 1, 2, 4  # how high they stand; staged policies above their tails: 3


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
    def tier(self, walk: Walk) -> str: ...
    def staged(self, policy: Policy, then: Walk) -> str: ...
    def parts(self, policy: Policy, direction: Direction) -> Iterable[Rule]: ...


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
    return tail_chain(_TAIL, walk.direction, *_identity(walk))


def tier_name(walk: Walk) -> str:
    """Of its first tier. Where that holds staged policies, it is also a matter of what comes later."""
    first = walk.stops[0]
    if any(policy.staged for policy in first.policies):
        return tier_chain(_STAGED_TIER, walk.direction, *_identity(walk))
    return tier_chain(_TIER, walk.direction, *_identity(Walk(walk.direction, (first,), None)))


def lines(walk: Walk, book: Book) -> Iterator[Line]:
    """The chain of this walk. It always ends with a verdict."""
    for at, stop in enumerate(walk.stops):
        if leaves(stop, walk.direction):
            yield Line(Rule((), Jump(book.tier(walk._replace(stops=walk.stops[at:])))))
            continue
        yield from _policies(walk, at, book)
        if stop.deny and not _left(stop, walk.direction):
            yield _end(walk, at, book)
            return
    if walk.profiles is None:
        yield Line(Rule((), Verdict.ACCEPT, "no policy denies it"))
        return
    for name in walk.profiles:
        yield Line(Rule((), Jump(profile_chain(name, walk.direction))))
    yield Line(Rule((), Verdict.DROP, "no policy allows it"))


def tier_lines(walk: Walk, book: Book) -> Iterator[Line]:
    """The chain of its first tier: who jumps here goes on with the next one. So however many tiers there are, jumps
    are nested no deeper."""
    yield from _policies(walk, 0, book)
    stop = walk.stops[0]
    if stop.deny and not _left(stop, walk.direction):
        yield _end(walk, 0, book)


def leaves(stop: Stop, direction: Direction) -> bool:
    """A policy of it passes on what it chooses, so that there must be a chain to get out of."""
    return any(in_parts(policy, direction) for _, policy in _asked(stop, direction))


def _policies(walk: Walk, at: int, book: Book) -> Iterator[Line]:
    stop, direction = walk.stops[at], walk.direction
    for number, policy in _asked(stop, direction):
        if policy.staged:
            yield Line(Rule((), Jump(book.staged(policy, _rest(walk, at, number)))))
        elif in_parts(policy, direction):
            yield from map(Line, book.parts(policy, direction))
        else:
            yield Line(Rule((), Jump(policy_chain(policy.name, direction))))


def _asked(stop: Stop, direction: Direction) -> Iterator[tuple[int, Policy]]:
    """With their numbers: all, or those up to the first that lets nothing by to the next."""
    for number, policy in enumerate(stop.policies):
        yield number, policy
        if _all_leave(policy, direction):
            return


def _left(stop: Stop, direction: Direction) -> bool:
    """Nothing comes to its end."""
    return any(_all_leave(policy, direction) for policy in stop.policies)


def _all_leave(policy: Policy, direction: Direction) -> bool:
    return not policy.staged and _PASS in policy.rules(direction)


def passes_on(policy: Policy, direction: Direction) -> bool:
    return any(rule.action is Action.PASS for rule in policy.rules(direction))


def lets_pass(policy: Policy, direction: Direction) -> bool:
    """Whatever it does not decide passes on: falling out of its chain says the same, and it is asked as others are."""
    rules = policy.rules(direction)
    first = next((at for at, rule in enumerate(rules) if rule.action is Action.PASS), len(rules))
    return rules[-1:] == (_PASS,) and all(rule.action is Action.PASS for rule in rules[first:])


def in_parts(policy: Policy, direction: Direction) -> bool:
    return not policy.staged and passes_on(policy, direction) and not lets_pass(policy, direction)


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
