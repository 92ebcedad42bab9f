# Owns: the translation of policies, profiles and selector sets into the abstract packet filter (ruleset.py).
# Pure functions of their arguments; calc.py decides when they are called.
from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import groupby, product
from typing import NamedTuple

from slash32.net import Address, Prefix
from slash32.pack import AddressSet
from slash32.policy import Action, Direction, Icmp, Peer, Policy, Profile
from slash32.policy import Rule as PolicyRule

from .desired import Member
from .names import digest, log_tag, part_chain
from .ruleset import (
    Family,
    Goto,
    IcmpIs,
    InNets,
    InSet,
    Jump,
    Log,
    Match,
    Ports,
    Protocol,
    Rule,
    SetKind,
    SetSpec,
    Side,
    Verdict,
)

SetLookup = Callable[[str], "SelectorSet"]

ICMP, ICMPV6 = 1, 58
_ALL_KINDS = tuple(SetKind)
ADDRESSES = (SetKind.ADDR4, SetKind.ADDR6)
POLICY, STAGED, PROFILE = "policy", "staged", "profile"
_VERDICTS: dict[Action, Verdict | Log] = {
    Action.ALLOW: Verdict.ACCEPT, Action.DENY: Verdict.DROP, Action.LOG: Log(""), Action.PASS: Verdict.RETURN,
}  # fmt: skip
_KINDS = {(4, False): SetKind.ADDR4, (6, False): SetKind.ADDR6, (4, True): SetKind.NET4, (6, True): SetKind.NET6}


class SelectorSet:
    """The kernel sets of one selector: single addresses in hash sets, prefixes in small interval sets of their own.

    A set's name carries its capacity, so that one that outgrows it is simply another object: the new set, the rules
    that name it and the old set's end travel in one transaction. `only`: of which kind all single addresses are, as
    long as it holds what it was made of.
    """

    __slots__ = ("_limits", "_sizes", "counts", "digest", "only", "specs")

    def __init__(self, selector: str, value: AddressSet) -> None:
        self.digest = digest(selector)
        long = _long(value.addresses)
        self.only = {0: SetKind.ADDR4, len(value.addresses): SetKind.ADDR6}.get(long)
        self.counts = Counter({SetKind.ADDR4: len(value.addresses) - long, SetKind.ADDR6: long})
        self.counts.update(kind_of(m) for m in value.prefixes)
        self._sizes = self._wanted()
        self.specs = self._declare()

    def changed(self, add: Iterable[Member], remove: Iterable[Member]) -> bool:
        """Count effective additions and removals; True if other kernel sets are needed than before, in a new `specs`.

        Written for the commonest change of all, that of one member.
        """
        self.only = None
        counts, limits, held = self.counts, self._limits, True
        for members, step in ((add, 1), (remove, -1)):
            for member in members:
                kind = kind_of(member)
                counts[kind] += step
                least, most = limits.get(kind, (0, 0))
                held = held and least <= counts[kind] <= most
        if held or (wanted := self._wanted()) == self._sizes:
            return False
        self._sizes = wanted
        self.specs = self._declare()
        return True

    def _wanted(self) -> list[tuple[SetKind, int]]:
        """Sets and their sizes: those of addresses always, those of prefixes where there are any."""
        counts = self.counts
        return [(kind, capacity(counts[kind])) for kind in _ALL_KINDS if kind in ADDRESSES or counts[kind] > 0]

    def _declare(self) -> dict[SetKind, tuple[str, SetSpec]]:
        self._limits = {kind: _counts_of(size, int(kind not in ADDRESSES)) for kind, size in self._sizes}
        return {kind: (f"{kind.value}-{self.digest}-{size}", SetSpec(kind, size)) for kind, size in self._sizes}


def _long(addresses: Collection[Address]) -> int:
    """How many are IPv6. There may be a hundred thousand, and seldom of both."""
    return (sum(map(len, addresses)) - 4 * len(addresses)) // 12


def kind_of(member: Member) -> SetKind:
    if isinstance(member, Prefix):
        return SetKind.NET4 if len(member.network) == 4 else SetKind.NET6
    return SetKind.ADDR4 if len(member) == 4 else SetKind.ADDR6


def members_of(value: AddressSet, kind: SetKind) -> Collection[Member]:
    """What a kernel set of this kind holds: single addresses as they are, prefixes as the fewest that cover them."""
    if kind in ADDRESSES:
        long, wants_long = _long(value.addresses), kind is SetKind.ADDR6
        if long in (0, len(value.addresses)):
            return value.addresses if wants_long is bool(long) else ()
        width = 16 if wants_long else 4
        return [address for address in value.addresses if len(address) == width]
    return disjoint(prefix for prefix in value.prefixes if kind_of(prefix) is kind)


def admitted(prefixes: Iterable[Prefix]) -> tuple[Prefix, ...]:
    """What a guest may send from besides its addresses: the fewest prefixes, none within another, of both families."""
    given = list(prefixes)
    return tuple(m for version in (4, 6) for m in disjoint(p for p in given if p.version == version))


def disjoint(members: Iterable[Prefix]) -> list[Prefix]:
    """Of one family."""
    prefixes = [ipaddress.ip_network((m.network, m.length)) for m in members]
    merged = ipaddress.collapse_addresses(prefixes)  # type: ignore[type-var]  # one family, as promised above
    return [Prefix(n.network_address.packed, n.prefixlen) for n in merged]


def capacity(count: int) -> int:
    """Elements a set is declared for: room to double, in steps of four, so that it seldom has to be made anew."""
    size = 256
    while size < 2 * count:
        size *= 4
    return size


def _counts_of(size: int, least: int) -> tuple[int, int]:
    """The fewest and the most elements for which a set is declared with this capacity."""
    return (least if capacity(0) == size else size // 8 + 1), size // 2


class Parts(NamedTuple):
    """A policy that leaves its tier here and there: the rules that leave stand in the tier's own chain, so that no jump
    has to be undone; what stands between them is chains, which all who ask the policy share."""

    chains: dict[str, tuple[Rule, ...]]
    asked: tuple[Rule, ...]


class Compiled(NamedTuple):
    """A rule of the packet filter, and the number of the rule it is made of, in its policy or profile."""

    number: int
    rule: Rule


def compile_rules(item: Policy | Profile, direction: Direction, lookup: SetLookup) -> tuple[Compiled, ...]:
    """Of one direction. Pass is RETURN: out of the chain of the tier."""
    kind = kind_of_item(item)
    what = "staged policy" if kind == STAGED else kind
    return tuple(
        Compiled(index, _finished(item, kind, direction, index, found))
        for index, rule in enumerate(item.rules(direction))
        if not (kind == STAGED and rule.action is Action.LOG)  # it decides nothing, and is not there yet
        for found in compile_rule(rule, lookup, f"{what} {item.name[:40]} {direction.value.lower()}[{index}]")
    )


def _finished(item: Policy | Profile, kind: str, direction: Direction, index: int, rule: Rule) -> Rule:
    if isinstance(rule.verdict, Log):
        return rule._replace(verdict=Log(log_tag(kind, item.name, direction, index)))
    if isinstance(item, Policy):
        return rule._replace(keep=item.keep_established and rule.verdict is Verdict.ACCEPT)
    return rule._replace(verdict=Verdict.DROP) if rule.verdict is Verdict.RETURN else rule


def kind_of_item(item: Policy | Profile) -> str:
    if isinstance(item, Profile):
        return PROFILE
    return STAGED if item.staged else POLICY


def directions_of(item: Policy | Profile) -> tuple[Direction, ...]:
    return item.types if isinstance(item, Policy) else tuple(Direction)


def without_pass(compiled: Iterable[Compiled]) -> tuple[Rule, ...]:
    """The chain of a policy that passes on what it does not decide, if anything: falling out of it says so."""
    return tuple(rule for _, rule in compiled if rule.verdict is not Verdict.RETURN)


def in_parts(policy: Policy, direction: Direction, compiled: Iterable[Compiled]) -> Parts:
    """Another policy has other chains: where one of them is refused, who asks stays with all of the last."""
    chains: dict[str, tuple[Rule, ...]] = {}
    asked: list[Rule] = []
    identity = repr(policy.rules(direction))
    for passes, group in groupby(compiled, key=lambda each: each.rule.verdict is Verdict.RETURN):
        rules = tuple(rule for _, rule in group)
        if passes:
            asked += rules
            if not all(rule.matches for rule in rules):
                break  # nothing comes further
        else:
            name = part_chain(policy.name, direction, identity, len(chains))
            chains[name] = rules
            asked.append(Rule((), Jump(name)))
    return Parts(chains, tuple(asked))


def only_counting(compiled: Iterable[Compiled], rest: str) -> tuple[Rule, ...]:
    """A staged policy's chain: whatever it says, what is enforced goes on there; what it would have dropped counts."""
    there = Goto(rest)
    return tuple(
        Rule(rule.matches, there, rule.comment, counted=rule.verdict is Verdict.DROP) for _, rule in compiled
    )


def compile_rule(rule: PolicyRule, lookup: SetLookup, comment: str) -> Iterator[Rule]:
    verdict = _VERDICTS[rule.action]
    for ip in (4, 6) if _asks_family(rule) else (0,):
        if rule.ip_version not in (None, ip) or not _can_match(rule, ip):
            continue
        head: list[Match] = [Family(ip)] if ip else []
        head += _protocol(rule, ip)
        once = rule.action is Action.LOG  # the others decide: what has matched comes to no alternative
        sources = list(_peer(rule.source, Side.SRC, ip, lookup, once))
        destinations = list(_peer(rule.destination, Side.DST, ip, lookup, once))
        for source, destination in product(sources, destinations):
            yield Rule((*head, *source, *destination), verdict, comment)


def _asks_family(rule: PolicyRule) -> bool:
    peers = (rule.source, rule.destination)
    return bool(
        rule.ip_version
        or rule.protocol in (ICMP, ICMPV6)
        or rule.icmp
        or rule.not_icmp
        or any(p.nets or p.not_nets or p.selector is not None or p.not_selector is not None for p in peers)
    )


def _can_match(rule: PolicyRule, ip: int) -> bool:
    """A positive list of nets admits only its own families, ICMP and its fields only that protocol's."""
    if ip == 0:
        return True
    if rule.protocol == {4: ICMPV6, 6: ICMP}[ip]:
        return False
    if (rule.icmp or rule.not_icmp) and rule.protocol != {4: ICMP, 6: ICMPV6}[ip]:
        return False
    return all(not p.nets or any(n.version == ip for n in p.nets) for p in (rule.source, rule.destination))


def _protocol(rule: PolicyRule, ip: int) -> Iterator[Match]:
    if rule.protocol is not None:
        yield Protocol(rule.protocol)
    if rule.not_protocol is not None:
        yield Protocol(rule.not_protocol, negate=True)
    fields: tuple[tuple[Icmp | None, bool], ...] = ((rule.icmp, False), (rule.not_icmp, True))
    for icmp, negate in fields:
        if icmp is not None:
            yield IcmpIs(ip, icmp, negate)


def _peer(peer: Peer, side: Side, ip: int, lookup: SetLookup, once: bool) -> Iterator[tuple[Match, ...]]:
    """The alternatives of one side: an address is in a selector's hash set, or behind one of its prefixes; maybe both,
    but where it may match only once."""
    always: list[Match] = []
    nets = tuple(n for n in peer.nets if n.version == ip)
    if nets:
        always.append(InNets(side, nets))
    outside = tuple(n for n in peer.not_nets if n.version == ip)
    if outside:
        always.append(InNets(side, outside, negate=True))
    if peer.not_selector is not None:
        always += [InSet(side, name, kind, negate=True) for kind, name in _sets(lookup(peer.not_selector), ip)]
    if peer.ports:
        always.append(Ports(side, peer.ports))
    if peer.not_ports:
        always.append(Ports(side, peer.not_ports, negate=True))
    if peer.selector is None:
        yield tuple(always)
        return
    for kind, name in _sets(lookup(peer.selector), ip):
        yield (InSet(side, name, kind), *always)
        if once:
            always.append(InSet(side, name, kind, negate=True))


def _sets(found: SelectorSet, ip: int) -> Iterator[tuple[SetKind, str]]:
    for kind in (_KINDS[ip, False], _KINDS[ip, True]):
        if kind in found.specs:
            yield kind, found.specs[kind][0]
