from __future__ import annotations

import itertools
import os
import select
import socket
from collections.abc import Iterator

import pytest
from netns import Namespace, eventually, run

from hostd.compiler.forwarding import Add, Delete, Neighbour, Replace, Route, SetGroup, TapAddress
from hostd.dataplane import sysctl
from hostd.dataplane.monitor import (
    AddressGone,
    LinkGone,
    LinkSeen,
    Monitor,
    NeighbourGone,
    NeighbourSeen,
    NetconfChanged,
    Overrun,
    RouteGone,
    RouteOverwritten,
    RouteSeen,
    RulesetChanged,
)
from hostd.dataplane.netlink import NETLINK_NETFILTER
from hostd.dataplane.rtnl import Rtnl
from slash32.net import Prefix, parse_address, parse_prefix

FULL = os.environ.get("SLASH32_COUNTS") == "full"
MAC = bytes.fromhex("525400000001")
V4 = parse_prefix("10.65.0.2")
V6 = parse_prefix("fd00:65::2")
INET, ARP = 1, 3


@pytest.fixture
def rtnl(netns: Namespace) -> Iterator[Rtnl]:
    """With vnet0 and vnet1 up and quiet."""
    for n in (0, 1):
        netns.ip(f"link add vnet{n} type veth peer name far{n}")
        for name in (f"vnet{n}", f"far{n}"):
            run("sysctl", "-qw", f"net.ipv6.conf.{name}.accept_dad=0", f"net.ipv6.conf.{name}.router_solicitations=0")
            netns.ip(f"link set {name} up")
    eventually(lambda: netns.ip("link show").count("state UP") == 4, "links settled")
    rtnl = Rtnl()
    yield rtnl
    rtnl.close()


@pytest.fixture
def monitor(rtnl: Rtnl) -> Iterator[Monitor]:
    monitor = Monitor()
    yield monitor
    monitor.close()


def index(name: str) -> int:
    return socket.if_nametoindex(name)


def heard(monitor: Monitor, *kinds: type) -> list[object]:
    """Notifications are sent before the call that causes them returns."""
    return [event for event in monitor.read() if isinstance(event, kinds or object)]


# ---- links ----


def test_links_come_change_and_go(netns: Namespace, monitor: Monitor) -> None:
    netns.ip("link add tap9 type veth peer name tap8")
    created = [event.link for event in heard(monitor, LinkSeen)]
    assert {link.name for link in created} == {"tap8", "tap9"}
    tap9 = index("tap9")
    netns.ip("link set tap9 group 76")
    assert heard(monitor) == []  # a link that is down changes its group in silence ...
    netns.ip("link set tap9 up")
    assert {(e.link.ifindex, e.link.group, e.link.up) for e in heard(monitor, LinkSeen)} >= {(tap9, 76, True)}
    netns.ip("link set tap9 group 77")
    assert (tap9, 77) in {(e.link.ifindex, e.link.group) for e in heard(monitor, LinkSeen)}  # one that is up does not
    netns.ip("link del tap9")
    assert LinkGone(tap9, "tap9") in heard(monitor, LinkGone)


def test_a_port_that_leaves_its_bridge_is_not_gone(netns: Namespace, monitor: Monitor) -> None:
    netns.ip("link add br0 type bridge")
    netns.ip("link set vnet0 master br0")
    netns.ip("link set vnet0 nomaster")
    events = heard(monitor, LinkSeen, LinkGone)
    assert not [e for e in events if isinstance(e, LinkGone)]
    assert index("br0") in {e.link.master for e in events if isinstance(e, LinkSeen) and e.link.name == "vnet0"}


# ---- routes ----


@pytest.mark.parametrize("prefix", [V4, V6], ids=str)
def test_routes_of_ours(rtnl: Rtnl, monitor: Monitor, prefix: Prefix) -> None:
    a, b = index("vnet0"), index("vnet1")
    gateways = [parse_address(f"10.0.0.{n}" if prefix.version == 4 else f"fe80::{n}") for n in (8, 9)]
    ways = [Route(prefix, a), Route(prefix, b), *(Route(prefix, a, gateway, True) for gateway in gateways)]
    rtnl.change([Add(ways[0])])
    assert heard(monitor, RouteSeen, RouteGone) == [RouteSeen(ways[0])]
    for old, new in itertools.pairwise(ways):
        rtnl.change([Replace(old, new)])
        events = heard(monitor, RouteSeen, RouteGone)
        assert RouteSeen(new) in events[:-1]  # two v6 hops are told as one route of two
        assert events[-1] == RouteGone(old)
    rtnl.change([Replace(ways[-1], ways[-1])])
    assert heard(monitor, RouteSeen, RouteGone) == []
    metric = " metric 1" if prefix.version == 6 else ""
    run("ip", *f"route del {prefix}{metric}".split())
    assert heard(monitor, RouteSeen, RouteGone, RouteOverwritten) == [RouteGone(ways[-1])]


def test_a_route_overwritten_by_somebody_is_told(rtnl: Rtnl, netns: Namespace, monitor: Monitor) -> None:
    ours = [Route(V4, index("vnet0")), Route(V6, index("vnet0"))]
    rtnl.change([Add(route) for route in ours])
    heard(monitor)
    netns.ip(f"route replace {V4} dev vnet1 proto static")
    assert rtnl.routes() == {ours[1]}
    assert heard(monitor) == [RouteOverwritten(V4)]
    netns.ip(f"-6 route replace {V6} dev vnet1 proto static metric 1")
    assert rtnl.routes() == set()
    assert heard(monitor) == [RouteOverwritten(V6)]


@pytest.mark.parametrize("how", ["proto static", "proto 132 table 77", "proto bird metric 32"])
def test_routes_of_others_are_not_told(netns: Namespace, monitor: Monitor, how: str) -> None:
    for prefix in (V4, V6):
        netns.ip(f"route add {prefix} dev vnet0 {how}")
        netns.ip(f"route del {prefix} dev vnet0 {how}")
    assert heard(monitor) == []
    netns.ip(f"route add {V4} dev vnet0 proto 132")  # the control
    assert heard(monitor) == [RouteSeen(Route(V4, index("vnet0")))]


def test_v4_routes_leave_a_closed_link_without_a_word(rtnl: Rtnl, netns: Namespace, monitor: Monitor) -> None:
    """The reason why LinkSeen(up=False) means that the link's routes are gone. v6 does tell."""
    a = index("vnet0")
    rtnl.change([Add(Route(V4, a)), Add(Route(V6, a))])
    heard(monitor)
    netns.ip("link set vnet0 down")
    eventually(lambda: rtnl.routes() == set(), "both routes gone")
    events = heard(monitor, RouteGone, LinkSeen)
    assert [e for e in events if isinstance(e, RouteGone)] == [RouteGone(Route(V6, a))]
    assert False in {e.link.up for e in events if isinstance(e, LinkSeen) and e.link.ifindex == a}


# ---- the rest of a tap ----


def test_neighbours_and_addresses(rtnl: Rtnl, netns: Namespace, monitor: Monitor) -> None:
    a = index("vnet0")
    four, six = (Neighbour(a, prefix.network, MAC) for prefix in (V4, V6))
    rtnl.change([Add(four), Add(six), Add(TapAddress(a))])
    assert heard(monitor, NeighbourSeen, NeighbourGone, AddressGone) == [NeighbourSeen(four), NeighbourSeen(six)]
    netns.ip("neigh add 10.65.0.9 lladdr 52:54:00:00:00:09 dev vnet0 nud permanent")
    netns.ip("neigh del 10.65.0.9 dev vnet0")
    assert heard(monitor) == []  # not ours
    netns.ip("neigh del 10.65.0.2 dev vnet0")
    netns.ip("neigh del fd00:65::2 dev vnet0")
    gone = heard(monitor, NeighbourGone)
    assert [(e.neighbour.ifindex, e.neighbour.address) for e in gone] == [(a, V4.network), (a, V6.network)]
    netns.ip("addr del fe80::1/64 dev vnet0")
    assert heard(monitor, AddressGone) == [AddressGone(TapAddress(a))]


@pytest.mark.parametrize(
    ("key", "value", "version", "name"),
    [
        ("ipv4/conf/vnet0/rp_filter", "1", 4, "rp_filter"),
        ("ipv4/conf/vnet0/proxy_arp", "1", 4, "proxy_neigh"),
        ("ipv4/conf/vnet0/forwarding", "1", 4, "forwarding"),
        ("ipv6/conf/vnet0/forwarding", "1", 6, "forwarding"),
    ],
)
def test_netconf(monitor: Monitor, key: str, value: str, version: int, name: str) -> None:
    sysctl.write(key, value)
    assert heard(monitor) == [NetconfChanged(index("vnet0"), version, ((name, int(value)),))]


# ---- our own changes ----


def test_own_changes_can_be_kept_silent(rtnl: Rtnl, netns: Namespace) -> None:
    a = index("vnet0")
    moved = Route(V4, index("vnet1"))
    items = [Neighbour(a, V4.network, MAC), TapAddress(a), Route(V4, a), Route(V6, a)]
    monitor, all_hearing = Monitor(route_port=rtnl.port), Monitor()
    rtnl.change([Add(item) for item in items])
    rtnl.change([Replace(Route(V4, a), moved)])
    rtnl.change([Delete(item) for item in (*items, moved)])
    unsigned = heard(monitor)
    assert {type(event) for event in unsigned} == {NeighbourGone, AddressGone}
    assert len(heard(all_hearing)) > len(unsigned) + 4
    rtnl.change([SetGroup(a, 5)])
    assert [event.link.group for event in heard(monitor)] == [5]  # links are told by whomever
    netns.ip(f"route add {V4} dev vnet0 proto 132")
    assert heard(monitor) == [RouteSeen(Route(V4, a))]
    monitor.close()
    all_hearing.close()


# ---- nf_tables ----


def nft(commands: str) -> None:
    run("nft", "-f", "-", stdin=commands)


def test_one_event_for_each_transaction_that_touches_ours(monitor: Monitor) -> None:
    nft("table inet slash32 { set s { type ipv4_addr; }\n chain c { }; }\n table inet other { chain c { }; }")
    (event,) = heard(monitor)
    assert isinstance(event, RulesetChanged)
    assert (event.tables, event.program) == (frozenset({(INET, "slash32")}), "nft")
    assert event.process > 1 and event.pid
    nft("table arp slash32 { }\n add element inet slash32 s { 10.0.0.1 }")
    (event,) = heard(monitor)
    assert event.tables == {(INET, "slash32"), (ARP, "slash32")}
    for change in (
        "add rule inet slash32 c accept",
        "flush chain inet slash32 c",
        "delete chain inet slash32 c",
        "delete element inet slash32 s { 10.0.0.1 }",
        "add set inet slash32 t { type ipv4_addr; }",
        "delete table arp slash32",
    ):
        nft(change)
        assert len(heard(monitor)) == 1, change


def test_foreign_tables_are_not_told_and_a_flush_of_everything_is(monitor: Monitor) -> None:
    nft("table inet slash32 { }")
    heard(monitor)
    elements = ",".join(f"10.0.{n >> 8}.{n & 255}" for n in range(60_000 if FULL else 10_000))
    nft('table inet other { set slash32 { type ipv4_addr; }\n chain slash32 { comment "slash32"; }; }')
    nft("table inet slash32x { }\n table inet xslash32 { }")
    nft(f"add element inet other slash32 {{ {elements} }}")
    assert heard(monitor) == []
    nft("flush ruleset")
    (event,) = heard(monitor)
    assert event.tables == {(INET, "slash32")}
    nft("flush ruleset")
    assert heard(monitor) == []


def test_the_port_tells_our_transactions_from_those_of_others(rtnl: Rtnl) -> None:
    from hostd.dataplane.netlink import NLM_F_ACK, NLM_F_CREATE, NetlinkSocket, message, text

    ours = NetlinkSocket(NETLINK_NETFILTER)
    silent, all_hearing = Monitor(nft_port=ours.port), Monitor()
    table = bytes([INET, 0, 0, 0]) + text(1, "slash32")
    parts = [
        (0x10, bytes([0, 0, 0, 10]), 0),
        (10 << 8, table, NLM_F_CREATE | NLM_F_ACK),
        (0x11, bytes([0, 0, 0, 10]), 0),
    ]
    first = ours.reserve(3)
    batch = b"".join(message(kind, flags, seq, body) for seq, (kind, body, flags) in enumerate(parts, first))
    assert ours.exchange(batch, first + 1) == []
    assert [(event.pid, event.process) for event in heard(all_hearing)] == [(ours.port, os.getpid())]
    assert heard(silent) == []
    nft("flush ruleset")
    (event,) = heard(silent)
    assert event.pid != ours.port
    for it in (ours, silent, all_hearing):
        it.close()


# ---- floods ----


def flood(count: int, how: str) -> None:
    for verb in ("add", "del"):
        lines = (f"route {verb} 10.{n >> 16}.{n >> 8 & 255}.{n & 255}/32 dev vnet1 {how}\n" for n in range(count))
        run("ip", "-batch", "-", stdin="".join(lines))


def test_a_flood_of_foreign_routes_does_not_even_wake_us(monitor: Monitor) -> None:
    flood(10_000, "proto static")
    assert select.select(monitor.filenos(), [], [], 0)[0] == []
    flood(1, "proto 132")  # the control
    assert select.select(monitor.filenos(), [], [], 0)[0] == [monitor.filenos()[0]]


def test_lost_messages_are_an_overrun_and_then_it_goes_on(netns: Namespace, monitor: Monitor) -> None:
    monitor._routes._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    flood(500, "proto 132")
    with pytest.raises(Overrun):
        for _ in range(100):
            monitor.read()
    monitor.read()
    netns.ip(f"route add {V4} dev vnet0 proto 132")
    assert heard(monitor) == [RouteSeen(Route(V4, index("vnet0")))]


def test_a_flood_of_ours_is_read_in_bounded_pieces(monitor: Monitor) -> None:
    flood(3_000, "proto 132")
    first = monitor.read()
    assert len(first) == 4096
    assert len(monitor.read()) == 6_000 - 4096
    assert monitor.read() == []
