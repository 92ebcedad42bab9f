"""The demo (make demo): slash32 at work on a rack in this machine, in seven steps, judged by packets between guests.

Owns the rack it makes (and removes, unless told to keep it) and what it prints; the guests are examples/*.xml, what is
expected of them is in examples/*.matrix, written by hand.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from lab import base, guest, matrix, product
from lab.access import guest_run, wait_guest
from lab.matrix import Guest, Matrix, at_once, background
from lab.node import Node
from lab.paths import STARTED, LabError
from lab.rack import Rack
from lab.screen import Screen

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PLACES = {"h1": ("web1", "app1", "db1"), "h2": ("db2", "web2", "app2", "stray")}
ROLES = {"web1": "web", "app1": "app", "db1": "db", "web2": "web", "app2": "app", "db2": "db", "stray": "none"}
LATE = ("h1", "app3", "app")  # started while hostd is dead
FLOW_SECONDS = 180.0  # at most: they are ended when they have shown what they are to show
FLOWS = (("app1", "db1", 4), ("app2", "db1", 4), ("app1", "db2", 6), ("app2", "db2", 6))  # all to 5432
NO_POLICY, THREE_TIER = "no-policy.matrix", "three-tier.matrix"
DROP_IN = "/run/systemd/system/{}.service.d/demo.conf"
GAP_LIMIT_MS = 1000.0  # a retransmission or two on a busy machine; a flow that was cut stays silent


class Flow(NamedTuple):
    """An open TCP connection inside a guest: a numbered line every 5 ms, echoed by the other end."""

    name: str
    result: Future[str]


class Demo:
    def __init__(self, rack: Rack, screen: Screen) -> None:
        self.rack = rack
        self.screen = screen
        self.roles = dict(ROLES)
        self.guests: dict[str, Guest] = {}
        self.before: Matrix | None = None
        self.asked = 0
        self.wrong: list[str] = []
        self.matrix_seconds = 1.5

    def run(self) -> None:
        self.one_rack()
        self.two_guests()
        self.three_closed()
        self.four_policy()
        self.five_retag()
        self.six_failures()
        self.seven_verdict()

    # ------------------------------------------------------------------ the steps

    def one_rack(self) -> None:
        self.screen.step(1, "A rack: top-of-rack router, two hypervisors (Debian, systemd, libvirtd), one dispatcher")
        self.rack.up()
        with self.screen.waiting("for the hosts to be in sync with the dispatcher"):
            product.deploy(self.rack)
        self.screen.line("slash32: keys exchanged, hosts admitted; h1 and h2 are in sync with d1")
        self.screen.line(", ".join(f"{node.name} filters packets by {packet_filter(node)}" for node in self.rack.hosts))

    def two_guests(self) -> None:
        self.screen.step(2, "Guests: a virtual machine and two containers on each host, and one that nobody tagged")
        self.screen.line("virsh define, virsh start: " + " ".join(ROLES))
        began = time.monotonic()
        with self.screen.waiting("for the guests to boot"):
            places = [(node, name) for node, names in PLACES.items() for name in names]
            at_once(lambda place: self.start(*place), places)
        with self.screen.waiting("for hostd to open the tagged guests' endpoints"):
            for node, names in PLACES.items():
                product.wait_connected(self.rack.node(node), *(name for name in names if ROLES[name] != "none"))
        self.screen.line(f"all {len(ROLES)} are up after {time.monotonic() - began:.1f} s")
        self.screen.block([self.described(name) for name in ROLES])

    def three_closed(self) -> None:
        self.screen.step(3, "No policy: everything is closed")
        self.check(NO_POLICY, legend=True)

    def four_policy(self) -> None:
        self.screen.step(4, "slash32 apply -f examples/three-tier.yaml --wait")
        for line in product.apply(self.rack, EXAMPLES / "three-tier.yaml").strip().splitlines():
            self.screen.line(line, "1")
        self.check(THREE_TIER)

    def five_retag(self) -> None:
        self.screen.step(5, "virsh metadata turns the running web1 from a web server into a database")
        with background() as pool:
            through = pool.submit(self.until_open, "app1", "web1")
            began = time.monotonic()
            self.retag("web1", "db")
            said = time.monotonic()
            opened = through.result()
        took = f"virsh took {ms(said - began)}; {ms(opened - began)} after its start"
        self.screen.line(f"{took} app1 got through to web1's port 5432")
        self.roles["web1"] = "db"
        self.check(THREE_TIER)

    def six_failures(self) -> None:
        self.screen.step(6, "hostd killed, then the dispatcher, while TCP flows go on")
        with background() as pool:
            flows = self.open_flows(pool, FLOW_SECONDS)
            self.hostd_killed(pool)
            self.dispatcher_killed()
            self.judge(flows)

    def hostd_killed(self, pool: ThreadPoolExecutor) -> None:
        host, name, role = LATE
        node = self.rack.node(host)
        kill(node, "slash32-hostd")
        self.screen.line(f"kill -9: hostd on {host} is dead, and systemd may not restart it")
        self.start(host, name)
        self.screen.line(f"virsh start {name}: it runs, but nobody could tell hostd, so it must be isolated")
        self.roles[name] = "none"
        self.check(THREE_TIER)
        began = time.monotonic()
        through = pool.submit(self.until_open, name, "db1")
        revive(node, "slash32-hostd")
        took = through.result() - began
        self.screen.line(f"hostd is started again: {ms(took)} later {name} got through to db1's port 5432")
        self.roles[name] = role
        product.wait_in_sync(self.rack)
        self.check(THREE_TIER)

    def dispatcher_killed(self) -> None:
        node = product.dispatcher_of(self.rack)
        kill(node, "slash32-dispatcher")
        self.screen.line("kill -9: the dispatcher is dead")
        self.check(THREE_TIER)
        revive(node, "slash32-dispatcher")
        with self.screen.waiting("for the hosts to be in sync with the dispatcher again"):
            product.wait_in_sync(self.rack)
        self.screen.line("the dispatcher is started again, h1 and h2 are in sync with it")

    def seven_verdict(self) -> None:
        self.screen.step(7, "The verdict")
        if self.wrong:
            self.screen.bad(f"{len(self.wrong)} of {self.asked} observations were not as expected:")
            self.screen.block(self.wrong)
        else:
            self.screen.good(f"all {self.asked} observations were as expected, in {time.monotonic() - STARTED:.1f} s")

    # ------------------------------------------------------------------ what they are made of

    def start(self, host: str, name: str) -> None:
        """virsh define, virsh start; returns when the guest's servers listen."""
        node = self.rack.node(host)
        xml = (EXAMPLES / f"{name}.xml").read_text()
        product.start(node, xml)
        wait_guest(node, name)
        four, six = (found[1] for found in re.finditer(r"s32\.addr6?=([0-9a-f.:]+)", xml))
        self.guests[name] = Guest(name, node, four, six)

    def described(self, name: str) -> str:
        one = self.guests[name]
        driver = product.driver_of((EXAMPLES / f"{name}.xml").read_text())
        kind = "container" if driver == "lxc" else "virtual machine"
        role = "no tag" if ROLES[name] == "none" else f"role {ROLES[name]}"
        return f"{one.node.name}  {name:<6} {kind:<16} {role:<9} {one.address4:<12} {one.address6}"

    def check(self, file: str, legend: bool = False) -> None:
        """All pairs, asked by packets, against a matrix written by hand."""
        began = time.monotonic()
        wanted = matrix.expected(matrix.read(EXAMPLES / file), self.roles)
        with self.screen.waiting("for the guests' probes"):
            observed = matrix.observe([self.guests[name] for name in self.roles])
        self.matrix_seconds = time.monotonic() - began
        complaints = matrix.complaints(wanted, observed)
        total = len(wanted.cells())
        text = f"{total - len(complaints)} of {total} as written in examples/{file}, {self.matrix_seconds:.1f} s"
        if observed == self.before and not complaints:
            text += "; not one has changed"
        else:
            self.screen.block(matrix.render(observed, wanted, self.before, self.screen.color))
        if legend:
            self.screen.block([matrix.LEGEND])
        if complaints:
            self.screen.bad(text)
            self.screen.block(complaints)
        else:
            self.screen.good(text)
        self.asked += total
        self.wrong += complaints
        self.before = observed

    def until_open(self, source: str, target: str, port: int = 5432, seconds: int = 15) -> float:
        """When SOURCE first got through to TARGET, asking every 20 ms."""
        one = self.guests[source]
        loop = f"until probe -t 20 -p {port} {self.guests[target].address4} | grep -q '{port} yes'; do :; done"
        try:
            guest_run(one.node, source, ["timeout", str(seconds), "sh", "-c", loop], timeout=seconds + 5)
        except LabError:
            tail = product.journal_tail(one.node)
            raise LabError(f"{source} did not get through to {target} tcp/{port} in {seconds} s; {tail}") from None
        return time.monotonic()

    def retag(self, name: str, role: str) -> None:
        xml = (EXAMPLES / f"{name}.xml").read_text()
        tag = re.search(r"<slash32:endpoint.*</slash32:endpoint>", xml, re.S)
        assert tag, name
        text = re.sub(r'key="role" value="\w+"', f'key="role" value="{role}"', tag[0])
        text = re.sub(r"<!--.*?-->|xmlns:slash32=\S+?(?=>)|(?<=</)slash32:|(?<=<)slash32:", "", text, flags=re.S)
        text = re.sub(r"\s+(?=[<>])", "", text)
        words = ["--uri", "urn:slash32:domain:1", "--key", "slash32", "--live", "--config", "--set", text]
        product.virsh(self.guests[name].node, product.driver_of(xml), "metadata", name, *words)

    def open_flows(self, pool: ThreadPoolExecutor, seconds: float) -> list[Flow]:
        flows = []
        for source, target, family in FLOWS:
            one, other = self.guests[source], self.guests[target]
            address = other.address4 if family == 4 else other.address6
            argv = ["stream", "tcp", address, "5432", f"{seconds:.1f}"]
            future = pool.submit(guest_run, one.node, source, argv, check=False, timeout=seconds + 10)
            flows.append(Flow(f"{source} -> {target} tcp/5432 by IPv{family}", future))
        self.screen.line(f"{len(flows)} TCP flows are open, each with a line every 5 ms:")
        self.screen.block([flow.name for flow in flows])
        return flows

    def judge(self, flows: Sequence[Flow]) -> None:
        """End the flows: none may have noticed anything."""
        early = [flow.name for flow in flows if flow.result.done()]
        for source in {source for source, _, _ in FLOWS}:
            guest_run(self.guests[source].node, source, ["sh", "-c", "kill -TERM $(pidof stream)"], check=False)
        with self.screen.waiting("for the flows to end"):
            said = {flow.name: flow.result.result() for flow in flows}
        self.asked += len(flows)
        wrong, gaps = [], [0.0]
        for name, text in said.items():
            found = re.fullmatch(r"sent (\d+) echoed (\d+) longest_gap_ms ([\d.]+) broken (yes|no)\s*", text)
            gaps.append(float(found[3]) if found else 0.0)
            if not found or found[4] == "yes" or int(found[1]) - int(found[2]) > 5 or gaps[-1] > GAP_LIMIT_MS:
                wrong.append(f"flow {name}: {text.strip() or 'did not open'}")
            elif name in early:
                wrong.append(f"flow {name}: over before the dispatcher was back: this machine is too slow to tell")
        self.wrong += wrong
        if wrong:
            self.screen.bad("the flows did not go on")
            self.screen.block(wrong)
        else:
            self.screen.good(f"all {len(flows)} flows went on the whole time, longest silence {max(gaps):.0f} ms")


def packet_filter(node: Node) -> str:
    return {"nftables": "nf_tables", "iptables": "iptables-legacy"}[product.host_status(node)["packet_filter"]]


def ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


def kill(node: Node, unit: str) -> None:
    """kill -9 for all of the unit's processes; a drop-in keeps systemd from starting it again."""
    node.write(DROP_IN.format(unit), "[Service]\nRestart=no\n")
    node.sh(f"systemctl daemon-reload; systemctl kill -s KILL {unit}")

    def alive() -> str | None:
        state = node.run(["systemctl", "show", "-P", "ActiveState", unit]).stdout.strip()
        return None if state == "failed" else state

    if state := product.poll(alive, 5):
        raise LabError(f"{node.name}: {unit} is '{state}' after kill -9")


def revive(node: Node, unit: str) -> None:
    node.sh(f"rm {DROP_IN.format(unit)}; systemctl daemon-reload; systemctl start {unit}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("lab.demo", description="slash32 at work on a rack in this machine.")
    parser.add_argument("--keep", action="store_true", help="leave the rack up at the end (make demo KEEP=1)")
    parser.add_argument("--name", default="lab", help="name of the rack; one of this name that is up is replaced")
    legacy = "these have iptables-legacy, the others nf_tables (default: h2; make demo LEGACY='h1 h2', LEGACY=none)"
    parser.add_argument("--legacy", nargs="*", default=["h2"], choices=sorted(PLACES), metavar="HOST", help=legacy)
    options = parser.parse_args(argv)
    if os.geteuid() != 0:
        print("demo: run as root: it makes namespaces and mounts", file=sys.stderr)
        return 1
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    return perform(options.name, options.keep, options.legacy)


def perform(name: str, keep: bool, legacy: Sequence[str] = ()) -> int:
    screen = Screen()
    print(screen.paint("slash32: routed guests behind a label firewall, shown on two hypervisors in this machine", "1"))
    rack: Rack | None = None
    status = 1
    try:
        screen.line("packages (a fresh checkout: about ten seconds)")
        prepared = [base.root(), guest.layer()]
        rack = product.new_rack(name, tied=not keep, legacy=legacy)
        screen.line(f"ready: {' '.join(path.name for path in prepared)}", "2")
        demo = Demo(rack, screen)
        demo.run()
        status = 1 if demo.wrong else 0
    except LabError as error:
        screen.bad(f"failed: {error}")
    except KeyboardInterrupt:
        screen.bad("interrupted")
        status, keep = 130, False
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # the clean-up is not to be interrupted
        if rack is not None and not keep:
            rack.down()
            screen.line("everything is removed")
    if keep and rack is not None:
        screen.block(["", *look_around(name)])
    return status


def look_around(name: str) -> list[str]:
    rack = "lab/rack" if name == "lab" else f"lab/rack --name {name}"
    return [
        "The rack is still up. To look around:",
        f"  {rack} exec h1 -- virsh list                          virtual machines (containers: virsh -c lxc:/// list)",
        f"  {rack} exec h1 -- slash32-hostd status                what hostd holds",
        f"  {rack} exec h1 -- nft list table inet slash32         what the kernel enforces",
        f"  {rack} exec h2 -- iptables-legacy-save -t security    the same, on a host of the other kind",
        f"  {rack} exec d1 -- slash32 explain app1 db2 tcp/5432   why: by the model, and by both kernels",
        f"  {rack} exec d1 -- slash32 get endpoints               the fleet, as the dispatcher knows it",
        f"  {rack} guest h1 app1 -- probe 10.65.0.13              packets from inside a guest",
        f"  {rack} logs h1 slash32-hostd",
        f"  {rack} down                                           when you are done",
    ]


def interrupt(number: int, frame: FrameType | None) -> None:
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
