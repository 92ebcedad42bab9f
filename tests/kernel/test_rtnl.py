from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator

import pytest
from netns import Namespace, eventually, run

from hostd.compiler.forwarding import (
    GATEWAY4_ROUTE,
    Add,
    Delete,
    Link,
    Neighbour,
    Operation,
    Replace,
    Route,
    SetGroup,
    Take,
    TapAddress,
    Way,
)
from hostd.dataplane.rtnl import Rtnl
from slash32.net import Prefix, host_prefix, parse_address, parse_prefix

FULL = os.environ.get("SLASH32_COUNTS") == "full"
MAC = bytes.fromhex("525400000001")
V4 = parse_prefix("10.65.0.2")
V6 = parse_prefix("fd00:65::2")
GONE = 4242  # an ifindex that nothing has


@pytest.fixture
def rtnl(netns: Namespace) -> Iterator[Rtnl]:
    netns.ip("link add vnet0 type veth peer name far0")
    netns.ip("link add vnet1 type veth peer name far1")
    for name in ("vnet0", "far0", "vnet1", "far1"):
        run("sysctl", "-qw", f"net.ipv6.conf.{name}.accept_dad=0")
        netns.ip(f"link set {name} up")
    rtnl = Rtnl()
    yield rtnl
    rtnl.close()


def index(rtnl: Rtnl, name: str) -> int:
    link = rtnl.link(name)
    assert link is not None
    return link.ifindex


def shown(prefix: Prefix) -> list[str]:
    """`ip route show` of a prefix, one line a route."""
    family = "-4" if prefix.version == 4 else "-6"
    return [line.strip() for line in run("ip", family, "route", "show", str(prefix)).splitlines()]


# ---- links ----


def test_links(rtnl: Rtnl, netns: Namespace) -> None:
    netns.ip("link add br0 type bridge")
    netns.ip("link set vnet1 master br0")
    netns.ip("link set vnet0 address 52:54:00:00:00:01 group 77")
    links = rtnl.links()
    by_name = {link.name: link for link in links.values()}
    assert by_name["vnet0"] == Link(by_name["vnet0"].ifindex, "vnet0", 77, MAC, True, 0, "veth")
    assert (by_name["br0"].up, by_name["br0"].kind) == (False, "bridge")
    assert by_name["vnet1"].master == by_name["br0"].ifindex
    assert rtnl.link("vnet0") == rtnl.link(by_name["vnet0"].ifindex) == by_name["vnet0"]
    assert rtnl.link("none") is None and rtnl.link(GONE) is None and rtnl.link("x" * 40) is None
    rtnl.set_up(by_name["br0"].ifindex)
    rtnl.set_group(by_name["br0"].ifindex, 0x53320001)
    assert rtnl.link("br0") == by_name["br0"]._replace(up=True, group=0x53320001)
    with pytest.raises(OSError) as refused:
        rtnl.set_group(GONE, 1)
    assert refused.value.errno == errno.ENODEV


# ---- ways ----


def test_the_way_to_an_address(rtnl: Rtnl, netns: Namespace) -> None:
    for words in (
        "address add 192.0.2.1/24 dev vnet1", "-6 address add 2001:db8::1/64 dev vnet1 nodad",
        "route add blackhole 198.51.100.0/24", "-6 route add unreachable 2001:db8:bad::/48",
        "route add prohibit 203.0.113.0/24",
    ):  # fmt: skip
        netns.ip(words)
    ways = {
        "192.0.2.1": Way(True, "lo"), "2001:db8::1": Way(True, "lo"), "127.0.0.1": Way(True, "lo"),
        "192.0.2.9": Way(False, "vnet1"), "2001:db8::9": Way(False, "vnet1"), "10.9.9.9": Way(False, ""),
        "198.51.100.1": Way(False, ""), "203.0.113.1": Way(False, ""), "2001:db8:bad::1": Way(False, ""),
    }  # fmt: skip
    assert {address: rtnl.way_to(parse_address(address)) for address in ways} == ways


# ---- everything there and back ----


def everything(a: int, b: int) -> list[Route | Neighbour | TapAddress]:
    guest4, guest6 = parse_address("10.65.0.2"), parse_address("fd00:65::2")
    return [
        Neighbour(a, guest4, MAC),
        Neighbour(a, guest6, MAC),
        TapAddress(a),
        TapAddress(b),
        GATEWAY4_ROUTE,
        Route(V4, a),
        Route(V6, a),
        Route(parse_prefix("10.66.0.0/26"), a, guest4, True),
        Route(parse_prefix("fd00:66::/64"), a, guest6, True),
        Route(parse_prefix("10.67.0.1"), b, parse_address("192.0.2.7"), True),
        Route(parse_prefix("0.0.0.0/0"), b),
        Route(parse_prefix("::/0"), b),
    ]


def actual(rtnl: Rtnl) -> set[object]:
    return {*rtnl.routes(), *rtnl.neighbours(), *rtnl.tap_addresses()}


def test_what_is_written_is_read_back_twice_the_same_and_can_be_deleted_twice(rtnl: Rtnl) -> None:
    items = everything(index(rtnl, "vnet0"), index(rtnl, "vnet1"))
    for _ in range(2):
        assert rtnl.change([Add(item) for item in items]) == []
        assert actual(rtnl) == set(items)
    for _ in range(2):
        assert rtnl.change([Delete(item) for item in reversed(items)]) == []
        assert actual(rtnl) == set()


def test_a_change_does_nothing_else(rtnl: Rtnl, netns: Namespace) -> None:
    links = len(rtnl.links()) - 1  # without lo
    eventually(lambda: netns.ip("-6 -o addr show scope link -tentative").count("fe80::") == links, "links have settled")
    before = [netns.ip(f"-d {what}") for what in ("route show table all", "-6 route show table all", "neigh", "addr")]
    assert rtnl.change([]) == []
    items = everything(index(rtnl, "vnet0"), index(rtnl, "vnet1"))
    rtnl.change([Add(item) for item in items])
    rtnl.change([Delete(item) for item in items])
    after = [netns.ip(f"-d {what}") for what in ("route show table all", "-6 route show table all", "neigh", "addr")]
    assert before == after


def test_the_kernel_finds_the_interface_of_a_next_hop(rtnl: Rtnl, netns: Namespace) -> None:
    netns.ip("addr add 192.0.2.1/24 dev vnet1")
    netns.ip("addr add 2001:db8::1/64 dev vnet1 nodad")
    b = index(rtnl, "vnet1")
    wanted = [Route(V4, 0, parse_address("192.0.2.7")), Route(V6, 0, parse_address("2001:db8::7"))]
    for _ in range(2):
        assert rtnl.change([Add(route) for route in wanted]) == []
        assert rtnl.routes() == {route._replace(oif=b) for route in wanted}
    assert rtnl.change([Delete(route) for route in wanted]) == []
    assert rtnl.routes() == set()


def test_neighbour_and_address_are_replaced(rtnl: Rtnl, netns: Namespace) -> None:
    a, address = index(rtnl, "vnet0"), parse_address("10.65.0.2")
    other = bytes.fromhex("525400000002")
    netns.ip("addr add fe80::1/64 dev vnet0 nodad")
    assert rtnl.tap_addresses() == set()  # not ours before it carries our mark
    assert rtnl.change([Add(Neighbour(a, address, MAC)), Add(TapAddress(a)), Add(Neighbour(a, address, other))]) == []
    assert rtnl.neighbours() == {Neighbour(a, address, other)}
    assert rtnl.tap_addresses() == {TapAddress(a)}


def test_group_is_an_operation(rtnl: Rtnl) -> None:
    a = index(rtnl, "vnet0")
    assert rtnl.change([SetGroup(a, 5), SetGroup(GONE, 0)]) == []  # closing what is gone is done
    (failure,) = rtnl.change([SetGroup(GONE, 5), SetGroup(a, 6)])
    assert (failure.operation, failure.errno) == (SetGroup(GONE, 5), errno.ENODEV)
    link = rtnl.link(a)
    assert link is not None and link.group == 6


# ---- failures ----


@pytest.mark.parametrize("bad_last", [False, True])
def test_failures_name_their_operation_and_stop_no_other(rtnl: Rtnl, bad_last: bool) -> None:
    a = index(rtnl, "vnet0")
    good: list[Operation] = [Add(Route(host_prefix(bytes([10, 65, 1, n])), a)) for n in range(4)]
    bad: list[Operation] = [
        Add(Route(V4, GONE)),
        Add(Route(V6, GONE)),
        Add(Route(parse_prefix("10.65.0.3"), 0, parse_address("203.0.113.1"))),
        Add(Neighbour(GONE, V4.network, MAC)),
        Add(TapAddress(GONE)),
    ]
    failures = rtnl.change(good[:2] + bad + good[2:] if not bad_last else good + bad)
    assert [f.operation for f in failures] == bad
    assert all(f.errno > 0 and "\n" not in f.message for f in failures)
    assert failures[0].message.startswith("route 10.65.0.2/32 dev #4242 (gone): ")
    assert {route.prefix.network[3] for route in rtnl.routes()} == {0, 1, 2, 3}


def test_deleting_from_links_that_are_gone_or_down_succeeds(rtnl: Rtnl, netns: Namespace) -> None:
    netns.ip("link set vnet1 down")
    for ifindex in (GONE, index(rtnl, "vnet0"), index(rtnl, "vnet1")):
        via = Route(V4, ifindex, parse_address("10.65.0.9"), True)
        via6 = Route(V6, ifindex, parse_address("fd00:65::9"), True)
        items = [Route(V4, ifindex), Route(V6, ifindex), via, via6]
        others = [Neighbour(ifindex, V4.network, MAC), Neighbour(ifindex, V6.network, MAC), TapAddress(ifindex)]
        assert rtnl.change([Delete(item) for item in [*items, *others]]) == []


def test_many_failures_in_one_change_are_all_returned(rtnl: Rtnl) -> None:
    count = 20_000 if FULL else 5_000
    a = index(rtnl, "vnet0")
    prefixes = [host_prefix((0x0A000000 + n).to_bytes(4, "big")) for n in range(count)]
    failures = rtnl.change([Add(Route(prefix, a if n % 2 else GONE)) for n, prefix in enumerate(prefixes)])
    assert len(failures) == count // 2 and len(rtnl.routes()) == count // 2
    assert rtnl.change([Delete(Route(prefix, a)) for prefix in prefixes]) == []  # half of them are missing
    assert rtnl.routes() == set()


# ---- ours and foreign ones ----


FOREIGN = ["proto static", "proto dhcp metric 100", "proto static table 77", "proto 132 metric 9", "proto 132 table 77"]


@pytest.mark.parametrize("how", FOREIGN)
@pytest.mark.parametrize("prefix", [V4, V6], ids=str)
def test_a_foreign_route_is_never_seen_overwritten_or_deleted(
    rtnl: Rtnl, netns: Namespace, prefix: Prefix, how: str
) -> None:
    a = index(rtnl, "vnet0")
    worst = " metric 1" if prefix.version == 6 and "metric" not in how else ""  # the place that we would take
    netns.ip(f"route add {prefix} dev vnet1 {how}{worst}")
    before = netns.ip(f"-{prefix.version} route show table all {prefix}")
    for ours in (Route(prefix, a), Route(prefix, index(rtnl, "vnet1"))):
        assert ours not in rtnl.routes()
        rtnl.change([Add(ours)])
        rtnl.change([Replace(ours, ours)])
        rtnl.change([Delete(ours)])
        assert netns.ip(f"-{prefix.version} route show table all {prefix}") == before


@pytest.mark.parametrize(("prefix", "metric"), [(V4, ""), (V6, " metric 1")])
def test_a_foreign_route_in_our_place_is_a_conflict_in_one_clear_line(
    rtnl: Rtnl, netns: Namespace, prefix: Prefix, metric: str
) -> None:
    ours = Add(Route(prefix, index(rtnl, "vnet0")))
    netns.ip(f"route add {prefix} dev vnet1 proto static{metric}")
    (failure,) = rtnl.change([ours])
    assert failure.message == f"route {prefix} exists already, proto static dev vnet1: remove it"
    assert rtnl.routes() == set()
    netns.ip(f"route del {prefix} dev vnet1{metric}")
    assert rtnl.change([ours]) == []
    assert rtnl.routes() == {ours.item}


@pytest.mark.parametrize(("prefix", "metric"), [(V4, ""), (V6, " metric 1")])
def test_a_place_that_was_taken_is_taken_back(rtnl: Rtnl, netns: Namespace, prefix: Prefix, metric: str) -> None:
    ours = Route(prefix, index(rtnl, "vnet0"))
    rtnl.change([Add(ours)])
    alone = netns.ip(f"-{prefix.version} route show table all")
    netns.ip(f"route replace {prefix} dev vnet1 proto static{metric}")
    assert rtnl.routes() == set()
    assert rtnl.change([Take(ours)]) == []
    assert netns.ip(f"-{prefix.version} route show table all") == alone
    assert rtnl.change([Take(ours)]) == []
    assert netns.ip(f"-{prefix.version} route show table all") == alone


@pytest.mark.parametrize(("prefix", "how"), [(V4, "metric 100"), (V6, ""), (V6, "metric 2")])
def test_beside_a_foreign_route_with_a_worse_metric_ours_wins(
    rtnl: Rtnl, netns: Namespace, prefix: Prefix, how: str
) -> None:
    netns.ip(f"route add {prefix} dev vnet1 proto static {how}")
    address = str(prefix).split("/")[0]
    assert " dev vnet1 " in netns.ip(f"route get {address}")
    assert rtnl.change([Add(Route(prefix, index(rtnl, "vnet0")))]) == []
    assert " dev vnet0 " in netns.ip(f"route get {address}")
    assert len(shown(prefix)) == 2


# ---- changing ours ----


def ways(a: int, b: int, prefix: Prefix) -> list[Route]:
    hops = ["192.0.2.7", "192.0.2.8"] if prefix.version == 4 else ["fe80::7", "fe80::8"]
    via = [parse_address(hop) for hop in hops]
    return [Route(prefix, a), Route(prefix, b), *(Route(prefix, o, v, True) for o in (a, b) for v in via)]


@pytest.mark.parametrize("prefix", [V4, V6], ids=str)
@pytest.mark.parametrize("known", [True, False])
def test_any_way_changes_into_any_other(rtnl: Rtnl, prefix: Prefix, known: bool) -> None:
    """`known`: the caller knows the old route; else it only adds the new one."""
    routes = ways(index(rtnl, "vnet0"), index(rtnl, "vnet1"), prefix)
    for old in routes:
        for new in routes:
            assert rtnl.change([Add(old)]) == []
            assert rtnl.routes() == {old}
            assert rtnl.change([Replace(old, new) if known else Add(new)]) == []
            assert rtnl.routes() == {new}
    assert len(shown(prefix)) == 1


@pytest.mark.parametrize("prefix", [V4, V6], ids=str)
def test_two_hops_left_by_a_crash_in_between_are_seen_and_one_can_be_deleted(rtnl: Rtnl, prefix: Prefix) -> None:
    a, b = index(rtnl, "vnet0"), index(rtnl, "vnet1")
    for old, new in zip(ways(a, b, prefix)[:-1], ways(a, b, prefix)[1:], strict=True):
        rtnl.change([Add(old)])
        metric = " metric 1" if prefix.version == 6 else ""
        via = f" via {ip_text(new.via)}" if new.via else ""
        onlink = " onlink" if new.via else ""
        device = "vnet0" if new.oif == a else "vnet1"
        run("ip", *f"route append {prefix}{via} dev {device} proto 132{onlink}{metric}".split())
        assert rtnl.routes() == {old, new}
        assert rtnl.change([Delete(old)]) == []
        assert rtnl.routes() == {new}
        rtnl.change([Delete(new)])


def ip_text(address: bytes) -> str:
    return str(Prefix(address, 8 * len(address))).split("/")[0]


@pytest.mark.parametrize("prefix", [V4, V6], ids=str)
@pytest.mark.parametrize("known", [True, False])
def test_a_change_leaves_no_moment_without_a_route(rtnl: Rtnl, prefix: Prefix, known: bool) -> None:
    routes = ways(index(rtnl, "vnet0"), index(rtnl, "vnet1"), prefix)
    rtnl.change([Add(routes[-1])])
    missing, looks, stop = [], [0], threading.Event()

    def look() -> None:
        with_default = Rtnl()
        while not stop.is_set():
            looks[0] += 1
            if not any(route.prefix == prefix for route in with_default.routes()):
                missing.append(looks[0])
        with_default.close()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        old = routes[-1]
        for n in range(20_000 if FULL else 3_000):
            new = routes[n % len(routes)]
            assert rtnl.change([Replace(old, new) if known else Add(new)]) == []
            old = new
        assert not missing and looks[0] > 10
        rtnl.change([Delete(old)])
        while not missing:  # the control: the looking thread does notice an absence
            pass
    finally:
        stop.set()
        thread.join()


# ---- cost ----


def test_reading_ours_does_not_read_the_routes_of_others(rtnl: Rtnl, netns: Namespace) -> None:
    ours = Route(V4, index(rtnl, "vnet0"))
    rtnl.change([Add(ours)])
    batch = "".join(f"route add 10.1.{n // 250}.{n % 250}/32 dev vnet1 proto static\n" for n in range(2000))
    run("ip", "-batch", "-", stdin=batch)
    socket = rtnl._socket
    parts: list[int] = []
    receive = socket._receive

    def counted(flags: int) -> bytes | None:
        data = receive(flags)
        parts.append(len(data or b""))
        return data

    socket._receive = counted  # type: ignore[method-assign]
    assert rtnl.routes() == {ours}
    assert sum(parts) < 1000
    assert netns.ip("route show proto static").count("\n") == 2000  # the control: they are there
