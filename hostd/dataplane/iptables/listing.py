# Owns: our packet filter as iptables-legacy-save lists it, read back into abstract rules, for `explain`: what is judged
# then is what the kernel holds, not what hostd believes. Sets keep their names of ipset. Parsing is pure;
# `SavedFilter` runs iptables-legacy-save and asks ipset.
from __future__ import annotations

import re
import shlex
import socket
from collections.abc import Iterator

from slash32.net import Address, parse_prefix
from slash32.policy import Icmp, PortRange

from ...compiler.ruleset import (
    HOST_FORWARD_IN,
    HOST_FORWARD_OUT,
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
from ..nft.listing import Unreadable
from ..tool import told
from .lines import MARK
from .names import CONSTANT
from .sets import Sets
from .skeleton import AWAY, MANGLE, ONTO, SECURITY

_SAVE = {4: "iptables-legacy-save", 6: "ip6tables-legacy-save"}
_ENDS = {"ACCEPT": Verdict.ACCEPT, "DROP": Verdict.DROP, "RETURN": Verdict.RETURN}
_WITHOUT_VALUE = frozenset(("-m", "--limit", "--limit-burst", "--nflog-group"))  # of what says nothing about a packet
_SIDES = {"-s": Side.SRC, "-d": Side.DST, "--sports": Side.SRC, "--dports": Side.DST, "--sport": Side.SRC}
_NAMED_SET = re.compile(r"s32([an])([46])-|" + re.escape(CONSTANT))


class SavedFilter:
    """The chains of one moment. Raises OSError where the tool does not answer, Unreadable at the first foreign rule
    that is asked about."""

    def __init__(self) -> None:
        self._saved = {(v, t): _chains(_save(v, t)) for v in _SAVE for t in (MANGLE, SECURITY)}
        self._members: dict[tuple[str, Address], bool] = {}

    def rules(self, chain: str, table: str = SECURITY) -> tuple[Rule, ...]:
        """Those of IPv4, then those of IPv6."""
        return tuple(read_rule(line, v) for v in _SAVE for line in self._saved[v, table].get(chain, ()))

    def chains_from(self, start: str) -> dict[str, tuple[Rule, ...]]:
        """That chain and all that it leads to."""
        table = MANGLE if start in (HOST_FORWARD_IN, HOST_FORWARD_OUT) else SECURITY
        found: dict[str, tuple[Rule, ...]] = {}
        waiting = [start]
        while waiting:
            name = waiting.pop()
            if name not in found:
                found[name] = self.rules(name, table)
                waiting += [rule.verdict.chain for rule in found[name] if isinstance(rule.verdict, Jump | Goto)]
        return found

    def class_of(self, group: int, egress: bool) -> str | None:
        """The chain to which the dispatch leads taps of this device group."""
        way = f"--{'src' if egress else 'dst'}-group {group:#x} "
        head = "s32-cf-" if egress else "s32-ct-"
        for chain, lines in self._saved[4, SECURITY].items():
            for line in lines if chain.startswith(head) else ():
                if way in line:
                    return line.rpartition(" -g ")[2]
        return None

    def contains(self, name: str, address: Address) -> bool:
        """Asked of the kernel."""
        known = self._members.get((name, address))
        if known is None:
            sets = Sets()
            try:
                known = self._members[name, address] = sets.contains(name, address)
            finally:
                sets.close()
        return known


def _save(version: int, table: str) -> str:
    command = [_SAVE[version], "-t", table]
    done = told(*command)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()[:200]}")
    return done.stdout


def _chains(saved: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in saved.splitlines():
        verb, _, rest = line.partition(" ")
        if verb == "-A":
            chain, _, rule = rest.partition(" ")
            found.setdefault(chain, []).append(rule)
    return found


def read_rule(line: str, version: int) -> Rule:
    """One rule as iptables-legacy-save lists it, without `-A CHAIN`. Raises Unreadable."""
    matches: list[Match] = [Family(version)]
    verdict: Verdict | Jump | Goto | Log = Verdict.CONTINUE
    comment, prefix = "", ""
    try:
        for word, value, negate in _options(shlex.split(line)):
            if word == "--comment":
                comment = _said(value)
            elif word == "--nflog-prefix":
                prefix = value
            elif word in ("-j", "-g"):
                verdict = _verdict(word, value)
            elif word not in _WITHOUT_VALUE:
                matches.append(_match(word, value, negate, version))
    except (ValueError, KeyError, OSError):
        raise Unreadable(f"a chain holds a rule that is not slash32's: {line[:120]}") from None
    return Rule(tuple(matches), Log(prefix) if prefix else verdict, comment)


def _options(words: list[str]) -> Iterator[tuple[str, str, bool]]:
    """(option, its value, whether it is inverted)"""
    at = 0
    while at < len(words):
        negate = words[at] == "!"
        at += negate
        count = 2 if words[at] == "--match-set" else 1
        yield words[at], " ".join(words[at + 1 : at + 1 + count]), negate
        at += 1 + count


def _said(comment: str) -> str:
    """What is told to people, behind mark and digest."""
    mark, _, rest = comment.partition(" ")
    if mark.partition(".")[0] != MARK:
        raise ValueError(comment)
    return rest.partition(" ")[2]


def _verdict(word: str, to: str) -> Verdict | Jump | Goto:
    if to in (ONTO, AWAY):
        return Verdict.ACCEPT
    if to in _ENDS or to == "NFLOG":
        return _ENDS.get(to, Verdict.CONTINUE)
    return Jump(to) if word == "-j" else Goto(to)


def _match(word: str, value: str, negate: bool, version: int) -> Match:
    match word:
        case "-p":
            return Protocol(int(value) if value.isdecimal() else _number(value), negate)
        case "-s" | "-d":
            return InNets(_SIDES[word], (parse_prefix(value),), negate)
        case "-i" | "-o" if not negate:
            return Interface(word == "-i", value)
        case "--sports" | "--dports":
            return Ports(_SIDES[word], tuple(_range(item) for item in value.split(",")), negate)
        case "--icmp-type" | "--icmpv6-type":
            kind, _, code = value.partition("/")
            return IcmpIs(version, Icmp(int(kind), int(code) if code else None), negate)
        case "--match-set":
            name, side = value.split()
            return InSet(Side(side), name, _kind(name, version), negate)
    raise ValueError(word)


def _number(protocol: str) -> int:
    return socket.getprotobyname(protocol)


def _range(item: str) -> PortRange:
    first, _, last = item.partition(":")
    return PortRange(int(first), int(last or first))


def _kind(name: str, version: int) -> SetKind:
    found = _NAMED_SET.match(name)
    single = found is not None and found[1] == "a"
    if version == 4:
        return SetKind.ADDR4 if single else SetKind.NET4
    return SetKind.ADDR6 if single else SetKind.NET6
