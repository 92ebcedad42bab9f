# A chain that is said to allow all that another does allows it, packet by packet; the commonest cases.
from __future__ import annotations

from itertools import product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hostd.compiler.ruleset import Goto, Jump, Log, Ports, Protocol, Rule, Side, Verdict
from hostd.revocation.gives import only_gives
from hostd.revocation.judge import View, judge
from slash32.net import parse_address
from slash32.policy import PortRange
from slash32.verdict import Packet

A, B = map(parse_address, ("10.65.0.1", "10.65.0.2"))
PACKETS = [Packet(A, B, protocol, 1, port) for protocol, port in product((6, 17), (22, 80))]
TCP, SSH = Protocol(6), Ports(Side.DST, (PortRange(22, 22),))
MATCHES = [(), (TCP,), (SSH,), (TCP, SSH), (Protocol(17),)]


def _rules(*below: str) -> st.SearchStrategy[tuple[Rule, ...]]:
    ways = [*Verdict, Log("x"), *(way(name) for name in below for way in (Jump, Goto))]
    return st.lists(st.builds(Rule, st.sampled_from(MATCHES), st.sampled_from(ways)), max_size=3).map(tuple)


ACCEPT, DROP = Rule((), Verdict.ACCEPT), Rule((), Verdict.DROP)
CLASS, MORE = (Rule((), Jump("b")), DROP), (Rule((), Jump("a")), Rule((), Jump("b")), DROP)


@given(_rules(), _rules("a"), _rules("a", "b"), _rules("a", "b"), st.lists(st.integers(0, 3), max_size=3))
@example((ACCEPT,), (), CLASS, (MORE[0],), [0])
@example((DROP,), (), CLASS, (MORE[0],), [0])
@example((Rule((), Verdict.RETURN),), (ACCEPT,), CLASS, (Rule((), Verdict.RETURN),), [0])
def test_what_is_said_to_be_no_less_is_no_less(
    a: tuple[Rule, ...], b: tuple[Rule, ...], before: tuple[Rule, ...], more: tuple[Rule, ...], places: list[int]
) -> None:
    after = list(before)
    for rule, place in zip(more, places, strict=False):
        after.insert(place, rule)
    chains = {"a": a, "b": b, "before": before, "after": tuple(after)}
    if not only_gives(before, after, chains.get):
        return
    view = View(chains, lambda _, __: False)
    for packet in PACKETS:
        had, has = judge(view, "before", packet).accept, judge(view, "after", packet).accept
        assert has or (had is has) or had is False, (packet, had, has)


@pytest.mark.parametrize(("a", "after", "gives"), [
    ((ACCEPT,), MORE, True),
    ((Rule((TCP,), Verdict.ACCEPT), Rule((), Verdict.RETURN)), MORE, True),
    ((DROP,), MORE, False),
    ((Rule((), Goto("b")),), MORE, False),
    ((), CLASS, True),
    ((), CLASS[:1], False),
    ((), (DROP, *CLASS), False),
    ((), (Rule((), Verdict.RETURN), *CLASS), False),
    ((), (CLASS[0], ACCEPT, DROP), True),
])  # fmt: skip
def test_who_comes_under_one_more_policy(a: tuple[Rule, ...], after: tuple[Rule, ...], gives: bool) -> None:
    chains = {"a": a, "b": (Rule((SSH,), Verdict.ACCEPT),)}
    assert only_gives(CLASS, after, chains.get) is gives
    assert not only_gives(CLASS, MORE, lambda _: None), "of a chain that is not known nothing is"
