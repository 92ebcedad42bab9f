# Packets that rules tell apart are not alike; those that differ in what no rule asks for are.
from __future__ import annotations

import os

from hypothesis import given, settings
from hypothesis import strategies as st

from hostd.compiler.ruleset import Family, InNets, InSet, Match, Ports, Protocol, Rule, SetKind, Side, Verdict
from hostd.revocation.alike import Alike
from hostd.revocation.judge import View, judge
from slash32.net import Address, Prefix
from slash32.policy import PortRange
from slash32.verdict import Packet

COUNT = 5000 if os.environ.get("SLASH32_COUNTS") == "full" else 500
SIDES = st.sampled_from(Side)
ADDRESSES = st.integers(0, 15).map(lambda n: bytes((10, 0, 0, n)))
NETS = st.tuples(ADDRESSES, st.integers(28, 32)).map(
    lambda pair: Prefix((int.from_bytes(pair[0], "big") >> 32 - pair[1] << 32 - pair[1]).to_bytes(4, "big"), pair[1])
)
RANGES = st.tuples(st.integers(0, 9), st.integers(0, 9)).map(lambda ends: PortRange(min(ends), max(ends)))
NOT = st.booleans()
MATCHES: st.SearchStrategy[Match] = st.one_of(
    st.just(Family(4)),
    st.builds(Protocol, st.sampled_from((6, 17)), NOT),
    st.builds(Ports, SIDES, st.lists(RANGES, min_size=1, max_size=2).map(tuple), NOT),
    st.builds(InNets, SIDES, st.lists(NETS, min_size=1, max_size=2).map(tuple), NOT),
    st.builds(InSet, SIDES, st.sampled_from("ab"), st.just(SetKind.ADDR4), NOT),
)
ENDS = st.sampled_from((Verdict.ACCEPT, Verdict.DROP))
RULES = st.lists(st.builds(Rule, st.lists(MATCHES, max_size=3).map(tuple), ENDS), max_size=4)
PACKETS = st.builds(
    Packet, ADDRESSES, ADDRESSES, st.sampled_from((6, 17)), st.integers(0, 9), st.integers(0, 9)
) | st.builds(Packet, ADDRESSES, ADDRESSES, st.just(47))
SETS = st.fixed_dictionaries({name: st.frozensets(ADDRESSES) for name in "ab"})


@settings(max_examples=COUNT, deadline=None)
@given(RULES, RULES, SETS, SETS, st.lists(PACKETS, min_size=2, max_size=8))
def test_what_is_alike_is_judged_alike(
    now: list[Rule], then: list[Rule], have: dict[str, frozenset[Address]], had: dict[str, frozenset[Address]],
    packets: list[Packet],
) -> None:  # fmt: skip
    changed = {name for name in have if have[name] != had[name]}
    contains, contained = (lambda n, a: a in have[n]), (lambda n, a: a in had[n])
    alike = Alike([*now, *then], contains, contained, changed)
    views = View({"x": tuple(now)}, contains), View({"x": tuple(then)}, contained)
    known: dict[object, tuple[object, ...]] = {}
    for packet in packets:
        judged = tuple(judge(view, "x", packet)[:4] for view in views)
        assert known.setdefault(alike.of(packet), judged) == judged


def test_what_nobody_asks_makes_no_difference() -> None:
    rule = Rule((Family(4), Protocol(6), Ports(Side.DST, (PortRange(80, 80),))), Verdict.ACCEPT)
    net = Rule((Family(4), InNets(Side.DST, (Prefix(bytes((203, 0, 113, 0)), 24),))), Verdict.DROP)

    def kinds(rules: list[Rule]) -> int:
        alike = Alike(rules, lambda _, a: a[-1] == 5, lambda _, a: False, ())
        hostile = [Packet(bytes((10, 0, 0, 1)), bytes((11, n % 7, n % 11, n % 256)), 6, n, 1 + n) for n in range(2000)]
        return len({alike.of(packet) for packet in hostile})

    assert kinds([]) == 1
    assert kinds([rule]) == 3, "below, at and above it"
    assert kinds([rule, net]) == 3
    assert kinds([Rule((InSet(Side.DST, "a", SetKind.ADDR4),), Verdict.ACCEPT)]) == 2
