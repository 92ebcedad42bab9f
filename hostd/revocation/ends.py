# Owns: where the packet filter asks a flow: at the guests' taps that it goes through, and at the host's own endpoints.
# As the skeletons do (hostd.dataplane). Pure.
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from slash32.failsafe import INBOUND, OUTBOUND, TCP, UDP, VITAL_ICMP6, Failsafe
from slash32.net import Address, Prefix
from slash32.verdict import Packet

from ..compiler.desired import Actual
from ..compiler.forwarding import Way
from ..compiler.ruleset import (
    HOST_CHAINS,
    HOST_FORWARD_IN,
    HOST_FORWARD_OUT,
    HOST_FROM_GUESTS,
    HOST_GUESTS,
    HOST_IN,
    HOST_OUT,
    HOST_TO_GUESTS,
)
from .judge import NO_WAYS, Ways
from .revoke import EGRESS, HOST, INGRESS, Side

_ICMP6 = 58
_ASKS_FOR_ADDRESS = ((68, 67), (546, 547))  # UDP ports of a guest and the host's DHCP
_NO_WAY = Way(False, "")


class End(NamedTuple):
    side: Side
    ways: Ways = NO_WAYS
    open: bool = False  # what comes to no decision there passes


class Ends:
    """Of the flows of one moment: what is looked up is remembered."""

    def __init__(self, actual: Actual, way_to: Callable[[Address], Way], dispatcher_port: int) -> None:
        self._owners = _Owners(actual)
        self._look_up, self._ways = way_to, dict[Address, Way]()
        self._outbound = (*OUTBOUND, Failsafe(TCP, dispatcher_port, dispatcher_port, "the dispatcher"))

    def of_guests(self, packet: Packet) -> Iterator[Side]:
        """Though a flow between guest and host is asked there only sometimes: see `never_asked`."""
        for ifindex in self._owners.senders(packet.source):
            yield ifindex, EGRESS
        for ifindex in self._owners.receivers(packet.destination):
            yield ifindex, INGRESS

    def never_asked(self, packet: Packet, side: Side, guests_may: bool) -> bool:
        """What a guest's class has no say in: DHCP with the host, and, where no host endpoint lets guests speak to the
        host, whatever else there is (about a flow of the host's)."""
        if side[1] == EGRESS:
            return self._way(packet.destination).local and (not guests_may or _is_vital(packet))
        return self._way(packet.source).local and _is_vital(packet)

    def of_host(self, packet: Packet) -> Iterator[End]:
        from_guest = bool(self._owners.senders(packet.source))
        to_guest = bool(self._owners.receivers(packet.destination))
        source = _NO_WAY if from_guest else self._way(packet.source)
        target = _NO_WAY if to_guest else self._way(packet.destination)
        if source.local and target.local:
            return
        if source.local or target.local:
            if from_guest or to_guest:
                yield from _between(packet, from_guest)
            elif source.local and not _failsafe(packet, self._outbound) and target.interface:
                yield _end(HOST_OUT, Ways(outgoing=target.interface))
            elif target.local and not _failsafe(packet, INBOUND) and source.interface:
                yield _end(HOST_IN, Ways(incoming=source.interface))
            return
        ways = Ways(source.interface, target.interface)
        if ways.incoming:
            yield _end(HOST_FORWARD_IN, ways)
        if ways.outgoing:
            yield _end(HOST_FORWARD_OUT, ways)

    def _way(self, address: Address) -> Way:
        found = self._ways.get(address)
        if found is None:
            found = self._ways[address] = self._look_up(address)
        return found


def _end(chain: str, ways: Ways = NO_WAYS) -> End:
    return End((HOST, HOST_CHAINS.index(chain)), ways, open=chain != HOST_GUESTS)


def _between(packet: Packet, from_guest: bool) -> Iterator[End]:
    """A guest and its own host."""
    if not _is_vital(packet):
        yield from map(_end, (HOST_GUESTS, HOST_FROM_GUESTS) if from_guest else (HOST_TO_GUESTS,))


def _is_vital(packet: Packet) -> bool:
    """Between a guest and the host it passes whatever policy says."""
    ports = packet.source_port, packet.destination_port
    dhcp = packet.protocol == UDP and (ports in _ASKS_FOR_ADDRESS or ports[::-1] in _ASKS_FOR_ADDRESS)
    return dhcp or _is_discovery(packet)


def _is_discovery(packet: Packet) -> bool:
    return packet.protocol == _ICMP6 and packet.icmp is not None and packet.icmp.type in VITAL_ICMP6


def _failsafe(packet: Packet, open_: tuple[Failsafe, ...]) -> bool:
    port = packet.destination_port
    return _is_discovery(packet) or any(
        item.protocol == packet.protocol and port is not None and item.first <= port <= item.last for item in open_
    )


class _Owners:
    """Which taps an address is behind. What comes to it goes where its route goes; what comes from it may come from any
    tap that has it, of a shared one."""

    def __init__(self, actual: Actual) -> None:
        self._routes, self._taps = actual.routes, actual.taps
        self._single: dict[Address, list[int]] = {}
        self._behind: dict[tuple[int, int], dict[int, list[int]]] = {}  # (width, length) -> network -> taps
        for ifindex, tap in actual.taps.items():
            for address in tap.addresses:
                self._single.setdefault(address, []).append(ifindex)
            for network, length in tap.prefixes:
                width = len(network)
                networks = self._behind.setdefault((width, length), {})
                networks.setdefault(int.from_bytes(network, "big") >> 8 * width - length, []).append(ifindex)
        self._lengths = sorted(self._behind, key=lambda key: -key[1])

    def senders(self, address: Address) -> list[int]:
        return self._single.get(address) or self._those_before(address)

    def receivers(self, address: Address) -> list[int]:
        route = self._routes.get(Prefix(address, 8 * len(address)))
        if route is None:
            return self.senders(address)
        return [route.oif] if route.oif in self._taps else []

    def _those_before(self, address: Address) -> list[int]:
        number = int.from_bytes(address, "big")
        for width, length in self._lengths:
            if width == len(address):
                found = self._behind[width, length].get(number >> 8 * width - length)
                if found is not None:
                    return found
        return []
