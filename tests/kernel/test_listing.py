# What nft lists of our tables, read back into abstract rules, judges every packet as the rules that were written do;
# and a rule that somebody put in between is seen, or said to be none of ours.
from __future__ import annotations

import os
import random

import pytest
from hypothesis import HealthCheck, given, settings
from netns import Namespace, run
from nft_samples import GUARD, KINDS, contents, fixed, write

from hostd.compiler.ruleset import HOST_GUESTS, Family, InNets, InSet, Rule
from hostd.dataplane.nft import Content, NftTable
from hostd.dataplane.nft.listing import KernelFilter, Unreadable
from hostd.reporting.answers import Listed
from hostd.revocation.judge import View, Ways, judge
from slash32.net import Address, parse_address
from slash32.policy import Icmp
from slash32.verdict import Packet

FULL = os.environ.get("SLASH32_COUNTS") == "full"
WAYS = [Ways(a, b) for a in ("", "eth0", "lo") for b in ("", "en-p.1@x:y", "br-lan.7")]


def loaded(content: Content) -> NftTable:
    table = NftTable(GUARD)
    table.load()
    write(table, content)
    return table


def packets(content: Content, chance: random.Random, count: int) -> list[Packet]:
    known = [m if isinstance(m, bytes) else m.network for members in content.members.values() for m in members]
    found = []
    for _ in range(count):
        width = chance.choice((4, 16))
        of_width: list[Address] = [a for a in known if len(a) == width] + [chance.randbytes(width)]
        source, target = chance.choice(of_width), chance.choice(of_width)
        protocol = chance.choice((1, 6, 17, 47, 58, 132))
        port = [chance.choice((1, 2, 53, 80, 5050, 65535)) if protocol in (6, 17, 132) else None for _ in range(2)]
        icmp = Icmp(chance.choice((3, 8, 128)), chance.choice((0, 4))) if protocol == {4: 1, 16: 58}[width] else None
        found.append(Packet(source, target, protocol, port[0], port[1], icmp))
    return found


def compare(content: Content, count: int, listed: Listed | None = None) -> None:
    """Of every chain."""
    listed = listed or KernelFilter()
    chance = random.Random(0)
    chains = {name: tuple(map(with_family, chain)) for name, chain in content.chains.items()}
    mine = View(chains, lambda n, a: _member(content, n, a))
    for chain in sorted(content.chains.keys() - {HOST_GUESTS}):  # that one leads into the skeleton
        theirs = View(listed.chains_from(chain), listed.contains)
        for packet in packets(content, chance, count):
            ways = chance.choice(WAYS)
            expected, found = judge(mine, chain, packet, ways), judge(theirs, chain, packet, ways)
            assert (expected.accept, expected.logs) == (found.accept, found.logs), (chain, packet, ways)


def with_family(rule: Rule) -> Rule:
    """Said, as the contract asks (ruleset.InSet); the kernel knows without."""
    asked = [m for m in rule.matches if isinstance(m, InSet | InNets)]
    if not asked:
        return rule
    first = asked[0]
    version = (4 if first.kind in KINDS[4] else 6) if isinstance(first, InSet) else first.nets[0].version
    return rule._replace(matches=(Family(version), *rule.matches))


def _member(content: Content, name: str, address: Address) -> bool:
    return any(m == address if isinstance(m, bytes) else m.contains(address) for m in content.members.get(name, ()))


def test_every_kind_of_rule(netns: Namespace) -> None:
    content = fixed()
    table = loaded(content)
    compare(content, 60)
    listed = KernelFilter()
    assert listed.class_of(GUARD.group_base + 1, egress=True) == "c1-from"
    assert listed.class_of(GUARD.group_base + 1, egress=False) == "c1-to"
    assert listed.class_of(GUARD.group_base + 2, egress=True) is None
    table.close()


@settings(
    max_examples=40 if FULL else 6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=contents())
def test_any_filter(netns: Namespace, content: Content) -> None:
    run("nft", "flush", "ruleset")
    table = loaded(content)
    compare(content, 15)
    table.close()


def test_what_others_put_in_between_is_judged_or_named(netns: Namespace) -> None:
    content = fixed()
    table = loaded(content)
    packet = Packet(parse_address("2001:db8::7"), parse_address("fd00::1"), 47)

    def verdict() -> bool | None:
        listed = KernelFilter()
        return judge(View(listed.chains_from("c1-from"), listed.contains), "c1-from", packet).accept

    assert verdict() is False
    run("nft", "insert", "rule", "inet", "slash32", "p-web-in", "meta", "l4proto", "47", "accept")
    assert verdict() is True
    run("nft", "insert", "rule", "inet", "slash32", "p-web-in", "ip", "ttl", "7", "accept")
    with pytest.raises(Unreadable, match="chain p-web-in holds a rule that is not slash32's"):
        verdict()
    table.close()


