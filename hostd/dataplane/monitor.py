# Owns: what the kernel tells unasked about our objects, as events. May touch: two netlink sockets that only listen.
# An event says that something happened, late; what holds now is to be read. What the kernel does not tell:
# - IPv4 routes that leave with a link that goes down or away: look at LinkSeen(up=False) and LinkGone;
# - a change of group of a link that is down (its next LinkSeen shows it);
# - a permanent neighbour that somebody turned into a common one; sysctls other than those of NetconfChanged.
from __future__ import annotations

import struct
import sys
from collections.abc import Collection, Iterator
from typing import NamedTuple

from slash32.net import Prefix

from ..compiler.forwarding import Link, Neighbour, Route, TapAddress
from . import netlink, sieve
from .netlink import NLM_F_REPLACE, Message, NetlinkSocket, Overrun, attribute_map, attributes
from .rtnl import links, neighbours, routes

__all__ = [
    "AddressGone",
    "Event",
    "LinkGone",
    "LinkSeen",
    "Monitor",
    "NeighbourGone",
    "NeighbourSeen",
    "NetconfChanged",
    "Overrun",
    "RouteGone",
    "RouteOverwritten",
    "RouteSeen",
    "RulesetChanged",
]

# RTNLGRP_LINK, NEIGH, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE, IPV4_NETCONF, IPV6_NETCONF
_ROUTE_GROUPS = (1, 3, 7, 9, 11, 24, 25)
_NFTABLES_GROUP = 7
_NEWGEN = (10 << 8) | 15
_GEN_PROCESS = 2
_GEN_PROGRAM = 3
_NETCONF_IFINDEX = 1
_NETCONF = {2: "forwarding", 3: "rp_filter", 5: "proxy_neigh"}
_AT_ONCE = 4096  # datagrams a socket in one read: the rest waits in the kernel


class LinkSeen(NamedTuple):
    """New or changed."""

    link: Link


class LinkGone(NamedTuple):
    ifindex: int
    name: str


class RouteSeen(NamedTuple):
    """With our protocol number and metric, by whomever."""

    route: Route


class RouteGone(NamedTuple):
    route: Route


class RouteOverwritten(NamedTuple):
    """Somebody's `replace` took the place that a route of ours to this prefix has, or would have."""

    prefix: Prefix


class NeighbourSeen(NamedTuple):
    neighbour: Neighbour


class NeighbourGone(NamedTuple):
    neighbour: Neighbour  # its MAC may be lost: b""


class AddressGone(NamedTuple):
    address: TapAddress


class NetconfChanged(NamedTuple):
    """A setting of an interface (-1: all, -2: default), by its name in `ip netconf`."""

    ifindex: int
    version: int
    settings: tuple[tuple[str, int], ...]


class RulesetChanged(NamedTuple):
    """One transaction of nf_tables that touched tables of ours."""

    pid: int  # netlink port of the socket that did it: compare with our own
    tables: frozenset[tuple[int, str]]  # (family, name)
    process: int
    program: str


Event = (
    LinkSeen | LinkGone | RouteSeen | RouteGone | RouteOverwritten | NeighbourSeen | NeighbourGone | AddressGone
    | NetconfChanged | RulesetChanged
)  # fmt: skip


class Monitor:
    """For one thread. Of what the sockets with the given netlink ports do (ours: 0 is none) nothing is reported but
    changes of links, and deletions of neighbours and addresses, which the kernel does not sign. Make it before the
    first read of what it watches over, or a change in between is missed."""

    def __init__(self, route_port: int = 0, nft_port: int = 0, tables: Collection[str] = ("slash32",)) -> None:
        self._routes = NetlinkSocket(netlink.NETLINK_ROUTE)
        self._ruleset = NetlinkSocket(netlink.NETLINK_NETFILTER)
        self._routes.attach(sieve.route_sieve(route_port))  # before the first message: it does more than save work
        self._ruleset.attach(sieve.ruleset_sieve(nft_port))
        for group in _ROUTE_GROUPS:
            self._routes.join(group)
        self._ruleset.join(_NFTABLES_GROUP)
        # Every message about nf_tables begins with the name of its table, as attribute 1.
        self._needles = [netlink.text(1, table) for table in tables]
        self._touched: dict[int, set[tuple[int, str]]] = {}  # by port: tables of a transaction that is not yet complete

    def filenos(self) -> tuple[int, int]:
        return self._routes.fileno(), self._ruleset.fileno()

    def hear_ruleset(self, on: bool) -> None:
        """Not, while we write thousands of elements: see nft/unheard.py."""
        (self._ruleset.join if on else self._ruleset.leave)(_NFTABLES_GROUP)

    def close(self) -> None:
        self._routes.close()
        self._ruleset.close()

    def read(self) -> list[Event]:
        """What has happened; does not wait. May leave some for the next call. Raises Overrun where something was
        lost: then everything is to be read again."""
        events: list[Event] = []
        try:
            for datagram in self._routes.datagrams(_AT_ONCE):
                for message in netlink.messages(datagram):
                    events.extend(_route_event(message))
            for datagram in self._ruleset.datagrams(_AT_ONCE):
                events.extend(self._ruleset_event(datagram))
        except Overrun:
            self._touched.clear()
            raise
        return events

    def _ruleset_event(self, datagram: bytes) -> Iterator[RulesetChanged]:
        """The end of a transaction comes in a datagram of its own."""
        if int.from_bytes(datagram[4:6], sys.byteorder) == _NEWGEN:
            for message in netlink.messages(datagram):
                touched = self._touched.pop(message.port, None)
                if touched:
                    found = attribute_map(message.body, 4)
                    program = found.get(_GEN_PROGRAM, b"").rstrip(b"\0").decode(errors="replace")
                    process = int.from_bytes(found.get(_GEN_PROCESS, b""), "big")
                    yield RulesetChanged(message.port, frozenset(touched), process, program)
        elif any(needle in datagram for needle in self._needles):  # much cheaper than to parse what others load
            for message in netlink.messages(datagram):
                for needle in self._needles:
                    if message.body.startswith(needle, 4):
                        name = needle[4:].rstrip(b"\0").decode()
                        self._touched.setdefault(message.port, set()).add((message.body[0], name))


def _route_event(message: Message) -> Iterator[Event]:
    kind, body = message.kind, message.body
    if kind == links.RTM_NEWLINK:
        yield LinkSeen(links.decode(body))
    elif kind == links.RTM_DELLINK:
        gone = links.decode(body)
        yield LinkGone(gone.ifindex, gone.name)
    elif kind in (routes.RTM_NEWROUTE, routes.RTM_DELROUTE):
        yield from _of_route(message)
    elif kind in (neighbours.RTM_NEWNEIGH, neighbours.RTM_DELNEIGH):
        neighbour = neighbours.decode_neighbour(body)
        if neighbour is not None:
            yield NeighbourSeen(neighbour) if kind == neighbours.RTM_NEWNEIGH else NeighbourGone(neighbour)
    elif kind == neighbours.RTM_DELADDR:
        address = neighbours.decode_address(body)
        if address is not None:
            yield AddressGone(address)
    elif kind == sieve.RTM_NEWNETCONF:
        yield from _of_netconf(body)


def _of_route(message: Message) -> Iterator[Event]:
    entry = routes.Entry(message.body)
    ours = tuple(entry.ours())
    if ours:
        yield from map(RouteSeen if message.kind == routes.RTM_NEWROUTE else RouteGone, ours)
    elif message.kind == routes.RTM_NEWROUTE and message.flags & NLM_F_REPLACE and entry.competes:
        yield RouteOverwritten(entry.prefix)


def _of_netconf(body: bytes) -> Iterator[NetconfChanged]:
    found = dict(attributes(body, 4))  # a one-byte header, padded
    values = {kind: struct.unpack("=i", data)[0] for kind, data in found.items() if len(data) == 4}
    settings = tuple((_NETCONF[kind], value) for kind, value in values.items() if kind in _NETCONF)
    if settings and _NETCONF_IFINDEX in values:
        yield NetconfChanged(values[_NETCONF_IFINDEX], 4 if body[0] == 2 else 6, settings)
