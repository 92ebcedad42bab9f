# Owns: what both daemons measure: families of metrics, histograms, Prometheus's text format. Pure. Names are declared
# once, next to what they mean (hostd/reporting/metrics.py, dispatcher/metrics.py); docs/monitoring.md lists them all.
# Why not python3-prometheus-client: docs/decisions/0010-metrics.md.
from __future__ import annotations

import enum
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Seconds. From what a settled host takes for one change to what nobody should wait for.
BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)


class Kind(enum.StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Histogram:
    """How long things took. One thread observes; `copy` for another that reads."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...] = BOUNDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def copy(self) -> Histogram:
        found = Histogram(self.bounds)
        found.counts, found.total = self.counts.copy(), self.total
        return found


Value = float | Histogram
Labels = tuple[str, ...]  # values, in the family's order


class Family(NamedTuple):
    """`labels` have few values each: states, operations, hosts; never endpoints or addresses."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()

    def of(self, value: Value) -> Sampled:
        """Without labels."""
        return Sampled(self, {(): value})

    def by(self, values: Mapping[str, Value]) -> Sampled:
        """With one label."""
        return Sampled(self, {(label,): value for label, value in values.items()})


class Sampled(NamedTuple):
    """A family as it is now."""

    family: Family
    values: Mapping[Labels, Value]


def render(sampled: Iterable[Sampled]) -> str:
    return "".join(line + "\n" for each in sampled for line in _lines(each))


def _lines(sampled: Sampled) -> Iterator[str]:
    name, kind, words, labels = sampled.family
    yield f"# HELP {name} {words.replace(chr(92), chr(92) * 2).replace(chr(10), chr(92) + 'n')}"
    yield f"# TYPE {name} {kind}"
    for values, value in sampled.values.items():
        given = [f'{label}="{_escaped(text)}"' for label, text in zip(labels, values, strict=True)]
        if isinstance(value, Histogram):
            yield from _histogram(name, given, value)
        else:
            yield f"{name}{_braced(given)} {_number(value)}"


def _histogram(name: str, given: list[str], histogram: Histogram) -> Iterator[str]:
    count = 0
    for bound, found in zip((*histogram.bounds, math.inf), histogram.counts, strict=True):
        count += found
        yield f"{name}_bucket{_braced([*given, 'le=' + chr(34) + _number(bound) + chr(34)])} {count}"
    yield f"{name}_sum{_braced(given)} {_number(histogram.total)}"
    yield f"{name}_count{_braced(given)} {count}"


def _braced(given: list[str]) -> str:
    return "{" + ",".join(given) + "}" if given else ""


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) else repr(value)


# --- what every daemon says of itself -------------------------------------------------------------------------------

BUILD = Family("slash32_build_info", Kind.GAUGE, "Always 1: which daemon, which version.", ("daemon", "version"))
MEMORY = Family("slash32_process_resident_memory_bytes", Kind.GAUGE, "Memory of the process that is in RAM.")
CPU = Family("slash32_process_cpu_seconds_total", Kind.COUNTER, "Processor time, user's and system's.")
FILES = Family("slash32_process_open_fds", Kind.GAUGE, "Open file descriptors.")
MAX_FILES = Family("slash32_process_max_fds", Kind.GAUGE, "Most file descriptors that the process may have.")
STARTED = Family("slash32_process_start_time_seconds", Kind.GAUGE, "When the process started, Unix time.")
COMMON = (BUILD, MEMORY, CPU, FILES, MAX_FILES, STARTED)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process uses (slash32.process)."""

    memory: int  # bytes
    cpu: float  # seconds
    files: int
    max_files: int
    started: float  # Unix time


def common(daemon: str, version: str, usage: Usage) -> list[Sampled]:
    return [
        Sampled(BUILD, {(daemon, version): 1}),
        MEMORY.of(usage.memory),
        CPU.of(usage.cpu),
        FILES.of(usage.files),
        MAX_FILES.of(usage.max_files),
        STARTED.of(usage.started),
    ]
