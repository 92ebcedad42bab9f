# slash32 as a neighbour: what the host had and others run is the same before, while guests of ours come and go, and
# after the purge. One hypervisor that begins without us; the tests follow each other: a plain host, then a router.
from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import access, domains, product
from lab.node import Node
from lab.rack import Rack

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a rack needs root")

SECONDS = 40.0
RADV = """
router id 10.99.0.1;
protocol device {}
protocol radv { interface "br0" { max ra interval 4; min ra interval 3; default lifetime 600; }; }
"""
# Two NICs of the host's own, each with a machine behind it; others' tables, routes, neighbours.
NEIGHBOURS = """
n=1; for side in left right; do
  ip netns add $side; ip link add own$n type veth peer name e0 netns $side
  sysctl -qw net.ipv6.conf.own$n.accept_dad=0; ip netns exec $side sysctl -qw net.ipv6.conf.e0.accept_dad=0
  ip address add 10.88.$n.1/24 dev own$n; ip address add fd88:$n::1/64 dev own$n; ip link set own$n up
  ip -n $side address add 10.88.$n.2/24 dev e0; ip -n $side address add fd88:$n::2/64 dev e0
  ip -n $side link set e0 up; ip -n $side route add default via 10.88.$n.1
  ip -n $side -6 route add default via fd88:$n::1
  n=2
done
ip route add 10.65.250.1/32 via 10.88.1.2 proto static; ip route add 10.65.250.2/32 dev own2 proto bird
ip -6 route add fd00:65::250/128 via fd88:1::2 proto static; ip route add blackhole 10.65.251.0/24 proto 186
ip route add 10.65.250.3/32 dev own1 table 77 proto 132; ip rule add fwmark 7 lookup 77
ip neigh add 10.88.1.9 lladdr 02:00:00:00:00:09 dev own1 nud permanent
nft -f - <<RULES
table inet theirs {
  set known { type ipv4_addr; elements = { 10.65.0.1, 10.65.0.2 } }
  chain forward { type filter hook forward priority 10; policy accept; ip saddr @known meta mark set 7; }
}
table arp theirs { chain c { type filter hook input priority 0; }; }
table netdev theirs { chain c { type filter hook ingress device own1 priority 0; }; }
RULES
"""
POLICY = """
apiVersion: slash32/v1
kind: GlobalNetworkPolicy
metadata: {name: neighbourly}
spec:
  selector: role == "ours"
  types: [Ingress, Egress]
  ingress: [{action: Allow, source: {selector: role == "ours"}}]
  egress: [{action: Allow}]
"""
SYSCTLS = "sysctl -a 2>/dev/null | grep -E '^net.ipv(4|6).(conf|neigh|ip_forward)'"


@pytest.fixture(scope="module")
def rack() -> Iterator[Rack]:
    with Rack("tnbr", hosts=1, dispatcher=True, dispatcher_debs=product.debs().on_dispatchers) as made:
        yield made


@pytest.fixture(scope="module")
def node(rack: Rack) -> Node:
    return rack.node("h1")


@pytest.fixture(scope="module")
def host(rack: Rack, node: Node) -> Node:
    """The host as its owner has it: a default route by router advertisements, NICs, tables, routes."""
    rack.tor.start_bird(RADV)
    node.sh("ip -6 route del default; sysctl -qw net.ipv6.conf.eth0.accept_ra=1")
    node.sh(NEIGHBOURS)
    wait(lambda: advertised(node), "the router advertises")
    return node


@pytest.fixture(scope="module")
def old(host: Node) -> str:
    """An untagged guest with an ethernet NIC, and a route to it by hand; its tap."""
    return start(host, domains.lxc_domain("old", mac="52:54:00:88:00:01", addr4="10.65.88.1", tag=False))


@pytest.fixture(scope="module")
def before(host: Node, old: str) -> dict[str, list[str]]:
    assert answers(host, "10.65.88.1"), old
    wait(lambda: "tentative" not in host.sh("ip -6 address"), "addresses settle")
    return look(host, links(host))


def wait(condition: object, what: str) -> None:
    assert callable(condition)
    assert product.poll(lambda: None if condition() else "no", SECONDS) is None, what


def advertised(node: Node) -> bool:
    return "proto ra" in node.sh("ip -6 route show default")


def start(node: Node, xml: str) -> str:
    """A guest of nobody's; the tap's name, with a route to 10.65.88.1 where it is routed by hand."""
    name = product.start(node, xml)
    access.wait_guest(node, name)
    tap = product.virsh(node, "lxc", "domiflist", name).split()[0]
    if "type='ethernet'" in xml and "slash32" not in xml:
        address = re.search(r"s32\.addr=([0-9.]+)", xml)
        assert address
        node.sh(f"ip address add 169.254.1.1/32 dev {tap}; ip route replace {address[1]}/32 dev {tap}")
    return tap


def stop(node: Node, *names: str) -> None:
    for name in names:
        product.virsh(node, "lxc", "destroy", name)
        product.virsh(node, "lxc", "undefine", name)


def answers(node: Node, address: str) -> bool:
    return node.run(["ping", "-c1", "-W1", address], check=False).returncode == 0


def transit(node: Node) -> dict[int, bool]:
    """Does the host carry packets from one of its NICs to the other?"""
    ping = "ip netns exec left ping -c1 -W1"
    return {
        v: not node.run(f"{ping} {a}".split(), check=False).returncode for v, a in ((4, "10.88.2.2"), (6, "fd88:2::2"))
    }


def links(node: Node) -> list[str]:
    return node.sh("ls /sys/class/net").split()


def look(node: Node, names: list[str]) -> dict[str, list[str]]:
    """All that is not ours in the kernel's network, of these links."""
    shown = {
        "nft": node.sh("nft -s list ruleset"),
        "routes": node.sh("for v in 4 6; do ip -$v -d route show table all; ip -$v rule; done"),
        "neighbours": node.sh("ip neigh show nud permanent; ip -6 neigh show nud permanent"),
        "links": "".join(node.sh(f"ip -o link show {name}; ip -o address show {name}") for name in names),
        "sysctls": node.sh(SYSCTLS),
    }
    return {key: sorted(others(text, names)) for key, text in shown.items()}


def others(text: str, names: list[str]) -> Iterator[str]:
    text = re.sub(r"(?ms)^table (inet|arp) slash32 \{.*?^\}\n", "", text)
    text = re.sub(r"expires \d+sec|(valid|preferred)_lft \w+|hoplimit \d+", "", text)
    for line in text.splitlines():
        devices = set(re.findall(r"(?:\bdev |conf[./]|neigh[./])([\w-]+)", line)) - {"all", "default"}
        ours = re.search(r"proto (slash32|132)\b", line) and "table 77" not in line
        if not ours and devices <= set(names):
            yield line.replace("proto slash32", "proto 132")


def changed(now: dict[str, list[str]], then: dict[str, list[str]], fine: str = "$^") -> dict[str, list[str]]:
    """What differs, but for lines that match FINE."""
    found = {key: sorted(set(now[key]) ^ set(then[key])) for key in then}
    return {key: left for key, lines in found.items() if (left := [x for x in lines if not re.search(fine, x)])}


# What forwarding does by itself to every interface, and what keeps them listening to routers.
FORWARDS = (
    r"^anycast |\.forwarding = |net\.ipv4\.ip_forward = |ipv4\.conf\.all\.accept_redirects = |\.mc_forwarding"
    r"|ipv6\.conf\.[\w-]+\.accept_ra = "
)


# ---- a plain host --------------------------------------------------------------------------------------------------


def test_control_forwarding_alone_loses_the_default_route(host: Node) -> None:
    host.sh("sysctl -qw net.ipv6.conf.all.forwarding=1")
    assert not advertised(host)
    host.sh("sysctl -qw net.ipv6.conf.all.forwarding=0")
    wait(lambda: advertised(host), "the next advertisement")


def test_control_a_change_is_seen(host: Node, before: dict[str, list[str]]) -> None:
    host.sh("nft add element inet theirs known { 10.9.9.9 }; ip route add 10.99.9.0/24 dev own2")
    host.sh("ip neigh add 10.88.1.8 lladdr 02:00:00:00:00:08 dev own1 nud permanent; ip link set own2 mtu 1400")
    host.sh("sysctl -qw net.ipv4.conf.own1.rp_filter=2 net.ipv4.conf.own1.proxy_arp=1")
    assert set(changed(look(host, links(host)), before, FORWARDS)) == set(before)
    host.sh("nft delete element inet theirs known { 10.9.9.9 }; ip route del 10.99.9.0/24 dev own2")
    host.sh("ip neigh del 10.88.1.8 dev own1; ip link set own2 mtu 1500")
    was = " ".join(
        line.replace(" = ", "=") for line in before["sysctls"] if re.search(r"own1\.(rp_filter|proxy_arp) ", line)
    )
    host.sh(f"sysctl -qw {was}")
    assert changed(look(host, links(host)), before) == {}


def test_install(rack: Rack, host: Node, before: dict[str, list[str]]) -> None:
    assert transit(host) == {4: False, 6: False}
    rack.install(product.debs().on_hosts, rack.hosts)
    product.deploy(rack, SECONDS)
    assert host.sh("cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding").split() == ["1", "1"]
    assert changed(look(host, links(host)), before, FORWARDS) == {}


def test_the_default_route_stays_and_is_learned_anew(host: Node) -> None:
    assert advertised(host)
    host.sh("ip -6 route del default")
    wait(lambda: advertised(host), "the host listens to routers")


def test_the_host_has_not_become_a_router(host: Node) -> None:
    assert transit(host) == {4: False, 6: False}


def test_guests_of_ours_change_nothing_of_others(
    rack: Rack, host: Node, before: dict[str, list[str]], old: str
) -> None:
    names = links(host)
    product.apply(rack, POLICY)
    for n in (1, 2):
        xml = domains.lxc_domain(
            f"ours{n}",
            mac=f"52:54:00:88:01:0{n}",
            addr4=f"10.65.88.1{n}",
            addr6=f"fd00:65::88:{n}",
            labels={"role": "ours"},
        )
        start(host, xml)
    product.wait_connected(host, "ours1", "ours2")
    assert all(access.probe(host, "ours1", ["10.65.88.12", "fd00:65::88:2"]).values())
    host.sh("systemctl restart slash32-hostd")
    product.wait_in_sync(rack)
    assert changed(look(host, names), before, FORWARDS) == {}
    assert transit(host) == {4: False, 6: False}
    assert answers(host, "10.65.88.1"), "and the guest that was there before us has its network"
    assert old in names


def test_the_ruleset_lists_and_loads_again(host: Node) -> None:
    """In place, and in an empty namespace that has links of the same names."""
    host.sh(
        "nft list ruleset > /run/listed; nft -c -f /run/listed; (echo flush ruleset; cat /run/listed) | nft -c -f -"
    )
    named = "; ".join(
        f"ip link add {name} type veth peer name p{n}" for n, name in enumerate(links(host)) if name != "lo"
    )
    again = host.run(
        ["unshare", "-n", "sh", "-ec", f"{named}; nft -c -f /run/listed; nft -f /run/listed; nft list ruleset"]
    )

    def lines(text: str) -> list[str]:
        return sorted(re.sub(r"\bcounter packets \d+ bytes \d+", "", word).strip() for word in re.split(r"[,\n]", text))

    listed = host.read("/run/listed")
    assert "ours" not in listed and "jump from-" in listed
    pruned = [re.sub(r"(?s)set (conns|asks) \{.*?\n\t\}", "", text) for text in (again.stdout, listed)]
    assert lines(pruned[0]) == lines(pruned[1])


def test_a_guest_that_ran_before_is_reported_and_isolated_once_its_line_goes(host: Node) -> None:
    listed = host.read("/etc/slash32/guard-exempt")
    assert re.search(r"^[0-9a-f-]{36} 52:54:00:88:00:01 old$", listed, re.M)
    status = product.host_status(host)
    assert len(status["exempt"]) == 1 and "52:54:00:88:00:01" in status["exempt"][0]
    assert "52:54:00:88:00:01" in host.sh("slash32-hostd status")
    assert answers(host, "10.65.88.1")
    host.write("/etc/slash32/guard-exempt", "".join(x for x in listed.splitlines(True) if "52:54" not in x))
    product.restart(host, "slash32-hostd")
    wait(lambda: not answers(host, "10.65.88.1"), "it is isolated")
    assert product.host_status(host)["exempt"] == []
    host.write("/etc/slash32/guard-exempt", listed)
    product.restart(host, "slash32-hostd")
    wait(lambda: answers(host, "10.65.88.1"), "control: with its line it is let be")


def test_purge_gives_everything_back(host: Node, before: dict[str, list[str]]) -> None:
    stop(host, "ours1", "ours2")
    host.run(["apt-get", "-q", "purge", "-y", "slash32-hostd", "slash32-common"])
    wait(lambda: advertised(host), "the default route")
    assert changed(look(host, links(host)), before) == {}
    assert transit(host) == {4: False, 6: False}
    assert answers(host, "10.65.88.1")


# ---- a router with libvirt's own networks ---------------------------------------------------------------------------


def attached(name: str, mac: str, network: str, *words: str) -> str:
    """A guest whose NIC is libvirt's business."""
    text = domains.lxc_domain(name, mac=mac, tag=False, words=words)
    kind = "network" if network == "default" else "bridge"
    return text.replace("<interface type='ethernet'>", f"<interface type='{kind}'><source {kind}='{network}'/>")


@pytest.fixture(scope="module")
def router(host: Node) -> Node:
    """It forwards IPv4, and runs a guest on libvirt's default network and one on a plain bridge."""
    stop(host, "old")
    host.sh("sysctl -qw net.ipv4.ip_forward=1; ip link add br9 type bridge")
    host.sh("ip address add 10.89.0.1/24 dev br9; ip link set br9 up")
    product.virsh(host, "qemu", "net-start", "default")
    start(host, attached("nat", "52:54:00:88:02:01", "default", "s32.dhcp=1"))
    start(host, attached("plain", "52:54:00:88:02:02", "br9"))
    access.guest_run(host, "plain", ["ip", "address", "add", "10.89.0.2/24", "dev", "eth0"])
    access.guest_run(host, "plain", ["ip", "route", "add", "default", "via", "10.89.0.1"])
    wait(lambda: works(host), "guests on bridges")
    return host


def works(node: Node) -> bool:
    """Each guest to its bridge; by NAT to the world; between the bridge and a NIC of the host."""
    nat = access.probe(node, "nat", ["192.168.122.1", "10.99.0.1"], "-t", "500")
    plain = access.probe(node, "plain", ["10.89.0.1", "10.88.1.2"], "-t", "500")
    asked = [
        nat["192.168.122.1", "icmp"],
        nat["10.99.0.1", "icmp"],
        plain["10.89.0.1", "icmp"],
        plain["10.88.1.2", "icmp"],
    ]
    return all(asked)


def test_a_router_stays_one_and_bridges_are_left_alone(rack: Rack, router: Node) -> None:
    assert transit(router) == {4: True, 6: False}
    names, before = links(router), look(router, links(router))
    rack.install(product.debs().on_hosts, rack.hosts)
    wait(lambda: works(router), "during")
    assert transit(router) == {4: True, 6: False}
    router.sh("systemctl restart slash32-hostd; systemctl reload libvirtd")
    start(router, attached("later", "52:54:00:88:02:03", "default", "s32.dhcp=1"))
    wait(lambda: access.probe(router, "later", ["10.99.0.1"], "-t", "500")["10.99.0.1", "icmp"], "one that comes later")
    stop(router, "later")
    assert works(router)
    assert changed(look(router, names), before, FORWARDS) == {}
    assert not Path(router.sees("/etc/slash32/guard-exempt")).exists(), "they are not ours to exempt"
    router.run(["apt-get", "-q", "purge", "-y", "slash32-hostd", "slash32-common"])
    assert changed(look(router, names), before, FORWARDS) == {}
    assert works(router)
    assert transit(router)[4]
