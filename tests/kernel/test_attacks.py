# What a hostile guest tries beyond a wrong source address: fragments, extension headers, errors about others' flows,
# floods of what the host must remember. Each attack works once the rule that stops it is taken away.
from __future__ import annotations

import re
import socket
import time

import filters
import pytest
from filters import NFTABLES, let_pass, open_up
from frames import ACK, SYN, SYN_ACK, Frame, arp, solicitation
from hostile import DESTINATION, FRAGMENT, HOP_BY_HOP, ROUTING, about, extended, fragments, tagged
from netns import Namespace, eventually, run
from nft_rig import DEAF, HOST4, HOST6, Port, Rig, mac

from hostd.compiler.ruleset import Guard
from slash32.net import parse_prefix

RST, FIN, URG_PSH_FIN = 0x04, 0x01, 0x29
UNREACHABLE = {4: (3, 3), 6: (1, 4)}
TOO_BIG = {4: (3, 4), 6: (2, 0)}
pytestmark = pytest.mark.usefixtures("packet_filter")


def forged(thief: Port, victim: Port, target: Port, version: int = 4) -> Frame:
    """As if from the victim, with all of its addresses, but through the thief's interface."""
    return victim.to(target, version).but(to_mac=thief.host_mac)


# ---- what is believed before anybody asks whose it is -------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("as_victim", [True, False], ids=["victim's MAC", "own MAC"])
def test_no_fragment_joins_another_guests_packet(rig: Rig, version: int, as_victim: bool) -> None:
    filters.only(NFTABLES, "table raw stands behind reassembly, unless it was loaded with raw_before_defrag=1")
    alice, bob, carol = rig.alice, rig.bob, rig.carol
    honest = alice.to(bob, version)
    evil = forged(carol, alice, bob, version)
    evil = evil if as_victim else evil.but(mac=carol.mac)

    def joined(ident: int) -> bool:
        payload = b"A" * 16 + b"from carol"
        first, _ = fragments(honest.udp(5, 6, payload), 24, ident)
        _, second = fragments(evil.udp(5, 6, payload), 24, ident)
        bob.heard()
        carol.wire.send(second)
        rig.settle()
        alice.wire.send(first)
        rig.settle()
        return any(b"from carol" in frame for frame in bob.heard())

    assert not joined(1)
    assert all(rig.crosses(alice, honest.udp(5, port, b"A" * 32), bob) for port in (7, 8))
    let_pass("prerouting")
    assert joined(2)


def test_own_fragments_arrive(rig: Rig) -> None:
    for version in (4, 6):
        whole = rig.alice.to(rig.bob, version).udp(5, 6, b"A" * 16 + b"the end of it")
        rig.bob.heard()
        for piece in fragments(whole, 24, 9):
            rig.alice.wire.send(piece)
        rig.settle()
        assert any(b"the end of it" in frame for frame in rig.bob.heard())


def tracked(protocol: str) -> str:
    return run("conntrack", "-L", "-p", protocol)


def established(rig: Rig) -> None:
    there, back = rig.alice.to(rig.bob), rig.bob.to(rig.alice)
    assert rig.crosses(rig.alice, there.tcp(4000, 80, SYN, seq=100), rig.bob)
    assert rig.crosses(rig.bob, back.tcp(80, 4000, SYN_ACK, seq=500, ack=101), rig.alice)
    assert rig.crosses(rig.alice, there.tcp(4000, 80, ACK, seq=101, ack=501), rig.bob)
    assert "ESTABLISHED" in tracked("tcp")


def test_a_forged_reset_ends_no_tracked_flow(rig: Rig) -> None:
    established(rig)
    reset = forged(rig.carol, rig.alice, rig.bob).tcp(4000, 80, RST, seq=101)
    assert not rig.crosses(rig.carol, reset, rig.bob)
    assert "ESTABLISHED" in tracked("tcp")
    let_pass("prerouting")
    assert rig.crosses(rig.carol, reset, rig.bob)
    assert "ESTABLISHED" not in tracked("tcp")


def test_an_isolated_guest_touches_no_tracked_flow(rig: Rig) -> None:
    established(rig)
    rig.group(rig.carol, 0)
    reset = forged(rig.carol, rig.alice, rig.bob).tcp(4000, 80, RST, seq=101)
    assert not rig.crosses(rig.carol, reset, rig.bob)
    assert "ESTABLISHED" in tracked("tcp")
    let_pass("prerouting")
    assert not rig.crosses(rig.carol, reset, rig.bob), "its group closes it in forward, too"
    assert "ESTABLISHED" not in tracked("tcp")


@pytest.mark.parametrize("version", [4, 6])
def test_the_host_answers_no_forged_packet(rig: Rig, version: int) -> None:
    """A hop limit of 1 makes a router complain to the source that the packet names."""
    victim, ends = rig.outside, rig.alice.to(rig.bob, version).but(hops=1)

    def complaints(frame: bytes, listener: Port) -> bool:
        kind = (11, 34) if version == 4 else (3, 54)
        listener.heard()
        rig.alice.wire.send(frame)
        rig.settle()
        found = [f for f in listener.heard() if f[12:14] == frame[12:14] and f[23 if version == 4 else 20] in (1, 58)]
        return any(f[kind[1]] == kind[0] for f in found)

    evil = ends.but(source=victim.v4 if version == 4 else victim.v6).udp(1, 2)
    assert not complaints(evil, victim)
    let_pass("prerouting")
    assert complaints(evil, victim)


# ---- errors about flows -------------------------------------------------------------------------------------------


def complaint(sender: Port, flow: Frame, ports: tuple[int, int], version: int, size: int = 0) -> bytes:
    """An ICMP error of the sender's to the flow's source; with a size, that its packets are too big."""
    kind, code = (TOO_BIG if size else UNREACHABLE)[version]
    ends = sender.to(flow.source, version)
    return ends.icmp(kind, code, size.to_bytes(4, "big") + about(flow, *ports))


@pytest.mark.parametrize("version", [4, 6])
def test_errors_about_others_flows_are_dropped(rig: Rig, version: int) -> None:
    """Else who may not speak to bob at all tells him, with any text, how big his packets to others may be."""
    flow = rig.bob.to(rig.outside, version)
    assert rig.crosses(rig.bob, flow.udp(123, 123), rig.outside)
    for size in (0, 1280):
        assert not rig.crosses(rig.alice, complaint(rig.alice, flow, (123, 123), version, size), rig.bob)
    let_pass("about")
    assert rig.crosses(rig.alice, complaint(rig.alice, flow, (123, 123), version, 1280), rig.bob)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("began", [True, False])
def test_errors_about_own_flows_pass(rig: Rig, version: int, began: bool) -> None:
    flow = rig.bob.to(rig.alice, version)
    if began:
        assert rig.crosses(rig.alice, flow.back().but(mac=rig.alice.mac, to_mac=rig.alice.host_mac).udp(6, 5), rig.bob)
    assert rig.crosses(rig.bob, flow.udp(5, 6), rig.alice)
    assert rig.crosses(rig.alice, complaint(rig.alice, flow, (5, 6), version), rig.bob)


@pytest.mark.parametrize("version", [4, 6])
def test_errors_about_what_lies_behind_a_guest_pass(rig: Rig, version: int) -> None:
    behind = "10.66.1.5" if version == 4 else "fd00:66:1::5"
    via = rig.alice.v4 if version == 4 else rig.alice.v6
    run("ip", f"-{version}", "route", "add", behind, "via", via, "dev", "vnet1", "onlink")
    flow = rig.bob.to(behind, version)
    assert rig.crosses(rig.bob, flow.udp(5, 6), rig.alice)
    assert rig.crosses(rig.alice, complaint(rig.alice, flow, (5, 6), version), rig.bob)
    assert not rig.crosses(rig.carol, complaint(rig.carol, flow, (5, 6), version), rig.bob)


def test_the_hosts_own_flows_are_not_a_guests_to_complain_of(rig: Rig) -> None:
    def told(ports: tuple[int, int]) -> bool:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as local:
            local.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER, always
            local.bind((HOST4, ports[0]))
            local.connect((rig.outside.v4, ports[1]))
            local.send(b"x")
            flow = Frame(b"", b"", HOST4, rig.outside.v4)
            rig.alice.wire.send(complaint(rig.alice, flow, ports, 4, 552))
            rig.settle()
            return "mtu 552" in run("ip", "route", "get", rig.outside.v4, "from", HOST4)

    assert not told((999, 888))
    let_pass("about")
    assert told((998, 887))


# ---- router advertisements in disguise ------------------------------------------------------------------------------

DISGUISES = [
    (HOP_BY_HOP,), (DESTINATION,), (ROUTING,), (FRAGMENT,), (HOP_BY_HOP, DESTINATION),
    (DESTINATION, DESTINATION, DESTINATION), (HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION), (DESTINATION, FRAGMENT),
]  # fmt: skip


@pytest.mark.parametrize("headers", DISGUISES, ids=str)
def test_extension_headers_hide_no_advertisement(rig: Rig, headers: tuple[int, ...]) -> None:
    """RFC 7113's evasions; an echo request so dressed shows that the packet is well-formed. (Behind an authentication
    header it is not seen, but who has no key for that header does not look behind it either.)"""
    ends = rig.alice.to(rig.bob, 6).but(hops=255)
    arrives = FRAGMENT not in headers  # reassembled, it arrives without that header: heard() would not know it
    assert not rig.crosses(rig.alice, extended(ends.icmp(134, 0, bytes(12)), *headers), rig.bob)
    assert rig.crosses(rig.alice, extended(ends.icmp(128, 0, bytes(12)), *headers), rig.bob) == arrives
    open_up()
    assert rig.crosses(rig.alice, extended(ends.icmp(134, 0, bytes(12)), *headers), rig.bob)


@pytest.mark.parametrize("headers", [(), (DESTINATION,), (DESTINATION, DESTINATION)], ids=str)
@pytest.mark.parametrize("at", [8, 16])
def test_fragments_hide_no_advertisement(rig: Rig, headers: tuple[int, ...], at: int) -> None:
    def arrived(kind: int, ident: int) -> bool:
        whole = rig.alice.to(rig.bob, 6).but(hops=255).icmp(kind, 0, bytes(4) + b"in pieces, hidden")
        rig.bob.heard()
        for piece in fragments(extended(whole, *headers), at, ident):
            rig.alice.wire.send(piece)
        rig.settle()
        return any(b"hidden" in f or b"in pieces" in f for f in rig.bob.heard())

    assert not arrived(134, 1)
    if not headers:
        assert arrived(128, 2)  # a first fragment that lacks the upper header is refused by the host, whatever it is
    open_up()
    assert arrived(134, 3)


@pytest.mark.parametrize("headers", [(HOP_BY_HOP,), (DESTINATION, DESTINATION)], ids=str)
def test_extension_headers_hide_no_port(rig: Rig, headers: tuple[int, ...]) -> None:
    offer = extended(rig.alice.to(rig.bob, 6).udp(547, 546), *headers)
    assert not rig.crosses(rig.alice, offer, rig.bob)
    assert rig.crosses(rig.alice, extended(rig.alice.to(rig.bob, 6).udp(547, 9), *headers), rig.bob)
    open_up()
    assert rig.crosses(rig.alice, offer, rig.bob)


# ---- tags, flags ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "stripped"),
    [
        (((0x8100, 0),), True),
        (((0x8100, 5),), False),
        (((0x88A8, 0), (0x8100, 0)), True),
        (((0x88A8, 0), (0x8100, 7)), False),
        (((0x88A8, 3), (0x8100, 0)), False),
    ],
    ids=str,
)
@pytest.mark.parametrize("version", [4, 6])
def test_tags_hide_no_source(rig: Rig, version: int, tags: tuple[tuple[int, int], ...], stripped: bool) -> None:
    honest = rig.alice.to(rig.bob, version)
    lie = honest.but(source="10.65.0.77" if version == 4 else "fd00:65::77")

    def arrives(ends: Frame, port: int) -> bool:
        rig.bob.heard()
        rig.alice.wire.send(tagged(ends.udp(1, port, b"in a tag"), *tags))
        rig.settle()
        return any(b"in a tag" in frame for frame in rig.bob.heard())

    assert arrives(honest, 1) == stripped
    assert not arrives(lie, 2)
    open_up()
    assert arrives(lie, 3) == stripped


@pytest.mark.parametrize("flags", [0, FIN, RST, ACK, SYN | FIN, SYN | RST, SYN_ACK, URG_PSH_FIN], ids=hex)
@pytest.mark.parametrize("version", [4, 6])
def test_no_odd_first_packet_begins_a_flow(rig: Rig, version: int, flags: int) -> None:
    frame = rig.alice.to(rig.bob, version).tcp(4000, 80, flags, seq=5, ack=6)
    assert not rig.crosses(rig.alice, frame, rig.bob)
    open_up()
    assert rig.crosses(rig.alice, frame, rig.bob)


# ---- to the host ----------------------------------------------------------------------------------------------------

GROUPS = {
    "224.0.0.251": "01005e0000fb",
    "224.0.0.1": "01005e000001",
    "255.255.255.255": "ffffffffffff",
    "ff02::fb": "3333000000fb",
    "ff02::1": "333300000001",
}


@pytest.mark.parametrize("group", GROUPS)
def test_no_multicast_service_of_the_host_hears_a_guest(rig: Rig, group: str) -> None:
    version = 6 if ":" in group else 4
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
    with socket.socket(family, kind) as service, socket.socket(family, kind) as unicast:
        if version == 6:
            index = rig.alice.ifindex.to_bytes(4, "little")
            service.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, socket.inet_pton(family, group) + index)
        elif group != "255.255.255.255":
            index = rig.alice.ifindex.to_bytes(4, "little")
            service.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(group) + bytes(4) + index)
        service.bind(("", 5353))
        unicast.bind(("", 5354))
        to = rig.alice.to(group, version).but(to_mac=bytes.fromhex(GROUPS[group]))
        own = HOST4 if version == 4 else HOST6

        def heard(port: int) -> list[bytes]:
            rig.alice.wire.send(to.udp(5353, 5353, b"to all"))
            rig.alice.wire.send(to.but(target=own).udp(5353, port, b"unicast in a multicast frame"))
            rig.settle()
            return [s.recv(100) for s in (service, unicast) if _waits(s)]

        assert heard(5354) == []
        let_pass("guest-input")
        assert heard(5354) == [b"to all", b"unicast in a multicast frame"]


def _waits(listener: socket.socket) -> bool:
    try:
        return bool(listener.recv(100, socket.MSG_PEEK))
    except BlockingIOError:
        return False


FLOOD = 250


def neighbours() -> int:
    return len(run("ip", "-6", "neigh", "show", "dev", "vnet1").splitlines())


def flows() -> int:
    """Those of UDP: the kernel's own reports of its groups are tracked, too, whenever it sends one."""
    return sum(len(run("conntrack", "-L", "-f", family, "-p", "udp").splitlines()) for family in ("ipv4", "ipv6"))


@pytest.mark.parametrize("what", ["neighbours", "flows"])
def test_a_guest_fills_no_table_with_link_local_addresses(rig: Rig, what: str) -> None:
    """It has 2**64 of them, and both tables are everybody's: 20 a second and 100 at once is what it gets."""
    filters.only(NFTABLES, "iptables can measure by address, not by interface")
    count = neighbours if what == "neighbours" else flows
    option = b"\1\1" + rig.alice.mac

    def flood(first: int) -> int:
        before = count()
        for number in range(first, first + FLOOD):
            ends = Frame(rig.alice.mac, bytes.fromhex("333300010002"), f"fe80::{number:x}", "ff02::1:2", 255)
            asks = ends.but(target="ff02::1:ff00:1", to_mac=bytes.fromhex("3333ff000001"))
            solicits = asks.icmp(135, 0, solicitation("fe80::1") + option)
            rig.alice.wire.send(solicits if what == "neighbours" else ends.udp(546, 547))
            if number % 25 == 0:
                rig.settle()
        rig.settle()
        rig.alice.heard()
        return count() - before

    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as server:
        member = socket.inet_pton(socket.AF_INET6, "ff02::1:2") + rig.alice.ifindex.to_bytes(4, "little")
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, member)
        server.bind(("", 547))
        began = time.monotonic()
        got = flood(0x1000)
        assert 50 <= got <= 101 + 20 * (time.monotonic() - began)
        good = Frame(rig.carol.mac, bytes.fromhex("3333ff000001"), "fe80::77", "ff02::1:ff00:1", 255)
        run("ip", "neigh", "replace", "fe80::77", "lladdr", mac(3).hex(":"), "dev", "vnet3", "nud", "permanent")
        assert rig.answer(rig.carol, good.icmp(135, 0, solicitation("fe80::1"))), "another guest has its own measure"
        filters.still_loads()
        let_pass("guest-input")
        assert flood(0x2000) >= FLOOD - 2


def test_a_guest_fills_no_arp_table_from_its_prefix(rig: Rig) -> None:
    filters.only(NFTABLES, "no arptables")
    def known() -> int:
        return len(run("ip", "neigh", "show", "dev", "vnet1").splitlines())

    change = rig.table.transaction()
    change.admit(rig.alice.admission._replace(prefixes=(parse_prefix("10.96.0.0/16"),)), 0)
    change.commit()
    run("ip", "route", "add", "10.96.0.0/16", "dev", "vnet1")

    def flood(third: int) -> int:
        before = known()
        for number in range(FLOOD):
            rig.alice.wire.send(arp(rig.alice.mac, 1, (rig.alice.mac, f"10.96.{third}.{number}"), HOST4))
            if number % 25 == 0:
                rig.settle()
        rig.settle()
        rig.alice.heard()
        return known() - before

    began = time.monotonic()
    assert 50 <= flood(1) <= 101 + 20 * (time.monotonic() - began)
    assert rig.answer(rig.alice, arp(rig.alice.mac, 1, (rig.alice.mac, rig.alice.v4), HOST4)), "in its own name, always"
    run("nft", "insert", "rule", "arp", "slash32", "guest-input", "accept")
    assert flood(2) >= FLOOD - 2


def test_a_packet_to_the_gateway_does_not_run_in_circles(rig: Rig) -> None:
    """169.254.1.1 is routed to lo for proxy ARP's sake: forwarded there, a packet would come back until it dies."""
    run("ip", "route", "add", "169.254.1.1/32", "dev", "lo")

    def rounds(sender: Port, port: int) -> int:
        before = _looped()
        sender.wire.send(sender.to("169.254.1.1").udp(1, port))
        rig.settle()
        return _looped() - before

    assert rounds(rig.alice, 1) == rounds(rig.outside, 1) == 0
    let_pass("forward-from")
    assert rounds(rig.alice, 2) > 50
    assert rounds(rig.outside, 2) > 50


def _looped() -> int:
    found = re.search(r"RX:[^\n]*\n\s*\d+\s+(\d+)", run("ip", "-s", "link", "show", "lo"))
    assert found
    return int(found[1])


def test_flows_that_the_receiver_refuses_do_not_count(netns: Namespace, peer: Namespace) -> None:
    rig = Rig(peer, Guard(conn_limit=10))
    rig.group(rig.bob, DEAF)
    for port in range(1000, 1040):
        assert not rig.crosses(rig.alice, rig.alice.to(rig.bob).udp(port, 2000), rig.bob)
    assert flows() == 0

    def passes(port: int) -> bool:
        return rig.crosses(rig.alice, rig.alice.to(rig.carol).udp(port, 2000), rig.carol)

    for port in range(1000, 1010):
        eventually(lambda port=port: passes(port), "the kernel's count forgets them within two ticks")
    assert not any(passes(port) for port in range(1010, 1015)), "half-open flows do count"
    rig.close()
