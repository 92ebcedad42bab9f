# Tiers, Pass, Log, profiles, staged policies and network sets, in cases worked by hand: one guest receives one packet.
from __future__ import annotations

from dataclasses import replace

import pytest

from slash32.model import Endpoint, EndpointKey
from slash32.net import parse_address, parse_prefix
from slash32.policy import Action, Direction, NetworkSet, Peer, Policy, Profile, Rule, Tier
from slash32.verdict import Note, Packet, Stage, Verdict, World, steps, verdict, walk

IN, OUT = Direction.INGRESS, Direction.EGRESS
TCP, UDP = 6, 17
ALLOW, DENY, LOG, PASS = (Rule(action) for action in (Action.ALLOW, Action.DENY, Action.LOG, Action.PASS))
UDP_ONLY = {action: Rule(action, protocol=UDP) for action in Action}
GUEST = Endpoint(
    EndpointKey("00000000-0000-0000-0000-000000000001", "52:54:00:00:00:01"),
    "db1",
    {"role": "db"},
    ("first", "second"),
    (parse_address("10.0.0.2"), parse_address("fd00::2")),
)
SYN = Packet(parse_address("192.0.2.1"), parse_address("10.0.0.2"), TCP, 40000, 5432)


def policy(name: str, tier: str, *rules: Rule, order: float | None = 1, staged: bool = False) -> Policy:
    return Policy(name, 'role == "db"', (IN,), order, ingress=rules, tier=tier, staged=staged)


def world(*items: Policy | Tier | Profile | NetworkSet) -> World:
    def of(kind: type) -> tuple[object, ...]:
        return tuple(item for item in items if isinstance(item, kind))

    return World((GUEST,), of(Policy), of(Profile), of(Tier), of(NetworkSet))  # type: ignore[arg-type]


def judge(*items: Policy | Tier | Profile | NetworkSet, packet: Packet = SYN) -> Stage:
    """The same whichever way round the world is listed."""
    found = verdict(world(*items), packet)
    assert verdict(world(*items[::-1]), packet) == found
    assert found.ingress is not None and found == Verdict(found.ingress.allowed, ingress=found.ingress)
    return found.ingress


def by(name: str, tier: str, rule: int | None = 0, *, allowed: bool = True) -> Stage:
    return Stage(allowed, IN, "policy", name, rule, "db1", tier)


def end_of(tier: str) -> Stage:
    return Stage(False, IN, "tier", "", None, "db1", tier)


NOBODY = Stage(False, IN, "default", "", None, "db1", "")
A, B, A_PASSES = Tier("a", 1), Tier("b", 2), Tier("a", 1, Action.PASS)


@pytest.mark.parametrize(
    ("first", "second", "winner"),
    [
        (Tier("x", 1), Tier("y", 2), "x"),
        (Tier("y", 1), Tier("x", 2), "y"),
        (Tier("x", 1), Tier("y", 1), "x"),  # equal orders by name
        (Tier("y", None), Tier("x", 5), "x"),  # no order is last
        (Tier("y", None), Tier("x", None), "x"),
        (Tier("x", 999_999), Tier("default"), "x"),  # `default` is at 1,000,000, whatever the world says of it
        (Tier("x", 1_000_001), Tier("default"), "default"),
        (Tier("x", None), Tier("default", 5), "default"),
        (Tier("a", 1_000_000), Tier("default"), "a"),
        (Tier("x", 1_000_000), Tier("default"), "default"),
        (Tier("y", -1), Tier("x", 0), "y"),
    ],
)
def test_tiers_by_order_then_name(first: Tier, second: Tier, winner: str) -> None:
    """The first tier's word counts, whatever the order of policies in tiers."""
    one, two = policy("one", first.name, ALLOW, order=9), policy("two", second.name, DENY, order=1)
    found = judge(first, second, one, two)
    assert (found.tier, found.allowed) == (winner, winner == first.name)
    found = judge(first, second, replace(one, ingress=(DENY,)), replace(two, ingress=(ALLOW,)))
    assert (found.tier, found.allowed) == (winner, winner == second.name)


def test_deny_in_the_first_tier_beats_allow_in_a_later_one_and_the_other_way_round() -> None:
    assert judge(A, B, policy("p", "a", DENY), policy("q", "b", ALLOW)) == by("p", "a", allowed=False)
    assert judge(A, B, policy("p", "a", ALLOW), policy("q", "b", DENY)) == by("p", "a")


def test_what_no_rule_of_a_tier_decides_meets_its_default_action() -> None:
    udp, later = policy("p", "a", UDP_ONLY[Action.ALLOW]), policy("q", "b", ALLOW)
    assert judge(A, B, udp, later) == end_of("a")
    assert judge(A_PASSES, B, udp, later) == by("q", "b")
    assert judge(A_PASSES, B, policy("p", "a"), later) == by("q", "b")  # no rule at all
    assert judge(policy("p", "default", UDP_ONLY[Action.ALLOW])) == end_of("default")
    assert judge(Tier("default", 1, Action.PASS), policy("p", "default")) == end_of("default")  # nobody changes it


def test_a_tier_counts_only_where_a_policy_of_it_applies() -> None:
    later = policy("q", "b", ALLOW)
    assert judge(A, B, later) == by("q", "b")
    elsewhere = replace(policy("p", "a"), selector='role == "web"')
    assert judge(A, B, elsewhere, later) == by("q", "b")
    other_way = replace(policy("p", "a"), types=(OUT,))
    assert judge(A, B, other_way, later) == by("q", "b")
    assert judge(A, B, policy("p", "a"), later) == end_of("a")  # the control


def test_pass_goes_to_the_next_tier_past_the_rest_of_its_own() -> None:
    passing, denying = policy("p", "a", PASS, DENY), policy("q", "a", DENY, order=2)
    assert judge(A, B, passing, denying, policy("r", "b", ALLOW)) == by("r", "b")
    only_udp = policy("p", "a", UDP_ONLY[Action.PASS])
    assert judge(A, B, only_udp, denying, policy("r", "b", ALLOW)) == by("q", "a", allowed=False)


def test_pass_out_of_the_last_tier_goes_to_the_profiles() -> None:
    profile = Profile("first", ingress=(ALLOW,))
    stage = Stage(True, IN, "profile", "first", 0, "db1", "")
    assert judge(A, policy("p", "a", PASS), profile) == stage
    assert judge(A_PASSES, policy("p", "a"), profile) == stage  # so does the tier's default action
    assert judge(policy("p", "default", PASS), profile) == stage
    assert judge(A, policy("p", "a", PASS), policy("q", "default"), profile) == end_of("default")  # one more tier
    assert judge(A, policy("p", "a"), profile) == end_of("a")
    assert judge(A, policy("p", "a", PASS)) == NOBODY
    assert judge(profile) == stage  # no tier applies


def test_profiles_in_the_order_of_the_endpoint_and_pass_ends_them() -> None:
    allow, deny = Profile("second", ingress=(ALLOW,)), Profile("second", ingress=(DENY,))
    assert judge(Profile("first", ingress=(UDP_ONLY[Action.DENY],)), allow).name == "second"
    assert judge(Profile("first", ingress=(ALLOW,)), deny) == Stage(True, IN, "profile", "first", 0, "db1", "")
    found = judge(Profile("first", ingress=(LOG, PASS, ALLOW)), allow)
    assert found == Stage(False, IN, "profile", "first", 1, "db1", "")
    assert judge(Profile("unused", ingress=(ALLOW,))) == NOBODY


def test_log_says_so_and_goes_on() -> None:
    p = policy("p", "a", LOG, UDP_ONLY[Action.LOG], LOG, ALLOW, LOG)
    assert judge(A, p) == by("p", "a", 3)
    _, notes = walk(world(A, p), SYN)
    assert notes == [Note(IN, "db1", "log", "a", "p", 0), Note(IN, "db1", "log", "a", "p", 2)]
    assert judge(A, policy("p", "a", LOG)) == end_of("a")  # Log alone decides nothing


def test_what_was_passed_is_told() -> None:
    items = (A, policy("p", "a", PASS), Tier("b", 2, Action.PASS), policy("q", "b"), Profile("first", ingress=(LOG,)))
    found, notes = walk(world(*items), SYN)
    assert found.ingress == NOBODY
    assert notes == [
        Note(IN, "db1", "pass", "a", "p", 0),
        Note(IN, "db1", "pass", "b"),
        Note(IN, "db1", "log", "", "first", 0),
    ]


def test_a_tier_that_nobody_defined_is_last_and_denies() -> None:
    lost = policy("p", "lost", UDP_ONLY[Action.ALLOW])
    assert judge(lost, policy("q", "default", PASS)) == end_of("lost")
    assert judge(lost, policy("q", "default", ALLOW)) == by("q", "default")


def test_steps() -> None:
    later, first = policy("b", "a", order=2), policy("c", "a", order=1)
    staged = policy("s", "a", order=1, staged=True)
    only = policy("s2", "b", staged=True)
    everything = [later, only, staged, first, policy("d", "default"), replace(later, name="x", types=(OUT,))]
    found = steps(everything, [B, A], {"role": "db"}, IN)
    assert [(t.name, [p.name for p in listed]) for t, listed in found] == [("a", ["c", "b"]), ("default", ["d"])]
    found = steps(everything, [B, A], {"role": "db"}, IN, staged=True)
    assert [(t.name, [p.name for p in listed]) for t, listed in found] == [
        ("a", ["c", "s", "b"]),
        ("b", ["s2"]),
        ("default", ["d"]),
    ]
    assert [t for t, _ in found[:2]] == [A, B] and steps(everything, [], {}, IN) == []


# --- staged policies: (world, what was noted of them); the verdict is that of the world without them


def staged(name: str, tier: str, *rules: Rule, order: float = 1) -> Policy:
    return policy(name, tier, *rules, order=order, staged=True)


ENFORCED = policy("real", "default", ALLOW, order=5)
STAGED: dict[str, tuple[list[Policy | Tier | Profile], list[tuple[object, ...]]]] = {
    "deny is counted": ([ENFORCED, staged("s", "default", DENY)], [("would drop", "default", "s", 0)]),
    "allow": ([policy("real", "default"), staged("s", "default", ALLOW)], [("would allow", "default", "s", 0)]),
    "the first ends it": (
        [ENFORCED, staged("s", "default", DENY), staged("t", "default", ALLOW, order=2)],
        [("would drop", "default", "s", 0)],
    ),
    "no match goes on": (
        [ENFORCED, staged("s", "default", UDP_ONLY[Action.DENY]), staged("t", "default", DENY, order=2)],
        [("would drop", "default", "t", 0)],
    ),
    "behind what decides": ([ENFORCED, staged("s", "default", DENY, order=6)], []),
    "the enforced goes first of two of one order": ([ENFORCED, staged("a", "default", DENY, order=5)], []),
    "an earlier tier": ([A, staged("s", "a", DENY), ENFORCED], [("would drop", "a", "s", 0)]),
    "allow ends it in later tiers": (
        [A, staged("s", "a", ALLOW), staged("t", "default", DENY), ENFORCED],
        [("would allow", "a", "s", 0)],
    ),
    "pass ends it, uncounted": (
        [
            *(A, staged("s", "a", PASS), policy("p", "a", UDP_ONLY[Action.ALLOW], PASS, order=2)),
            *(staged("t", "default", DENY), ENFORCED),
        ],
        [("would pass", "a", "s", 0), ("pass", "a", "p", 1)],
    ),
    "end of a tier that is only staged": (
        [A, staged("s", "a", UDP_ONLY[Action.ALLOW]), ENFORCED],
        [("would drop", "a", "", None)],
    ),
    "end of it ends staged ones": (
        [A, staged("s", "a"), staged("t", "default", DENY), ENFORCED],
        [("would drop", "a", "", None)],
    ),
    "end of it, passing": (
        [A_PASSES, staged("s", "a"), staged("t", "default", DENY), ENFORCED],
        [("would drop", "default", "t", 0)],
    ),
    "end of a tier that is enforced too": (
        [A_PASSES, staged("s", "a"), policy("p", "a", order=2), ENFORCED],
        [("pass", "a", "", None)],
    ),
    "only staged, with profiles": (
        [staged("s", "default", UDP_ONLY[Action.ALLOW]), Profile("first", ingress=(ALLOW,))],
        [("would drop", "default", "", None)],
    ),
    "a staged log is silent": ([staged("s", "default", LOG, ALLOW), ENFORCED], [("would allow", "default", "s", 1)]),
}


@pytest.mark.parametrize("case", STAGED)
def test_staged_policies_never_decide(case: str) -> None:
    items, expected = STAGED[case]
    found, notes = walk(world(*items), SYN)
    assert [tuple(note[2:]) for note in notes] == expected
    without, _ = walk(world(*(i for i in items if not (isinstance(i, Policy) and i.staged))), SYN)
    assert found == without
    enforced = [replace(i, staged=False) if isinstance(i, Policy) else i for i in items]
    if expected and expected[0][0] in (
        "would allow",
        "would drop",
    ):  # and if they were enforced, they would do just that
        assert verdict(world(*enforced), SYN).allowed is (expected[0][0] == "would allow")


# --- network sets

OFFICE = NetworkSet("office", {"net": "office"}, (parse_prefix("192.0.2.0/24"), parse_prefix("2001:db8::/64")))
FROM = [  # source's selector, notSelector, source, does it match
    ('net == "office"', None, "192.0.2.1", True),
    ('net == "office"', None, "192.0.3.1", False),
    ('net == "office"', None, "2001:db8::1", True),
    ('net == "office"', None, "2001:db8:0:1::1", False),
    ("all()", None, "192.0.2.1", True),
    ("all()", None, "192.0.3.1", False),
    ('role != "web"', None, "192.0.2.1", True),  # a set without the label
    ('role != "web"', None, "192.0.3.1", False),  # nobody's address: no labels at all
    ("!has(role)", None, "192.0.3.1", False),
    (None, 'net == "office"', "192.0.2.1", False),
    (None, 'net == "office"', "192.0.3.1", True),
    (None, 'role == "db"', "192.0.2.1", True),
    ('net == "office"', 'vpn == "yes"', "192.0.2.1", True),
    ('net == "office"', 'vpn == "yes"', "192.0.2.9", False),  # two sets hold it: either may match, for both selectors
    ('vpn == "yes"', None, "192.0.2.9", True),
    ('net == "office" && vpn == "yes"', None, "192.0.2.9", False),  # but no set has both labels
]


@pytest.mark.parametrize(("selector", "not_selector", "source", "matches"), FROM)
def test_network_sets(selector: str | None, not_selector: str | None, source: str, matches: bool) -> None:
    rule = Rule(Action.ALLOW, source=Peer(selector=selector, not_selector=not_selector))
    vpn = NetworkSet("vpn", {"vpn": "yes"}, (parse_prefix("192.0.2.9/32"),))
    sender = parse_address(source)
    asked = replace(SYN, source=sender, destination=GUEST.addresses[len(sender) == 16])
    assert judge(OFFICE, vpn, policy("p", "default", rule), packet=asked).allowed is matches


def test_a_set_has_labels_but_no_policies() -> None:
    around = NetworkSet("around", {"role": "db"}, (parse_prefix("192.0.2.0/24"),))
    outgoing = Policy("o", 'role == "db"', (IN, OUT), 1, ingress=(ALLOW,))
    found = verdict(world(around, outgoing), SYN)
    assert found.allowed and found.egress is None


def test_of_a_guest_inside_a_set_both_labels_count() -> None:
    sender = replace(GUEST, key=EndpointKey("x", "y"), labels={"role": "web"}, addresses=(SYN.source,), domain="web1")
    for selector in ('role == "web"', 'net == "office"'):
        rules = (Rule(Action.ALLOW, source=Peer(selector=selector)),)
        policies = (policy("p", "default", *rules), Policy("o", 'role == "web"', (OUT,), egress=(ALLOW,)))
        assert verdict(World((GUEST, sender), policies, sets=(OFFICE,)), SYN).allowed
        assert not verdict(World((GUEST,), policies), SYN).allowed
