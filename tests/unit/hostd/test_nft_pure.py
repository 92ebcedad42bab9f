# The pure parts of the nf_tables door: intervals, elements, fingerprints, admissions, comments.
from __future__ import annotations

import ipaddress
import itertools
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostd.compiler.ruleset import (
    Family,
    Goto,
    Guard,
    IcmpIs,
    InNets,
    InSet,
    Interface,
    Jump,
    Log,
    Ports,
    Protocol,
    Rule,
    SetKind,
    Side,
    Verdict,
)
from hostd.dataplane.netlink import attributes
from hostd.dataplane.nft import Admission, disjoint, fingerprint, group, render
from hostd.dataplane.nft.admission import PLAIN, Element, Granted, whole
from hostd.dataplane.nft.elements import decode_nets, encode, keys
from hostd.dataplane.nft.intervals import merge, prefixes_of
from hostd.dataplane.nft.rules import statement
from hostd.dataplane.nft.statements import safe_comment
from slash32.net import Prefix, parse_prefix
from slash32.policy import Icmp, PortRange

ANY = settings(max_examples=500 if os.environ.get("SLASH32_COUNTS") == "full" else 100, deadline=None)


@st.composite
def prefixes(draw: st.DrawFn, width: int) -> Prefix:
    length = draw(st.integers(0, 8 * width))
    number = draw(st.integers(0, 2 ** (8 * width) - 1)) >> (8 * width - length) << (8 * width - length)
    return Prefix(number.to_bytes(width, "big"), length)


def _network(prefix: Prefix) -> ipaddress.IPv4Network:
    return ipaddress.IPv4Network(str(prefix))


@ANY
@given(st.lists(prefixes(4), max_size=20))
def test_disjoint_is_the_smallest_cover(given_prefixes: list[Prefix]) -> None:
    expected = ipaddress.collapse_addresses(map(_network, given_prefixes))
    assert sorted(map(_network, disjoint(given_prefixes))) == sorted(expected)


@ANY
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)).map(sorted).map(tuple), max_size=10))
def test_merge_covers_the_same_numbers(intervals: list[tuple[int, int]]) -> None:
    merged = merge(intervals)
    assert {n for a, b in merged for n in range(a, b + 1)} == {n for a, b in intervals for n in range(a, b + 1)}
    assert all(before[1] + 1 < after[0] for before, after in itertools.pairwise(merged))


@ANY
@given(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)).map(sorted))
def test_prefixes_of_a_range(ends: list[int]) -> None:
    low, high = map(ipaddress.IPv4Address, ends)
    expected = list(ipaddress.summarize_address_range(low, high))
    assert [_network(p) for p in prefixes_of((ends[0], ends[1]), 4)] == expected


def _as_dumped(piece: bytes) -> bytes:
    """The kernel sends nests without the NESTED flag."""
    return piece.replace(b"\1\x80", b"\1\0")


@ANY
@given(st.sets(st.binary(min_size=4, max_size=4).filter(lambda m: b"\x80" not in m)))
def test_addresses_come_back(members: set[bytes]) -> None:
    pieces = [_as_dumped(p) for p in encode(SetKind.ADDR4, members)]
    assert {key for p in pieces for key in keys(p, 4)} == members


@pytest.mark.parametrize("width", [4, 16])
def test_nets_come_back(width: int) -> None:
    @ANY
    @given(st.lists(prefixes(width)))
    def check(given_prefixes: list[Prefix]) -> None:
        members = disjoint(given_prefixes)
        kind = SetKind.NET4 if width == 4 else SetKind.NET6
        assert decode_nets(encode(kind, members), width) == members

    check()


def test_elements_come_in_pieces_that_an_attribute_can_hold() -> None:
    members = [n.to_bytes(16, "big") for n in range(10_000)]
    pieces = list(encode(SetKind.ADDR6, members))
    assert len(pieces) > 1
    assert all(len(p) < 1 << 16 for p in pieces)
    assert sum(len(list(attributes(p))) for p in pieces) == 10_000


def test_no_members_are_no_elements() -> None:
    assert all(list(encode(kind, ())) == [] for kind in SetKind)


# ---- rules ------------------------------------------------------------------------------------------------------



def _nets(*texts: str) -> tuple[Prefix, ...]:
    return tuple(map(parse_prefix, texts))


WEB = Rule((Family(4), Protocol(6), Ports(Side.DST, (PortRange(80, 80),))), Verdict.ACCEPT, "web")
OTHERS = [
    Rule(WEB.matches, Verdict.DROP, "web"),
    Rule(WEB.matches, Jump("web-x"), "web"),
    Rule(WEB.matches, Verdict.ACCEPT, "other"),
    Rule((*WEB.matches[:2], Ports(Side.SRC, (PortRange(80, 80),))), Verdict.ACCEPT, "web"),
    Rule((*WEB.matches[:2], Ports(Side.DST, (PortRange(80, 80),), True)), Verdict.ACCEPT, "web"),
    Rule((*WEB.matches[:2], Ports(Side.DST, (PortRange(80, 81),))), Verdict.ACCEPT, "web"),
    Rule((*WEB.matches, InSet(Side.SRC, "s-1", SetKind.ADDR4)), Verdict.ACCEPT, "web"),
    Rule((*WEB.matches, InSet(Side.SRC, "s-2", SetKind.ADDR4)), Verdict.ACCEPT, "web"),
    Rule((*WEB.matches, InSet(Side.SRC, "s-1", SetKind.ADDR4, True)), Verdict.ACCEPT, "web"),
    Rule((*WEB.matches, InNets(Side.SRC, (parse_prefix("10.0.0.0/8"),))), Verdict.ACCEPT, "web"),
    Rule((*WEB.matches, InNets(Side.SRC, (parse_prefix("10.0.0.0/9"),))), Verdict.ACCEPT, "web"),
    Rule((*WEB.matches, InNets(Side.SRC, _nets("10.0.0.0/9", "11.0.0.0/8"))), Verdict.ACCEPT, "web"),
    Rule((*WEB.matches, InNets(Side.SRC, _nets("10.0.0.0/9", "12.0.0.0/8"))), Verdict.ACCEPT, "web"),
    Rule(WEB.matches, Goto("web-x"), "web"),
    Rule(WEB.matches, Log("web"), "web"),
    Rule(WEB.matches, Log("web-x"), "web"),
    Rule(WEB.matches, Verdict.CONTINUE, "web"),
    Rule(WEB.matches, Verdict.RETURN, "web"),
    Rule(WEB.matches, Verdict.CONTINUE, "web", counted=True),
    WEB._replace(counted=True),
    Rule((*WEB.matches, Interface(True, "eth0")), Verdict.ACCEPT, "web"),
    Rule((*WEB.matches, Interface(False, "eth0")), Verdict.ACCEPT, "web"),
    Rule((*WEB.matches, Interface(True, "eth1")), Verdict.ACCEPT, "web"),
    Rule((*WEB.matches, Interface(True, "eth1"), Interface(False, "eth1")), Verdict.ACCEPT, "web"),
]


def test_fingerprints_tell_rules_apart() -> None:
    assert len({fingerprint(r) for r in [WEB, *OTHERS]}) == 1 + len(OTHERS)


def test_fingerprint_is_of_the_meaning_not_the_order() -> None:
    assert fingerprint(Rule(WEB.matches[::-1], WEB.verdict, WEB.comment)) == fingerprint(WEB)
    through = Rule((*WEB.matches, Interface(False, "a"), Interface(True, "a")), Verdict.ACCEPT)
    assert fingerprint(through) == fingerprint(Rule(through.matches[::-1], Verdict.ACCEPT))


def test_fingerprint_leaves_out_what_is_no_matter_of_the_kernel() -> None:
    assert fingerprint(WEB._replace(keep=True)) == fingerprint(WEB)


def test_text_of_a_rule() -> None:
    assert str(statement(WEB)) == 'meta nfproto ipv4 meta l4proto 6 th dport 80 accept comment "web"'
    ping = Rule((Protocol(1), IcmpIs(4, Icmp(8))), Verdict.ACCEPT)
    assert str(statement(ping)) == "meta nfproto ipv4 meta l4proto 1 icmp type 8 accept"
    halves = Rule((InNets(Side.DST, _nets("10.0.0.0/9", "10.128.0.0/9")),), Verdict.DROP)
    assert str(statement(halves)) == "ip daddr 10.0.0.0/8 drop"


def test_text_of_what_does_not_decide() -> None:
    logged = Rule((Protocol(6),), Log("i:web.1"), counted=True)
    assert str(statement(logged)) == (
        'meta l4proto 6 counter limit rate 10/second burst 20 packets log prefix "i:web.1" group 5332'
    )
    assert str(statement(Rule((Protocol(6),), Verdict.CONTINUE, counted=True))) == "meta l4proto 6 counter"
    assert str(statement(Rule((Protocol(6),), Verdict.CONTINUE))) == "meta l4proto 6 continue"
    assert str(statement(Rule((Protocol(6),), Verdict.RETURN))) == "meta l4proto 6 return"
    assert str(statement(Rule((Interface(True, "eth0"),), Goto("t-1")))) == 'iifname "eth0" goto t-1'


@pytest.mark.parametrize("tag", ["", "a" * 29, 'a"', "a b", "a\n", "é"])
def test_a_tag_that_is_none_is_refused(tag: str) -> None:
    with pytest.raises(ValueError, match="no log tag"):
        statement(Rule((), Log(tag)))


@pytest.mark.parametrize("name", ["", "a" * 16, "eth*", 'e"', "e h", "a/b", "a\\", "é"])
def test_a_name_that_no_rule_can_hold_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no interface name"):
        statement(Rule((Interface(True, name),), Verdict.ACCEPT))


@pytest.mark.parametrize("match", [Ports(Side.SRC, ()), InNets(Side.SRC, ())])
def test_a_match_of_nothing_is_refused(match: Ports | InNets) -> None:
    with pytest.raises(ValueError, match="at least one"):
        statement(Rule((match,), Verdict.ACCEPT))


def test_mixed_families_are_refused() -> None:
    nets = parse_prefix("10.0.0.0/8"), parse_prefix("fd00::/8")
    with pytest.raises(ValueError, match="one family"):
        statement(Rule((InNets(Side.SRC, nets),), Verdict.ACCEPT))


@given(st.text())
def test_comments_are_one_bounded_line_without_quotes(text: str) -> None:
    comment = safe_comment(text)
    assert len(comment) <= 120
    assert comment.isascii()
    assert all(c.isprintable() and c != '"' for c in comment)


# ---- admissions -------------------------------------------------------------------------------------------------

MAC = bytes.fromhex("525400000001")
ALICE = Admission(7, MAC, (bytes([10, 0, 0, 1]), b"\xfd" + bytes(15)), _nets("10.1.0.0/24", "fd01::/64"))


def _whole(elements: list[Element]) -> tuple[frozenset[Granted], frozenset[Element]]:
    plain = {name: {e.key for e in elements if e.set == name} for name in PLAIN}
    return whole(plain, {e for e in elements if e.last})


def test_admission_comes_back_from_its_elements() -> None:
    granted, strays = _whole(ALICE.elements())
    assert not strays
    assert group(granted) == {(7, MAC): ALICE}


def test_each_missing_element_takes_its_grants_along() -> None:
    for missing in ALICE.elements():
        rest = [e for e in ALICE.elements() if e != missing]
        granted, strays = _whole(rest)
        assert granted < frozenset(ALICE.grants())
        covered = {e for (ifindex, mac, source) in granted for e in _of(ifindex, mac, source)}
        assert covered | strays == set(rest)
        assert not covered & strays


def _of(ifindex: int, mac: bytes, source: bytes | Prefix) -> list:
    if isinstance(source, Prefix):
        return Admission(ifindex, mac, (), (source,)).elements()
    return Admission(ifindex, mac, (source,)).elements()


def test_nothing_admitted_is_nothing_written() -> None:
    assert Admission(7, MAC).elements() == []


def test_guard_shows_in_the_text() -> None:
    text = render(Guard(prefixes=("tap", "vnet"), conn_limit=99, drop_transit=(4, 6)))
    assert text.count('iifname "tap*" drop') == 4
    assert "ct count over 99" in text
    assert "did not forward before" in text
    assert "did not forward before" not in render(Guard())
