# Policies as the abstract packet filter, in tables written by hand: each rule shown as nft shows it. What the rules do
# to packets is tests/kernel/test_verdicts.py's.
from __future__ import annotations

import ipaddress
import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostd.compiler.compile import (
    SelectorSet,
    admitted,
    capacity,
    compile_rule,
    compile_rules,
    in_parts,
    members_of,
    only_counting,
    without_pass,
)
from hostd.compiler.names import (
    class_chain,
    digest,
    height,
    is_derived,
    log_tag,
    part_chain,
    parts_of,
    policy_chain,
    policy_of,
    profile_chain,
    staged_chain,
    tail_chain,
    tier_chain,
)
from hostd.compiler.ruleset import HOST_CHAINS, HOST_IN, NAME_LIMIT, Goto, Log, SetKind, Verdict
from hostd.dataplane.nft.rules import statement
from hostd.dataplane.nft.skeleton import RESERVED_CHAINS
from hostd.dataplane.nft.transaction import _free
from hostd.revocation.judge import View, judge
from slash32.net import Address, Prefix, parse_address, parse_prefix
from slash32.pack import AddressSet
from slash32.policy import Action, Direction, Icmp, Peer, Policy, PortRange, Profile, Rule
from slash32.verdict import Packet

WEB = 'role == "web"'
IN, OUT = Direction.INGRESS, Direction.EGRESS
PLAIN = SelectorSet(WEB, AddressSet())
BEHIND = SelectorSet(WEB, AddressSet(set(), {parse_prefix("10.66.0.0/26"), parse_prefix("fd66::/64")}))
A4, A6, N4, N6 = (f"@{BEHIND.specs[kind][0]}" for kind in SetKind)


def shown(rule: Rule, found: SelectorSet = BEHIND) -> list[str]:
    return [statement(r).text for r in compile_rule(rule, lambda _: found, "why")]


def nets(*texts: str) -> tuple[Prefix, ...]:
    return tuple(map(parse_prefix, texts))


def ports(*ranges: tuple[int, int]) -> tuple[PortRange, ...]:
    return tuple(PortRange(*r) for r in ranges)


V4, V6 = "meta nfproto ipv4", "meta nfproto ipv6"
ALLOW = {"action": Action.ALLOW}
TABLE: dict[str, tuple[dict[str, object], list[str]]] = {
    "anything": ({}, ["accept"]),
    "nothing": ({"action": Action.DENY}, ["drop"]),
    "a protocol": ({"protocol": 6}, ["meta l4proto 6 accept"]),
    "another protocol": ({"not_protocol": 6}, ["meta l4proto != 6 accept"]),
    "a family": ({"ip_version": 6}, [f"{V6} accept"]),
    "ports": (
        {"protocol": 6, "destination": Peer(ports=ports((80, 80), (443, 444)))},
        ["meta l4proto 6 th dport { 80, 443-444 } accept"],
    ),
    "not those ports": (
        {"protocol": 17, "source": Peer(not_ports=ports((1, 1023)))}, ["meta l4proto 17 th sport != 1-1023 accept"],
    ),
    "ICMP": ({"protocol": 1, "icmp": Icmp(8)}, [f"{V4} meta l4proto 1 icmp type 8 accept"]),
    "not that ICMPv6": (
        {"protocol": 58, "not_icmp": Icmp(128, 0)},
        [f"{V6} meta l4proto 58 icmpv6 type . icmpv6 code != {{ 128 . 0 }} accept"],
    ),
    "nets of both families": (
        {"source": Peer(nets=nets("10.0.0.0/8", "fd00::/8"))},
        [f"{V4} ip saddr 10.0.0.0/8 accept", f"{V6} ip6 saddr fd00::/8 accept"],
    ),
    "nets of one family admit only that": (
        {"source": Peer(nets=nets("10.0.0.0/8"))}, [f"{V4} ip saddr 10.0.0.0/8 accept"],
    ),
    "notNets of one family say nothing of the other": (
        {"destination": Peer(not_nets=nets("10.0.0.0/8"))}, [f"{V4} ip daddr != 10.0.0.0/8 accept", f"{V6} accept"],
    ),
    "nets that cannot meet": (
        {"source": Peer(nets=nets("10.0.0.0/8")), "destination": Peer(nets=nets("fd00::/8"))}, [],
    ),
    "a selector": (
        {"source": Peer(selector=WEB)},
        [f"{V4} ip saddr {A4} accept", f"{V4} ip saddr {N4} accept",
         f"{V6} ip6 saddr {A6} accept", f"{V6} ip6 saddr {N6} accept"],
    ),
    "not that selector: neither its addresses nor what is behind them": (
        {"ip_version": 4, "source": Peer(not_selector=WEB)}, [f"{V4} ip saddr != {A4} ip saddr != {N4} accept"],
    ),
    "two selectors: every pair": (
        {"ip_version": 4, "source": Peer(selector=WEB), "destination": Peer(selector=WEB)},
        [f"{V4} ip saddr {s} ip daddr {d} accept" for s, d in itertools.product((A4, N4), (A4, N4))],
    ),
    "all of one side must hold": (
        {"protocol": 6, "ip_version": 4,
         "source": Peer(nets("10.0.0.0/8"), nets("10.1.0.0/16"), None, WEB, ports((1, 2)), ports((2, 2)))},
        [f"{V4} meta l4proto 6 th sport 1-2 th sport != 2 ip saddr 10.0.0.0/8 ip saddr != 10.1.0.0/16 "
         f"ip saddr != {A4} ip saddr != {N4} accept"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_rules(case: str) -> None:
    fields, expected = TABLE[case]
    assert shown(Rule(**(ALLOW | fields))) == expected  # type: ignore[arg-type]


def test_a_selector_with_nothing_behind_it_needs_no_sets_of_nets() -> None:
    assert len(shown(Rule(Action.ALLOW, source=Peer(selector=WEB)), PLAIN)) == 2
    assert set(PLAIN.specs) == {SetKind.ADDR4, SetKind.ADDR6}


def compiled(item: Policy | Profile, direction: Direction = IN) -> list[tuple[int, str]]:
    return [(at, statement(rule).text) for at, rule in compile_rules(item, direction, lambda _: PLAIN)]


def test_a_policy_is_its_rules_by_number() -> None:
    rules = (Rule(Action.DENY), Rule(Action.ALLOW, ip_version=6, source=Peer(nets=nets("10.0.0.0/8"))), Rule(**ALLOW))
    assert compiled(Policy("web", "all()", (IN,), ingress=rules)) == [(0, "drop"), (2, "accept")]
    (rule,) = [rule for _, rule in compile_rules(Profile("web", rules[:1]), IN, lambda _: PLAIN)]
    assert rule.comment == "profile web ingress[0]"


def test_actions() -> None:
    rules = tuple(map(Rule, Action))
    policy, profile = Policy("web", "all()", (IN,), ingress=rules, keep_established=True), Profile("web", rules)
    tags = [log_tag(kind, "web", IN, 2) for kind in ("policy", "profile")]
    made = compile_rules(policy, IN, lambda _: PLAIN)
    assert [r.verdict for _, r in made] == [Verdict.ACCEPT, Verdict.DROP, Log(tags[0]), Verdict.RETURN]
    assert [r.keep for _, r in made] == [True, False, False, False]
    assert [r.verdict for r in without_pass(made)] == [Verdict.ACCEPT, Verdict.DROP, Log(tags[0])]
    in_profile = [r.verdict for _, r in compile_rules(profile, IN, lambda _: PLAIN)]
    assert in_profile == [Verdict.ACCEPT, Verdict.DROP, Log(tags[1]), Verdict.DROP]
    staged = only_counting(compile_rules(replace(policy, staged=True), IN, lambda _: PLAIN), "there")
    assert [(r.verdict, r.counted) for r in staged] == [(Goto("there"), counted) for counted in (False, True, False)]
    assert len({*tags}) == 2 and all(len(tag) <= 28 for tag in tags)


def test_a_policy_in_parts() -> None:
    passing, other = Rule(Action.PASS, 6), Rule(Action.PASS, 17)
    deny = Rule(Action.DENY, 1)
    rules = (deny, Rule(Action.LOG), passing, other, Rule(**ALLOW), Rule(Action.PASS), deny)
    policy = Policy("web", "all()", (IN,), ingress=rules)
    chains, asked = in_parts(policy, IN, compile_rules(policy, IN, lambda _: PLAIN))
    first, second = chains
    verdicts = [[rule.verdict for rule in chain] for chain in chains.values()]
    assert verdicts == [[Verdict.DROP, Log(log_tag("policy", "web", IN, 1))], [Verdict.ACCEPT]]
    assert [statement(rule).text for rule in asked] == [
        f"jump {first}", "meta l4proto 6 return", "meta l4proto 17 return", f"jump {second}", "return",
    ]  # fmt: skip
    assert {policy_of(name) for name in chains} == {parts_of("web", IN)} != {parts_of("web", OUT)}


BOTH = SelectorSet(WEB, AddressSet({parse_address("10.0.0.1")}, set(nets("10.0.0.0/24"))))


@pytest.mark.parametrize("action", Action)
def test_who_is_in_a_set_twice_is_logged_once(action: Action) -> None:
    """By its address, and behind a prefix; as a source and as a destination."""
    own, behind, stranger = (parse_address(f"10.0.{n}") for n in ("0.1", "0.2", "9.9"))
    rule = Rule(action, source=Peer(selector=WEB), destination=Peer(selector=WEB))
    made = compile_rules(Policy("web", "all()", (IN,), ingress=(rule,)), IN, lambda _: BOTH)

    def contains(name: str, address: Address) -> bool:
        return address == own or (name.startswith("net") and address == behind)

    def matching(source: Address, target: Address) -> int:
        packet = Packet(source, target, 6, 1, 2)
        counting = tuple(r._replace(verdict=Verdict.CONTINUE, counted=True) for _, r in made)
        return len(judge(View({"c": counting}, contains), "c", packet).counted)

    pairs = [(a, b) for a in (own, behind) for b in (own, behind)]
    assert max(matching(*pair) for pair in pairs) == (1 if action is Action.LOG else 4)
    assert min(matching(*pair) for pair in pairs) == 1 and matching(own, stranger) == matching(stranger, own) == 0


# -- names ----------------------------------------------------------------------------------------------------------

names = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,60}[a-z0-9])?(\.[a-z0-9]{1,30}){0,3}", fullmatch=True)
tricky = names | st.builds("{}-{}".format, names, st.integers(0, 99)) | st.builds(
    lambda name, other: f"{name[:7]}-{digest(other)}-5", names, names
)  # fmt: skip
MAKERS: tuple[Callable[[str, Direction], str], ...] = (
    policy_chain, profile_chain, lambda n, d: part_chain(n, d, "x", 0), lambda n, d: part_chain(n, d, "y", 9999),
    lambda n, d: staged_chain(n, d, "tail-in-0123456789ab-5"), lambda n, d: tail_chain(9999, d, n),
    lambda n, d: tier_chain(9999, d, n), lambda n, d: class_chain(d, n),
)  # fmt: skip


@given(st.sets(tricky, min_size=2, max_size=4))
def test_names_of_different_chains_are_different_and_legal_and_short(given_: set[str]) -> None:
    made = {make(name, d) for name in given_ for d in Direction for make in MAKERS}
    assert len(made) == len(given_) * 2 * len(MAKERS) and not made & set(HOST_CHAINS)
    for name in made:
        _free(name, RESERVED_CHAINS)
        assert len(name) <= NAME_LIMIT


def test_short_names_are_kept_and_long_ones_begin_so() -> None:
    assert policy_chain("web", IN) == "pi-web" and profile_chain("web-1", OUT) == "fo-web-1"
    assert policy_chain("x" * 25, IN) == "pi-" + "x" * 25
    assert policy_chain("x" * 26, IN).startswith("pi-xxxxxxxxxxxx_")
    assert part_chain("web.front", IN, "", 0).startswith("pi-web_fr_")


@given(tricky)
def test_a_name_says_how_high_its_chain_stands(name: str) -> None:
    assert height(policy_chain(name, IN)) == height(profile_chain(name, OUT)) == 0
    tail = tail_chain(5, IN, name)
    user = staged_chain(name, IN, tail)
    assert height(part_chain(name, IN, "", 7)) == 0 and not is_derived(part_chain(name, IN, "", 7))
    chains = tier_chain(1, OUT, name), tail, user, class_chain(OUT, name), HOST_IN
    assert height(chains[0]) > 0 and sorted(chains, key=height) == [*chains] and len({*map(height, chains)}) == 5
    assert not is_derived(policy_chain(name, IN)) and not is_derived(HOST_IN) and not is_derived("other")
    assert all(map(is_derived, (tail, user, class_chain(IN, name))))


@given(tricky, st.integers(0, 9999))
def test_a_part_says_whose_it_is(name: str, number: int) -> None:
    assert policy_of(part_chain(name, IN, "x", number)) == policy_of(part_chain(name, IN, "y", 0)) == parts_of(name, IN)
    others = policy_chain(name, IN), profile_chain(name, IN), tail_chain(5, IN, name), class_chain(IN, name)
    assert [policy_of(other) for other in others] == [*others]


def test_a_name_cannot_be_made_to_look_like_another() -> None:
    long = "a.b"
    assert policy_chain(policy_chain(long, IN).removeprefix("pi-").replace("_", "-"), IN) != policy_chain(long, IN)


@given(st.integers(0, 10**8))
def test_names_of_sets_are_short(count: int) -> None:
    assert len(f"addr4-{digest(WEB)}-{capacity(count)}") <= NAME_LIMIT


@given(st.integers(0, 200_000))
def test_a_set_has_room_to_double(count: int) -> None:
    size = capacity(count)
    assert size >= max(256, 2 * count) and (size == 256 or size < 8 * count)


def addresses(count: int) -> set[bytes]:
    return {bytes((10, n >> 16, n >> 8 & 255, n & 255)) for n in range(count)}


def test_a_set_that_outgrows_itself_is_another_set() -> None:
    found = SelectorSet(WEB, AddressSet(addresses(128)))
    before = dict(found.specs)
    extra = bytes((10, 255, 0, 0))
    assert found.changed([extra], [])
    assert found.specs[SetKind.ADDR4] != before[SetKind.ADDR4] and found.specs[SetKind.ADDR6] == before[SetKind.ADDR6]
    assert found.changed([], [extra]) and found.specs == before
    assert not found.changed([], [next(iter(addresses(1)))])
    assert found.specs == SelectorSet(WEB, AddressSet(addresses(127))).specs


some = st.lists(st.builds(lambda n, length: parse_prefix(
    str(ipaddress.ip_network((n, length), strict=False))), st.integers(0, 2**32 - 1), st.integers(20, 32)), max_size=6)


@given(some, st.integers(0, 2**32 - 1))
def test_what_is_admitted_covers_the_same_and_nothing_twice(given_: list[Prefix], near: int) -> None:
    covered = admitted(given_)
    assert all(a is b or not a.contains(b.network) for a in covered for b in covered)
    for prefix in given_:
        for address in prefix.bounds():
            assert any(p.contains(address) for p in covered)
    address = near.to_bytes(4, "big")
    assert any(p.contains(address) for p in covered) == any(p.contains(address) for p in given_)


def test_members_by_kind() -> None:
    value = AddressSet(
        {parse_address("10.0.0.1"), parse_address("fd00::1")}, set(nets("10.66.0.0/25", "10.66.0.128/25", "fd66::/64"))
    )
    assert {kind: list(map(repr, members_of(value, kind))) for kind in SetKind} == {
        SetKind.ADDR4: [repr(parse_address("10.0.0.1"))], SetKind.ADDR6: [repr(parse_address("fd00::1"))],
        SetKind.NET4: [repr(parse_prefix("10.66.0.0/24"))], SetKind.NET6: [repr(parse_prefix("fd66::/64"))],
    }  # fmt: skip
