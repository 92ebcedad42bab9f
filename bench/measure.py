# Owns: how a benchmark is measured and told. Cases run interleaved in random order, so that a drift of the machine hits
# all alike; what counts is the ratio to a floor or peer that ran beside ours.
from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from json import dumps


@dataclass(frozen=True, slots=True)
class Stats:
    """Seconds, or bytes."""

    n: int
    median: float
    p99: float
    best: float


@dataclass(frozen=True, slots=True)
class Case:
    run: Callable[[], object]
    before: Callable[[], object] | None = None  # not measured, nor is `after`
    after: Callable[[], object] | None = None
    every: int = 1  # a slow one takes part in one round of so many


def stats(values: list[float]) -> Stats:
    ordered = sorted(values)
    n = len(ordered)
    return Stats(n, statistics.median(ordered), ordered[min(n - 1, n * 99 // 100)], ordered[0])


def measure(cases: Mapping[str, Callable[[], object] | Case], n: int) -> dict[str, Stats]:
    """Each case once unmeasured, then in `n` rounds."""
    return {name: stats(found) for name, found in collect(cases, n).items()}


def collect(cases: Mapping[str, Callable[[], object] | Case], n: int) -> dict[str, list[float]]:
    """The seconds of each run, in their order."""
    whole = {name: case if isinstance(case, Case) else Case(case) for name, case in cases.items()}
    seconds: dict[str, list[float]] = {name: [] for name in whole}
    for case in whole.values():
        _once(case)
    order = list(whole)
    gc.collect()
    gc.disable()
    try:
        for number in range(n):
            random.shuffle(order)
            for name in order:
                if number % whole[name].every == 0:
                    seconds[name].append(_once(whole[name]))
    finally:
        gc.enable()
    return seconds


def _once(case: Case) -> float:
    if case.before is not None:
        case.before()
    start = time.perf_counter()
    case.run()
    end = time.perf_counter()
    if case.after is not None:
        case.after()
    return end - start


@dataclass(frozen=True, slots=True)
class Report:
    name: str
    measured: Mapping[str, Stats]
    ratios: Mapping[str, float]
    bars: Mapping[str, float]  # at most, for ratios of the same name
    unit: str = "seconds"  # or "bytes"

    def tell(self, json: bool) -> bool:
        """Prints a table, or one line of JSON. True: every bar is met."""
        met = {key: self.ratios[key] <= limit for key, limit in self.bars.items()}
        if json:
            rows = {case: asdict(found) for case, found in self.measured.items()}
            ratios, bars = dict(self.ratios), dict(self.bars)
            print(dumps({"name": self.name, self.unit: rows, "ratios": ratios, "bars": bars, "met": met}), flush=True)
            return all(met.values())
        print(self.name)
        width = max(map(len, [*self.measured, *self.ratios]))
        words = _seconds if self.unit == "seconds" else _bytes
        for case, found in self.measured.items():
            figures = "  ".join(f"{key} {words(value)}" for key, value in _figures(found))
            print(f"  {case:{width}}  {figures}  n {found.n}")
        for key, value in self.ratios.items():
            verdict = f"  bar {self.bars[key]:.4g}: {'met' if met[key] else 'MISSED'}" if key in met else ""
            print(f"  {key:{width}}  {value:.4g}{verdict}", flush=True)
        return all(met.values())


def _figures(found: Stats) -> list[tuple[str, float]]:
    return [("median", found.median), ("p99", found.p99), ("best", found.best)]


def _seconds(value: float) -> str:
    for unit, factor in (("s ", 1.0), ("ms", 1e3)):
        if value * factor >= 1:
            return f"{value * factor:8.3f} {unit}"
    return f"{value * 1e6:8.2f} us"


def _bytes(value: float) -> str:
    return f"{value / (1 << 20):8.2f} MiB"
