# What policy means, in tables written by hand: who may send what to whom, and which rule said so.
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slash32.model import Endpoint, EndpointKey, SharedAddress
from slash32.net import parse_address, parse_prefix
from slash32.policy import Action, Direction, Icmp, Peer, Policy, PortRange, Profile, Rule
from slash32.resources import decode, load_yaml
from slash32.verdict import Packet, Verdict, World, applicable, effective_labels, owners, verdict

IN, OUT = Direction.INGRESS, Direction.EGRESS
TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58
ALLOW, DENY = Rule(Action.ALLOW), Rule(Action.DENY)


def endpoint(name: str, *addresses: str, labels: dict[str, str] | None = None, **more: Any) -> Endpoint:
    key = EndpointKey(f"00000000-0000-0000-0000-{sum(name.encode()):012}", "52:54:00:00:00:01")
    return Endpoint(key, name, labels or {}, addresses=tuple(map(parse_address, addresses)), **more)


WEB = endpoint("web", "10.0.0.1", "fd00::1", labels={"role": "web"})
DB = endpoint("db", "10.0.0.2", "fd00::2", labels={"role": "db"})
PLAIN = endpoint("plain", "10.0.0.3")
ROUTER = endpoint(
    "router",
    "10.0.0.4",
    labels={"role": "router"},
    shared=(SharedAddress(parse_address("10.9.0.1"), "vip"),),
    prefixes=(parse_prefix("10.66.0.0/24"), parse_prefix("fd66::/64")),
)
EVERYBODY = (WEB, DB, PLAIN, ROUTER)
OPEN = Policy("zz-open-egress", "all()", (OUT,), None, egress=(ALLOW,))


def packet(source: str, destination: str, protocol: int = TCP, port: int | None = 80, sport: int = 40000) -> Packet:
    with_ports = protocol in (6, 17, 132, 136)
    echo = {ICMP: Icmp(8, 0), ICMPV6: Icmp(128, 0)}.get(protocol)
    ends = (sport, port) if with_ports else (None, None)
    return Packet(parse_address(source), parse_address(destination), protocol, *ends, echo)


def judge(policies: list[Policy], asked: Packet, profiles: tuple[Profile, ...] = ()) -> Verdict:
    return verdict(World(EVERYBODY, policies, profiles), asked)


def to_db(*rules: Rule, name: str = "db", order: float | None = 1) -> Policy:
    return Policy(name, 'role == "db"', (IN,), order, ingress=rules)


def allowed(rule: Rule, asked: Packet) -> bool:
    """Does this one rule match? Asked of an Allow alone, and the other way round of a Deny before an Allow."""
    direct = judge([OPEN, Policy("p", "all()", (IN,), 1, ingress=(rule,))], asked)
    deny = Rule(Action.DENY, *[getattr(rule, f) for f in rule.__slots__ if f != "action"])
    reverse = judge([OPEN, Policy("p", "all()", (IN,), 1, ingress=(deny, ALLOW))], asked)
    assert direct.allowed is not reverse.allowed
    return direct.allowed


def test_nothing_is_allowed_without_policy() -> None:
    found = judge([], packet("10.0.0.1", "10.0.0.2"))
    assert not found.allowed
    assert found.egress and (found.egress.kind, found.egress.allowed) == ("default", False)
    assert found.ingress and (found.ingress.kind, found.ingress.allowed) == ("default", False)


def test_both_ends_must_allow_and_the_rule_is_named() -> None:
    ingress = to_db(Rule(Action.DENY, protocol=UDP), Rule(Action.ALLOW, protocol=TCP))
    found = judge([OPEN, ingress], packet("10.0.0.1", "10.0.0.2"))
    assert found.allowed
    assert found.egress == (True, OUT, "policy", "zz-open-egress", 0, "web", "default")
    assert found.ingress == (True, IN, "policy", "db", 1, "db", "default")
    denied = judge([OPEN, ingress], packet("10.0.0.1", "10.0.0.2", UDP))
    assert denied.ingress == (False, IN, "policy", "db", 0, "db", "default")
    assert not denied.allowed and denied.egress and denied.egress.allowed
    assert not judge([ingress], packet("10.0.0.1", "10.0.0.2")).allowed  # egress is closed
    assert not judge([OPEN], packet("10.0.0.1", "10.0.0.2")).allowed  # ingress is closed


def test_an_end_that_is_no_endpoint_is_not_judged() -> None:
    found = judge([to_db(ALLOW)], packet("192.0.2.1", "10.0.0.2"))
    assert found.allowed and found.egress is None
    found = judge([OPEN], packet("10.0.0.2", "192.0.2.1"))
    assert found.allowed and found.ingress is None
    assert judge([], packet("192.0.2.1", "192.0.2.2")) == Verdict(True)
    assert not judge([], packet("192.0.2.1", "10.0.0.2")).allowed


@pytest.mark.parametrize(
    ("first", "second", "winner"),
    [
        (("a", 1.0), ("b", 2.0), "a"),
        (("z", 1.0), ("b", 2.0), "z"),
        (("a", None), ("b", 2.0), "b"),  # no order is last
        (("a", 1.0), ("b", 1.0), "a"),  # equal orders by name
        (("a", None), ("b", None), "a"),
        (("a", -1.5), ("b", -2.0), "b"),
    ],
)
def test_order_then_name(first: tuple[str, float | None], second: tuple[str, float | None], winner: str) -> None:
    policies = [to_db(ALLOW, name=first[0], order=first[1]), to_db(DENY, name=second[0], order=second[1])]
    for listed in (policies, policies[::-1]):
        found = judge([OPEN, *listed], packet("10.0.0.1", "10.0.0.2"))
        assert found.ingress and found.ingress.name == winner
        assert found.allowed is (winner == first[0])


def test_first_match_wins_and_no_match_goes_on_to_the_next_policy_then_drops() -> None:
    one = to_db(Rule(Action.ALLOW, protocol=UDP), name="one", order=1)
    two = to_db(Rule(Action.ALLOW, protocol=TCP), Rule(Action.DENY, protocol=TCP), name="two", order=2)
    found = judge([OPEN, one, two], packet("10.0.0.1", "10.0.0.2"))
    assert found.ingress == (True, IN, "policy", "two", 0, "db", "default")
    found = judge([OPEN, one, two], packet("10.0.0.1", "10.0.0.2", 47))
    assert found.ingress == (False, IN, "tier", "", None, "db", "default")


def test_types_say_in_which_direction_a_policy_applies() -> None:
    egress_only = Policy("e", 'role == "db"', (OUT,), 1, egress=(ALLOW,))
    profile = Profile("d", ingress=(ALLOW,))
    db = endpoint("db", "10.0.0.2", labels={"role": "db"}, profiles=("d",))
    world = World((WEB, db), [OPEN, egress_only], [profile])
    assert verdict(world, packet("10.0.0.1", "10.0.0.2")).allowed  # no policy for ingress: the profile
    both = Policy("e", 'role == "db"', (OUT, IN), 1, egress=(ALLOW,))
    world = World((WEB, db), [OPEN, both], [profile])
    assert not verdict(world, packet("10.0.0.1", "10.0.0.2")).allowed  # now it applies, with no rule


def test_profiles_in_order_only_where_no_policy_applies() -> None:
    profiles = (
        Profile("udp", ingress=(Rule(Action.ALLOW, protocol=UDP),)),
        Profile("no-udp", ingress=(Rule(Action.DENY, protocol=UDP), Rule(Action.ALLOW, protocol=TCP)), egress=(ALLOW,)),
    )
    db = endpoint("db", "10.0.0.2", labels={"role": "db"}, profiles=("missing", "udp", "no-udp"))
    world = World((WEB, db), [OPEN], profiles)
    assert verdict(world, packet("10.0.0.1", "10.0.0.2", UDP)).ingress == (True, IN, "profile", "udp", 0, "db", "")
    assert verdict(world, packet("10.0.0.1", "10.0.0.2")).ingress == (True, IN, "profile", "no-udp", 1, "db", "")
    assert verdict(world, packet("10.0.0.1", "10.0.0.2", ICMP)).ingress == (False, IN, "default", "", None, "db", "")
    world = World((WEB, db), [OPEN, to_db()], profiles)
    assert not verdict(world, packet("10.0.0.1", "10.0.0.2", UDP)).allowed


def test_labels_of_profiles_and_which_win() -> None:
    profiles = {
        "a": Profile("a", labels={"x": "a", "y": "a", "z": "a"}),
        "b": Profile("b", labels={"y": "b", "w": "b"}),
    }
    have = endpoint("e", labels={"z": "own"}, profiles=("b", "a", "missing"))
    assert effective_labels(have, profiles) == {"x": "a", "y": "b", "z": "own", "w": "b"}
    assert effective_labels(WEB, profiles) == {"role": "web"}
    db = endpoint("db", "10.0.0.2", profiles=("as-db",))
    world = World((WEB, db), [OPEN, to_db(ALLOW)], [Profile("as-db", labels={"role": "db"})])
    assert verdict(world, packet("10.0.0.1", "10.0.0.2")).allowed
    world = World((WEB, db), [OPEN, to_db(ALLOW)], [Profile("as-db")])
    assert not verdict(world, packet("10.0.0.1", "10.0.0.2")).allowed


def test_applicable() -> None:
    policies = [to_db(name="b", order=2), to_db(name="a", order=2), to_db(name="c", order=1), OPEN]
    assert [p.name for p in applicable(policies, {"role": "db"}, IN)] == ["c", "a", "b"]
    assert applicable(policies, {"role": "web"}, IN) == []
    assert applicable(policies, {}, OUT) == [OPEN]


SELECTED = [  # source selector, notSelector, source address, does the rule match
    ('role == "web"', None, "10.0.0.1", True),
    ('role == "web"', None, "fd00::1", True),
    ('role == "web"', None, "10.0.0.2", False),
    ('role == "web"', None, "192.0.2.1", False),
    ("all()", None, "10.0.0.3", True),
    ("all()", None, "192.0.2.1", False),  # an address of no endpoint has no labels
    ("!has(role)", None, "10.0.0.3", True),
    ("!has(role)", None, "192.0.2.1", False),
    (None, 'role == "web"', "10.0.0.1", False),
    (None, 'role == "web"', "10.0.0.2", True),
    (None, 'role == "web"', "192.0.2.1", True),
    (None, "all()", "192.0.2.1", True),
    (None, "all()", "10.0.0.3", False),
    ("has(role)", 'role == "web"', "10.0.0.2", True),
    ("has(role)", 'role == "web"', "10.0.0.1", False),
    ('role == "router"', None, "10.9.0.1", True),  # shared
    ('role == "router"', None, "10.66.0.77", True),  # behind it
    ('role == "router"', None, "fd66::77", True),
    ('role == "router"', None, "10.66.1.1", False),
    (None, 'role == "router"', "10.66.0.77", False),
]


@pytest.mark.parametrize(("selector", "not_selector", "source", "matches"), SELECTED)
def test_selectors_of_peers(selector: str | None, not_selector: str | None, source: str, matches: bool) -> None:
    rule = Rule(Action.ALLOW, source=Peer(selector=selector, not_selector=not_selector))
    to = "fd00::2" if ":" in source else "10.0.0.2"
    assert allowed(rule, packet(source, to)) is matches


NETS = [  # nets, notNets, source, does the rule match
    (["10.0.0.0/8"], [], "10.0.0.1", True),
    (["10.0.0.0/8"], [], "192.0.2.1", False),
    (["10.0.0.0/8"], [], "fd00::1", False),  # a positive list of IPv4 never matches IPv6
    (["0.0.0.0/0"], [], "fd00::1", False),
    (["::/0"], [], "10.0.0.1", False),
    (["10.0.0.0/8", "fd00::/8"], [], "fd00::1", True),
    ([], ["10.0.0.0/8"], "10.0.0.1", False),
    ([], ["10.0.0.0/8"], "192.0.2.1", True),
    ([], ["10.0.0.0/8"], "fd00::1", True),  # a negative one of the other family holds
    ([], ["0.0.0.0/0"], "fd00::1", True),
    (["10.0.0.0/8"], ["10.0.0.1/32"], "10.0.0.1", False),
    (["10.0.0.0/8"], ["10.0.0.1/32"], "10.0.0.2", True),
]


@pytest.mark.parametrize(("nets", "not_nets", "source", "matches"), NETS)
def test_nets(nets: list[str], not_nets: list[str], source: str, matches: bool) -> None:
    peer = Peer(nets=tuple(map(parse_prefix, nets)), not_nets=tuple(map(parse_prefix, not_nets)))
    to = "fd00::2" if ":" in source else "10.0.0.2"
    assert allowed(Rule(Action.ALLOW, source=peer), packet(source, to)) is matches


def ports(*ranges: tuple[int, int]) -> tuple[PortRange, ...]:
    return tuple(PortRange(*r) for r in ranges)


V4, V6 = ("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")
FIELDS = [  # rule's fields, packet, does the rule match
    ({}, packet(*V4), True),
    ({"protocol": TCP}, packet(*V4), True),
    ({"protocol": TCP}, packet(*V6), True),
    ({"protocol": TCP}, packet(*V4, UDP), False),
    ({"not_protocol": TCP}, packet(*V4), False),
    ({"not_protocol": TCP}, packet(*V4, UDP), True),
    ({"ip_version": 4}, packet(*V4), True),
    ({"ip_version": 4}, packet(*V6), False),
    ({"ip_version": 6}, packet(*V6), True),
    ({"protocol": TCP, "destination": Peer(ports=ports((80, 80)))}, packet(*V4), True),
    ({"protocol": TCP, "destination": Peer(ports=ports((80, 80)))}, packet(*V4, port=81), False),
    ({"protocol": TCP, "destination": Peer(ports=ports((80, 80)))}, packet(*V4, port=443, sport=80), False),
    ({"protocol": TCP, "destination": Peer(ports=ports((1, 79), (80, 90)))}, packet(*V4, port=90), True),
    ({"protocol": TCP, "destination": Peer(ports=ports((80, 90)))}, packet(*V4, port=91), False),
    ({"protocol": TCP, "destination": Peer(not_ports=ports((80, 90)))}, packet(*V4, port=91), True),
    ({"protocol": TCP, "destination": Peer(not_ports=ports((80, 90)))}, packet(*V4, port=80), False),
    ({"protocol": TCP, "destination": Peer(ports=ports((1, 99)), not_ports=ports((80, 80)))}, packet(*V4), False),
    ({"protocol": TCP, "source": Peer(ports=ports((40000, 40000)))}, packet(*V4), True),
    ({"protocol": TCP, "source": Peer(ports=ports((40000, 40000)))}, packet(*V4, sport=1), False),
    ({"protocol": TCP, "source": Peer(not_ports=ports((40000, 40000)))}, packet(*V4), False),
    ({"protocol": TCP, "destination": Peer(ports=ports((80, 80)))}, packet(*V4, port=None), False),
    ({"protocol": TCP, "destination": Peer(not_ports=ports((80, 80)))}, packet(*V4, port=None), False),
    ({"protocol": ICMP}, packet(*V4, ICMP), True),
    ({"protocol": ICMP}, packet(*V6, ICMPV6), False),
    ({"protocol": ICMP}, packet(*V6, ICMP), False),
    ({"protocol": ICMPV6}, packet(*V4, ICMPV6), False),
    ({"protocol": ICMPV6}, packet(*V6, ICMPV6), True),
    ({"not_protocol": ICMPV6}, packet(*V4, ICMPV6), False),
    ({"protocol": ICMP, "icmp": Icmp(8)}, packet(*V4, ICMP), True),
    ({"protocol": ICMP, "icmp": Icmp(8, 0)}, packet(*V4, ICMP), True),
    ({"protocol": ICMP, "icmp": Icmp(8, 1)}, packet(*V4, ICMP), False),
    ({"protocol": ICMP, "icmp": Icmp(0)}, packet(*V4, ICMP), False),
    ({"protocol": ICMP, "not_icmp": Icmp(8)}, packet(*V4, ICMP), False),
    ({"protocol": ICMP, "not_icmp": Icmp(8, 1)}, packet(*V4, ICMP), True),
    ({"protocol": ICMP, "not_icmp": Icmp(0)}, packet(*V4, ICMP), True),
    ({"protocol": ICMP, "icmp": Icmp(8), "not_icmp": Icmp(8, 0)}, packet(*V4, ICMP), False),
    ({"protocol": ICMPV6, "icmp": Icmp(128)}, packet(*V6, ICMPV6), True),
    ({"protocol": ICMPV6, "icmp": Icmp(8)}, packet(*V6, ICMPV6), False),
    ({"destination": Peer(nets=(parse_prefix("10.0.0.2/32"),))}, packet(*V4), True),
    ({"destination": Peer(nets=(parse_prefix("10.0.0.1/32"),))}, packet(*V4), False),
    ({"destination": Peer(selector='role == "db"')}, packet(*V4), True),
    ({"destination": Peer(not_selector='role == "db"')}, packet(*V4), False),
]


@pytest.mark.parametrize(("fields", "asked", "matches"), FIELDS)
def test_fields_of_a_rule(fields: dict[str, Any], asked: Packet, matches: bool) -> None:
    assert allowed(Rule(Action.ALLOW, **fields), asked) is matches


def test_who_is_judged_for_an_address_behind_a_guest() -> None:
    to_router = Policy("r", 'role == "router"', (IN,), 1, ingress=(ALLOW,))
    assert judge([OPEN, to_router], packet("10.0.0.1", "10.66.0.9")).allowed
    assert judge([OPEN, to_router], packet("10.0.0.1", "10.9.0.1")).allowed
    assert not judge([OPEN, to_router], packet("10.0.0.1", "10.0.0.3")).allowed
    from_router = Policy("r", 'role == "router"', (OUT,), 1, egress=(ALLOW,))
    assert judge([from_router], packet("10.66.0.9", "192.0.2.1")).allowed
    assert not judge([from_router], packet("10.0.0.3", "192.0.2.1")).allowed


def test_the_most_specific_owner_is_judged() -> None:
    inside = endpoint("inside", "10.66.0.5", labels={"role": "inside"})
    world = World((*EVERYBODY, inside), [OPEN, Policy("i", 'role == "inside"', (IN,), 1, ingress=(ALLOW,))])
    found = verdict(world, packet("10.0.0.1", "10.66.0.5"))
    assert found.allowed and found.ingress and found.ingress.domain == "inside"
    found = verdict(world, packet("10.0.0.1", "10.66.0.6"))
    assert not found.allowed and found.ingress and found.ingress.domain == "router"


def test_of_two_prefixes_the_longer_is_judged() -> None:
    inside = endpoint("inside", labels={"role": "inside"}, prefixes=(parse_prefix("10.66.0.0/28"),))
    to_inside = Policy("i", 'role == "inside"', (IN,), 1, ingress=(ALLOW,))
    for everybody in ((*EVERYBODY, inside), (inside, *EVERYBODY)):
        world = World(everybody, [OPEN, to_inside])
        assert verdict(world, packet("10.0.0.1", "10.66.0.15")).allowed
        found = verdict(world, packet("10.0.0.1", "10.66.0.16"))
        assert not found.allowed and found.ingress and found.ingress.domain == "router"


def test_owners_are_all_who_have_an_address() -> None:
    inside = endpoint("inside", "10.66.0.5")
    found = owners((*EVERYBODY, inside), parse_address("10.66.0.5"))
    assert [e.domain for e in found] == ["router", "inside"]
    assert (
        owners(EVERYBODY, parse_address("10.9.0.1")) == [ROUTER] and owners(EVERYBODY, parse_address("10.9.0.2")) == []
    )


def test_of_a_shared_address_every_claimant_must_allow() -> None:
    shared = (SharedAddress(parse_address("10.9.0.9"), "v"),)
    one = endpoint("one", labels={"open": "yes"}, shared=shared)
    two = endpoint("two", labels={"open": "no"}, shared=shared)
    to_open = Policy("o", 'open == "yes"', (IN,), 1, ingress=(ALLOW,))
    assert not verdict(World((WEB, one, two), [OPEN, to_open]), packet("10.0.0.1", "10.9.0.9")).allowed
    assert verdict(World((WEB, one), [OPEN, to_open]), packet("10.0.0.1", "10.9.0.9")).allowed


# --- the example: its hand-written matrix against the model's reading of its policy

EXAMPLES = Path(__file__).parents[3] / "examples"
MATRIX = [line.split() for line in (EXAMPLES / "three-tier.matrix").read_text().splitlines() if line[:1] != "#"]


def three_tier() -> World:
    policies = [decode(d) for d in load_yaml((EXAMPLES / "three-tier.yaml").read_text(), "three-tier.yaml")]
    guests = [
        endpoint(f"{role}{n}", f"10.1.{tier}.{n}", f"fd01::{tier}:{n}", labels={"role": role})
        for tier, role in enumerate(("web", "app", "db"))
        for n in (1, 2)
    ]
    return World(guests, [p for p in policies if isinstance(p, Policy)])


@pytest.mark.parametrize(("sender", "receiver", "icmp", "http", "postgres"), MATRIX, ids=str)
def test_the_example_and_its_matrix(sender: str, receiver: str, icmp: str, http: str, postgres: str) -> None:
    world = three_tier()
    if "none" in (sender, receiver):  # a guest without a tag is no endpoint: the guard's, not policy's
        assert {icmp, http, postgres} == {"no"}
        return
    ends = {e.domain: e.addresses for e in world.endpoints}
    for source, destination in zip(ends[f"{sender}1"], ends[f"{receiver}2"], strict=True):
        echo = Icmp(8, 0) if len(source) == 4 else Icmp(128, 0)
        asked = [Packet(source, destination, ICMP if len(source) == 4 else ICMPV6, icmp=echo)]
        asked += [Packet(source, destination, TCP, 40000, port) for port in (80, 5432)]
        assert ["yes" if verdict(world, p).allowed else "no" for p in asked] == [icmp, http, postgres]


def test_the_example_lets_the_world_in_only_at_the_front() -> None:
    world, world_address = three_tier(), parse_address("192.0.2.1")
    for guest in world.endpoints:
        for port in (80, 5432):
            asked = Packet(world_address, guest.addresses[0], TCP, 40000, port)
            assert verdict(world, asked).allowed is (guest.labels["role"] == "web" and port == 80)
