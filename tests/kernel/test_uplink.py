# A host whose default route comes from real router advertisements, sent by a peer namespace.
from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest
from netns import Namespace, eventually, run

from hostd.compiler.forwarding import Link
from hostd.compiler.ruleset import Guard
from hostd.dataplane import sysctl, uplink
from hostd.dataplane.rtnl import Rtnl
from hostd.dataplane.uplink import Forwarding

NOT_BEFORE = Forwarding(False, False)


def advertise(router: Namespace) -> None:
    """One RA: a default route for half an hour, and 2001:db8:1::/64 for autoconfiguration."""
    prefix = struct.pack(
        "!BBBBIII16s", 3, 4, 64, 0xC0, 3600, 1800, 0, socket.inet_pton(socket.AF_INET6, "2001:db8:1::")
    )
    with router.entered(), socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as raw:
        raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        raw.sendto(
            struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0) + prefix,
            ("ff02::1", 0, 0, socket.if_nametoindex("tor0")),
        )


def learned() -> bool:
    return "proto ra" in run("ip", "-6", "route", "show", "default")


@pytest.fixture
def host(netns: Namespace, peer: Namespace) -> Iterator[Namespace]:
    connect(netns, peer)
    yield netns


def connect(netns: Namespace, peer: Namespace) -> None:
    netns.ip(f"link add eth0 type veth peer name tor0 netns {peer.path}")
    run("sysctl", "-qw", "net.ipv6.conf.eth0.accept_dad=0")
    netns.ip("link set eth0 up")
    with peer.entered():
        run("sysctl", "-qw", "net.ipv6.conf.tor0.accept_dad=0")
        peer.ip("link set tor0 up")
        eventually(lambda: "fe80::" in peer.ip("-6 addr show dev tor0 -tentative"), "the router's address")


def learn(peer: Namespace) -> None:
    def asked() -> bool:
        advertise(peer)
        return learned()

    eventually(asked, "the default route of the RA")


def names() -> list[str]:
    rtnl = Rtnl()
    try:
        return uplink.uplinks(rtnl.links(), Guard())
    finally:
        rtnl.close()


def test_the_default_route_survives_and_goes_on_being_refreshed(host: Namespace, peer: Namespace) -> None:
    learn(peer)
    assert names() == ["eth0"] and uplink.forwarding() == NOT_BEFORE
    written = uplink.switch_on(names(), NOT_BEFORE)
    assert [key for key, _ in written] == ["ipv6/conf/eth0/accept_ra", "ipv6/conf/all/forwarding", "ipv4/ip_forward"]
    assert uplink.forwarding() == Forwarding(True, True)
    assert learned()
    host.ip("-6 route flush proto ra")
    assert not learned()
    learn(peer)
    assert uplink.switch_on(names(), NOT_BEFORE) == [] and learned()  # nothing to do, nothing written


def test_control_without_it_the_default_route_is_gone(host: Namespace, peer: Namespace) -> None:
    learn(peer)
    sysctl.write("ipv6/conf/all/forwarding", "1")
    assert not learned()


def test_control_a_taps_own_setting_is_enough_to_lose_it(host: Namespace, peer: Namespace) -> None:
    host.ip("link add vnet0 type veth peer name far0")
    learn(peer)
    sysctl.write_all(sysctl.tap_sysctls("vnet0"))
    assert not learned()
    learn(peer)
    uplink.switch_on(names(), NOT_BEFORE)
    sysctl.write("ipv6/conf/vnet0/forwarding", "0")
    sysctl.write_all(sysctl.tap_sysctls("vnet0"))
    assert learned()


def test_advertisements_that_come_only_later_are_heard(host: Namespace, peer: Namespace) -> None:
    uplink.switch_on(names(), NOT_BEFORE)
    learn(peer)


def test_an_uplink_that_comes_later_is_heard(netns: Namespace, peer: Namespace) -> None:
    uplink.switch_on([], NOT_BEFORE)
    connect(netns, peer)
    advertise(peer)
    assert not learned()
    assert uplink.keep_router_advertisements("eth0") != [] and uplink.keep_router_advertisements("eth0") == []
    learn(peer)


@pytest.mark.parametrize("accept_ra", ["0", "2"])
def test_other_choices_of_the_operator_stay(host: Namespace, accept_ra: str) -> None:
    sysctl.write("ipv6/conf/eth0/accept_ra", accept_ra)
    uplink.switch_on(names(), NOT_BEFORE)
    assert sysctl.read("ipv6/conf/eth0/accept_ra") == accept_ra


def test_a_host_that_was_a_router_stays_deaf_to_routers(host: Namespace) -> None:
    sysctl.write("ipv6/conf/all/forwarding", "1")
    before = uplink.forwarding()
    assert before == Forwarding(False, True)
    assert [key for key, _ in uplink.switch_on(names(), before)] == ["ipv4/ip_forward"]
    assert sysctl.read("ipv6/conf/eth0/accept_ra") == "1"


def test_uplinks_are_the_hosts_own() -> None:
    links = [
        Link(1, "lo", 0, b"", True),
        Link(2, "eth0", 0, b"", True),
        Link(3, "br0", 0, b"", True, kind="bridge"),
        Link(4, "eth1", 0, b"", True, master=3),
        Link(5, "vrf0", 0, b"", True, kind="vrf"),
        Link(6, "eth2", 0, b"", True, master=5),
        Link(7, "vnet0", 0, b"", True),
        Link(8, "tap-of-ours", Guard().group_base + 1, b"", True),
        Link(9, "eth3", 5, b"", True),
    ]
    assert uplink.uplinks({link.ifindex: link for link in links}, Guard()) == ["eth0", "br0", "vrf0", "eth2", "eth3"]
    assert uplink.uplinks({}, Guard()) == []
