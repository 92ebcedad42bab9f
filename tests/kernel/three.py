# Owns: three verdicts on random worlds, many at a time: processes, each with a fabric for either packet filter, to
# which seeds are handed out; what they found, and figures. A world is loaded with nothing remembered, then changed.
from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.queues import SimpleQueue
from typing import NamedTuple

from fabric import Fabric, Unsettled, one_cpu
from findings import as_yaml, report
from verdict_changes import changed
from verdict_packets import Case, case, case_of

from hostd.dataplane.filter import IPTABLES, NFTABLES

KINDS = (NFTABLES, IPTABLES)


class Outcome(NamedTuple):
    """Of one seed."""

    seed: int
    worlds: int
    allowed: float
    deciding: float
    seconds: dict[str, float]  # by packet filter, and "model": the making of worlds
    finding: str = ""


@dataclass
class Figures:
    worlds: int = 0
    allowed: list[float] = field(default_factory=list)
    deciding: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, one: Outcome) -> None:
        self.worlds += one.worlds
        self.allowed.append(one.allowed)
        self.deciding.append(one.deciding)
        for what, spent in one.seconds.items():
            self.seconds[what] = self.seconds.get(what, 0) + spent

    def __str__(self) -> str:
        count = max(1, len(self.allowed))
        each = ", ".join(f"{what} {1000 * spent / max(1, self.worlds):.0f}" for what, spent in self.seconds.items())
        return (
            f"{self.worlds} worlds; allowed {sum(self.allowed) / count:.0%} of the packets "
            f"({min(self.allowed, default=0):.0%} to {max(self.allowed, default=0):.0%} in a world); "
            f"{sum(self.deciding) / count:.0%} of the rules decide; ms a world: {each}"
        )


def sequel(one: Case) -> Case:
    """What comes after it."""
    chance = random.Random(one.seed ^ 0x5332)
    while True:
        made = case_of(one.seed, changed(one.world, chance), chance)
        if made is not None:
            return made


_fabrics: dict[str, Fabric] = {}


def _begin(kinds: Iterable[str], numbers: SimpleQueue[int]) -> None:
    """In the process. Each has a CPU of its own, if there are enough."""
    one_cpu(numbers.get()).__enter__()
    for kind in kinds:
        _fabrics[kind] = Fabric(kind)


def _judged(seed: int) -> Outcome:
    begun = time.monotonic()
    cases = [case(seed)]
    cases.append(sequel(cases[0]))
    seconds = {"model": time.monotonic() - begun}
    finding = ""
    for kind, fabric in _fabrics.items():
        begun = time.monotonic()
        for number, one in enumerate(cases):
            try:
                wrong = fabric.wrong(one) if number == 0 else fabric.wrong_after(one)
            except Unsettled as refused:
                finding = finding or f"{refused}, world {number}\n{as_yaml(one.world)}"
                break
            if wrong and not finding:
                finding = report(fabric, cases[: number + 1], wrong, _fabrics.values())
        seconds[kind] = time.monotonic() - begun
    share = [sum(each) / len(cases) for each in ((c.allowed for c in cases), (c.deciding() for c in cases))]
    return Outcome(seed, len(cases), share[0], share[1], seconds, finding)


def outcomes(seeds: Iterable[int], kinds: Iterable[str] = KINDS, jobs: int = 0) -> Iterator[Outcome]:
    """As they come, until who asks has enough."""
    jobs = jobs or len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("fork")
    numbers = context.SimpleQueue()
    for number in range(jobs):
        numbers.put(number)
    with ProcessPoolExecutor(jobs, context, _begin, (tuple(kinds), numbers)) as pool:
        todo, waiting = iter(seeds), set[Future[Outcome]]()
        try:
            while True:
                waiting |= {pool.submit(_judged, seed) for seed in islice(todo, 2 * jobs - len(waiting))}
                if not waiting:
                    return
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (each.result() for each in done)
        finally:
            for each in waiting:
                each.cancel()
