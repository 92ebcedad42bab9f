# Owns: the translation of the abstract rules into statements. Pure. Matches are put in one order, cheapest first
# and what others depend on before them: all of them must hold, so their order has no meaning.
from __future__ import annotations

from functools import lru_cache
from typing import TypeVar

from slash32.net import version

from ...compiler.ruleset import (
    LOG_GROUP,
    Family,
    Goto,
    IcmpIs,
    InNets,
    InSet,
    Interface,
    Jump,
    Log,
    Match,
    Ports,
    Protocol,
    Rule,
    SetKind,
    Side,
    Verdict,
)
from .intervals import merge, prefix_interval, prefixes_of
from .statements import Draft, Statement

_T = TypeVar("_T")
_RANK = {Interface: 0, Family: 1, Protocol: 2, IcmpIs: 3, Ports: 4, InNets: 5, InSet: 6}


def _rank(match: Match) -> tuple[int, bool, bool]:
    """Source before destination: nft merges neighbours of one header into one load, and lists them in this order."""
    if isinstance(match, Interface):
        return _RANK[Interface], not match.incoming, False
    negative = not isinstance(match, Family) and match.negate
    return _RANK[type(match)], negative, getattr(match, "side", Side.SRC) is Side.DST


@lru_cache(maxsize=65536)
def statement(rule: Rule) -> Statement:
    draft = Draft()
    for match in rule.matches:
        if isinstance(match, IcmpIs):
            draft.family(match.version)
    for match in sorted(rule.matches, key=_rank):
        _match(draft, match)
    if rule.counted:
        draft.count()
    _verdict(draft, rule)
    return draft.done(rule.comment)


def _verdict(draft: Draft, rule: Rule) -> None:
    match rule.verdict:
        case Jump(chain):
            draft.jump(chain)
        case Goto(chain):
            draft.goto(chain)
        case Log(tag):
            draft.log(tag, LOG_GROUP)
        case Verdict.ACCEPT:
            draft.accept()
        case Verdict.DROP:
            draft.drop()
        case Verdict.RETURN:
            draft.give_back()
        case Verdict.CONTINUE if not rule.counted:  # a rule of nothing is none that nft can list
            draft.go_on()


def fingerprint(rule: Rule) -> str:
    """Of what the kernel is told for this rule, and its comment: what read() gives back for it."""
    return statement(rule).fingerprint


def _match(draft: Draft, match: Match) -> None:
    if isinstance(match, Family):
        draft.family(match.version)
    elif isinstance(match, Protocol):
        draft.protocol(match.number, match.negate)
    elif isinstance(match, IcmpIs):
        draft.icmp(match.version, match.icmp.type, match.icmp.code, match.negate)
    elif isinstance(match, InSet):
        family = 4 if match.kind in (SetKind.ADDR4, SetKind.NET4) else 6
        draft.in_set(family, match.side is Side.SRC, match.set, match.negate)
    elif isinstance(match, Interface):
        draft.interface_name(match.incoming, match.name)
    elif isinstance(match, Ports):
        draft.ports(match.side is Side.SRC, merge(_given(match, match.ranges)), match.negate)
    else:
        _nets(draft, match)


def _given(match: Match, values: tuple[_T, ...]) -> tuple[_T, ...]:
    if not values:
        raise ValueError(f"a {type(match).__name__} match needs at least one value")
    return values


def _nets(draft: Draft, match: InNets) -> None:
    source, first = match.side is Side.SRC, _given(match, match.nets)[0]
    if len({n.version for n in match.nets}) > 1:
        raise ValueError("an InNets match holds prefixes of one family only")
    merged = merge(prefix_interval(n) for n in match.nets)
    alone = list(prefixes_of(merged[0], len(first.network))) if len(merged) == 1 else []
    if len(alone) == 1:
        draft.in_prefix(source, alone[0], match.negate)
    else:
        draft.in_intervals(version(first.network), source, merged, match.negate)
