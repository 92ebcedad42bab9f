# What iptables-legacy-save lists of our tables, read back into abstract rules, judges every packet as the rules that
# were written do; and what somebody put in between is seen, or said to be none of ours.
from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from netns import Namespace, run
from nft_samples import GUARD, contents
from test_iptables_table import renamed, write
from test_listing import FULL, compare

from hostd.compiler.ruleset import (
    Family,
    Goto,
    IcmpIs,
    InSet,
    Jump,
    Log,
    Ports,
    Protocol,
    Rule,
    SetKind,
    SetSpec,
    Side,
    Verdict,
)
from hostd.dataplane.iptables.listing import SavedFilter, Unreadable
from hostd.dataplane.iptables.table import IptablesFilter
from hostd.dataplane.nft import Content
from hostd.revocation.judge import View, judge
from slash32.net import Address, parse_address
from slash32.policy import Icmp, PortRange
from slash32.verdict import Packet

ACCEPT, DROP = Verdict.ACCEPT, Verdict.DROP
WEB, ELSE = parse_address("10.0.0.1"), parse_address("10.0.0.2")
BASE = GUARD.group_base


def loaded(content: Content) -> IptablesFilter:
    table = IptablesFilter(GUARD)
    table.load()
    write(table, content)
    return table


@settings(max_examples=40 if FULL else 8, deadline=None, suppress_health_check=list(HealthCheck))
@given(contents())
def test_any_filter(content: Content) -> None:
    content = renamed(content)
    namespace = Namespace()
    with namespace.entered():
        table = loaded(content)
        listed = SavedFilter()
        compare(content, 15, listed)
        for group, (outward, inward) in content.classes.items():
            assert (listed.class_of(group, True), listed.class_of(group, False)) == (outward, inward)
        assert listed.class_of(BASE + 77, egress=True) is None
        table.close()
    namespace.close()


CHAINS = {
    "pi-web": [
        Rule((Family(4), Protocol(6), InSet(Side.SRC, "addr4-web", SetKind.ADDR4)), Log("i:web.0"), "web 0"),
        Rule((Family(4), Protocol(6), InSet(Side.SRC, "addr4-web", SetKind.ADDR4)), ACCEPT, "policy web ingress[1]"),
        Rule((Protocol(17), Ports(Side.DST, (PortRange(53, 53), PortRange(5000, 5100)), True)), ACCEPT, "web 2"),
        Rule((Family(6), Protocol(58), IcmpIs(6, Icmp(128))), ACCEPT, "web 3"),
        Rule((Protocol(132),), Verdict.RETURN, "web 4"),
    ],
    "po-web": [Rule((Protocol(47, True),), ACCEPT, "out 0")],
    "to-c": [Rule((), Jump("pi-web")), Rule((), Goto("tail-in-x"))],
    "tail-in-x": [Rule((), DROP, "the end")],
    "from-c": [Rule((), Jump("po-web")), Rule((), DROP, "no more")],
}
BY_HAND = Content(
    {"addr4-web": SetSpec(SetKind.ADDR4, 256)},
    {"addr4-web": frozenset({WEB})},
    CHAINS,
    {BASE + n: ("from-c", "to-c") for n in (1, 0x12, 0x112)},
    (),
)


def asked(listed: SavedFilter, chain: str, packet: Packet) -> tuple[bool | None, str, tuple[str, ...]]:
    found = judge(View(listed.chains_from(chain), listed.contains), chain, packet)
    return found.accept, found.rule.comment if found.rule else "", found.logs


def test_by_hand(netns: Namespace) -> None:
    table = loaded(BY_HAND)
    listed = SavedFilter()

    def tcp(source: Address) -> Packet:
        return Packet(source, ELSE, 6, 1000, 80)

    assert asked(listed, "to-c", tcp(WEB)) == (True, "policy web ingress[1]", ("i:web.0",))
    assert asked(listed, "to-c", tcp(ELSE)) == (False, "the end", ())
    for port, allowed in ((53, False), (54, True), (5000, False), (5101, True)):
        assert asked(listed, "to-c", Packet(WEB, ELSE, 17, 1, port))[0] is allowed
    six = parse_address("fd00::1")
    assert asked(listed, "to-c", Packet(six, six, 58, icmp=Icmp(128, 0)))[:2] == (True, "web 3")
    assert asked(listed, "to-c", Packet(six, six, 58, icmp=Icmp(129, 0)))[0] is False
    assert asked(listed, "from-c", tcp(WEB))[:2] == (True, "out 0")
    assert asked(listed, "from-c", Packet(WEB, ELSE, 47))[:2] == (False, "no more")
    assert {listed.class_of(BASE + n, True) for n in (1, 0x12, 0x112)} == {"from-c"}
    assert listed.class_of(BASE + 2, False) is listed.class_of(BASE + 0x111, False) is None
    table.close()


def test_what_others_put_in_between_is_judged_or_named(netns: Namespace) -> None:
    table = loaded(BY_HAND)
    packet = Packet(ELSE, WEB, 6, 1000, 80)

    def verdict() -> bool | None:
        return asked(SavedFilter(), "to-c", packet)[0]

    assert verdict() is False
    run("iptables-legacy", "-t", "security", "-I", "pi-web", "-p", "tcp", "-j", "ACCEPT")
    assert verdict() is True
    run("ipset", "add", "s32a4-web", "10.0.0.2")
    run("iptables-legacy", "-t", "security", "-I", "pi-web", "-m", "ttl", "--ttl-eq", "7", "-j", "ACCEPT")
    with pytest.raises(Unreadable, match="holds a rule that is not slash32's"):
        verdict()
    table.close()
