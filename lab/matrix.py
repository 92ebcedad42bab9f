"""Who can open what to whom: expected matrices read from files written by hand, observed ones by packets from guests.

Owns the file format (see examples/*.matrix) and how a matrix is printed. Touches the guests through lab.access only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from lab.access import probe
from lab.node import Node
from lab.paths import LabError

SERVICES = {"i": "icmp", "w": "80", "d": "5432"}  # letter on the screen -> what the guest tool "probe" calls it
SPOKEN = {"icmp": "ICMP", "80": "tcp/80", "5432": "tcp/5432"}
FAMILIES = (4, 6)
Table = dict[tuple[str, str], frozenset[str]]  # (from role, to role) -> the services that are open
LEGEND = "i ICMP echo   w tcp/80   d tcp/5432   . closed   (each by IPv4 and by IPv6)"
T = TypeVar("T")
U = TypeVar("U")


class Cell(NamedTuple):
    """One question: may SOURCE open SERVICE to TARGET in this FAMILY?"""

    source: str
    target: str
    service: str
    family: int

    def __str__(self) -> str:
        return f"{self.source} -> {self.target} {SPOKEN[self.service]} by IPv{self.family}"


@dataclass(frozen=True)
class Guest:
    """A guest to ask: its name, the node it runs on, one address of each family."""

    name: str
    node: Node
    address4: str
    address6: str


@dataclass(frozen=True)
class Matrix:
    """All ordered pairs of NAMES; what is not in OPEN is closed."""

    names: tuple[str, ...]
    open: frozenset[Cell]

    def cells(self) -> list[Cell]:
        pairs = [(source, target) for source in self.names for target in self.names if source != target]
        return [Cell(*pair, service, family) for pair in pairs for service in SERVICES.values() for family in FAMILIES]

    def wrong(self, observed: Matrix) -> list[Cell]:
        """The cells in which OBSERVED is not as expected here."""
        if set(self.names) != set(observed.names):
            raise LabError(f"matrix of {' '.join(self.names)} against one of {' '.join(observed.names)}")
        return [cell for cell in self.cells() if (cell in self.open) != (cell in observed.open)]


def read(path: Path) -> Table:
    """A file written by hand: '#' comments, and for each ordered pair of roles one line FROM TO ICMP TCP/80 TCP/5432,
    each yes or no."""
    try:
        return parse(path.read_text(), str(path))
    except OSError as error:
        raise LabError(f"{path}: {error.strerror}") from None


def parse(text: str, where: str) -> Table:
    table: Table = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        source, target, answers = words[0], words[1] if len(words) > 1 else "", words[2:]
        if len(answers) != len(SERVICES) or any(answer not in ("yes", "no") for answer in answers):
            raise LabError(f"{where}:{number}: '{line.strip()}': want FROM TO and three times yes or no")
        if (source, target) in table:
            raise LabError(f"{where}:{number}: {source} to {target} is there twice")
        services = SERVICES.values()
        table[source, target] = frozenset(s for s, answer in zip(services, answers, strict=True) if answer == "yes")
    roles = {source for source, _ in table} | {target for _, target in table}
    missing = sorted((a, b) for a in roles for b in roles if (a, b) not in table)
    if missing or not table:
        raise LabError(f"{where}: no line for {' to '.join(missing[0]) if missing else 'anybody'}")
    return table


def expected(table: Table, roles: Mapping[str, str]) -> Matrix:
    """What TABLE says of the guests whose ROLES are given."""
    absent = sorted(set(roles.values()) - {source for source, _ in table})
    if absent:
        raise LabError(f"the expected matrix says nothing of the role {absent[0]}")
    names = tuple(roles)
    cells = Matrix(names, frozenset()).cells()
    return Matrix(names, frozenset(c for c in cells if c.service in table[roles[c.source], roles[c.target]]))


def observe(guests: Sequence[Guest], wait_ms: int = 1000) -> Matrix:
    """Ask every guest, all at once, to try all others; silence for WAIT_MS counts as closed."""
    names = {address: guest.name for guest in guests for address in (guest.address4, guest.address6)}

    def ask(guest: Guest) -> set[Cell]:
        others = [address for address, name in names.items() if name != guest.name]
        answers = probe(guest.node, guest.name, others, "-t", str(wait_ms))
        if len(answers) != len(others) * len(SERVICES):
            raise LabError(f"{guest.node.name}/{guest.name}: probe answered for {len(answers)} of its targets only")
        return {
            Cell(guest.name, names[address], service, 6 if ":" in address else 4)
            for (address, service), yes in answers.items()
            if yes
        }

    return Matrix(tuple(guest.name for guest in guests), frozenset().union(*at_once(ask, guests)))


@contextmanager
def background(workers: int = 16) -> Iterator[ThreadPoolExecutor]:
    """A pool that nobody waits for when it is left: after a failure or an interrupt its workers end with the rack, when
    the nodes' power is cut."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def at_once(work: Callable[[T], U], items: Iterable[T]) -> list[U]:
    """WORK on all ITEMS in parallel; the first failure in their order is raised."""
    with background() as pool:
        return [future.result() for future in [pool.submit(work, item) for item in items]]


def render(observed: Matrix, wanted: Matrix, before: Matrix | None = None, color: bool = False) -> list[str]:
    """The observed matrix as lines of text: wrong cells with '!' (and in red), cells that changed since BEFORE bold."""
    wrong = {cell[:2] for cell in wanted.wrong(observed)}
    width = max(len(name) for name in observed.names)
    column = max(width, 4) + 1
    lines = [" " * (width + 5) + "to " + "".join(f"{name:<{column}}" for name in observed.names).rstrip()]
    for source in observed.names:
        parts = []
        for target in observed.names:
            text = "-" if source == target else _shown(observed, source, target)
            mark = "!" if (source, target) in wrong else ""
            padded = f"{text + mark:<{column}}"
            parts.append(_paint(padded, _style(mark, observed, before, (source, target))) if color else padded)
        lines.append(f"{'from' if source == observed.names[0] else '':5}{source:<{width}}   {''.join(parts)}".rstrip())
    return lines


def _shown(matrix: Matrix, source: str, target: str) -> str:
    """iwd. for what is the same in both families; 4 or 6 where it is open in this one only."""
    shown = ""
    for letter, service in SERVICES.items():
        families = [family for family in FAMILIES if Cell(source, target, service, family) in matrix.open]
        shown += letter if len(families) == 2 else str(families[0]) if families else "."
    return shown


def _style(mark: str, observed: Matrix, before: Matrix | None, pair: tuple[str, str]) -> str:
    if mark:
        return "1;37;41"
    text = _shown(observed, *pair)
    known = before is not None and set(pair) <= set(before.names)
    changed = before is not None and (not known or _shown(before, *pair) != text)
    if changed and pair[0] != pair[1] and (known or "." * len(SERVICES) != text):
        return "1;33"
    return "2" if pair[0] == pair[1] or set(text) == {"."} else "32"


def _paint(text: str, style: str) -> str:
    body = text.rstrip()
    return f"\x1b[{style}m{body}\x1b[0m{text[len(body) :]}"


def wants_color(tty: bool) -> bool:
    return tty and "NO_COLOR" not in os.environ and os.environ.get("TERM", "dumb") != "dumb"


def complaints(wanted: Matrix, observed: Matrix) -> list[str]:
    """One line for each wrong cell."""

    def said(matrix: Matrix, cell: Cell) -> str:
        return "open" if cell in matrix.open else "closed"

    return [f"{cell}: {said(observed, cell)}, expected {said(wanted, cell)}" for cell in wanted.wrong(observed)]
