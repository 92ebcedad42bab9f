# The interpreter of the abstract packet filter: every match and verdict, each with its counterpart.
from __future__ import annotations

import pytest

from hostd.compiler.ruleset import (
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
from hostd.revocation.judge import Judgement, View, Ways, judge
from slash32.net import Address, parse_address, parse_prefix
from slash32.policy import Icmp, PortRange
from slash32.verdict import Packet

A, B = parse_address("10.0.0.1"), parse_address("10.0.0.2")
A6, B6 = parse_address("fd00::1"), parse_address("fd00::2")
TCP = Packet(A, B, 6, 40000, 80)
TCP6 = Packet(A6, B6, 6, 40000, 80)
PING = Packet(A, B, 1, icmp=Icmp(8, 0))
PING6 = Packet(A6, B6, 58, icmp=Icmp(128, 0))
ACCEPT, DROP, CONTINUE = Rule((), Verdict.ACCEPT), Rule((), Verdict.DROP), Rule((), Verdict.CONTINUE)
NETS = (parse_prefix("10.0.0.0/31"), parse_prefix("10.9.0.0/16"), parse_prefix("fd00::/127"))
SETS = {"web": {A}, "db": {B, B6}}


def view(**chains: tuple[Rule, ...]) -> View:
    return View(chains, lambda name, address: address in SETS[name])


def _holds(match: Match, packet: Packet, ways: Ways) -> bool:
    return judge(view(c=(Rule((match,), Verdict.ACCEPT),)), "c", packet, ways).accept is True


MATCHES: list[tuple[Match, Packet, Ways, bool]] = [
    (Family(4), TCP, Ways(), True),
    (Family(4), TCP6, Ways(), False),
    (Family(6), TCP6, Ways(), True),
    (Protocol(6), TCP, Ways(), True),
    (Protocol(17), TCP, Ways(), False),
    (Protocol(17, negate=True), TCP, Ways(), True),
    (Protocol(6, negate=True), TCP, Ways(), False),
    (Ports(Side.DST, (PortRange(1, 2), PortRange(80, 81))), TCP, Ways(), True),
    (Ports(Side.DST, (PortRange(81, 90),)), TCP, Ways(), False),
    (Ports(Side.DST, (PortRange(70, 80),)), TCP, Ways(), True),
    (Ports(Side.DST, (PortRange(80, 80),), negate=True), TCP, Ways(), False),
    (Ports(Side.SRC, (PortRange(40000, 40000),)), TCP, Ways(), True),
    (Ports(Side.SRC, (PortRange(80, 80),)), TCP, Ways(), False),
    (Ports(Side.DST, (PortRange(0, 65535),)), PING, Ways(), False),
    (Ports(Side.DST, (PortRange(1, 1),), negate=True), PING, Ways(), False),
    (InSet(Side.SRC, "web", SetKind.ADDR4), TCP, Ways(), True),
    (InSet(Side.DST, "web", SetKind.ADDR4), TCP, Ways(), False),
    (InSet(Side.DST, "web", SetKind.ADDR4, negate=True), TCP, Ways(), True),
    (InSet(Side.DST, "db", SetKind.ADDR6), TCP6, Ways(), True),
    (InNets(Side.SRC, NETS), TCP, Ways(), True),
    (InNets(Side.DST, NETS), TCP, Ways(), False),
    (InNets(Side.DST, NETS, negate=True), TCP, Ways(), True),
    (InNets(Side.SRC, NETS, negate=True), TCP6, Ways(), False),
    (InNets(Side.SRC, (parse_prefix("0.0.0.0/0"),)), TCP6, Ways(), False),
    (InNets(Side.SRC, (parse_prefix("::/0"),)), TCP6, Ways(), True),
    (IcmpIs(4, Icmp(8)), PING, Ways(), True),
    (IcmpIs(4, Icmp(8, 1)), PING, Ways(), False),
    (IcmpIs(4, Icmp(8, 1), negate=True), PING, Ways(), True),
    (IcmpIs(4, Icmp(8), negate=True), PING, Ways(), False),
    (IcmpIs(6, Icmp(128)), PING6, Ways(), True),
    (IcmpIs(6, Icmp(8)), PING, Ways(), False),
    (IcmpIs(4, Icmp(9), negate=True), TCP, Ways(), False),
    (Interface(True, "eth0"), TCP, Ways("eth0", "eth1"), True),
    (Interface(False, "eth0"), TCP, Ways("eth0", "eth1"), False),
    (Interface(False, "eth1"), TCP, Ways("eth0", "eth1"), True),
    (Interface(True, "eth0"), TCP, Ways(), False),
]


@pytest.mark.parametrize(("match", "packet", "ways", "expected"), MATCHES)
def test_matches(match: Match, packet: Packet, ways: Ways, expected: bool) -> None:
    assert _holds(match, packet, ways) is expected


def test_first_verdict_wins_and_all_matches_must_hold() -> None:
    both = Rule((Protocol(6), Family(6)), Verdict.DROP)
    assert judge(view(c=(both, ACCEPT, DROP)), "c", TCP) == Judgement(True, ACCEPT, "c", 1)
    assert judge(view(c=(both, ACCEPT, DROP)), "c", TCP6) == Judgement(False, both, "c", 0)


def test_nothing_decided() -> None:
    assert judge(view(), "missing", TCP) == Judgement(None)
    assert judge(view(c=(CONTINUE,)), "c", TCP).accept is None


def test_jump_comes_back_and_goto_does_not() -> None:
    jump, goto = Rule((), Jump("inner")), Rule((), Goto("inner"))
    assert judge(view(c=(jump, ACCEPT), inner=()), "c", TCP).accept is True
    assert judge(view(c=(goto, ACCEPT), inner=()), "c", TCP).accept is None
    assert judge(view(c=(goto, ACCEPT), inner=(DROP,)), "c", TCP) == Judgement(False, DROP, "inner", 0)
    outer = view(o=(Rule((), Jump("c")), DROP), c=(goto, ACCEPT), inner=(CONTINUE,))
    assert judge(outer, "o", TCP) == Judgement(False, DROP, "o", 1)


def test_return_goes_on_after_the_last_jump() -> None:
    back, into = Rule((), Verdict.RETURN), Rule((), Jump("inner"))
    assert judge(view(c=(back, ACCEPT)), "c", TCP).accept is None
    assert judge(view(c=(into, DROP), inner=(back, ACCEPT)), "c", TCP) == Judgement(False, DROP, "c", 1)
    only6 = Rule((Family(6),), Verdict.RETURN)
    assert judge(view(c=(into, DROP), inner=(only6, ACCEPT)), "c", TCP).accept is True
    over = view(c=(into, DROP), inner=(Rule((), Goto("there")), ACCEPT), there=(back, ACCEPT))
    assert judge(over, "c", TCP) == Judgement(False, DROP, "c", 1), "a Goto is no jump to come back from"


def test_logs_and_counts_on_the_way() -> None:
    counted = Rule((), Verdict.CONTINUE, counted=True)
    other = Rule((Family(6),), Verdict.CONTINUE, counted=True)
    end = Rule((), Verdict.ACCEPT, counted=True, keep=True)
    made = view(c=(Rule((), Log("one")), other, counted, Rule((), Jump("d"))), d=(Rule((), Log("two")), end))
    found = judge(made, "c", TCP)
    assert found == Judgement(True, end, "d", 1, ("one", "two"), (("c", 2), ("d", 1)))
    assert found.keep


def test_keep_is_of_what_is_accepted() -> None:
    assert not judge(view(c=(Rule((), Verdict.DROP, keep=True),)), "c", TCP).keep
    assert not judge(view(c=(ACCEPT,)), "c", TCP).keep
    assert not judge(view(), "c", TCP).keep


def test_a_chain_that_is_replaced_is_read_anew() -> None:
    chains = {"c": (ACCEPT,)}
    made = View(chains, lambda _name, _address: False)
    assert judge(made, "c", TCP).accept is True
    chains["c"] = (DROP,)
    assert judge(made, "c", TCP).accept is False


def test_sets_are_asked_when_judged() -> None:
    members: set[Address] = set()
    made = View({"c": (Rule((InSet(Side.SRC, "s", SetKind.ADDR4),), Verdict.ACCEPT),)}, lambda _, a: a in members)
    assert judge(made, "c", TCP).accept is None
    members.add(A)
    assert judge(made, "c", TCP).accept is True


def test_jumps_in_a_circle_are_refused() -> None:
    with pytest.raises(ValueError, match="too deep"):
        judge(view(c=(Rule((), Jump("c")),)), "c", TCP)
