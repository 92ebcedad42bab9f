# Owns: what the abstract packet filter says of one packet, by reading it as the kernel would: it judges established
# flows (hostd.revocation.revoke) and answers `explain`. Pure.
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from slash32.net import Address, Prefix
from slash32.verdict import Packet

from ..compiler.ruleset import (
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
    Side,
    Verdict,
)

_ICMP = {4: 1, 6: 58}
_DEPTH = 16  # nested jumps: what the kernel takes, too


class Ways(NamedTuple):
    """The interfaces that a packet comes in through and goes out by; "": none, or nobody asks."""

    incoming: str = ""
    outgoing: str = ""


NO_WAYS = Ways()


class Judgement(NamedTuple):
    """`accept` is None where the packet fell out of the chain undecided; else `rule` at `position` of `chain` decided.
    `logs` are the tags of Log rules on the way, `counted` the counted rules that matched, both in order."""

    accept: bool | None
    rule: Rule | None = None
    chain: str = ""
    position: int = -1
    logs: tuple[str, ...] = ()
    counted: tuple[tuple[str, int], ...] = ()

    @property
    def keep(self) -> bool:
        """It was accepted, and stays so when the rule is taken away."""
        return bool(self.accept and self.rule is not None and self.rule.keep)


_Test = Callable[[Packet, Ways], bool]
_DECIDED, _ON, _SAID, _JUMP, _GOTO, _BACK = range(6)


class _Step(NamedTuple):
    """A rule, ready to be asked. `word`: the chain it leads to, or what it logs."""

    tests: tuple[_Test, ...]
    then: int
    word: str
    counted: bool


_Read = tuple[_Step, ...]


class View:
    """The chains and sets of one moment. Each chain is read once: further packets cost comparisons only."""

    __slots__ = ("_read", "chains", "contains")

    def __init__(self, chains: Mapping[str, tuple[Rule, ...]], contains: Callable[[str, Address], bool]) -> None:
        """`contains`: whether an address is in a named set (of prefixes: in one of them)."""
        self.chains = chains
        self.contains = contains
        self._read: dict[str, tuple[tuple[Rule, ...], _Read]] = {}

    def read(self, chain: str) -> _Read:
        """The chain's rules with their tests; nothing where there is no such chain."""
        rules = self.chains.get(chain, ())
        known = self._read.get(chain)
        if known is None or known[0] is not rules:
            known = self._read[chain] = rules, tuple(_step(rule, self.contains) for rule in rules)
        return known[1]


def judge(ruleset: View, chain: str, packet: Packet, ways: Ways = NO_WAYS) -> Judgement:
    """What becomes of the first packet of a flow in this chain. A chain that is not there decides nothing."""
    logs: list[str] = []
    counted: list[tuple[str, int]] = []
    decided = _walk(_Walk(ruleset, packet, ways, logs, counted), chain, _DEPTH)
    if decided is None:
        return Judgement(None, logs=tuple(logs), counted=tuple(counted))
    where, position, rule = decided
    return Judgement(rule.verdict is Verdict.ACCEPT, rule, where, position, tuple(logs), tuple(counted))


class _Walk(NamedTuple):
    view: View
    packet: Packet
    ways: Ways
    logs: list[str]
    counted: list[tuple[str, int]]


def _walk(walk: _Walk, chain: str, depth: int) -> tuple[str, int, Rule] | None:
    """Where it was decided: chain, position, rule."""
    if depth == 0:
        raise ValueError(f"chain {chain!r} lies too deep")
    view, packet, ways, logs, counts = walk
    for position, (tests, then, word, counted) in enumerate(view.read(chain)):
        for test in tests:
            if not test(packet, ways):
                break
        else:
            if counted:
                counts.append((chain, position))
            if then == _DECIDED:
                return chain, position, view.chains[chain][position]
            if then == _SAID:
                logs.append(word)
            elif then == _BACK:
                return None
            elif then != _ON:
                decided = _walk(walk, word, depth - 1)
                if decided is not None or then == _GOTO:
                    return decided  # what falls out of where it went to does not come back here
    return None


def _step(rule: Rule, contains: Callable[[str, Address], bool]) -> _Step:
    tests = tuple(_test(match, contains) for match in rule.matches)
    match rule.verdict:
        case Jump(chain):
            return _Step(tests, _JUMP, chain, rule.counted)
        case Goto(chain):
            return _Step(tests, _GOTO, chain, rule.counted)
        case Log(tag):
            return _Step(tests, _SAID, tag, rule.counted)
        case Verdict.CONTINUE:
            return _Step(tests, _ON, "", rule.counted)
        case Verdict.RETURN:
            return _Step(tests, _BACK, "", rule.counted)
    return _Step(tests, _DECIDED, "", rule.counted)


def _test(match: Match, contains: Callable[[str, Address], bool]) -> _Test:
    match match:
        case Family(version):
            width = 4 if version == 4 else 16
            return lambda packet, _: len(packet.source) == width
        case Protocol(number, negate):
            return lambda packet, _: (packet.protocol == number) is not negate
        case Ports():
            return _ports(match)
        case InSet(side, name, _, negate):
            if side is Side.SRC:
                return lambda packet, _: contains(name, packet.source) is not negate
            return lambda packet, _: contains(name, packet.destination) is not negate
        case InNets(side, nets, negate):
            inside = within(nets)
            if side is Side.SRC:
                return lambda packet, _: inside(packet.source) is not negate
            return lambda packet, _: inside(packet.destination) is not negate
        case IcmpIs():
            return _icmp(match)
        case Interface(incoming, name):
            return lambda _, ways: (ways.incoming if incoming else ways.outgoing) == name


def _ports(match: Ports) -> _Test:
    """A packet without ports has none to be among, nor outside of, any."""
    side, ranges, negate = match

    def test(packet: Packet, _: Ways) -> bool:
        port = packet.source_port if side is Side.SRC else packet.destination_port
        if port is None:
            return False
        return any(first <= port <= last for first, last in ranges) is not negate

    return test


def _icmp(match: IcmpIs) -> _Test:
    version, (wanted, code), negate = match
    protocol, width = _ICMP[version], 4 if version == 4 else 16

    def test(packet: Packet, _: Ways) -> bool:
        have = packet.icmp
        if have is None or packet.protocol != protocol or len(packet.source) != width:
            return False
        return (have.type == wanted and code in (None, have.code)) is not negate

    return test


def within(nets: Iterable[Prefix]) -> Callable[[Address], bool]:
    """Whether an address is in one of these. One lookup for each length of prefix, however many there are of it."""
    by_length: dict[tuple[int, int], set[int]] = {}
    for net in nets:
        width = len(net.network)
        shift = 8 * width - net.length
        by_length.setdefault((width, shift), set()).add(int.from_bytes(net.network, "big") >> shift)
    heads = [(width, shift, networks) for (width, shift), networks in by_length.items()]

    def inside(address: Address) -> bool:
        number, length = int.from_bytes(address, "big"), len(address)
        return any(width == length and number >> shift in networks for width, shift, networks in heads)

    return inside
