# Nothing of an open flow is lost whatever is restarted, and a resync that finds nothing to do writes nothing. Numbered
# datagrams and TCP lines run through every event, on one host and between two, by v4 and v6; each one is counted.
from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest
from deployed import Guest, Site

from lab import product
from lab.matrix import at_once
from lab.node import Node

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a rack needs root")

SECONDS = 60.0
RATE = 100  # datagrams per second and flow
LIMIT = "100"  # seconds after which a flow ends if nobody stops it
FIRST_PORT = 6000
POLICY = """
apiVersion: slash32/v1
kind: GlobalNetworkPolicy
metadata: {name: hitless}
spec:
  selector: role == "flow"
  types: [Ingress, Egress]
  ingress: [{action: Allow, source: {selector: role == "flow"}}]
  egress: [{action: Allow, destination: {selector: role == "flow"}}]
"""


class Way(NamedTuple):
    """A flow from one guest to another."""

    source: Guest
    target: Guest
    version: int
    kind: str  # udp | tcp

    @property
    def address(self) -> str:
        return self.target.address4 if self.version == 4 else self.target.address6

    def __str__(self) -> str:
        where = "one host" if self.source.node is self.target.node else "two hosts"
        return f"{self.kind} {self.source.name} -> {self.target.name} by v{self.version} ({where})"


def background(guest: Guest, out: str, *argv: str) -> str:
    """Start a command in a guest; its pid there."""
    command = f"rm -f {out}; {' '.join(argv)} > {out} 2>&1 < /dev/null & echo $!"
    return guest.run("sh", "-c", command).strip()


def ended(guest: Guest, out: str, pid: str) -> str:
    """What it said when it was asked to end."""
    script = (
        f"kill -TERM {pid}; n=0; until grep -q . {out} || [ $n -gt 500 ]; do usleep 20000; n=$((n+1)); done; cat {out}"
    )
    return guest.run("sh", "-c", script)


@dataclass
class Flow:
    """Running from its making until end()."""

    way: Way
    number: int
    pids: list[tuple[Guest, str, str]] = field(default_factory=list)

    def start(self) -> Flow:
        port, way, out = str(FIRST_PORT + self.number), self.way, f"/tmp/flow-{self.number}"
        if way.kind == "tcp":
            argv = ["stream", "tcp", way.address, "5432", LIMIT, str(1000 // RATE)]
            self.pids = [(way.source, out, background(way.source, out, *argv))]
            return self
        receiver = background(way.target, f"{out}-in", "stream", "recv", port, LIMIT)
        way.target.run("sh", "-c", f"until grep -q :{int(port):04X} /proc/net/udp6; do usleep 10000; done")
        sender = background(way.source, out, "stream", "send", way.address, port, str(RATE), LIMIT)
        self.pids = [(way.source, out, sender), (way.target, f"{out}-in", receiver)]
        return self

    def end(self) -> tuple[int, int]:
        """(sent, arrived): UDP at the other end, TCP there and back."""
        said = " ".join(ended(*each) for each in self.pids)
        assert "broken yes" not in said, f"{self.way}: {said}"
        found = {key: int(value) for key, value in re.findall(r"(sent|received|echoed) (\d+)", said)}
        assert len(found) == 2, f"{self.way}: {said}"
        print(self.way, said.split())
        return found["sent"], found.get("received", found.get("echoed", 0))


@dataclass(frozen=True)
class Scene:
    site: Site
    a: Guest
    b: Guest
    far: Guest
    machine: Guest

    def ways(self) -> list[Way]:
        here = [Way(self.a, self.b, v, kind) for v in (4, 6) for kind in ("udp", "tcp")]
        there = [Way(self.a, self.far, v, kind) for v in (4, 6) for kind in ("udp", "tcp")]
        back = [Way(self.far, self.b, 4, "udp"), Way(self.far, self.b, 6, "tcp")]
        virtual = [Way(self.a, self.machine, 4, "udp"), Way(self.far, self.machine, 6, "tcp")]
        return here + there + back + virtual

    def retransmitted(self) -> int:
        """TCP segments that the containers sent twice."""
        total = 0
        for guest in (self.a, self.b, self.far):
            names, values = (line.split() for line in guest.run("grep", "^Tcp:", "/proc/net/snmp").splitlines())
            total += int(values[names.index("RetransSegs")])
        return total

    def carried(self) -> None:
        """Wait for half a second's packets from each container."""
        counters = [(g.node, f"/sys/class/net/{g.tap}/statistics/rx_packets") for g in (self.a, self.b, self.far)]
        before = [int(node.read(path)) for node, path in counters]

        def few() -> str | None:
            more = [int(node.read(path)) - was for (node, path), was in zip(counters, before, strict=True)]
            return None if min(more) >= RATE // 2 and more[0] >= 3 * RATE else str(more)

        assert (problem := product.poll(few, SECONDS)) is None, problem

    def quiet(self) -> None:
        """Everything is as it should be again."""
        product.wait_in_sync(self.site.rack, seconds=SECONDS)
        for guest in (self.a, self.b, self.far, self.machine):
            product.wait_connected(guest.node, guest.name, seconds=SECONDS)


@pytest.fixture(scope="module")
def scene(site: Site) -> Iterator[Scene]:
    with site.scope():
        site.apply(POLICY)
        a, b, far = site.guest(site.h1, "flow"), site.guest(site.h1, "flow"), site.guest(site.h2, "flow")
        machine = site.guest(site.h1, "flow", "qemu")
        site.start(a, b, far, machine, seconds=SECONDS)
        yield Scene(site, a, b, far, machine)


@contextmanager
def flows(scene: Scene) -> Iterator[dict[Way, tuple[int, int]]]:
    """All ways at work in the body; what became of them is in the dictionary afterwards."""
    running = at_once(Flow.start, [Flow(way, number) for number, way in enumerate(scene.ways())])
    counts: dict[Way, tuple[int, int]] = {}
    try:
        yield counts
    finally:
        results = at_once(Flow.end, running)
        counts.update(zip((flow.way for flow in running), results, strict=True))


def both(scene: Scene, script: str) -> None:
    at_once(lambda node: node.sh(script, timeout=180), scene.site.rack.hosts)


def main_pid(node: Node, unit: str) -> str:
    return node.sh(f"systemctl show -P MainPID {unit}").strip()


def restart_hostd(scene: Scene) -> None:
    both(scene, "systemctl restart slash32-hostd")


def kill_hostd(scene: Scene) -> None:
    """systemd starts it again."""
    old = [main_pid(node, "slash32-hostd") for node in scene.site.rack.hosts]
    both(scene, "systemctl kill -s KILL slash32-hostd")

    def same() -> str | None:
        now = [main_pid(node, "slash32-hostd") for node in scene.site.rack.hosts]
        return None if all(pid not in ("0", was) for pid, was in zip(now, old, strict=True)) else str(now)

    assert (problem := product.poll(same, SECONDS)) is None, problem


def restart_dispatcher(scene: Scene) -> None:
    scene.site.d1.sh("systemctl restart slash32-dispatcher")


def kill_dispatcher(scene: Scene) -> None:
    scene.site.d1.sh("systemctl kill -s KILL slash32-dispatcher; systemctl restart slash32-dispatcher")


def restart_libvirtd(scene: Scene) -> None:
    both(scene, "systemctl restart libvirtd")


def reload_libvirtd(scene: Scene) -> None:
    both(scene, "systemctl reload libvirtd")


EVENTS: list[tuple[Callable[[Scene], None], str, bool]] = [
    (restart_hostd, "slash32-hostd", True),
    (kill_hostd, "slash32-hostd", True),
    (restart_dispatcher, "slash32-dispatcher", True),
    (kill_dispatcher, "slash32-dispatcher", True),
    (restart_libvirtd, "libvirtd", True),
    (reload_libvirtd, "libvirtd", False),
]


def complete(counts: dict[Way, tuple[int, int]]) -> None:
    lost = {str(way): (sent, arrived) for way, (sent, arrived) in counts.items() if sent != arrived}
    assert not lost
    assert all(sent > RATE // 2 for sent, _ in counts.values()), {str(way): each for way, each in counts.items()}
    print(f"{sum(sent for sent, _ in counts.values())} packets and lines in {len(counts)} flows, none lost")


@pytest.mark.parametrize(("event", "unit", "new"), EVENTS, ids=[event.__name__ for event, _, _ in EVENTS])
def test_nothing_is_lost(scene: Scene, event: Callable[[Scene], None], unit: str, new: bool) -> None:
    node = scene.site.d1 if unit == "slash32-dispatcher" else scene.site.h1
    before = main_pid(node, unit)
    retransmitted = scene.retransmitted()
    with flows(scene) as counts:
        scene.carried()
        event(scene)
        scene.quiet()
        scene.carried()
    assert (main_pid(node, unit) != before) is new, "control: it happened"
    complete(counts)
    assert scene.retransmitted() == retransmitted


def test_control_a_lost_packet_is_counted(scene: Scene) -> None:
    """A cable is out for a moment: only what goes between the hosts suffers."""
    with flows(scene) as counts:
        scene.carried()
        path = f"/sys/class/net/{scene.a.tap}/statistics/rx_packets"
        sent = int(scene.site.h1.read(path))
        scene.site.rack.tor.unplug("h2")
        try:
            more = product.poll(lambda: None if int(scene.site.h1.read(path)) > sent + RATE else "few", SECONDS)
        finally:
            scene.site.rack.tor.plug("h2")
        assert more is None
        scene.quiet()
    for way, (went, came) in counts.items():
        apart = way.source.node is not way.target.node
        assert went > came if apart and way.kind == "udp" else went == came, (str(way), went, came)
    assert {way.kind for way in counts} == {"tcp", "udp"}


# ---- upgrade --------------------------------------------------------------------------------------------------------


def repacked(deb: Path, folder: Path, version: str) -> Path:
    """The same files as another version."""
    tree = folder / deb.name.split("_")[0]
    subprocess.run(["dpkg-deb", "-R", deb, tree], check=True)
    control = tree / "DEBIAN/control"
    old = deb.name.split("_")[1]
    control.write_text(
        control.read_text().replace(f"Version: {old}\n", f"Version: {version}\n").replace(f"= {old})", f"= {version})")
    )
    subprocess.run(
        ["dpkg-deb", "-Zgzip", "-z1", "--root-owner-group", "-b", tree, folder], check=True, capture_output=True
    )
    return folder / f"{tree.name}_{version}_all.deb"


def install(scene: Scene, debs: list[Path]) -> None:
    """On both hosts, as dpkg does it: also a downgrade."""

    def one(node: Node) -> None:
        for deb in debs:
            node.push(deb, f"/root/debs/{deb.name}")
        node.sh(f"dpkg -i --force-confdef {' '.join(f'/root/debs/{deb.name}' for deb in debs)}", timeout=180)

    at_once(one, scene.site.rack.hosts)


def test_nothing_is_lost_in_an_upgrade_and_back(scene: Scene, tmp_path: Path) -> None:
    old = product.debs().on_hosts
    new = [repacked(deb, tmp_path, "99.0") for deb in old]
    version = "dpkg-query -W -f '${Version}' slash32-hostd"
    before = scene.site.h1.sh(version), main_pid(scene.site.h1, "libvirtd")
    pids = [main_pid(scene.site.h1, "slash32-hostd")]
    with flows(scene) as counts:
        for debs in (new, old):
            install(scene, debs)
            assert scene.site.h1.sh(version) == debs[0].name.split("_")[1]
            pids.append(main_pid(scene.site.h1, "slash32-hostd"))
            scene.quiet()
        scene.carried()
    assert len(set(pids)) == 3, "new code runs each time"
    assert (scene.site.h1.sh(version), main_pid(scene.site.h1, "libvirtd")) == before
    complete(counts)


# ---- a resync that finds nothing writes nothing ---------------------------------------------------------------------


@contextmanager
def monitored(node: Node) -> Iterator[list[str]]:
    """What the kernel tells of changes, by anybody, in the body: nf_tables, and what routes and taps are made of."""
    monitors = {
        "nft": ["nft", "monitor"],
        "ip": ["stdbuf", "-oL", "ip", "monitor", "link", "address", "route", "neigh", "rule", "netconf"],
    }
    running = {
        name: node.popen(["sh", "-c", f"exec {' '.join(argv)} > /run/m-{name}"]) for name, argv in monitors.items()
    }

    def mark(word: str) -> None:
        """Both have told of everything before it: each mark is a change of its own."""
        script = f"nft 'add table inet {word}; delete table inet {word}'; ip route add 192.0.2.{len(word)} dev lo"

        def unseen() -> str | None:
            node.sh(f"{script}; ip route del 192.0.2.{len(word)} dev lo")
            texts = node.sh("cat /run/m-nft"), node.sh("cat /run/m-ip")
            return None if word in texts[0] and f"192.0.2.{len(word)}" in texts[1] else "unseen"

        assert product.poll(unseen, SECONDS) is None

    seen: list[str] = []
    try:
        mark("begin")
        yield seen
        mark("finish")
        for name in monitors:
            seen += [line for line in node.read(f"/run/m-{name}").splitlines() if telling(line)]
    finally:
        for monitor in running.values():
            monitor.kill()
            monitor.communicate()
        node.sh("rm -f /run/m-nft /run/m-ip")


def telling(line: str) -> bool:
    """Not a mark of ours, nor what the kernel does by itself: the ageing of learned neighbours."""
    marks = re.search(r"192\.0\.2\.|\b(begin|finish)\b|# new generation", line)
    learned = re.search(r"lladdr|FAILED|INCOMPLETE|PROBE|STALE|REACHABLE|DELAY", line) and "PERMANENT" not in line
    return bool(line.strip()) and not marks and not learned


@pytest.mark.parametrize("event", [restart_hostd, kill_hostd])
def test_a_restart_writes_nothing(scene: Scene, event: Callable[[Scene], None]) -> None:
    with monitored(scene.site.h1) as seen:
        event(scene)
        scene.quiet()
    counters = product.host_status(scene.site.h1)["counters"]
    assert counters["resyncs"] >= 1
    assert (counters["writes"], counters["healed"]) == (0, 0)
    assert seen == []


def test_control_a_write_is_seen(scene: Scene) -> None:
    with monitored(scene.site.h1) as seen:
        scene.site.h1.sh(f"ip route del {scene.a.address4}; nft add element inet slash32 exempt {{ lo }}")
        scene.quiet()
    text = "\n".join(seen)
    assert f"Deleted {scene.a.address4}" in text and "element inet slash32 exempt" in text


NOTHING = 'add element inet slash32 exempt { "lo" }\\n delete element inet slash32 exempt { "lo" }\\n'


def test_a_resync_of_a_settled_host_sends_no_write(scene: Scene) -> None:
    """Somebody's transaction that changes nothing after all makes hostd read everything; strace sees what it sends."""
    node = scene.site.h1
    restart_hostd(scene)
    scene.quiet()
    trace = "/run/s32-strace"
    pid = main_pid(node, "slash32-hostd")
    strace = f"exec strace -f -p {pid} -e trace=sendto,sendmsg,openat -o {trace} 2> {trace}.err"

    def sent() -> set[str]:
        return set(re.findall(r"nlmsg_type=(?:NFNL_SUBSYS_NFTABLES<<8\|)?(\w+)", node.read(trace)))

    def wait(condition: Callable[[], bool], what: str) -> None:
        assert product.poll(lambda: None if condition() else "no", SECONDS) is None, what

    def counters() -> dict[str, int]:
        found: dict[str, int] = product.host_status(node)["counters"]
        return found

    tracer = node.popen(["sh", "-c", strace])
    try:
        wait(lambda: "attached" in node.sh(f"cat {trace}.err || :"), "strace")
        resyncs = counters()["resyncs"]
        node.sh(f"printf '{NOTHING}' | nft -f -")
        wait(lambda: {"NFT_MSG_GETRULE", "RTM_GETROUTE"} <= sent(), "control: it read everything")
        wait(lambda: counters()["resyncs"] > resyncs, "and says so")
        assert counters()["writes"] == 0
        assert {kind for kind in sent() if "GET" not in kind} == set()
        assert not re.findall(r".*/proc/sys/net.*O_(?:WRONLY|RDWR).*", node.read(trace))
        node.sh("nft add element inet slash32 exempt { lo }")
        wait(lambda: "NFT_MSG_DELSETELEM" in sent(), "control: a write is seen")
        wait(lambda: counters()["writes"] > 0, "and said")
    finally:
        tracer.kill()
        tracer.communicate()
        node.sh(f"rm -f {trace} {trace}.err")
