# Owns: our packet filter as the kernel itself lists it, read back into abstract rules, for `explain`: what is judged
# then is what nft shows, not what hostd believes. Parsing is pure; `KernelFilter` runs nft.
from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterator, Mapping
from typing import Any

from slash32.net import Address, Prefix, format_address, parse_address
from slash32.policy import Icmp, PortRange

from ...compiler.ruleset import (
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
from ..tool import told
from .shapes import FROM, TABLE, TO

Json = Any
_VERSIONS = {"ip": 4, "ip6": 6}
_ICMPS = {"icmp": 4, "icmpv6": 6}
_NUMBERS = {4: 1, 6: 58}
_PORTED = {"th": None, "tcp": 6, "udp": 17, "sctp": 132, "udplite": 136}
_SIDES = {"sport": Side.SRC, "dport": Side.DST, "saddr": Side.SRC, "daddr": Side.DST}
_KINDS = {("ipv4_addr", False): SetKind.ADDR4, ("ipv6_addr", False): SetKind.ADDR6,
          ("ipv4_addr", True): SetKind.NET4, ("ipv6_addr", True): SetKind.NET6}  # fmt: skip
_ENDS = {verdict.value: verdict for verdict in Verdict}  # nft has the same words


class Unreadable(ValueError):
    """The kernel holds a rule that is none of ours: one line."""


class KernelFilter:
    """The chains and sets of one moment. Raises OSError where nft does not answer, Unreadable at the first foreign rule
    that is asked about."""

    def __init__(self) -> None:
        listed = json.loads(_nft("-j", "-n", "-t", "list", "table", "inet", TABLE))["nftables"]
        self._sets = {item["set"]["name"]: item["set"] for item in listed if "set" in item}
        self._rules: dict[str, list[Json]] = {item["chain"]["name"]: [] for item in listed if "chain" in item}
        for item in listed:
            if "rule" in item:
                self._rules[item["rule"]["chain"]].append(item["rule"])
        self._members: dict[tuple[str, Address], bool] = {}

    def rules(self, chain: str) -> tuple[Rule, ...]:
        kinds = {name: kind_of(found) for name, found in self._sets.items()}
        return tuple(read_rule(rule, kinds) for rule in self._rules.get(chain, ()))

    def chains_from(self, start: str) -> dict[str, tuple[Rule, ...]]:
        """That chain and all that it leads to."""
        found: dict[str, tuple[Rule, ...]] = {}
        waiting = [start]
        while waiting:
            name = waiting.pop()
            if name not in found:
                found[name] = self.rules(name)
                waiting += [rule.verdict.chain for rule in found[name] if isinstance(rule.verdict, Jump | Goto)]
        return found

    def class_of(self, group: int, egress: bool) -> str | None:
        """The chain that the kernel's own map gives to taps of this device group."""
        table = json.loads(_nft("-j", "-n", "list", "map", "inet", TABLE, FROM if egress else TO))["nftables"]
        for item in table:
            for key, verdict in item.get("map", {}).get("elem", ()):
                if int(str(key), 0) == group:
                    return str(next(iter(verdict.values()))["target"])
        return None

    def contains(self, name: str, address: Address) -> bool:
        """Asked of the kernel."""
        known = self._members.get((name, address))
        if known is None:
            whose = kind_of(self._sets[name]) if name in self._sets else None
            fits = whose is not None and (whose in (SetKind.ADDR4, SetKind.NET4)) == (len(address) == 4)
            known = self._members[name, address] = fits and _holds(name, address)
        return known


def _holds(name: str, address: Address) -> bool:
    command = ["nft", "get", "element", "inet", TABLE, name, f"{{ {format_address(address)} }}"]
    done = told(*command)
    if done.returncode and "No such file or directory" not in done.stderr:
        raise OSError(f"nft get element: {done.stderr.strip()[:200]}")
    return done.returncode == 0


def _nft(*words: str) -> str:
    done = told("nft", *words)
    if done.returncode:
        raise OSError(f"nft {' '.join(words)}: {done.stderr.strip()[:200]}")
    return done.stdout


def kind_of(declared: Mapping[str, Json]) -> SetKind | None:
    """None: no set of addresses."""
    return _KINDS.get((str(declared.get("type")), "interval" in declared.get("flags", ())))


def read_rule(listed: Mapping[str, Json], kinds: Mapping[str, SetKind | None]) -> Rule:
    """One rule as `nft -j -n` lists it. Raises Unreadable."""
    matches: list[Match] = []
    verdict: Verdict | Jump | Goto | Log = Verdict.CONTINUE
    counted = False
    for part in listed.get("expr", ()):
        (word, body), *more = part.items()
        if more:
            raise _unreadable(listed, part)
        if word == "match":
            _take(matches, _checked(listed, body, kinds))
        elif word in _ENDS:
            verdict = _ENDS[word]
        elif word == "jump":
            verdict = Jump(body["target"])
        elif word == "goto":
            verdict = Goto(body["target"])
        elif word == "log":
            verdict = Log(str(body.get("prefix", "")))
        elif word == "counter":
            counted = True
        elif word != "limit" or not any("log" in other for other in listed["expr"]):
            raise _unreadable(listed, part)
    return Rule(tuple(matches), verdict, str(listed.get("comment", "")), counted)


def _take(matches: list[Match], found: list[Match]) -> None:
    """A code goes with the type before it."""
    last = matches[-1] if matches else None
    for match in found:
        if isinstance(match, IcmpIs) and match.icmp.type < 0 and isinstance(last, IcmpIs):
            matches[-1] = last._replace(icmp=Icmp(last.icmp.type, match.icmp.code))
        else:
            matches.append(match)


def _checked(listed: Mapping[str, Json], body: Json, kinds: Mapping[str, SetKind | None]) -> list[Match]:
    try:
        found = _match(body, kinds)
    except (KeyError, IndexError, TypeError, ValueError):  # of a form that nothing of ours has
        found = None
    if found is None:
        raise _unreadable(listed, {"match": body})
    return found


def _unreadable(listed: Mapping[str, Json], part: Json) -> Unreadable:
    shown = json.dumps(part)[:120]
    return Unreadable(f"chain {listed.get('chain')} holds a rule that is not slash32's: {shown}")


def _match(body: Mapping[str, Json], kinds: Mapping[str, SetKind | None]) -> list[Match] | None:
    left, right, negate = body["left"], body["right"], body["op"] == "!="
    if body["op"] not in ("==", "!=", "in"):
        return None
    if "meta" in left:
        return _meta(left["meta"]["key"], right, negate)
    if "concat" in left:
        (kind, code), version = right["set"][0]["concat"], _ICMPS[left["concat"][0]["payload"]["protocol"]]
        return [Family(version), Protocol(_NUMBERS[version]), IcmpIs(version, Icmp(int(kind), int(code)), negate)]
    if "payload" not in left or "protocol" not in left["payload"]:
        return None
    protocol, part = left["payload"]["protocol"], left["payload"]["field"]
    if protocol in _VERSIONS and part in ("saddr", "daddr"):
        return _address(_VERSIONS[protocol], _SIDES[part], right, (negate, kinds))
    if protocol in _PORTED and part in ("sport", "dport"):
        number = _PORTED[protocol]
        ports = Ports(_SIDES[part], tuple(PortRange(*ends) for ends in _ranges(right)), negate)
        return [*([] if number is None else [Protocol(number)]), ports]
    if protocol in _ICMPS:
        version = _ICMPS[protocol]
        if part == "code":
            return [IcmpIs(version, Icmp(-1, int(right)), negate)]
        return [Family(version), Protocol(_NUMBERS[version]), IcmpIs(version, Icmp(int(right)), negate)]
    return None


def _meta(key: str, right: Json, negate: bool) -> list[Match] | None:
    if key == "nfproto" and not negate:
        return [Family({"ipv4": 4, "ipv6": 6, 2: 4, 10: 6}[right])]
    if key == "l4proto" and isinstance(right, int):
        return [Protocol(right, negate)]
    if key in ("iifname", "oifname") and not negate:
        return [Interface(key == "iifname", str(right))]
    return None


def _address(
    version: int, side: Side, right: Json, how: tuple[bool, Mapping[str, SetKind | None]]
) -> list[Match] | None:
    negate, kinds = how
    if isinstance(right, str) and right.startswith("@"):
        kind = kinds.get(right[1:])
        return None if kind is None else [Family(version), InSet(side, right[1:], kind, negate)]
    nets = tuple(net for item in _items(right) for net in _prefixes(item))
    return [Family(version), InNets(side, nets, negate)]


def _items(right: Json) -> list[Json]:
    return list(right["set"]) if isinstance(right, dict) and "set" in right else [right]


def _ranges(right: Json) -> Iterator[tuple[int, int]]:
    for item in _items(right):
        first, last = item["range"] if isinstance(item, dict) else (item, item)
        yield int(first), int(last)


def _prefixes(item: Json) -> Iterator[Prefix]:
    if isinstance(item, str):
        address = parse_address(item)
        yield Prefix(address, 8 * len(address))
    elif "prefix" in item:
        yield Prefix(parse_address(item["prefix"]["addr"]), int(item["prefix"]["len"]))
    else:
        first, last = map(ipaddress.ip_address, item["range"])
        for net in ipaddress.summarize_address_range(first, last):
            yield Prefix(net.network_address.packed, net.prefixlen)
