# Measures the real dispatcher process (store on disk, CURVE) with simulated hosts (bench.crowd): a change until the
# last host that it concerns has acknowledged it, as who made it sees it; all hosts back after kill -9, with what they
# had and with their whole snapshot to fetch; CPU per acknowledged delivery; memory. Beside each, in the same run: a
# bare pyzmq ROUTER (bench.bare) that sends the same frames to the same hosts. Bars, where there are 1,000 hosts: 1.3
# times the bare loop, 15 us per delivery, storms 1.5 times with 1 GB at most; and with any number of hosts not one
# message to a host that a change does not concern. Dispatcher and bare ROUTER run on the first core, hosts on others.
#   python -m bench.fanout [--json] [-n N] [--storms N] [--hosts 10,100,1000] [--endpoints 1000,10000,45000]
from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import zmq

from bench import bare, crowd
from bench.bare import Message
from bench.crowd import Where
from bench.measure import Report, Stats, stats
from bench.served import EVERYBODY, FEW, SHARED, Dispatcher, Fleet, cpu_seconds, free_port, memory
from slash32.keys import KeyPair
from slash32.wire import Tag

KINDS = ("membership", "policy", "1 % of hosts")
LIMIT = 15e-6  # seconds of CPU per delivery
MOST = 1 << 30  # bytes at the peak of a storm
BARRED = 1000  # hosts from which on the bars hold
PATIENCE = 600.0  # seconds


def fresh_keys() -> KeyPair:
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


def cores() -> tuple[set[int], set[int]]:
    """For the server, for all else."""
    first, *rest = sorted(os.sched_getaffinity(0))
    return {first}, set(rest) or {first}


@dataclass
class Peer:
    """A process of ours at the other end of a pipe."""

    process: BaseProcess
    pipe: Connection

    def ask(self, *command: Any) -> Any:
        self.pipe.send(command)
        return self.hear()

    def hear(self) -> Any:
        if not self.pipe.poll(PATIENCE):
            raise RuntimeError("a process of the benchmark is silent")
        found = self.pipe.recv()
        if isinstance(found, Exception):
            raise found
        return found

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def begin(target: Callable[..., None], *given: Any) -> Peer:
    spawn = multiprocessing.get_context("spawn")
    ours, its = spawn.Pipe()
    process = spawn.Process(target=target, args=(its, *given), daemon=True)
    process.start()
    its.close()
    return Peer(process, ours)


@dataclass
class Found:
    """What one scale measured, by case."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    bytes: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    strays: int = 0  # messages to hosts that a change does not concern
    checked: int = 0  # hosts that might have been told and were not to be


class Bench:
    def __init__(self, folder: Path, fleet: Fleet, crowds: int) -> None:
        self.fleet, self.found = fleet, Found()
        self.server, self.others = cores()
        os.sched_setaffinity(0, self.others)
        keys = [fresh_keys() for _ in fleet.names]
        self.dispatcher = Dispatcher(folder, self.server)
        self.bare_keys = fresh_keys()
        self.where = {
            "dispatcher": Where("dispatcher", self.dispatcher.endpoint, self.dispatcher.public_key),
            "bare": Where("bare", f"tcp://127.0.0.1:{free_port()}", self.bare_keys.public),
        }
        self.documents = fleet.documents(keys)
        shares = [range(fleet.hosts)[n::crowds] for n in range(min(crowds, fleet.hosts))]
        self.crowds = [begin(crowd.live, fleet, {n: keys[n] for n in share}, self.others) for share in shares]
        self.crowd_of = {n: peer for peer, share in zip(self.crowds, shares, strict=True) for n in share}
        self.bare: Peer | None = None
        self.answers: dict[bool, dict[int, list[Message]]] = {}  # to a Hello for everything, to one that has it
        self.grouped: dict[int, bool] = {}
        self.port = 1000

    def end(self) -> None:
        for peer in (*self.crowds, *([self.bare] if self.bare else [])):
            peer.end()
        self.dispatcher.kill()

    def all(self, *command: Any) -> list[Any]:
        for peer in self.crowds:
            peer.pipe.send(command)
        return [peer.hear() for peer in self.crowds]

    def collect(self) -> dict[int, list[Message]]:
        return {n: got for found in self.all("collect") for n, got in found.items()}

    # -- storms -----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """The fleet is in the store; all hosts are connected to both servers, and what they were told is known."""
        self.dispatcher.start()
        self.dispatcher.ready()
        self.dispatcher.apply(self.documents)
        self.all("claim_all", self.where["dispatcher"])
        self.dispatcher.kill()
        self.dispatcher.start()
        self.dispatcher.ready()
        self.found.bytes["loaded"].append(memory(self.dispatcher.pid))
        self.all("storm", "dispatcher", True, True)
        self.connect("dispatcher")
        self.dispatcher.all_in_sync(self.fleet.hosts)
        self.answers[True] = self.collect()
        self.found.bytes["at rest, all connected"].append(memory(self.dispatcher.pid))
        self.restart(False)
        self.answers[False] = self.collect()
        sizes = [sum(len(f) for message in got for f in message) for got in self.answers[True].values()]
        self.found.bytes["snapshot"] += sizes
        self.all("storm", "bare", False, False)
        self.start_bare()
        self.bare_serves(self.answers[False])
        self.connect("bare")
        self.hear_bare()

    def connect(self, name: str) -> None:
        for peer in self.crowds:
            peer.pipe.send(("connect", self.where[name]))
        for peer in self.crowds:
            peer.hear()

    def restart(self, fresh: bool) -> tuple[float, float]:
        """kill -9 until all are in sync; how long nobody listened, and how long it took from then on."""
        self.all("storm", "dispatcher", fresh, False)
        self.dispatcher.kill()
        down = time.monotonic()
        self.dispatcher.start()
        connected = min(peer.hear()[0] for peer in self.crowds)
        self.dispatcher.all_in_sync(self.fleet.hosts)
        return connected - down, time.monotonic() - connected

    def restart_bare(self, fresh: bool, down: float) -> tuple[float, int]:
        """The same with the bare ROUTER, after as long a time; with its peak of memory."""
        self.all("storm", "bare", fresh, False)
        assert self.bare
        self.bare.end()
        killed = time.monotonic()
        self.start_bare()
        time.sleep(max(0.0, killed + down - time.monotonic()))
        self.bare_serves(self.answers[fresh])
        connected = min(peer.hear()[0] for peer in self.crowds)
        finished, peak = self.hear_bare()
        return finished - connected, peak

    def start_bare(self) -> None:
        self.bare = begin(bare.serve, self.where["bare"].endpoint, self.bare_keys, self.server)

    def bare_serves(self, answers: dict[int, list[Message]]) -> None:
        assert self.bare
        self.bare.pipe.send(answers)

    def hear_bare(self) -> Any:
        assert self.bare
        return self.bare.hear()

    def storms(self, n: int) -> None:
        seconds, sizes = self.found.seconds, self.found.bytes
        for _ in range(n):
            for name, fresh in (("all back", False), ("all back, snapshots", True)):
                down, took = self.restart(fresh)
                seconds["down"].append(down)
                seconds[name].append(took)
                sizes[f"peak, {name}"].append(memory(self.dispatcher.pid, "VmHWM"))
                took, peak = self.restart_bare(fresh, down)
                seconds[f"{name}, bare"].append(took)
                sizes[f"peak, {name}, bare"].append(peak)

    # -- changes ----------------------------------------------------------------------------------------------------

    def changes(self, n: int) -> None:
        self.all("pair")
        self.collect()  # what the storms brought is no part of this
        cases = [(kind, prompt) for kind in KINDS for prompt in (False, True)]
        for number in range(n + 1):
            random.shuffle(cases)
            for kind, prompt in cases:
                self.round(kind, prompt, kept=number > 0)
        self.collect()
        bad = [name for names in self.all("check") for name in names]
        if bad:
            raise RuntimeError(f"{len(bad)} hosts are not where the dispatcher is: {bad[:5]}")

    def round(self, kind: str, prompt: bool, kept: bool) -> None:
        self.all("begin", prompt)
        concerned = self.fleet.few if kind == KINDS[2] else range(self.fleet.hosts)
        used = cpu_seconds(self.dispatcher.pid)
        begun, revision = self.relabel() if kind == KINDS[0] else self.repolicy(FEW if kind == KINDS[2] else EVERYBODY)
        progress = self.dispatcher.wait(revision)
        took, used = time.monotonic() - begun, cpu_seconds(self.dispatcher.pid) - used
        told = self.collect()
        self.look(told, concerned)
        assert self.bare
        self.bare.pipe.send([(bare.identity(n), message) for n in concerned for message in told[n]])
        bare_took, bare_used = self.bare.hear()
        if not kept:
            return
        name, seconds = kind + ", prompt hosts" * prompt, self.found.seconds
        seconds[name].append(took)
        seconds[f"{name}, its own figure"].append(float(progress["milliseconds"]) / 1000)
        seconds[f"{name}, bare"].append(bare_took)
        if kind != KINDS[2]:
            seconds["CPU per delivery"].append(used / len(concerned))
            seconds["CPU per delivery, bare"].append(bare_used / len(concerned))

    def relabel(self) -> tuple[float, int]:
        """A guest joins the group that all hosts know, or leaves it: when its host said so, and the revision."""
        number = random.randrange(self.fleet.endpoints)
        grouped = not self.grouped.get(number, number % SHARED == 0)
        self.grouped[number] = grouped
        host = number % self.fleet.hosts
        peer = self.crowd_of[host]
        return peer.ask("claim", host, number, grouped), int(peer.hear())

    def repolicy(self, name: str) -> tuple[float, int]:
        self.port += 1
        document, begun = self.fleet.policy(name, self.port), time.monotonic()
        return begun, self.dispatcher.apply([document])

    def look(self, told: dict[int, list[Message]], concerned: range) -> None:
        """Each host that is concerned has one message, and nobody else any."""
        self.found.strays += sum(len(got) for n, got in told.items() if n not in concerned)
        self.found.checked += self.fleet.hosts - len(concerned)
        for n in concerned:
            if len(told.get(n, ())) != 1 or told[n][0][0][1] != Tag.DELTA:
                raise RuntimeError(f"host {n} was told {len(told.get(n, ()))} times of one change")


def report(found: Found, fleet: Fleet, json: bool) -> bool:
    times = {name: stats(values) for name, values in found.seconds.items()}
    sizes = {name: stats(values) for name, values in found.bytes.items()}
    what = f"fanout ({fleet.hosts} hosts, {fleet.endpoints} endpoints)"
    ratios = {f"{n} / bare": s.median / times[f"{n}, bare"].median for n, s in times.items() if f"{n}, bare" in times}
    ratios["CPU per delivery / limit"] = times["CPU per delivery"].median / LIMIT
    ratios["messages to the uninterested"] = float(found.strays)
    ratios["uninterested looked at"] = float(found.checked)
    bars = {"messages to the uninterested": 0.0}
    if fleet.hosts >= BARRED:
        bars |= {"CPU per delivery / limit": 1.0}
        bars |= {f"{kind}, prompt hosts / bare": 1.3 for kind in KINDS[:2]}
        bars |= {f"{name} / bare": 1.5 for name in times if name.startswith("all back") and "bare" not in name}
    met = Report(what, times, ratios, bars).tell(json)
    return Report(f"{what}, memory", sizes, *peaks(sizes, fleet), "bytes").tell(json) and met


def peaks(sizes: dict[str, Stats], fleet: Fleet) -> tuple[dict[str, float], dict[str, float]]:
    name = "peak, all back, snapshots"
    peak, floor = sizes[name].median, sizes[f"{name}, bare"].median
    ratios = {f"{name} / limit": peak / MOST, f"{name} / bare": peak / floor}
    return ratios, {f"{name} / limit": 1.0} if fleet.hosts >= BARRED else {}


def run(fleet: Fleet, n: int, storms: int, crowds: int, json: bool) -> bool:
    with tempfile.TemporaryDirectory(prefix="fanout-") as folder:
        bench = Bench(Path(folder), fleet, crowds)
        try:
            bench.prepare()
            bench.storms(storms)
            bench.changes(n)
        finally:
            bench.end()
    return report(bench.found, fleet, json)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.fanout")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("-n", type=int, default=30, help="changes of each kind")
    parser.add_argument("--storms", type=int, default=3, help="restarts of each kind")
    parser.add_argument("--hosts", default="10,100,1000,1000")
    parser.add_argument("--endpoints", default="1000,10000,45000,100000", help="as many numbers as of hosts")
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
