# Measures slash32 against Debian's OVN on the same machine in the same run, rounds interleaved: a guest joins a group
# that policies everywhere use, an address is added to a set, a new guest comes; each until the last host has it in
# force and has said so. What that costs each host's processor; memory; the restart of one host's agent. Bars 1 to 3.
#   python -m bench.ovn [--chassis 10 --ports 100] [--json | --markdown] [-n ROUNDS] [--alone]   (both sizes by default)
# Needs Debian's ovn-central, ovn-host and openvswitch-switch; bench.fleet and bench.ovn_fleet are the two sides.
from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from bench import ovn_fleet
from bench.cage import CageError, caged, cpu, memory
from bench.fleet import Fleet
from bench.measure import Report, Stats, stats

SIZES = [(10, 100), (50, 20)]
JOIN, ELEMENT, NEW, RESTART = "join a group", "one more address in a set", "new guest", "agent restarted, in sync"
CHANGES = {JOIN: "join", ELEMENT: "element", NEW: "new"}
OURS, THEIRS = Fleet.name, ovn_fleet.Ovn.name
CPU, CENTRE = "a host's CPU", "the centre's CPU"
TIMES_LESS = {JOIN: 50, ELEMENT: 50, NEW: 40}
CPU_TIMES_LESS = 30
AFTER = 0.05  # seconds for which what a change leaves to be done still counts as its cost
RESTARTS = 5
Seconds = dict[str, list[float]]


class Side(Protocol):
    name: str

    def join(self, turn: int) -> Callable[[], None]: ...
    def element(self, turn: int) -> Callable[[], None]: ...
    def new(self, turn: int) -> Callable[[], None]: ...
    def stop_agent(self) -> None: ...
    def start_agent(self) -> None: ...
    def agent_started(self) -> None: ...
    def agents(self) -> list[list[int]]: ...
    def centre(self) -> list[int]: ...


def say(words: str) -> None:
    print(f"bench.ovn: {words}", file=sys.stderr, flush=True)


def change(side: Side, what: str, turn: int, found: Seconds) -> None:
    """One, measured. The first warms up."""
    run = getattr(side, CHANGES[what])(turn)
    agents, centre = [pid for host in side.agents() for pid in host], side.centre()
    before, central = cpu(agents), cpu(centre)
    start = time.perf_counter()
    run()
    took = time.perf_counter() - start
    time.sleep(AFTER)
    if turn:
        each = (cpu(agents) - before) / len(side.agents())
        for name, value in (("", took), (f"{CPU}: ", each), (f"{CENTRE}: ", cpu(centre) - central)):
            found.setdefault(f"{name}{what}, {side.name}", []).append(value)


def restart(side: Side, found: Seconds) -> None:
    side.stop_agent()
    start = time.perf_counter()
    side.start_agent()
    found.setdefault(f"{RESTART}, {side.name}", []).append(time.perf_counter() - start)
    side.agent_started()


def measured(folder: Path, size: tuple[int, int], rounds: int, alone: bool) -> dict[str, Seconds]:
    """In a cage."""
    makers: list[Callable[..., Side]] = [Fleet] if alone else [ovn_fleet.Ovn, Fleet]
    sides: list[Side] = []
    for make in makers:
        start = time.perf_counter()
        sides.append(make(folder, *size, rounds + 1))
        took = time.perf_counter() - start
        say(f"{size[0]} x {size[1]}: {sides[-1].name} is up after {took:.0f} s")
    seconds: Seconds = {}
    for turn in range(rounds + 1):
        pairs = [(side, what) for side in sides for what in CHANGES]
        for side, what in random.sample(pairs, len(pairs)):
            change(side, what, turn, seconds)
    for _ in range(min(RESTARTS, rounds)):
        for side in random.sample(sides, len(sides)):
            restart(side, seconds)
    sizes: Seconds = {}
    for side in sides:
        for host in side.agents():
            rss, pss = memory(host)
            sizes.setdefault(f"a host's RSS, {side.name}", []).append(rss)
            sizes.setdefault(f"a host's PSS, {side.name}", []).append(pss)
    return {"seconds": dict(sorted(seconds.items())), "bytes": sizes}


def ratios(found: dict[str, Stats]) -> Iterator[tuple[str, float]]:
    """Ours to theirs."""
    for name, ours in found.items():
        what, _, side = name.rpartition(", ")
        theirs = found.get(f"{what}, {THEIRS}")
        if side == OURS and theirs is not None:
            yield f"{what}, {OURS} / {THEIRS}", ours.median / theirs.median


def reports(size: tuple[int, int], raw: dict[str, Seconds]) -> Iterator[Report]:
    limits = {what: 1 / less for what, less in TIMES_LESS.items()}
    limits |= {f"{CPU}: {what}": 1 / CPU_TIMES_LESS for what in CHANGES}
    for unit, values in raw.items():
        figures = {name: stats(each) for name, each in values.items()}
        compared = dict(ratios(figures))
        bars = {f"{what}, {OURS} / {THEIRS}": limit for what, limit in limits.items()}
        bars = {name: limit for name, limit in bars.items() if name in compared}
        yield Report(f"{size[0]} hosts x {size[1]} guests", figures, compared, bars, unit)


# -- the README's table -----------------------------------------------------------------------------------------------

ROWS = {
    f"{JOIN} that policies everywhere use": JOIN,
    "one more address in a set that policies use": ELEMENT,
    "new guest, live on its host and in all peers' sets": NEW,
    "agent of one host restarted, in sync": RESTART,
    "CPU per host for the join": f"{CPU}: {JOIN}",
    "CPU per host for the new guest": f"{CPU}: {NEW}",
    "memory of a host's agent (PSS)": "a host's PSS",
    "the same, RSS": "a host's RSS",
}


def markdown(found: list[Report]) -> str:
    by_size: dict[str, dict[str, Stats]] = {}
    for report in found:
        by_size.setdefault(report.name, {}).update(report.measured)
    sides = [cell for size in by_size for cell in (f"{size}: {THEIRS}", OURS, "")]
    lines = [f"| median (p99), n | {' | '.join(sides)} |", "|---|" + "---|" * len(sides)]
    for words, key in ROWS.items():
        cells = [cell for figures in by_size.values() for cell in _cells(key, figures)]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(key: str, figures: Mapping[str, Stats]) -> tuple[str, str, str]:
    theirs, ours = (figures.get(f"{key}, {side}") for side in (THEIRS, OURS))
    return _cell(key, theirs), _cell(key, ours), f"1/{theirs.median / ours.median:.2g}" if theirs and ours else ""


def _cell(key: str, one: Stats | None) -> str:
    if one is None:
        return ""
    if key.endswith(("PSS", "RSS")):
        return f"{one.median / (1 << 20):.0f} MiB"
    digits = 2 if one.median < 0.001 else 1 if one.median < 0.1 else 0
    return f"{one.median * 1e3:.{digits}f} ms ({one.p99 * 1e3:.{digits}f}), {one.n}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.ovn")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true", help="the README's table")
    parser.add_argument("-n", type=int, default=30, help="rounds")
    parser.add_argument("--chassis", type=int, help="hosts; both sizes, unless told")
    parser.add_argument("--ports", type=int, default=100, help="guests of each")
    parser.add_argument("--alone", action="store_true", help="slash32 only, where there is no OVN")
    given = parser.parse_args()
    if not given.alone and (problem := ovn_fleet.missing()):
        say(problem)
        return 2
    found, met = [], True
    for size in SIZES if given.chassis is None else [(given.chassis, given.ports)]:
        raw: Any = caged(lambda folder, size=size: measured(folder, size, given.n, given.alone))  # type: ignore[misc]
        for report in reports(size, raw):
            found.append(report)
            if not given.markdown:
                met = report.tell(given.json) and met
    if given.markdown:
        print(markdown(found))
    return 0 if met else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CageError as error:
        say(f"{error}")
        sys.exit(1)
    except KeyboardInterrupt:
        say("interrupted; nothing of it is left")
        sys.exit(130)
