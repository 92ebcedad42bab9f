# Measures the real dispatcher process (store on disk, CURVE) with simulated hosts (bench.crowd): a change until the
# last host that it concerns has acknowledged it, as who made it sees it; all hosts back after kill -9, with what they
# had and with their whole snapshot to fetch; CPU per acknowledged delivery; memory. Beside each, in the same run: a
# bare pyzmq ROUTER (bench.bare) that sends the same frames to the same hosts. Bars, where there are 1,000 hosts: 1.3
# times the bare loop, 15 us per delivery in a burst, storms of snapshots 1.5 times with 1 GB at most; and with any
# number of hosts not one message to a host that a change does not concern. Dispatcher and bare ROUTER run on the first
# core, hosts on the others.
#   python -m bench.fanout [--json] [-n N] [--storms N] [--hosts 10,100,1000] [--endpoints 1000,10000,60000]
from __future__ import annotations

import argparse
import random
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

from bench.bare import Message
from bench.measure import Report, Stats, stats
from bench.served import EVERYBODY, FEW, SHARED, Fleet, cpu_seconds
from bench.stage import Found, Stage
from slash32.wire import Tag

KINDS = ("membership", "policy", "1 % of hosts")
LIMIT = 15e-6  # seconds of CPU per delivery
MOST = 1 << 30  # bytes at the peak of a storm
BARRED = 1000  # hosts from which on the bars hold
BURST, GAP = 40, 0.005  # changes of a burst, seconds between two
SLOW = 5  # rounds per burst


class Changes:
    """Changes, one at a time and many, each followed by the same messages from the bare ROUTER."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.fleet, self.found = stage, stage.fleet, stage.found
        self.grouped: dict[int, bool] = {}
        self.port = 1000

    def run(self, n: int) -> None:
        self.stage.all("pair")
        self.stage.collect()  # what the storms brought is no part of this
        cases = [(kind, prompt) for kind in KINDS for prompt in (False, True)]
        for number in range(n + 1):
            random.shuffle(cases)
            for kind, prompt in cases:
                self.one(kind, prompt, kept=number > 0)
            if number % SLOW == 0:
                self.burst()
        self.stage.collect()
        bad = [name for names in self.stage.all("check") for name in names]
        if bad:
            raise RuntimeError(f"{len(bad)} hosts are not where the dispatcher is: {bad[:5]}")

    def one(self, kind: str, prompt: bool, kept: bool) -> None:
        dispatcher = self.stage.dispatcher
        self.stage.all("begin", prompt)
        concerned = self.fleet.few if kind == KINDS[2] else range(self.fleet.hosts)
        used = cpu_seconds(dispatcher.pid)
        begun, revision = self.relabel() if kind == KINDS[0] else self.repolicy(FEW if kind == KINDS[2] else EVERYBODY)
        progress = dispatcher.wait(revision)
        took, used = time.monotonic() - begun, cpu_seconds(dispatcher.pid) - used
        told = self.stage.collect()
        self.look(told, concerned)
        bare_took, bare_used = self.stage.send_bare(told)
        if not kept:
            return
        name, seconds = kind + ", prompt hosts" * prompt, self.found.seconds
        seconds[name].append(took)
        seconds[f"{name}, its own figure"].append(float(progress["milliseconds"]) / 1000)
        seconds[f"{name}, bare"].append(bare_took)
        if kind != KINDS[2]:
            seconds["CPU per delivery, alone"].append(used / len(concerned))
            seconds["CPU per delivery, alone, bare"].append(bare_used / len(concerned))

    def burst(self) -> None:
        """Guests join and leave faster than all hosts acknowledge: deliveries overlap, and what waits is merged."""
        dispatcher = self.stage.dispatcher
        self.stage.all("begin", True)
        begun, used = time.monotonic(), cpu_seconds(dispatcher.pid)
        for _ in range(BURST):
            host, number, grouped = self.pick()
            self.stage.crowd_of[host].pipe.send(("claim_too", host, number, grouped))
            time.sleep(GAP)
        self.stage.all("claims_answered")
        dispatcher.wait(int(dispatcher.call("GET", "/v1/status")["revision"]))
        took, used = time.monotonic() - begun, cpu_seconds(dispatcher.pid) - used
        told = self.stage.collect()
        _, bare_used = self.stage.send_bare(told)
        deliveries, seconds = sum(map(len, told.values())), self.found.seconds
        seconds["burst"].append(took)
        seconds["CPU per delivery, burst"].append(used / deliveries)
        seconds["CPU per delivery, burst, bare"].append(bare_used / deliveries)
        seconds["CPU per change and host, burst"].append(used / BURST / self.fleet.hosts)

    def pick(self) -> tuple[int, int, bool]:
        """A guest that joins the group that all hosts know, or leaves it; before it, its host."""
        number = random.randrange(self.fleet.endpoints)
        grouped = not self.grouped.get(number, number % SHARED == 0)
        self.grouped[number] = grouped
        return number % self.fleet.hosts, number, grouped

    def relabel(self) -> tuple[float, int]:
        """When its host said so, and the revision."""
        host, number, grouped = self.pick()
        peer = self.stage.crowd_of[host]
        return peer.ask("claim", host, number, grouped), int(peer.hear())

    def repolicy(self, name: str) -> tuple[float, int]:
        self.port += 1
        document, begun = self.fleet.policy(name, self.port), time.monotonic()
        return begun, self.stage.dispatcher.apply([document])

    def look(self, told: dict[int, list[Message]], concerned: range) -> None:
        """Each host that is concerned has one message, and nobody else any."""
        self.found.strays += sum(len(got) for n, got in told.items() if n not in concerned)
        self.found.checked += self.fleet.hosts - len(concerned)
        for n in concerned:
            if len(told.get(n, ())) != 1 or told[n][0][0][1] != Tag.DELTA:
                raise RuntimeError(f"host {n} was told {len(told.get(n, ()))} times of one change")


def report(found: Found, fleet: Fleet, json: bool) -> bool:
    times = {name: stats(found.seconds[name]) for name in sorted(found.seconds)}
    sizes = {name: stats(values) for name, values in found.bytes.items()}
    what = f"fanout ({fleet.hosts} hosts, {fleet.endpoints} endpoints)"
    ratios = {f"{n} / bare": s.median / times[f"{n}, bare"].median for n, s in times.items() if f"{n}, bare" in times}
    ratios["CPU per delivery, burst / limit"] = times["CPU per delivery, burst"].median / LIMIT
    ratios["messages to the uninterested"] = float(found.strays)
    ratios["uninterested looked at"] = float(found.checked)
    bars = {"messages to the uninterested": 0.0}
    if fleet.hosts >= BARRED:
        bars |= {"CPU per delivery, burst / limit": 1.0}
        bars |= {f"{kind}, prompt hosts / bare": 1.3 for kind in KINDS[:2]}
        bars |= {"all back, snapshots / bare": 1.5}
    met = Report(what, times, ratios, bars).tell(json)
    return Report(f"{what}, memory", sizes, *peaks(sizes, fleet), "bytes").tell(json) and met


def peaks(sizes: dict[str, Stats], fleet: Fleet) -> tuple[dict[str, float], dict[str, float]]:
    name = "peak, all back, snapshots"
    peak, floor = sizes[name].median, sizes[f"{name}, bare"].median
    ratios = {f"{name} / limit": peak / MOST, f"{name} / bare": peak / floor}
    return ratios, {f"{name} / limit": 1.0} if fleet.hosts >= BARRED else {}


def run(fleet: Fleet, n: int, storms: int, crowds: int, json: bool) -> bool:
    with tempfile.TemporaryDirectory(prefix="fanout-") as folder:
        stage = Stage(Path(folder), fleet, crowds)
        try:
            stage.prepare()
            stage.storms(storms)
            Changes(stage).run(n)
        finally:
            stage.end()
    return report(stage.found, fleet, json)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.fanout")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("-n", type=int, default=30, help="changes of each kind")
    parser.add_argument("--storms", type=int, default=3, help="restarts of each kind")
    parser.add_argument("--hosts", default="10,100,1000")
    parser.add_argument("--endpoints", default="1000,10000,60000", help="as many numbers as of hosts")
    parser.add_argument("--processes", type=int, default=2, help="that the hosts are in")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # no process of ours outlives it
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    scales = zip(map(int, given.hosts.split(",")), map(int, given.endpoints.split(",")), strict=True)
    met = [run(Fleet(*scale), given.n, given.storms, given.processes, given.json) for scale in scales]
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
