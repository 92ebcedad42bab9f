# What somebody else breaks in a host's kernel is put right upon the notification, and how much a third party's flush of
# all rules lets through meanwhile. Each damage is also done while hostd is stopped: then it stays.
from __future__ import annotations

import json
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import pytest
from deployed import FULL, Guest, Site

from lab import packets, product
from lab.node import Node

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a rack needs root")

TRIALS = 20 if FULL else 4
ROUNDS = 3  # of trials, at most, until the bar is met
SECONDS = 20.0
BAR = 0.050  # seconds after a foreign flush; nothing may leak later
CAPTURE = "/run/s32-leaks"  # of the node
RATE = 1000  # packets per second that knock, at least
CLOSED, ECHO = 9, 5432  # UDP ports of the receiver: nobody listens; an echo answers
POLICY = """
apiVersion: slash32/v1
kind: GlobalNetworkPolicy
metadata: {name: heal-all}
spec:
  selector: role in {"heal-a", "heal-b", "heal-far"}
  types: [Ingress, Egress]
  ingress: [{action: Allow, protocol: TCP, destination: {ports: [80]}}]
  egress: [{action: Allow, protocol: TCP}]
"""
# All that is ours in the kernel, in lines that compare: what counts, ages or has no order is left out.
SNAPSHOT = """
ip route show table all proto 132; ip -6 route show table all proto 132
ip neigh show nud permanent; ip -6 neigh show nud permanent
for tap in TAPS; do
  ip -6 address show dev $tap to fe80::1 | sed 's/^[0-9]*: //'
  ip -o link show $tap | sed 's/.*\\(state [A-Z]*\\).*\\(group [^ ]*\\).*/\\1 \\2/'
  cd /proc/sys/net; grep -H . ipv4/conf/$tap/{forwarding,proxy_arp,rp_filter,accept_redirects,send_redirects} \
    ipv6/conf/$tap/{forwarding,accept_ra} ipv4/neigh/$tap/proxy_delay
done
grep -H . ipv4/ip_forward ipv6/conf/all/forwarding
nft -s list ruleset
"""
# Says when: the flush is the kernel's between these two moments.
FLUSH = """
import ctypes, sys, time
nft = ctypes.CDLL("libnftables.so.1")
nft.nft_ctx_new.restype = ctypes.c_void_p
context = ctypes.c_void_p(nft.nft_ctx_new(0))
before = time.time()
status = nft.nft_run_cmd_from_buffer(context, b"flush ruleset")
print(before, time.time())
sys.stdout.flush()
sys.exit(status != 0)
"""


class Damage(NamedTuple):
    """A shell script; $TAP, $A4, $A6 are a guest of this host, $R4, $R6 one of the other host."""

    name: str
    script: str


def rule(table: str, chain: str) -> str:
    handle = f"nft -a list chain {table} {chain} | sed -n 's/.*drop.* # handle \\([0-9]*\\)$/\\1/p' | head -n1"
    return f"nft delete rule {table} {chain} handle $({handle})"


ROUTES = [
    Damage("a deleted v4 route", "ip route del $A4/32"),
    Damage("a deleted v6 route", "ip -6 route del $A6/128"),
    Damage("a deleted v4 route to another host", "ip route del $R4/32"),
    Damage("a deleted v6 route to another host", "ip -6 route del $R6/128"),
    Damage("all our routes deleted", "ip route flush proto 132; ip -6 route flush proto 132"),
    Damage("a v4 route replaced", "ip route replace $A4/32 dev lo"),
    Damage("a v6 route replaced", "ip -6 route replace $A6/128 dev lo metric 1"),
    Damage("a v4 route to another host replaced", "ip route replace blackhole $R4/32"),
    Damage("a route of ours to elsewhere added", "ip route add 10.65.200.1/32 dev lo proto 132"),
]
LINKS = [
    Damage("proxy_arp off", "echo 0 > /proc/sys/net/ipv4/conf/$TAP/proxy_arp"),
    Damage("v4 forwarding of the tap off", "echo 0 > /proc/sys/net/ipv4/conf/$TAP/forwarding"),
    Damage("v6 forwarding of the tap off", "echo 0 > /proc/sys/net/ipv6/conf/$TAP/forwarding"),
    Damage("rp_filter off", "echo 0 > /proc/sys/net/ipv4/conf/$TAP/rp_filter"),
    Damage("v4 forwarding of the host off", "echo 0 > /proc/sys/net/ipv4/ip_forward"),
    Damage("v6 forwarding of the host off", "echo 0 > /proc/sys/net/ipv6/conf/all/forwarding"),
    Damage("a neighbour deleted", "ip neigh del $A4 dev $TAP"),
    Damage("a neighbour with another MAC", "ip neigh replace $A4 lladdr 02:00:00:00:00:09 dev $TAP nud permanent"),
    Damage("a v6 neighbour deleted", "ip -6 neigh del $A6 dev $TAP"),
    Damage("the v6 gateway deleted", "ip -6 address del fe80::1/64 dev $TAP"),
    Damage("all v6 addresses flushed", "ip -6 address flush dev $TAP || :"),
    Damage("a foreign group", "ip link set $TAP group 7"),
    Damage("group 0", "ip link set $TAP group 0"),
    Damage("another group of ours", "ip link set $TAP group $((0x5332f000))"),
    Damage("down and up", "ip link set $TAP down; ip link set $TAP up"),
]
RULES = [
    Damage("a rule deleted", rule("inet slash32", "forward-from")),
    Damage("a rule of the arp table deleted", rule("arp slash32", "input")),
    Damage("a rule added", "nft insert rule inet slash32 guest-from accept"),
    Damage("a chain flushed", "nft flush chain inet slash32 guest-to"),
    Damage("a base chain's policy changed", "nft chain inet slash32 input '{ policy drop; }'"),
    Damage("a source address added", "nft add element inet slash32 source4 { $TAP . 10.65.200.9 . $MAC }"),
    Damage("a source address deleted", "nft delete element inet slash32 source4 { $TAP . $A4 . $MAC }"),
    Damage("the tap exempted", "nft add element inet slash32 exempt { $TAP }"),
    Damage("a set flushed", "nft flush set inet slash32 source6"),
    Damage("a class deleted", "nft flush map inet slash32 class-to"),
    Damage("a table deleted", "nft delete table inet slash32"),
    Damage("the arp table deleted", "nft delete table arp slash32"),
    Damage("the ruleset flushed", "nft flush ruleset"),
]


@dataclass(frozen=True)
class Scene:
    """Guests a and b on `node`, far on the other host. TCP to port 80 is open between all of them, and nothing else."""

    site: Site
    a: Guest
    b: Guest
    far: Guest
    words: str  # the shell variables of Damage

    @property
    def node(self) -> Node:
        return self.a.node

    def snapshot(self) -> list[str]:
        text = self.node.sh(SNAPSHOT.replace("TAPS", f"{self.a.tap} {self.b.tap}"), check=False)
        text = re.sub(r"set (conns|asks) \{.*?\n\t\}", "", text, flags=re.S)
        for number, chain in re.findall(r"(\d+) : jump (from-\w+)", text):  # a class may come back as another group
            text = re.sub(rf"\b{number}\b", chain, text)
        text = re.sub(r"\{([^{}]*)\}", lambda found: ",".join(sorted(found[1].replace("\n", "").split(","))), text)
        return sorted(re.sub(r"\s+", " ", line) for line in text.splitlines())

    @property
    def writes(self) -> int:
        """Operations that hostd handed to the kernel."""
        said = self.node.run(["slash32-hostd", "status", "-o", "json"], check=False)  # fails where anything is refused
        return int(json.loads(said.stdout)["counters"]["writes"])

    def damage(self, script: str) -> None:
        self.node.sh(f"{self.words}; {script}")

    def healed(self, before: list[str], what: str) -> None:
        """Poll until everything is as it was."""

        def wrong() -> str | None:
            now = self.snapshot()
            return None if now == before else "\n".join(sorted(set(now) ^ set(before)))

        problem = product.poll(wrong, SECONDS)
        assert problem is None, f"{what}: not healed:\n{problem}\n{product.journal_tail(self.node)}"


@pytest.fixture(scope="module")
def scene(site: Site) -> Iterator[Scene]:
    with site.scope():
        site.apply(POLICY)
        a, b = site.guest(site.h1, "heal-a"), site.guest(site.h1, "heal-b")
        far = site.guest(site.h2, "heal-far")
        site.start(a, b, far)
        names = {"TAP": a.tap, "MAC": a.mac, "A4": a.address4, "A6": a.address6, "R4": far.address4, "R6": far.address6}
        made = Scene(site, a, b, far, "; ".join(f"{key}={value}" for key, value in names.items()))
        made_open(made)
        yield made


def made_open(scene: Scene) -> None:
    """Wait until a reaches b and far as the policy says."""

    def closed() -> str | None:
        said = scene.a.probe(scene.b, scene.far, ms=300)
        return None if all(yes for (_, what), yes in said.items() if what == "80") else str(said)

    assert (problem := product.poll(closed, SECONDS)) is None, problem


def hostd(node: Node) -> int:
    return int(node.run(["systemctl", "show", "-P", "MainPID", "slash32-hostd"]).stdout)


@contextmanager
def stopped(node: Node) -> Iterator[None]:
    """hostd holds still (shorter than its watchdog's patience)."""
    pid = hostd(node)
    node.run(["kill", "-STOP", str(pid)])
    try:
        yield
    finally:
        node.run(["kill", "-CONT", str(pid)])


@pytest.mark.parametrize("kind", [ROUTES, LINKS, RULES], ids=["routes", "links", "rules"])
def test_what_is_broken_is_healed(scene: Scene, kind: list[Damage]) -> None:
    before = scene.snapshot()
    pid = hostd(scene.node)
    for name, script in kind:
        with stopped(scene.node):
            scene.damage(script)
            assert scene.snapshot() != before, f"control: {name}: the damage does nothing"
        scene.healed(before, f"{name}, heard of late")
        scene.damage(script)
        scene.healed(before, name)
    assert hostd(scene.node) == pid, "it was hostd that healed, not its restart"
    made_open(scene)


def test_a_link_that_was_down_has_its_routes_when_it_is_up(scene: Scene) -> None:
    """Down is somebody's word and stays."""
    before = scene.snapshot()
    scene.damage("ip link set $TAP down")
    assert "state DOWN" in "\n".join(scene.snapshot())
    scene.damage("ip link set $TAP up")
    scene.healed(before, "up again")


def test_who_replaces_a_route_again_and_again_is_reported(scene: Scene) -> None:
    """No race between two programs: after the first time it is taken back with the retries."""
    before = scene.snapshot()
    insist = f"{scene.words}; while ip route replace $A4/32 dev lo; do :; done"
    writes = scene.writes
    insistent = scene.node.popen(["bash", "-c", insist])

    def silent() -> str | None:
        said = scene.node.run(["slash32-hostd", "status"], check=False).stdout
        return None if f"route {scene.a.address4}/32" in said else said

    try:
        assert (problem := product.poll(silent, SECONDS)) is None, problem
    finally:
        insistent.kill()
        insistent.communicate()
    scene.healed(before, "taken back in the end")
    assert scene.writes - writes < 20, "no race"


# ---- what a flush lets through ------------------------------------------------------------------------------------


class Leak(NamedTuple):
    """Packets of the flood that reached the guest, by their time; and when the flush began and was over."""

    times: list[float]
    began: float
    ended: float

    @property
    def after(self) -> list[float]:
        """Seconds from the flush's begin."""
        return [at - self.began for at in self.times]

    def __str__(self) -> str:
        last = f"the last {1e3 * max(self.after):.1f} ms after the flush began" if self.times else "none"
        return f"{len(self.times)} leaked, {last} (it took {1e3 * (self.ended - self.began):.1f} ms)"


class Flood:
    """a knocks at a UDP port of b, by v4 and v6, and b's own interface is watched."""

    def __init__(self, scene: Scene, port: int = CLOSED) -> None:
        self.scene, self.node = scene, scene.node
        mac = self.node.read(f"/sys/class/net/{scene.a.tap}/address").strip()
        pairs = [(scene.a.address4, scene.b.address4), (scene.a.address6, scene.b.address6)]
        self.frames = [packets.udp(mac, scene.a.mac, *pair, port) for pair in pairs]
        self.counter = f"/sys/class/net/{scene.a.tap}/statistics/rx_packets"

    def __enter__(self) -> Flood:
        child = f"$(cat /proc/$(cat /run/libvirt/lxc/{self.scene.b.name}.pid)/task/*/children | cut -d' ' -f1)"
        dump = f"tcpdump -i eth0 -n -tt -l -Q in udp > {CAPTURE} 2> {CAPTURE}.err"
        self.capture = self.node.popen(["sh", "-c", f": > {CAPTURE}.err; exec nsenter -t {child} -n -- {dump}"])
        flood = f"frames flood 60 {' '.join(self.frames)} > /dev/null 2>&1 & echo $!"
        watches = self.wait(lambda: "listening" in self.node.sh(f"cat {CAPTURE}.err || :"))
        assert watches, self.node.read(f"{CAPTURE}.err")
        self.pid = self.scene.a.run("sh", "-c", flood).strip()
        self.began, self.first = time.monotonic(), self.knocks()
        return self

    def __exit__(self, *_: object) -> None:
        self.scene.a.run("kill", self.pid, check=False)
        self.capture.kill()
        self.capture.communicate()
        self.node.sh(f"rm {CAPTURE} {CAPTURE}.err")

    @staticmethod
    def wait(condition: Callable[[], bool]) -> bool:
        return product.poll(lambda: None if condition() else "not yet", SECONDS) is None

    def knocks(self) -> int:
        return int(self.node.read(self.counter))

    def more(self, count: int = RATE) -> None:
        """Until so many more packets have knocked."""
        enough = self.knocks() + count
        assert self.wait(lambda: self.knocks() >= enough), "the flood is over"

    def rate(self) -> float:
        return (self.knocks() - self.first) / (time.monotonic() - self.began)

    def arrived(self, since: float = 0.0) -> list[float]:
        times = (float(line.split()[0]) for line in self.node.read(CAPTURE).splitlines() if " IP" in line)
        return [at for at in times if at >= since]

    def flush(self) -> tuple[float, float]:
        """A third party's `nft flush ruleset`; between when and when."""
        began, ended = self.node.run(["python3", "-c", FLUSH]).stdout.split()
        return float(began), float(ended)


@pytest.fixture
def tracked(scene: Scene) -> Iterator[None]:
    """Somebody else's rules keep connection tracking at work, also when all of nf_tables is gone."""
    rule = "iptables-legacy -t nat {} POSTROUTING -s 192.0.2.0/24 -j MASQUERADE"
    scene.node.sh(rule.format("-A"))
    yield
    scene.node.sh(rule.format("-D"))


@pytest.mark.usefixtures("tracked")
@pytest.mark.parametrize("port", [CLOSED, ECHO], ids=["closed", "answered"])
def test_what_a_flush_lets_through(scene: Scene, port: int) -> None:
    before = scene.snapshot()
    leaks: list[Leak] = []
    with Flood(scene, port) as flood:
        flood.more()
        assert flood.arrived() == [], "closed, as long as nobody flushes"
        while len(leaks) < TRIALS or (median(leaks) > BAR and len(leaks) < ROUNDS * TRIALS):
            began, ended = flood.flush()
            scene.healed(before, "flushed")
            healed = time.time()
            flood.more()
            leaks.append(Leak(flood.arrived(since=began), began, ended))
            assert max(leaks[-1].times, default=0.0) < healed, "what leaked goes on"
        assert flood.rate() >= RATE
    print(*leaks, sep="\n")
    assert median(leaks) <= BAR, [str(leak) for leak in leaks]


def median(leaks: list[Leak]) -> float:
    """Of the times of the last packets: a machine that is busy with other things is late now and then."""
    return statistics.median(max(leak.after, default=0.0) for leak in leaks)


@pytest.mark.usefixtures("tracked")
def test_control_without_hostd_a_flush_lets_everything_through(scene: Scene) -> None:
    before = scene.snapshot()
    with Flood(scene) as flood:
        with stopped(scene.node):
            began, _ = flood.flush()
            assert flood.wait(lambda: len(flood.arrived(since=began + 2 * BAR)) > 100), "the capture sees leaks"
        scene.healed(before, "hostd goes on")
        healed = time.time()
        flood.more()
        assert flood.arrived(since=healed) == []


@pytest.mark.usefixtures("tracked")
def test_a_flow_that_leaked_and_was_answered_ends_with_the_leak(scene: Scene) -> None:
    """The answers made it a flow of conntrack's, established."""
    before = scene.snapshot()
    answers = f"conntrack -L -p udp --dport {ECHO} 2>/dev/null | grep -cv UNREPLIED || :"
    with Flood(scene, ECHO) as flood:
        with stopped(scene.node):
            began, _ = flood.flush()
            assert flood.wait(lambda: len(flood.arrived(since=began + 2 * BAR)) > 100)
            assert int(scene.node.sh(answers)) > 0, "control: it is"
        scene.healed(before, "hostd goes on")
        healed = time.time()
        flood.more()
        assert flood.arrived(since=healed) == []


@pytest.fixture
def owner(scene: Scene) -> Iterator[None]:
    """hostd owns its tables. (What it finds owned it goes on owning, unless told not to.)"""
    path = "/etc/slash32/hostd.toml"
    config = scene.node.read(path)

    def own(word: str) -> None:
        scene.node.write(path, f'{config}table_owner = "{word}"\n')
        product.restart(scene.node, "slash32-hostd")
        product.wait_in_sync(scene.site.rack, [scene.node], SECONDS)
        product.wait_connected(scene.node, scene.a.name, scene.b.name)
        made_open(scene)

    own("yes")
    yield
    own("no")
    scene.node.write(path, config)
    product.restart(scene.node, "slash32-hostd")


@pytest.mark.usefixtures("owner", "tracked")
def test_an_owned_table_is_not_flushed(scene: Scene) -> None:
    before = scene.snapshot()
    with Flood(scene) as flood:
        scene.node.sh("nft add table inet witness")
        for _ in range(TRIALS):
            flood.flush()
        flood.more()
        assert "witness" not in scene.node.sh("nft list tables"), "control: the flush happened"
        assert flood.arrived() == []
    assert scene.snapshot() == before
    made_open(scene)


@pytest.mark.usefixtures("tracked")
@pytest.mark.parametrize("verb", ["reload", "restart"])
def test_nftables_service_brings_the_guard_back(scene: Scene, verb: str) -> None:
    """hostd is dead: the unit's tie does it. Then nobody is known, and everybody isolated."""
    before, node = scene.snapshot(), scene.node
    assert "flush ruleset" in node.read("/etc/nftables.conf"), "Debian's own"
    node.sh("systemctl stop slash32-hostd; systemctl enable --now nftables")
    try:
        with Flood(scene) as flood:
            node.sh(f"nft add table inet witness; systemctl {verb} nftables")
            done = time.time()
            tables = node.sh("nft list tables")
            flood.more()
            print(f"{verb}: {len(flood.arrived())} leaked before it returned")
            assert flood.arrived(since=done) == []
        assert "witness" not in tables and "table inet filter" in tables, "control: the flush happened"
        assert {"table inet slash32", "table arp slash32"} <= set(tables.splitlines())
        assert not any(scene.a.probe(scene.b, scene.far, ms=200).values())
    finally:
        node.sh("systemctl disable --now nftables; systemctl start slash32-hostd")
    scene.healed(before, "hostd is back")
    made_open(scene)
