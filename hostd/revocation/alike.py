# Owns: which packets no rule tells apart, so that flows are judged once for all that are alike, whatever ports and
# addresses a guest makes up. Pure.
from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from slash32.net import Address
from slash32.policy import Icmp
from slash32.verdict import Packet

from ..compiler.ruleset import InNets, InSet, Ports, Rule, SetKind, Side

Contains = Callable[[str, Address], bool]
_WIDTH = {SetKind.ADDR4: 4, SetKind.NET4: 4, SetKind.ADDR6: 16, SetKind.NET6: 16}


class Likeness(NamedTuple):
    source: tuple[int, ...]
    destination: tuple[int, ...]
    protocol: int
    source_port: int | None
    port: int | None
    icmp: Icmp | None


class Alike:
    def __init__(self, rules: Iterable[Rule], now: Contains, before: Contains, changed: Collection[str]) -> None:
        """`before`: what the sets held that have `changed`."""
        self._now, self._before = now, before
        ports: dict[Side, set[int]] = {side: set() for side in Side}
        nets: dict[int, set[int]] = {4: set(), 16: set()}
        sets: dict[int, set[str]] = {4: set(), 16: set()}
        for match in {match for rule in rules for match in rule.matches}:
            match match:
                case Ports(side, ranges):
                    ports[side].update(edge for first, last in ranges for edge in (first, last + 1))
                case InNets(_, prefixes):
                    for first, last in (prefix.bounds() for prefix in prefixes):
                        nets[len(first)] |= {int.from_bytes(first, "big"), int.from_bytes(last, "big") + 1}
                case InSet(_, name, kind):
                    sets[_WIDTH[kind]].add(name)
        self._ports = {side: sorted(edges) for side, edges in ports.items()}
        self._nets = {width: sorted(edges) for width, edges in nets.items()}
        self._sets = {width: sorted(names) for width, names in sets.items()}
        self._changed = {width: sorted(names.intersection(changed)) for width, names in sets.items()}
        self._known: dict[Address, tuple[int, ...]] = {}

    def of(self, packet: Packet) -> Likeness:
        source, port = packet.source_port, packet.destination_port
        return Likeness(
            self._address(packet.source),
            self._address(packet.destination),
            packet.protocol,
            None if source is None else bisect_right(self._ports[Side.SRC], source),
            None if port is None else bisect_right(self._ports[Side.DST], port),
            packet.icmp,
        )

    def _address(self, address: Address) -> tuple[int, ...]:
        found = self._known.get(address)
        if found is None:
            width = len(address)
            place = bisect_right(self._nets[width], int.from_bytes(address, "big"))
            now = _bits(self._now(name, address) for name in self._sets[width])
            before = _bits(self._before(name, address) for name in self._changed[width])
            found = self._known[address] = width, place, now, before
        return found


def _bits(answers: Iterable[bool]) -> int:
    return sum(1 << number for number, yes in enumerate(answers) if yes)
