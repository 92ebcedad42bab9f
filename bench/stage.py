# The stage of `bench.fanout`: the dispatcher, the bare ROUTER and the hosts' processes, each on its cores; and storms:
# the server is killed, all hosts come back.
from __future__ import annotations

import multiprocessing
import os
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
from bench.served import Dispatcher, Fleet, free_port, memory
from bench.simulated import Where
from slash32.keys import KeyPair

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


class Stage:
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

    def send_bare(self, told: dict[int, list[Message]]) -> tuple[float, float]:
        """What the dispatcher has told the hosts, from the bare ROUTER: seconds until all acknowledged, and of CPU."""
        longest = max(map(len, told.values()))
        order = [(n, got[at]) for at in range(longest) for n, got in told.items() if at < len(got)]
        assert self.bare
        self.bare.pipe.send([(bare.identity(n), message) for n, message in order])
        took, used = self.bare.hear()
        return took, used
