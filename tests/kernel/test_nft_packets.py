# Real packets through the skeleton. Every packet that must not pass is sent again once the guarding rule is gone
# (`open_up`), and must pass then.
from __future__ import annotations

import socket

import filters
import pytest
from filters import IPTABLES, NFTABLES, open_up
from frames import ACK, BROADCAST, SYN, SYN_ACK, Frame, arp, solicitation
from netns import Namespace, run
from nft_rig import BASE, DEAF, HOST4, HOST6, OPEN, SILENT, Port, Rig, mac, receives

from hostd.compiler.ruleset import Guard

LINK_LOCAL = "fe80::5054:ff:fe00:1"
pytestmark = pytest.mark.usefixtures("packet_filter")


def handshake(rig: Rig, sender: Port, receiver: Port, ports: tuple[int, int] = (40000, 80)) -> bool:
    there, sport, dport = sender.to(receiver), *ports
    back = receiver.to(sender)
    return (
        rig.crosses(sender, there.tcp(sport, dport, SYN, seq=100), receiver)
        and rig.crosses(receiver, back.tcp(dport, sport, SYN_ACK, seq=500, ack=101), sender)
        and rig.crosses(sender, there.tcp(sport, dport, ACK, seq=101, ack=501), receiver)
    )


def more(rig: Rig, sender: Port, receiver: Port, ports: tuple[int, int] = (40000, 80)) -> bool:
    return rig.crosses(sender, sender.to(receiver).tcp(*ports, ACK, seq=101, ack=501), receiver)


# ---- forwarding and classes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 6])
def test_open_guests_and_the_outside_reach_each_other(rig: Rig, version: int) -> None:
    for sender, receiver in ((rig.alice, rig.bob), (rig.alice, rig.outside), (rig.outside, rig.alice)):
        assert rig.crosses(sender, sender.to(receiver, version).udp(1000, 2000), receiver)


@pytest.mark.parametrize("version", [4, 6])
def test_both_ends_are_asked(rig: Rig, version: int) -> None:
    ask = rig.alice.to(rig.bob, version)
    rig.group(rig.bob, DEAF)
    assert not rig.crosses(rig.alice, ask.udp(1000, 2000), rig.bob), "egress allows, ingress does not"
    rig.group(rig.bob, OPEN)
    rig.group(rig.alice, SILENT)
    assert not rig.crosses(rig.alice, ask.udp(1000, 2001), rig.bob), "ingress allows, egress does not"
    rig.group(rig.alice, OPEN)
    assert rig.crosses(rig.alice, ask.udp(1000, 2002), rig.bob)


@pytest.mark.parametrize("group", [0, 17, BASE + 9, BASE + 0x10000])
@pytest.mark.parametrize("version", [4, 6])
def test_a_tap_of_no_known_class_is_isolated(rig: Rig, version: int, group: int) -> None:
    there, back = rig.alice.to(rig.outside, version), rig.outside.to(rig.alice, version)
    rig.group(rig.alice, group)
    assert not rig.crosses(rig.alice, there.udp(1000, 2000), rig.outside)
    assert not rig.crosses(rig.outside, back.udp(1000, 2000), rig.alice)
    rig.group(rig.alice, OPEN)
    assert rig.crosses(rig.alice, there.udp(1001, 2001), rig.outside)
    assert rig.crosses(rig.outside, back.udp(1001, 2001), rig.alice)


def test_group_zero_cuts_established_flows(rig: Rig) -> None:
    assert handshake(rig, rig.alice, rig.bob)
    rig.group(rig.alice, 0)
    assert not more(rig, rig.alice, rig.bob)
    rig.group(rig.alice, OPEN)
    rig.group(rig.bob, 0)
    assert not more(rig, rig.alice, rig.bob)
    rig.group(rig.bob, OPEN)
    assert more(rig, rig.alice, rig.bob)


def test_replies_pass_a_class_that_may_not_send(rig: Rig) -> None:
    rig.group(rig.bob, SILENT)
    assert handshake(rig, rig.alice, rig.bob)
    assert not rig.crosses(rig.bob, rig.bob.to(rig.alice).tcp(5000, 80, SYN), rig.alice)


def test_tcp_begins_with_syn(rig: Rig) -> None:
    stray = rig.alice.to(rig.bob).tcp(4000, 80, ACK, seq=5, ack=6)
    from_outside = rig.outside.to(rig.bob).tcp(4000, 80, SYN_ACK, seq=5, ack=6)
    assert not rig.crosses(rig.alice, stray, rig.bob)
    assert not rig.crosses(rig.outside, from_outside, rig.bob)
    assert handshake(rig, rig.alice, rig.bob)
    open_up()
    assert rig.crosses(rig.alice, stray, rig.bob)
    assert rig.crosses(rig.outside, from_outside, rig.bob)


def test_a_deleted_tap_leaves_nothing_to_the_next_of_its_name(rig: Rig) -> None:
    filters.only(NFTABLES, "ipset knows taps by name: the group gates them, and hostd expels with the link")
    rig.alice.wire.close()
    run("ip", "link", "del", "vnet1")
    again = rig.guest(1)
    rig.group(again, OPEN)
    assert again.ifindex != rig.alice.ifindex
    assert not rig.crosses(again, again.to(rig.bob).udp(1, 2), rig.bob)
    change = rig.table.transaction()
    change.admit(again.admission, 0)
    change.commit()
    assert rig.crosses(again, again.to(rig.bob).udp(1, 2), rig.bob)


# ---- healing ----------------------------------------------------------------------------------------------------


def test_flow_survives_load_and_a_flush_is_healed(rig: Rig) -> None:
    rig.group(rig.carol, 0)
    assert handshake(rig, rig.alice, rig.bob)
    assert not rig.table.load()
    assert more(rig, rig.alice, rig.bob)
    open_up()
    assert rig.crosses(rig.carol, rig.carol.to(rig.bob).udp(1, 2), rig.bob)
    assert rig.table.load()
    assert not rig.crosses(rig.carol, rig.carol.to(rig.bob).udp(1, 3), rig.bob)
    rig._policy()
    rig.group(rig.carol, 0)
    assert more(rig, rig.alice, rig.bob)


# ---- spoofing ---------------------------------------------------------------------------------------------------

NO_MAC = "no set of ipset that every kernel has knows MACs; a guest's reaches nobody"
SPOOFS = {
    "another guest's v4": {"source": "10.65.0.3"},
    "nobody's v4": {"source": "10.65.0.77"},
    "the host's v4": {"source": HOST4},
    "another MAC": {"mac": mac(77)},
    "another guest's MAC and v4": {"mac": mac(3), "source": "10.65.0.3"},
    "just past its prefix": {"source": "10.66.1.64"},
    "its prefix, another MAC": {"source": "10.66.1.5", "mac": mac(77)},
    "another guest's v6": {"source": "fd00:65::3", "target": "fd00:65::2"},
    "nobody's v6 of its /64": {"source": "fd00:65::1:1", "target": "fd00:65::2"},
    "v6 with another MAC": {"source": "fd00:65::1", "target": "fd00:65::2", "mac": mac(77)},
    "just past its v6 prefix": {"source": "fd00:66:1:1::1", "target": "fd00:65::2"},
}


@pytest.mark.parametrize("spoof", SPOOFS)
def test_spoofed_source_is_dropped(rig: Rig, spoof: str) -> None:
    frame = rig.alice.to(rig.bob).but(**SPOOFS[spoof]).udp(1000, 2000)
    if spoof in ("another MAC", "its prefix, another MAC", "v6 with another MAC"):
        filters.only(NFTABLES, NO_MAC)
    assert not rig.crosses(rig.alice, frame, rig.bob)
    open_up()
    if spoof == "the host's v4":
        return  # a router drops that by itself
    assert rig.crosses(rig.alice, frame, rig.bob)


@pytest.mark.parametrize("source", ["10.66.1.0", "10.66.1.63", "fd00:66:1::1"])
def test_prefix_behind_a_guest_may_send(rig: Rig, source: str) -> None:
    target = rig.bob.v6 if ":" in source else rig.bob.v4
    assert rig.crosses(rig.alice, rig.alice.to(rig.bob).but(source=source, target=target).udp(1, 2), rig.bob)


def test_spoofing_into_an_established_flow_is_dropped(rig: Rig) -> None:
    assert handshake(rig, rig.alice, rig.bob)
    forged = rig.alice.to(rig.bob).but(mac=rig.carol.mac, to_mac=rig.carol.host_mac).tcp(40000, 80, ACK, 101, 501)
    assert not rig.crosses(rig.carol, forged, rig.bob)
    assert more(rig, rig.alice, rig.bob)
    open_up()
    assert rig.crosses(rig.carol, forged, rig.bob)


def _redirect(frame: Frame) -> bytes:
    """About a packet of the flow that `frame` answers, so that conntrack calls it related."""
    about = frame.back().udp(5000, 6000)[14:42]
    return frame.icmp(5, 1, bytes([203, 0, 113, 66]) + about)


def test_redirects_and_advertisements_are_dropped(rig: Rig) -> None:
    assert rig.crosses(rig.bob, rig.bob.to(rig.alice).udp(5000, 6000), rig.alice)
    redirect = _redirect(rig.alice.to(rig.bob))
    unreachable = rig.alice.to(rig.bob).icmp(3, 3, bytes(4) + rig.bob.to(rig.alice).udp(5000, 6000)[14:42])
    advertisement = rig.alice.to(rig.bob, 6).icmp(134, 0, bytes(12))
    assert not rig.crosses(rig.alice, redirect, rig.bob)
    assert not rig.crosses(rig.alice, advertisement, rig.bob)
    assert rig.crosses(rig.alice, unreachable, rig.bob), "other errors about the flow pass"
    assert rig.crosses(rig.alice, rig.alice.to(rig.bob, 6).icmp(128), rig.bob)
    open_up()
    assert rig.crosses(rig.alice, redirect, rig.bob)
    assert rig.crosses(rig.alice, advertisement, rig.bob)


@pytest.mark.parametrize(("version", "ports"), [(4, (67, 68)), (6, (547, 546))])
def test_no_dhcp_server(rig: Rig, version: int, ports: tuple[int, int]) -> None:
    offer = rig.alice.to(rig.bob, version).udp(*ports)
    assert not rig.crosses(rig.alice, offer, rig.bob)
    assert rig.crosses(rig.alice, rig.alice.to(rig.bob, version).udp(ports[0], 2000), rig.bob)
    open_up()
    assert rig.crosses(rig.alice, offer, rig.bob)


def test_tunnels_between_guests_are_a_matter_of_policy(rig: Rig) -> None:
    assert rig.crosses(rig.alice, rig.alice.to(rig.bob).udp(5000, 4789), rig.bob)


# ---- connection limit -------------------------------------------------------------------------------------------


def test_connections_are_limited_per_guest(netns: Namespace, peer: Namespace) -> None:
    rig = Rig(peer, Guard(conn_limit=10))
    assert handshake(rig, rig.alice, rig.bob)
    passed = [rig.crosses(rig.alice, rig.alice.to(rig.bob).udp(n, 2000), rig.bob) for n in range(1000, 1020)]
    assert passed == [True] * 9 + [False] * 11
    assert more(rig, rig.alice, rig.bob), "an established flow goes on"
    assert rig.crosses(rig.carol, rig.carol.to(rig.bob).udp(1000, 2000), rig.bob), "another guest has its own"
    filters.still_loads()
    rig.close()


# ---- to and from the host ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("port", [2000, 4789, 8472, 6081, 53])
def test_guest_to_host_is_closed(rig: Rig, version: int, port: int) -> None:
    frame = rig.alice.to(HOST4 if version == 4 else HOST6, version).udp(1000, port)
    assert not receives(rig, rig.alice, frame, port)
    open_up()
    assert receives(rig, rig.alice, frame, port)


def test_tunnels_to_the_host_are_closed_even_as_replies(rig: Rig) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as local:
        local.bind((HOST4, 4789))
        local.connect((rig.alice.v4, 1000))
        rig.alice.heard()
        local.send(b"ask")
        rig.settle()
        assert any(f.endswith(b"ask") for f in rig.alice.heard()), "the host may speak"
        rig.alice.wire.send(rig.alice.to(HOST4).udp(1000, 4789))
        rig.settle()
        with pytest.raises(BlockingIOError):
            local.recv(100)
        open_up()
        rig.alice.wire.send(rig.alice.to(HOST4).udp(1000, 4789))
        rig.settle()
        assert local.recv(100)


@pytest.mark.parametrize("version", [4, 6])
def test_replies_to_the_host_pass_under_the_guests_policy(rig: Rig, version: int) -> None:
    own, guest = (HOST4, rig.alice.v4) if version == 4 else (HOST6, rig.alice.v6)
    with socket.socket(
        socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
    ) as local:
        local.bind((own, 3000))
        local.connect((guest, 1000))
        rig.group(rig.alice, DEAF)
        with pytest.raises(PermissionError):
            local.send(b"no")
        rig.group(rig.alice, SILENT)
        local.send(b"yes")
        rig.alice.wire.send(rig.alice.to(own, version).udp(1000, 3000))
        rig.settle()
        assert local.recv(100)


def test_dhcp_requests_reach_the_host(rig: Rig) -> None:
    discover = Frame(rig.alice.mac, BROADCAST, "0.0.0.0", "255.255.255.255")
    assert receives(rig, rig.alice, discover.udp(68, 67), 67)
    assert receives(rig, rig.alice, rig.alice.to(HOST4).udp(68, 67), 67)
    bad = [rig.alice.to(HOST4).but(source="10.65.0.3").udp(68, 67)]
    if filters.chosen == NFTABLES:
        bad.append(discover.but(mac=mac(77)).udp(68, 67))
    assert not any(receives(rig, rig.alice, frame, 67) for frame in bad)
    assert not receives(rig, rig.alice, discover.udp(69, 67), 67)
    open_up()
    assert all(receives(rig, rig.alice, frame, 67) for frame in bad)


def test_dhcp6_requests_reach_the_host(rig: Rig) -> None:
    servers = "ff02::1:2"
    ask = Frame(rig.alice.mac, bytes.fromhex("333300010002"), LINK_LOCAL, servers)
    assert receives(rig, rig.alice, ask.udp(546, 547), 547, servers)
    bad = ask.but(mac=mac(77) if filters.chosen == NFTABLES else rig.alice.mac, source="2001:db8::77").udp(546, 547)
    assert not receives(rig, rig.alice, bad, 547, servers)
    open_up()
    assert receives(rig, rig.alice, bad, 547, servers)


def test_neighbour_discovery(rig: Rig) -> None:
    good = Frame(rig.alice.mac, bytes.fromhex("3333ff000001"), LINK_LOCAL, "ff02::1:ff00:1", 255)
    ask = solicitation("fe80::1")
    run("ip", "neigh", "replace", LINK_LOCAL, "lladdr", mac(1).hex(":"), "dev", "vnet1", "nud", "permanent")
    assert rig.answer(rig.alice, good.icmp(135, 0, ask))
    assert rig.answer(rig.alice, good.but(source=rig.alice.v6).icmp(135, 0, ask))
    assert rig.answer(rig.alice, good.but(source="::").icmp(135, 0, ask))
    bad = [good.but(source=rig.carol.v6).icmp(135, 0, ask)]
    if filters.chosen == NFTABLES:
        bad.insert(0, good.but(mac=mac(77)).icmp(135, 0, ask))
    for frame in bad:
        assert not rig.answer(rig.alice, frame)
    rig.group(rig.alice, 0)
    assert not rig.answer(rig.alice, good.icmp(135, 0, ask))
    open_up()
    if filters.chosen == NFTABLES:
        assert rig.answer(rig.alice, bad[0])
    assert rig.answer(rig.alice, good.icmp(135, 0, ask))


def test_no_tcp_to_the_host_over_link_local(rig: Rig) -> None:
    with socket.create_server(("::", 22), family=socket.AF_INET6):
        frames = [
            Frame(rig.alice.mac, rig.alice.host_mac, source, target).tcp(5000, 22, SYN)
            for source in (LINK_LOCAL, rig.alice.v6)
            for target in ("fe80::1", HOST6)
        ]
        run("ip", "neigh", "replace", LINK_LOCAL, "lladdr", mac(1).hex(":"), "dev", "vnet1", "nud", "permanent")
        assert not any(rig.answer(rig.alice, frame) for frame in frames)
        open_up()
        assert all(rig.answer(rig.alice, frame) for frame in frames[:2])


def test_host_says_nothing_to_an_unknown_tap(rig: Rig) -> None:
    def spoken(target: str) -> list[bytes]:
        rig.carol.heard()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as local:
            try:
                local.sendto(b"hello", (target, 9))
            except PermissionError:
                return []
        rig.settle()
        return rig.carol.heard()

    run("ip", "route", "add", "10.65.0.99", "dev", "vnet3")  # no neighbour: the host would ask by ARP
    rig.group(rig.carol, 0)
    assert not spoken("10.65.0.99")
    assert not spoken(rig.carol.v4)
    rig.group(rig.carol, OPEN)
    assert spoken(rig.carol.v4)
    run("ip", "route", "add", "10.65.0.98", "dev", "vnet3")
    assert any(f[12:14] == b"\x08\x06" for f in spoken("10.65.0.98"))


# ---- ARP --------------------------------------------------------------------------------------------------------


def test_arp_is_answered_to_the_guests_own_address_only(rig: Rig) -> None:
    filters.only(NFTABLES, "no arptables: rp_filter answers for it, see test_iptables_packets.py")
    alice = rig.alice
    own = alice.mac, alice.v4
    assert rig.answer(alice, arp(alice.mac, 1, own, HOST4))
    assert rig.answer(alice, arp(alice.mac, 1, (alice.mac, "10.66.1.5"), HOST4)), "an address of its prefix"
    run("ip", "address", "add", "169.254.1.1/32", "dev", "vnet1")
    assert rig.answer(alice, arp(alice.mac, 1, (alice.mac, "0.0.0.0"), "169.254.1.1")), "a probe"
    bad = {
        "another's address": arp(alice.mac, 1, (alice.mac, "10.65.0.3"), HOST4),
        "another's MAC inside": arp(alice.mac, 1, (mac(3), alice.v4), HOST4),
        "another's MAC outside": arp(mac(3), 1, own, HOST4),
        "past its prefix": arp(alice.mac, 1, (alice.mac, "10.66.1.64"), HOST4),
    }
    for what, frame in bad.items():
        assert not rig.answer(alice, frame), what
    rig.group(alice, 0)
    assert not rig.answer(alice, arp(alice.mac, 1, own, HOST4))
    open_up()
    for what, frame in bad.items():
        assert rig.answer(alice, frame), what


# ---- what is not ours -------------------------------------------------------------------------------------------


def _enslave(rig: Rig) -> bytes:
    """alice and bob become unmanaged guests of a libvirt network; returns the bridge's MAC."""
    run("ip", "link", "add", "virbr0", "up", "type", "bridge")
    for name in ("vnet1", "vnet2"):
        run("ip", "link", "set", name, "group", "0", "master", "virbr0")
        run("ip", "route", "flush", "dev", name)
    run("ip", "address", "add", "10.65.0.100/24", "dev", "virbr0")
    run("ip", "neigh", "replace", rig.alice.v4, "lladdr", rig.alice.mac.hex(":"), "dev", "virbr0", "nud", "permanent")
    if rig.table.changed():  # of a new bridge, too, where that is of interest
        rig.table.load()
    return bytes.fromhex(run("ip", "-o", "link", "show", "virbr0").split("link/ether ")[1][:17].replace(":", ""))


@pytest.mark.parametrize("drop_transit", [(), (4, 6)])
def test_a_tap_in_a_bridge_is_not_touched(netns: Namespace, peer: Namespace, drop_transit: tuple[int, ...]) -> None:
    rig = Rig(peer, Guard(drop_transit=drop_transit))
    honest = rig.alice.to(rig.outside).but(to_mac=_enslave(rig))
    assert rig.crosses(rig.alice, rig.alice.to(rig.bob).but(to_mac=rig.bob.mac).udp(1, 2), rig.bob), "inside the bridge"
    assert receives(rig, rig.alice, honest.but(target="10.65.0.100").udp(1, 53), 53), "to the host"
    assert rig.crosses(rig.alice, honest.udp(1, 3), rig.outside), "through the bridge to the outside"
    assert rig.crosses(rig.outside, rig.outside.to(rig.alice).udp(1, 4), rig.alice), "and in"
    run("ip", "link", "set", "vnet1", "nomaster")
    alone = honest.but(to_mac=rig.alice.host_mac)
    assert not rig.crosses(rig.alice, alone.udp(1, 5), rig.outside), "out of the bridge it is guarded"
    rig.close()


@pytest.mark.parametrize("version", [4, 6])
def test_transit_between_foreign_interfaces(netns: Namespace, peer: Namespace, version: int) -> None:
    rig = Rig(peer, Guard(drop_transit=(4, 6)))
    inside = rig.attach(21, "up1", "192.0.2.9", "2001:db8:9::9")
    assert not rig.crosses(rig.outside, rig.outside.to(inside, version).udp(1, 2), inside)
    for sender, receiver in ((rig.alice, rig.outside), (rig.outside, rig.alice), (rig.alice, rig.bob)):
        assert rig.crosses(sender, sender.to(receiver, version).udp(1, 2), receiver)
    for number, dropped in enumerate([(), (10 - version,)], 3):
        router = filters.make(Guard(drop_transit=dropped))
        assert router.load()
        assert rig.crosses(rig.outside, rig.outside.to(inside, version).udp(1, number), inside), "a router stays one"
        router.close()
    half = filters.make(Guard(drop_transit=(version,)))
    assert half.load()
    assert not rig.crosses(rig.outside, rig.outside.to(inside, version).udp(1, 9), inside)
    half.close()
    rig.close()


def test_an_exempt_interface_is_let_be(rig: Rig) -> None:
    rig.group(rig.alice, 0)
    forged = rig.alice.to(rig.outside).but(source="10.65.0.77")
    question = arp(rig.alice.mac, 1, (rig.alice.mac, "10.65.0.77"), HOST4)
    run("ip", "route", "add", "10.65.0.77", "dev", "vnet1")

    def free(port: int) -> list[bool]:
        return [
            rig.crosses(rig.alice, forged.udp(1, port), rig.outside),
            receives(rig, rig.alice, forged.but(target=HOST4).udp(1, 53), 53),
            bool(rig.answer(rig.alice, question)),
            rig.crosses(rig.outside, rig.outside.to(rig.alice).udp(1, port), rig.alice),
        ]

    def exempt(on: bool) -> None:
        change = rig.table.transaction()
        change.exempt(rig.alice.ifindex, on, 0)
        change.commit()

    arp_free = filters.chosen == IPTABLES  # has no say in ARP
    assert free(1) == [False, False, arp_free, False]
    exempt(True)
    assert rig.table.read().exempt == {rig.alice.ifindex}
    assert free(2) == [True] * 4
    assert not rig.crosses(rig.alice, forged.but(target=rig.bob.v4).but(source="10.65.0.2").udp(1, 2), rig.carol)
    exempt(False)
    assert free(3) == [False, False, arp_free, False]
