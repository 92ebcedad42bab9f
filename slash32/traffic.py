# Owns: kinds of traffic as bits. Protocols, ports and ICMP types that no rule tells apart are one bit, so that what a
# list of rules allows is one integer. Pure.
from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from slash32.policy import Icmp, Peer, PortRange, Rule
from slash32.rules import WITH_PORTS

_ICMP = {4: 1, 6: 58}
_OCTETS = 256
_PORTS = 65536

Ports = tuple[tuple[PortRange, ...], tuple[PortRange, ...]]  # ports, notPorts
Types = tuple[Icmp | None, Icmp | None]  # icmp, notICMP
Key = tuple[int | None, int | None, int | None, Types, Ports, Ports]  # all that a rule asks but addresses
ANY_PORTS: Ports = ((), ())
ANY_TYPES: Types = (None, None)


class Traffic(NamedTuple):
    """One protocol, or with `protocol` None all others than `but`. Empty ranges: all. `codes` only with one type."""

    protocol: int | None
    but: tuple[int, ...] = ()
    ports: tuple[PortRange, ...] = ()  # destination
    source_ports: tuple[PortRange, ...] = ()
    types: tuple[PortRange, ...] = ()
    codes: tuple[PortRange, ...] = ()


def key_of(rule: Rule) -> Key:
    icmp = (rule.icmp, rule.not_icmp)
    return (rule.protocol, rule.not_protocol, rule.ip_version, icmp, _ports(rule.source), _ports(rule.destination))


def _ports(peer: Peer) -> Ports:
    return (peer.ports, peer.not_ports)


def merged(ranges: Iterable[tuple[int, int]]) -> tuple[PortRange, ...]:
    """Sorted, with what overlaps or touches as one."""
    found: list[PortRange] = []
    for first, last in sorted(ranges):
        if found and first <= found[-1].last + 1:
            found[-1] = PortRange(found[-1].first, max(found[-1].last, last))
        else:
            found.append(PortRange(first, last))
    return tuple(found)


@dataclass(slots=True)
class Axis:
    """Numbers 0..65535 in kinds that none of the questions tells apart; an answer is a mask of kinds."""

    kinds: list[list[tuple[int, int]]]
    answers: dict[Ports, int]

    @property
    def all(self) -> int:
        return (1 << len(self.kinds)) - 1

    def ranges(self, mask: int) -> tuple[PortRange, ...]:
        if mask == self.all:
            return ()
        return merged(span for index, spans in enumerate(self.kinds) if mask >> index & 1 for span in spans)


def axis(questions: Iterable[Ports]) -> Axis:
    asked = list(dict.fromkeys([ANY_PORTS, *questions]))
    cuts = {0, _PORTS}
    for group in (ranges for question in asked for ranges in question):
        cuts.update(edge for first, last in group for edge in (first, last + 1))
    edges = sorted(cut for cut in cuts if 0 <= cut <= _PORTS)
    signatures = [0] * (len(edges) - 1)
    for index, (ports, not_ports) in enumerate(asked):
        within = _covered(edges, ports) if ports else set(range(len(signatures)))
        for interval in within - _covered(edges, not_ports):
            signatures[interval] |= 1 << index
    kinds: dict[int, list[tuple[int, int]]] = {}
    for interval, signature in enumerate(signatures):
        kinds.setdefault(signature, []).append((edges[interval], edges[interval + 1] - 1))
    answers = {
        question: sum(1 << kind for kind, signature in enumerate(kinds) if signature >> index & 1)
        for index, question in enumerate(asked)
    }
    return Axis(list(kinds.values()), answers)


def _covered(edges: Sequence[int], ranges: Iterable[PortRange]) -> set[int]:
    """Which intervals between edges."""
    return {i for first, last in ranges for i in range(bisect_left(edges, first), bisect_left(edges, last + 1))}


@dataclass(slots=True)
class Echo:
    """ICMP types and codes in kinds; an answer is a mask of kinds."""

    kinds: list[list[tuple[int, int, int]]]  # type, first code, last code
    answers: dict[Types, int]

    @property
    def all(self) -> int:
        return (1 << len(self.kinds)) - 1


def echo(questions: Iterable[Types]) -> Echo:
    asked = list(dict.fromkeys([ANY_TYPES, *questions]))
    named = [icmp for question in asked for icmp in question if icmp is not None]
    kinds: dict[int, list[tuple[int, int, int]]] = {}
    for number in range(_OCTETS):
        codes = {i.code for i in named if i.type == number and i.code is not None}
        edges = sorted({0, _OCTETS} | codes | {code + 1 for code in codes})
        for first, end in pairwise(edges):
            answers = (_echoes(question, Icmp(number, first)) for question in asked)
            signature = sum(1 << index for index, answer in enumerate(answers) if answer)
            kinds.setdefault(signature, []).append((number, first, end - 1))
    masks = {
        question: sum(1 << kind for kind, signature in enumerate(kinds) if signature >> index & 1)
        for index, question in enumerate(asked)
    }
    return Echo(list(kinds.values()), masks)


def _echoes(question: Types, have: Icmp) -> bool:
    def matches(asked: Icmp) -> bool:
        return asked.type == have.type and asked.code in (None, have.code)

    wanted, unwanted = question
    return (wanted is None or matches(wanted)) and (unwanted is None or not matches(unwanted))


@dataclass(slots=True)
class _Grid:
    """The bits of a protocol with ports: a row of destination kinds for each kind of source port."""

    first: int
    source: Axis
    destination: Axis


@dataclass(slots=True)
class Space:
    """All traffic of one IP version. `whole` has every bit."""

    version: int
    keys: Iterable[Key]
    protocols: list[int] = field(default_factory=list)  # those that are told apart
    whole: int = 0
    _grids: dict[int, _Grid] = field(default_factory=dict)
    _single: dict[int | None, int] = field(default_factory=dict)  # protocols of one bit; None: all that are not named
    _echo: Echo = field(default_factory=lambda: echo(()))
    _echo_at: int = 0
    _masks: dict[Key, int] = field(default_factory=dict)
    _said: dict[int, tuple[Traffic, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keys = [key for key in set(self.keys) if key[2] in (None, self.version)]
        self.keys = ()
        self.protocols = _named(keys)
        width = 1
        self._single[None] = 0
        for protocol in self.protocols:
            about = [key for key in keys if key[0] in (None, protocol)]
            if protocol in WITH_PORTS:
                grid = _Grid(width, axis(key[4] for key in about), axis(key[5] for key in about))
                self._grids[protocol] = grid
                width += len(grid.source.kinds) * len(grid.destination.kinds)
            elif protocol == _ICMP[self.version]:
                self._echo, self._echo_at = echo(key[3] for key in about), width
                width += len(self._echo.kinds)
            else:
                self._single[protocol] = width
                width += 1
        self.whole = (1 << width) - 1

    def mask(self, key: Key) -> int:
        """The traffic that a rule with this key is about."""
        found = self._masks.get(key)
        if found is None:
            found = self._masks[key] = self._mask(key)
        return found

    def _mask(self, key: Key) -> int:
        protocol, not_protocol, version, *_ = key
        if version not in (None, self.version) or protocol == _ICMP[10 - self.version]:
            return 0
        mask = 0 if protocol is not None else self._bits(None, key)
        for number in self.protocols:
            if protocol in (None, number) and number != not_protocol:
                mask |= self._bits(number, key)
        return mask

    def _bits(self, protocol: int | None, key: Key) -> int:
        types, source, destination = key[3:]
        grid = self._grids.get(protocol) if protocol is not None else None
        if grid is not None:
            if types != ANY_TYPES:
                return 0
            row, width = grid.destination.answers[destination], len(grid.destination.kinds)
            rows = grid.source.answers[source]
            return sum(row << (width * i) for i in range(len(grid.source.kinds)) if rows >> i & 1) << grid.first
        if (source, destination) != (ANY_PORTS, ANY_PORTS):
            return 0  # nothing to read them from
        if protocol == _ICMP[self.version]:
            return self._echo.answers[types] << self._echo_at
        return 1 << self._single[protocol] if types == ANY_TYPES else 0

    def describe(self, mask: int) -> tuple[Traffic, ...]:
        """The other way round."""
        if mask not in self._said:
            self._said[mask] = self._describe(mask)
        return self._said[mask]

    def _describe(self, mask: int) -> tuple[Traffic, ...]:
        if mask == self.whole:
            return (Traffic(None),)
        found: list[Traffic] = []
        left: list[int] = []
        for protocol in self.protocols:
            own = self._described(protocol, mask)
            if own != [Traffic(protocol)]:
                left.append(protocol)
                found += own
            elif not mask & 1:
                found += own
        return (Traffic(None, tuple(left)), *found) if mask & 1 else tuple(found)

    def _described(self, protocol: int, mask: int) -> list[Traffic]:
        grid = self._grids.get(protocol)
        if grid is not None:
            return _grid_traffic(protocol, grid, mask >> grid.first)
        if protocol == _ICMP[self.version]:
            return _echo_traffic(protocol, self._echo, mask >> self._echo_at & self._echo.all)
        return [Traffic(protocol)] if mask >> self._single[protocol] & 1 else []


def _named(keys: Iterable[Key]) -> list[int]:
    found: set[int] = set()
    for protocol, not_protocol, _, types, source, destination in keys:
        found |= {number for number in (protocol, not_protocol) if number is not None}
        if protocol is None and (source, destination) != (ANY_PORTS, ANY_PORTS):
            found.update(WITH_PORTS)
        if protocol is None and types != ANY_TYPES:
            found.update(_ICMP.values())
    return sorted(found)


def _grid_traffic(protocol: int, grid: _Grid, bits: int) -> list[Traffic]:
    width = len(grid.destination.kinds)
    rows: dict[int, int] = {}  # destination kinds -> the source kinds for which it is these
    for index in range(len(grid.source.kinds)):
        row = bits >> (index * width) & grid.destination.all
        if row:
            rows[row] = rows.get(row, 0) | 1 << index
    return [
        Traffic(protocol, ports=grid.destination.ranges(row), source_ports=grid.source.ranges(sources))
        for row, sources in rows.items()
    ]


def _echo_traffic(protocol: int, kinds: Echo, mask: int) -> list[Traffic]:
    if mask in (0, kinds.all):
        return [Traffic(protocol)] if mask else []
    codes: dict[int, list[tuple[int, int]]] = {}
    for index, cells in enumerate(kinds.kinds):
        for number, first, last in cells if mask >> index & 1 else ():
            codes.setdefault(number, []).append((first, last))
    whole = (PortRange(0, _OCTETS - 1),)
    full = merged((number, number) for number, spans in codes.items() if merged(spans) == whole)
    found = [Traffic(protocol, types=full)] if full else []
    for number, spans in sorted(codes.items()):
        if merged(spans) != whole:
            found.append(Traffic(protocol, types=(PortRange(number, number),), codes=merged(spans)))
    return found
