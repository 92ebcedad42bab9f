# Host endpoints in the verdict, in cases worked by hand: who is asked on which way, local against forwarded.
#
#   web on h1, app on h1, db on h2; h1 has eth0 (192.0.2.11) and eth1, h2 has eth0 (192.0.2.12); 198.51.100.1 is outside
from __future__ import annotations

from dataclasses import replace

import pytest

from slash32 import failsafe
from slash32.model import Endpoint, EndpointKey
from slash32.net import parse_address
from slash32.policy import Action, Direction, HostEndpoint, Icmp, Peer, Policy, Profile, Rule, Tier
from slash32.verdict import Judge, Packet, Stage, Verdict, World, verdict, walk

IN, OUT = Direction.INGRESS, Direction.EGRESS
TCP, UDP, ICMPV6 = 6, 17, 58
ALLOW, DENY, PASS = Rule(Action.ALLOW), Rule(Action.DENY), Rule(Action.PASS)


def guest(number: int, name: str) -> Endpoint:
    key = EndpointKey(f"00000000-0000-0000-0000-{number:012}", "52:54:00:00:00:01")
    addresses = tuple(map(parse_address, (f"10.0.0.{number}", f"fd00::{number}")))
    return Endpoint(key, name, {"guest": name}, addresses=addresses)


def host(name: str, node: str, interface: str, *addresses: str, profiles: tuple[str, ...] = ()) -> HostEndpoint:
    labels = {"host": node, "nic": "any" if interface == "*" else interface}
    return HostEndpoint(name, node, interface, labels, tuple(map(parse_address, addresses)), profiles)


WEB, APP, DB = guest(1, "web"), guest(2, "app"), guest(3, "db")
PLACES = {WEB.key: "h1", APP.key: "h1", DB.key: "h2"}
H1, H2 = host("h1-eth0", "h1", "eth0", "192.0.2.11", "2001:db8::11"), host("h2-eth0", "h2", "eth0", "192.0.2.12")
H1_ETH1, H1_ANY = host("h1-eth1", "h1", "eth1"), host("h1-any", "h1", "*", "192.0.2.11")
GUESTS = Policy("guests", "has(guest)", (IN, OUT), 1, ingress=(ALLOW,), egress=(ALLOW,))
AT = {
    "web": "10.0.0.1", "app": "10.0.0.2", "db": "10.0.0.3", "h1": "192.0.2.11", "h2": "192.0.2.12",
    "outside": "198.51.100.1",
}  # fmt: skip


def on_host(name: str, selector: str, *rules: Rule, forward: bool = False, order: float = 1) -> Policy:
    return Policy(name, selector, (IN, OUT), order, rules, rules, apply_on_forward=forward)


def packet(source: str, destination: str, protocol: int = TCP, port: int = 8080, **more: str) -> Packet:
    return Packet(parse_address(AT[source]), parse_address(AT[destination]), protocol, 40000, port, **more)


def world(hosts: tuple[HostEndpoint, ...], *policies: Policy, profiles: tuple[Profile, ...] = ()) -> World:
    return World((WEB, APP, DB), (GUESTS, *policies), profiles, host_endpoints=hosts, places=PLACES)


def at_hosts(found: Verdict) -> tuple[str | None, str | None]:
    """Who decided leaving and arriving."""
    stages = (found.host_egress, found.host_ingress)
    return stages[0] and stages[0].domain, stages[1] and stages[1].domain  # type: ignore[return-value]


BOTH = (on_host("open", "has(host)", ALLOW, forward=True),)
WAYS = [  # source, destination, leaving, arriving
    ("web", "db", "h1-eth0", "h2-eth0"),
    ("db", "web", "h2-eth0", "h1-eth0"),
    ("web", "app", None, None),  # never leaves the host
    ("web", "outside", "h1-eth0", None),
    ("outside", "db", None, "h2-eth0"),
    ("web", "h2", "h1-eth0", "h2-eth0"),
    ("h1", "db", "h1-eth0", "h2-eth0"),
    ("h1", "h2", "h1-eth0", "h2-eth0"),
    ("h1", "outside", "h1-eth0", None),
    ("outside", "h1", None, "h1-eth0"),
    ("h1", "h1", None, None),
    ("h1", "web", None, None),  # its own guest, and no "*"
    ("web", "h1", None, "h1"),  # closed: named by the host itself
    ("outside", "outside", None, None),
]


@pytest.mark.parametrize(("source", "destination", "leaving", "arriving"), WAYS)
def test_who_is_asked(source: str, destination: str, leaving: str | None, arriving: str | None) -> None:
    found = verdict(world((H1, H2), *BOTH), packet(source, destination))
    assert at_hosts(found) == (leaving, arriving)
    guests = {"web", "app", "db"}
    assert (found.egress is not None, found.ingress is not None) == (source in guests, destination in guests)
    assert found.allowed is (arriving != "h1")
    without = verdict(World((WEB, APP, DB), (GUESTS,), places=PLACES), packet(source, destination))
    assert at_hosts(without) == (None, None) and without.allowed


@pytest.mark.parametrize(("source", "destination"), [way[:2] for way in WAYS])
def test_each_stage_can_close_the_way(source: str, destination: str) -> None:
    """What no policy on hosts allows is closed where hosts are asked, and nowhere else."""
    closed = on_host("closed", "has(host)", DENY, forward=True)
    found = verdict(world((H1, H2), closed), packet(source, destination))
    assert found.allowed is (at_hosts(found) == (None, None))
    for stage in (found.host_egress, found.host_ingress):
        assert stage is None or not stage.allowed


LOCAL, FORWARDED = packet("outside", "h1"), packet("outside", "web")


def test_forwarded_only_policies_with_apply_on_forward() -> None:
    local_only = on_host("local", "has(host)", DENY)
    found = verdict(world((H1,), local_only), FORWARDED)
    assert found.allowed and found.host_ingress is None  # none applies: nothing is asked
    assert not verdict(world((H1,), local_only), LOCAL).allowed
    both = replace(local_only, apply_on_forward=True)
    assert not verdict(world((H1,), both), FORWARDED).allowed
    assert not verdict(world((H1,), both), LOCAL).allowed  # local traffic asks all, whatever applyOnForward
    outgoing = replace(both, types=(OUT,), ingress=())
    assert verdict(world((H1,), outgoing), FORWARDED).allowed  # applies, but not in this direction
    assert not verdict(world((H1,), outgoing), packet("web", "outside")).allowed


def test_forwarded_what_nobody_decides() -> None:
    """The tier's default action; after the last Pass it is let by, and no profile is asked."""
    nothing = on_host("nothing", "has(host)", forward=True)
    assert verdict(world((H1,), nothing), FORWARDED).host_ingress == Stage(
        False, IN, "tier", "", None, "h1-eth0", "default"
    )
    closing = Profile("p", ingress=(DENY,), egress=(DENY,))
    with_profile = (replace(H1, profiles=("p",)),)
    passing = on_host("pass", "has(host)", PASS, forward=True)
    found = verdict(world(with_profile, passing, profiles=(closing,)), FORWARDED)
    assert found.allowed and found.host_ingress == Stage(True, IN, "default", "", None, "h1-eth0", "")
    found = verdict(world(with_profile, profiles=(closing,)), FORWARDED)
    assert found.allowed and found.host_ingress is None
    found = verdict(world(with_profile, passing, profiles=(closing,)), LOCAL)
    assert found.host_ingress == Stage(False, IN, "profile", "p", 0, "h1-eth0", "")  # local: they are


def test_local_policies_then_profiles_then_closed() -> None:
    assert verdict(world((H1,)), LOCAL).host_ingress == Stage(False, IN, "default", "", None, "h1-eth0", "")
    opening = Profile("p", ingress=(ALLOW,))
    with_profile = (replace(H1, profiles=("p",)),)
    assert verdict(world(with_profile, profiles=(opening,)), LOCAL).allowed
    assert not verdict(world(with_profile, on_host("n", "has(host)"), profiles=(opening,)), LOCAL).allowed
    tier = Tier("t", 1, Action.PASS)
    silent = replace(on_host("n", "has(host)"), tier="t")
    everything = replace(world(with_profile, silent, profiles=(opening,)), tiers=(tier,))
    assert verdict(everything, LOCAL).allowed


def test_labels_of_a_host_endpoints_profile_count() -> None:
    labelled = Profile("p", labels={"zone": "dmz"})
    hosts = (replace(H1, profiles=("p",)),)
    opening = Policy("z", 'zone == "dmz"', (IN,), 1, ingress=(ALLOW,))
    assert verdict(world(hosts, opening, profiles=(labelled,)), LOCAL).allowed
    assert not verdict(world((H1,), opening, profiles=(labelled,)), LOCAL).allowed
    from_dmz = Rule(Action.ALLOW, source=Peer(selector='zone == "dmz"'))
    to_db = (Policy("d", 'guest == "db"', (IN,), 0, ingress=(from_dmz, DENY)), *BOTH)
    asked = packet("h1", "db")
    assert verdict(world(hosts, *to_db, profiles=(labelled,)), asked).allowed
    assert not verdict(world((H1,), *to_db, profiles=(labelled,)), asked).allowed


def test_rules_select_hosts_by_their_addresses() -> None:
    for selector, matches in (('host == "h1"', True), ('host == "h2"', False), ("all()", True), ("has(guest)", False)):
        rule = Rule(Action.ALLOW, source=Peer(selector=selector))
        policy = Policy("d", 'guest == "db"', (IN,), 0, ingress=(rule, DENY))
        assert verdict(world((H1, H2), policy, *BOTH), packet("h1", "db")).allowed is matches
        assert not verdict(world((H1, H2), policy, *BOTH), packet("outside", "db")).allowed


def test_between_guests_of_a_host_no_host_endpoint_is_asked() -> None:
    closed = world((H1, H1_ANY), on_host("closed", "has(host)", DENY, forward=True))
    assert at_hosts(verdict(closed, packet("web", "app"))) == (None, None)
    assert at_hosts(verdict(closed, packet("h1", "h1"))) == (None, None)


def test_one_judge_for_many_packets() -> None:
    """It remembers what it was asked, and no packet gets another's answer."""
    closed = on_host("closed", "has(host)", DENY), on_host("open", 'nic == "any"', ALLOW, forward=True, order=2)
    everything = world((H1, H2, H1_ANY), *closed)
    for order in (1, -1):
        judge = Judge(everything)
        for way in WAYS[::order]:
            for port in (22, 8080):
                assert judge.verdict(packet(*way[:2], port=port)) == verdict(everything, packet(*way[:2], port=port))


# --- failsafes


@pytest.mark.parametrize("each", failsafe.INBOUND, ids=str)
def test_failsafes_inwards(each: failsafe.Failsafe) -> None:
    closed = world((H1,), on_host("closed", "has(host)", DENY, forward=True))
    for port, open_ in ((each.first, True), (each.last, True), (9999, False)):
        found = verdict(closed, packet("outside", "h1", each.protocol, port))
        assert found.allowed is open_ and found.host_ingress
        assert found.host_ingress.kind == ("failsafe" if open_ else "policy")
    for below in {each.first - 1, each.last + 1} - {p for f in failsafe.INBOUND for p in (f.first, f.last)}:
        assert not verdict(closed, packet("outside", "h1", each.protocol, below)).allowed
    assert not verdict(closed, packet("outside", "h1", 132, each.first)).allowed
    assert not verdict(closed, packet("outside", "web", each.protocol, each.first)).allowed  # never for the forwarded


@pytest.mark.parametrize("each", failsafe.OUTBOUND, ids=str)
def test_failsafes_outwards(each: failsafe.Failsafe) -> None:
    closed = world((H1,), on_host("closed", "has(host)", DENY, forward=True))
    for port, open_ in ((each.first, True), (each.last, True), (9999, False)):
        assert verdict(closed, packet("h1", "outside", each.protocol, port)).allowed is open_
    assert not verdict(closed, packet("web", "outside", each.protocol, each.first)).allowed


def test_neighbours_of_a_host() -> None:
    closed = world((H1,), on_host("closed", "has(host)", DENY, forward=True))
    ends = parse_address("2001:db8::1"), parse_address("2001:db8::11")
    for kind, open_ in ((129, False), (130, True), (133, True), (137, True), (138, False), (143, True), (128, False)):
        for source, destination in (ends, ends[::-1]):
            assert verdict(closed, Packet(source, destination, ICMPV6, icmp=Icmp(kind, 0))).allowed is open_


def test_what_says_icmpv6_in_ipv4_is_no_neighbour() -> None:
    closed = world((H1,), on_host("closed", "has(host)", DENY))
    asked = Packet(parse_address(AT["outside"]), parse_address(AT["h1"]), ICMPV6, icmp=Icmp(135, 0))
    assert not verdict(closed, asked).allowed


# --- "*"


def test_only_with_any_interface_may_guests_and_host_talk() -> None:
    opening = on_host("open", 'nic == "any"', ALLOW)
    asked = packet("web", "h1")
    found = verdict(world((H1, H1_ANY), opening), asked)
    assert found.allowed and at_hosts(found) == (None, "h1-any")
    assert verdict(world((H1,), on_host("open", "has(host)", ALLOW)), asked).host_ingress == Stage(
        False, IN, "default", "*", None, "h1", ""
    )
    no_egress = Policy("n", 'guest == "web"', (OUT,), 0, egress=(DENY,))
    assert not verdict(world((H1_ANY,), opening, no_egress), asked).allowed  # both must allow
    assert not verdict(world((H1_ANY,)), asked).allowed


def test_no_failsafes_between_a_host_and_its_own_guests() -> None:
    closed, ssh = on_host("closed", "has(host)", DENY), {"protocol": TCP, "port": 22}
    assert not verdict(world((H1_ANY,), closed), packet("web", "h1", **ssh)).allowed  # type: ignore[arg-type]
    assert verdict(world((H1_ANY,), closed), packet("outside", "h1", **ssh)).allowed  # type: ignore[arg-type]
    assert not verdict(world((H1_ANY,), closed), packet("h1", "web", **ssh)).allowed  # type: ignore[arg-type]
    assert verdict(world((H1_ANY,), closed), packet("h1", "outside", **ssh)).allowed  # type: ignore[arg-type]


def test_a_host_to_its_own_guest() -> None:
    asked = packet("h1", "web")
    assert verdict(world((H1,), on_host("closed", "has(host)", DENY)), asked).allowed  # no "*": the guest's word counts
    found = verdict(world((H1_ANY,), on_host("closed", "has(host)", DENY)), asked)
    assert not found.allowed and found.ingress and found.ingress.allowed and at_hosts(found) == ("h1-any", None)
    assert verdict(world((H1_ANY,), on_host("open", "has(host)", ALLOW)), asked).allowed
    closed_guest = Policy("n", 'guest == "web"', (IN,), 0, ingress=(DENY,))
    assert not verdict(world((H1_ANY,), on_host("open", "has(host)", ALLOW), closed_guest), asked).allowed


def test_guests_of_a_host_that_is_not_known() -> None:
    lost = replace(world((H1, H2), on_host("closed", "has(host)", DENY, forward=True)), places={})
    assert at_hosts(verdict(lost, packet("web", "db"))) == (None, None)
    assert verdict(lost, packet("web", "db")).allowed
    assert at_hosts(verdict(lost, packet("web", "h2"))) == (None, "h2-eth0")  # as from anywhere
    half = replace(lost, places={WEB.key: "h1"})
    assert at_hosts(verdict(half, packet("web", "db"))) == ("h1-eth0", None)


# --- several interfaces

TWO = (H1, H1_ETH1, H1_ANY)
ONLY = {
    nic: (
        on_host("open", f'nic == "{nic}"', ALLOW, forward=True),
        on_host("rest", "has(host)", DENY, forward=True, order=2),
    )
    for nic in ("eth0", "eth1", "any")
}


@pytest.mark.parametrize("opened", ONLY)
@pytest.mark.parametrize("through", ["eth0", "eth1", "eth7", None])
def test_the_interface_says_who_is_asked(opened: str, through: str | None) -> None:
    """Named ones first, "*" for the others; where it is not said, all of them must allow."""
    expected = through is not None and opened == (through if through != "eth7" else "any")
    everything = world(TWO, *ONLY[opened])
    for source, destination in (("outside", "h1"), ("outside", "web")):
        asked = replace(packet(source, destination), in_interface=through)
        assert verdict(everything, asked).allowed is expected
        asked = replace(packet(destination, source), out_interface=through)
        assert verdict(everything, asked).allowed is expected
        asked = replace(packet(destination, source), in_interface=through)  # arrives at no host: says nothing
        assert not verdict(everything, asked).allowed
    assert verdict(world(TWO, *BOTH), packet("outside", "h1")).allowed  # the control: all of them do


def test_an_interface_without_host_endpoint_is_open() -> None:
    closed = on_host("closed", "has(host)", DENY, forward=True)
    for asked in (LOCAL, FORWARDED):
        assert verdict(world((H1, H1_ETH1), closed), replace(asked, in_interface="eth7")).allowed
        assert verdict(world((H1_ANY,), closed), replace(asked, in_interface="lo")).allowed
        assert not verdict(world((H1_ANY,), closed), replace(asked, in_interface="eth7")).allowed


def test_a_shared_address_on_two_hosts_is_closed_by_either() -> None:
    both = (replace(DB, addresses=(parse_address(AT["db"]),)), replace(APP, addresses=(parse_address(AT["db"]),)))
    asked = packet("web", "db")
    everything = replace(world((H2,), on_host("closed", "has(host)", DENY, forward=True)), endpoints=(WEB, *both))
    assert not verdict(everything, asked).allowed
    assert verdict(replace(everything, host_endpoints=()), asked).allowed


def test_staged_policies_on_forwarded_traffic_ask_nobody() -> None:
    staged = replace(on_host("s", "has(host)", DENY, forward=True), staged=True)
    found, notes = walk(world((H1,), staged), FORWARDED)
    assert found.allowed and found.host_ingress is None
    assert [(note.domain, note.what, note.policy) for note in notes] == [("h1-eth0", "would drop", "s")]
