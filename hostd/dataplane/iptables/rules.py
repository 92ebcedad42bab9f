# Owns: the translation of hostd.compiler.ruleset's rules into lines of iptables, for one IP version at a time. Pure.
# What one line cannot say becomes several that exclude each other, or a constant set of its own.
from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product

from slash32.net import Prefix

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
from ..nft.intervals import Interval, merge, prefix_interval, prefixes_of
from . import lines as words
from .lines import ACCEPT, DROP, RETURN, Line, safe_comment
from .names import constant_set, kernel_set

_SLOTS = 15  # ports that one multiport match takes; a range is two
_LOG_RATE = "10/second", "20"
_VERSION = {SetKind.ADDR4: 4, SetKind.NET4: 4, SetKind.ADDR6: 6, SetKind.NET6: 6}
_ICMP = {4: 1, 6: 58}
_WITH_PORTS = frozenset((6, 17, 132, 136, 33))

_Alternatives = Sequence[tuple[str, ...]]


@lru_cache(maxsize=65536)
def lines(rule: Rule, version: int) -> tuple[Line, ...]:
    """None of them where the rule is about the other IP version, or nothing can match."""
    if any(_version(m) not in (0, version) for m in rule.matches):
        return ()
    head, nets = _protocol(rule), _nets(rule)
    if head is None or nets is None:
        return ()
    parts: list[_Alternatives] = [[head], *([_net(asked)] for asked in nets)]
    for match in sorted(rule.matches, key=_rank):
        if not isinstance(match, InNets):
            parts.append(_alternatives(match, version))
    act, comment = _act(rule), safe_comment(rule.comment)
    return tuple(Line(tuple(w for part in chosen for w in part), act, comment) for chosen in product(*parts))


def fingerprints(rules: Sequence[Rule], versions: Sequence[int] = (4, 6)) -> tuple[str, ...]:
    """Of a whole chain, as read() gives it back."""
    return tuple(f"{version} {line.fingerprint}" for version in versions for r in rules for line in lines(r, version))


def constants(rule: Rule, version: int) -> Iterator[tuple[str, tuple[Prefix, ...]]]:
    """The sets of its own that a rule needs, and their members."""
    if any(isinstance(m, InNets) for m in rule.matches) and lines(rule, version):
        for asked in _nets(rule) or ():
            if len(asked.nets) > 1:
                yield constant_set(asked.nets), asked.nets


def polarity(rule: Rule) -> Iterator[tuple[str, int]]:
    """For each set that a rule asks: +1, more members let more pass; -1, less; 0, either may be."""
    if isinstance(rule.verdict, Log) or rule.verdict is Verdict.CONTINUE:
        return
    sense = {Verdict.ACCEPT: 1, Verdict.DROP: -1}.get(rule.verdict, 0) if isinstance(rule.verdict, Verdict) else 0
    for match in rule.matches:
        if isinstance(match, InSet):
            yield match.set, -sense if match.negate else sense


def target(rule: Rule) -> str | None:
    return rule.verdict.chain if isinstance(rule.verdict, Jump | Goto) else None


def _act(rule: Rule) -> tuple[str, ...]:
    match rule.verdict:
        case Jump(chain):
            return words.jump(chain)
        case Goto(chain):
            return words.goto(chain)
        case Log(tag):
            rate, burst = _LOG_RATE
            limit = ("-m", "limit", "--limit", rate, "--limit-burst", burst)
            return (*limit, "-j", "NFLOG", "--nflog-group", str(LOG_GROUP), "--nflog-prefix", tag)
        case Verdict.ACCEPT:
            return ACCEPT
        case Verdict.DROP:
            return DROP
        case Verdict.RETURN:
            return RETURN
    return ()


def _rank(match: Match) -> tuple[str, bool]:
    return type(match).__name__, getattr(match, "side", Side.SRC) is Side.DST


def _version(match: Match) -> int:
    match match:
        case Family(version) | IcmpIs(version):
            return version
        case InSet():
            return _VERSION[match.kind]
        case InNets():
            return match.nets[0].version
    return 0


def _protocol(rule: Rule) -> tuple[str, ...] | None:
    """Of all that is said about it, one match; None: it contradicts itself."""
    is_ = {m.number for m in rule.matches if isinstance(m, Protocol) and not m.negate}
    is_ |= {_ICMP[m.version] for m in rule.matches if isinstance(m, IcmpIs)}
    is_not = {m.number for m in rule.matches if isinstance(m, Protocol) and m.negate}
    if len(is_) > 1 or is_ & is_not or 0 in is_:
        return None
    if is_:
        return ("-p", str(*is_))
    if not is_not:
        return ()
    if len(is_not) > 1:
        raise ValueError("a rule excludes at most one protocol")
    return ("!", "-p", str(*is_not))


def _alternatives(match: Match, version: int) -> _Alternatives:
    match match:
        case Ports(side, ranges, negate):
            return _ports(side is Side.SRC, merge(ranges), negate)
        case InSet(side, name, _, negate):
            return [words.in_set(kernel_set(name), side.value, negate)]
        case IcmpIs(_, icmp, negate):
            return [words.icmp(version, icmp.type, icmp.code, negate)]
        case Interface(incoming, name):
            return [words.named(incoming, name)]
    return [()]


def _nets(rule: Rule) -> list[InNets] | None:
    """Of all that is said of a side's address, one match; None: nothing is left."""
    found = []
    for side in Side:
        asked = [m for m in rule.matches if isinstance(m, InNets) and m.side is side]
        if not asked:
            continue
        first = asked[0].nets[0]
        top = 8 * len(first.network)
        inside = [_intervals(m) for m in asked if not m.negate]
        outside = merge(i for m in asked if m.negate for i in _intervals(m))
        left = [(0, (1 << top) - 1)]
        for some in inside:
            left = _without(left, _without([(0, (1 << top) - 1)], some))
        negate = not inside and len(outside) > 0
        left = outside if negate else _without(left, outside)
        if not left or (negate and left == [(0, (1 << top) - 1)]):
            return None
        nets = tuple(prefix for interval in left for prefix in prefixes_of(interval, top // 8))
        found.append(InNets(side, nets, negate))
    return found


def _intervals(match: InNets) -> list[Interval]:
    return merge(prefix_interval(n) for n in match.nets)


def _without(some: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """Both sorted and disjoint."""
    found = []
    for first, last in some:
        for start, end in others:
            if start <= last and end >= first:
                if start > first:
                    found.append((first, start - 1))
                first = max(first, end + 1)
        if first <= last:
            found.append((first, last))
    return found


def _net(asked: InNets) -> tuple[str, ...]:
    if len(asked.nets) > 1:
        return words.in_set(constant_set(asked.nets), asked.side.value, asked.negate)
    return words.net(asked.side is Side.SRC, asked.nets[0], asked.negate)


def _ports(source: bool, ranges: Sequence[Interval], negate: bool) -> _Alternatives:
    if not ranges:
        raise ValueError("a Ports match needs at least one port")
    pieces: list[list[str]] = [[]]
    free = _SLOTS
    for first, last in ranges:
        needs = 1 if first == last else 2
        if needs > free:
            pieces.append([])
            free = _SLOTS
        pieces[-1].append(str(first) if first == last else f"{first}:{last}")
        free -= needs
    matches = [words.ports(source, ",".join(piece), negate) for piece in pieces]
    return [tuple(w for m in matches for w in m)] if negate else matches
