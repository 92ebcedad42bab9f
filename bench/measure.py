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
    """Seconds."""

    n: int
    median: float
    p99: float
    best: float


def stats(seconds: list[float]) -> Stats:
    ordered = sorted(seconds)
    n = len(ordered)
    return Stats(n, statistics.median(ordered), ordered[min(n - 1, n * 99 // 100)], ordered[0])


def measure(cases: Mapping[str, Callable[[], None]], n: int) -> dict[str, Stats]:
    """Each case once unmeasured, then `n` times."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for run in cases.values():
        run()
    order = list(cases)
    gc.collect()
    gc.disable()
    try:
        for _ in range(n):
            random.shuffle(order)
            for name in order:
                start = time.perf_counter()
                cases[name]()
                seconds[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return {name: stats(found) for name, found in seconds.items()}


def report(
    name: str, measured: Mapping[str, Stats], ratios: Mapping[str, float], bar: Mapping[str, float], json: bool
) -> bool:
    """Prints a table, or one JSON object. `bar`: at most, for ratios of the same name. True: every bar is met."""
    met = {key: ratios[key] <= limit for key, limit in bar.items()}
    if json:
        rows = {case: asdict(found) for case, found in measured.items()}
        print(dumps({"name": name, "seconds": rows, "ratios": dict(ratios), "bars": dict(bar), "met": met}))
        return all(met.values())
    print(f"{name}")
    width = max(map(len, [*measured, *ratios]))
    for case, found in measured.items():
        figures = "  ".join(f"{key} {_seconds(value)}" for key, value in _figures(found))
        print(f"  {case:{width}}  {figures}  n {found.n}")
    for key, value in ratios.items():
        verdict = f"  bar {bar[key]:g}: {'met' if met[key] else 'MISSED'}" if key in bar else ""
        print(f"  {key:{width}}  {value:.4g}{verdict}")
    return all(met.values())


def _figures(found: Stats) -> list[tuple[str, float]]:
    return [("median", found.median), ("p99", found.p99), ("best", found.best)]


def _seconds(value: float) -> str:
    for unit, factor in (("s ", 1.0), ("ms", 1e3)):
        if value * factor >= 1:
            return f"{value * factor:8.3f} {unit}"
    return f"{value * 1e6:8.2f} us"
