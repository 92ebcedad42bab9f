# Owns: the held rtnetlink socket: reads links, routes, neighbours, tap addresses, and writes them in batches.
# May touch: NETLINK_ROUTE. How our routes and foreign ones live side by side stands in routes.py.
from __future__ import annotations

import errno
import socket
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from slash32.net import Address, Prefix, format_address

from ...compiler.forwarding import (
    Add,
    Delete,
    Failure,
    Item,
    Link,
    Neighbour,
    Operation,
    Replace,
    Route,
    SetGroup,
    Take,
    TapAddress,
    Way,
)
from .. import netlink
from ..netlink import NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, KernelRefused, NetlinkSocket
from . import links, neighbours, routes

_BATCH = 2048  # messages per send: bounds the answers that wait in the receive buffer
_GONE = frozenset({errno.ESRCH, errno.ENOENT, errno.EADDRNOTAVAIL, errno.ENODEV, errno.ENXIO})
_NO_WAY = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL, errno.EAGAIN})
_NOTHING: frozenset[int] = frozenset()
_PROTOCOLS = {2: "kernel", 3: "boot", 4: "static", 9: "ra", 11: "zebra", 12: "bird", 16: "dhcp", 186: "bgp"}


class _Request(NamedTuple):
    operation: Operation
    kind: int
    flags: int
    body: bytes
    forgiven: frozenset[int]


class Rtnl:
    """For one thread, in the network namespace it was made in."""

    def __init__(self) -> None:
        self._socket = NetlinkSocket(netlink.NETLINK_ROUTE)

    @property
    def port(self) -> int:
        return self._socket.port

    def close(self) -> None:
        self._socket.close()

    # -- read --

    def links(self) -> dict[int, Link]:
        """By ifindex."""
        found = (links.decode(m.body) for m in self._socket.dump(links.RTM_GETLINK, links.dump_body()))
        return {link.ifindex: link for link in found}

    def link(self, name_or_index: str | int) -> Link | None:
        if name_or_index in ("", 0) or (isinstance(name_or_index, str) and len(name_or_index.encode()) > 15):
            return None
        try:
            answer = self._socket.ask(links.RTM_GETLINK, links.get_body(name_or_index))
        except KernelRefused as refused:
            if refused.errno == errno.ENODEV:
                return None
            raise
        return links.decode(answer[0].body)

    @staticmethod
    def name(ifindex: int) -> str | None:
        """Of a link, or None; a quarter of the time that link() takes."""
        try:
            return socket.if_indextoname(ifindex)
        except OSError:
            return None

    def routes(self) -> set[Route]:
        """Ours, v4 and v6."""
        found: set[Route] = set()
        for family in routes.METRIC:
            try:
                answer = self._socket.dump(routes.RTM_GETROUTE, routes.dump_body(family))
            except KernelRefused as refused:
                if refused.errno != errno.ENOENT:  # the table does not exist before its first route
                    raise
                continue
            for message in answer:
                found.update(routes.Entry(message.body).ours())
        return found

    def way_to(self, address: Address) -> Way:
        """Raises KernelRefused for what is no matter of there being a way."""
        try:
            answer = self._socket.ask(routes.RTM_GETROUTE, routes.way_body(address))
        except KernelRefused as refused:
            if refused.errno in _NO_WAY:
                return Way(False, "")
            raise
        entry = routes.Entry(answer[0].body)
        return Way(entry.is_local, self.name(entry.oif) or "")

    def neighbours(self) -> set[Neighbour]:
        """Ours, v4 and v6."""
        answer = self._socket.dump(neighbours.RTM_GETNEIGH, neighbours.neighbour_dump_body())
        found = (neighbours.decode_neighbour(m.body) for m in answer if neighbours.is_permanent(m.body))
        return {neighbour for neighbour in found if neighbour is not None}

    def tap_addresses(self) -> set[TapAddress]:
        """Ours."""
        answer = self._socket.dump(neighbours.RTM_GETADDR, neighbours.address_dump_body())
        found = (neighbours.decode_address(m.body) for m in answer)
        return {address for address in found if address is not None}

    # -- write --

    def set_group(self, ifindex: int, group: int) -> None:
        """Raises KernelRefused."""
        self._one(links.RTM_SETLINK, links.group_body(ifindex, group))

    def set_up(self, ifindex: int) -> None:
        """Raises KernelRefused."""
        self._one(links.RTM_SETLINK, links.up_body(ifindex))

    def change(self, operations: Sequence[Operation]) -> list[Failure]:
        """Does all of them, in order, in one send. One that fails stops none of the others."""
        requests = _requests(operations)
        failures: list[Failure] = []
        for start in range(0, len(requests), _BATCH):
            failures += self._send(requests[start : start + _BATCH])
        clashes = [f for f in failures if _is_clash(f)]
        if not clashes:
            return failures
        return [f for f in failures if not _is_clash(f)] + self._settle([f.operation for f in clashes])

    def _one(self, kind: int, body: bytes) -> None:
        seq = self._socket.reserve()
        for refusal in self._socket.exchange(netlink.message(kind, NLM_F_ACK, seq, body), seq):
            raise KernelRefused(refusal)

    def _send(self, requests: Sequence[_Request]) -> list[Failure]:
        first = self._socket.reserve(len(requests))
        last = first + len(requests) - 1
        parts = [netlink.message(r.kind, r.flags, seq, r.body) for seq, r in enumerate(requests[:-1], first)]
        parts.append(netlink.message(requests[-1].kind, requests[-1].flags | NLM_F_ACK, last, requests[-1].body))
        failures: list[Failure] = []
        for refusal in self._socket.exchange(b"".join(parts), last):
            request = requests[refusal.seq - first]
            if refusal.errno not in request.forgiven:
                failures.append(Failure(request.operation, refusal.errno, f"{_words(request.operation)}: {refusal}"))
        return failures

    def _settle(self, clashes: Sequence[Operation]) -> list[Failure]:
        """Routes whose place was taken: one of ours gives way, a foreign one stays and is reported."""
        present: dict[Prefix, list[Route]] = {}
        for route in self.routes():
            present.setdefault(route.prefix, []).append(route)
        failures: list[Failure] = []
        requests: list[_Request] = []
        for clash in clashes:
            assert isinstance(clash, Add) and isinstance(clash.item, Route)
            mine = present.get(clash.item.prefix, [])
            if not mine:
                failures.append(Failure(clash, errno.EEXIST, self._conflict(clash.item)))
            elif not any(_same(clash.item, route) for route in mine):
                requests += _replacement(clash, mine, clash.item)
        for start in range(0, len(requests), _BATCH):
            failures += self._send(requests[start : start + _BATCH])
        return failures

    def _conflict(self, route: Route) -> str:
        prefix = route.prefix
        try:
            answer = self._socket.ask(routes.RTM_GETROUTE, routes.match_body(prefix.network))
        except KernelRefused:  # it went meanwhile, or hides behind a rule: then without its name
            answer = []
        for entry in (routes.Entry(m.body) for m in answer):
            if entry.competes and entry.prefix == prefix:
                protocol = _PROTOCOLS.get(entry.protocol, entry.protocol)
                return f"route {prefix} exists already, proto {protocol}{_way(entry.via, entry.oif)}: remove it"
        return f"route {prefix} exists already and is not ours: see `ip route show {prefix}` and remove it"


def _is_clash(failure: Failure) -> bool:
    operation = failure.operation
    return failure.errno == errno.EEXIST and isinstance(operation, Add) and isinstance(operation.item, Route)


def _same(wanted: Route, present: Route) -> bool:
    return wanted == present or (not wanted.oif and wanted == present._replace(oif=0))


def _replacement(operation: Operation, old: Sequence[Route], new: Route) -> list[_Request]:
    append = _Request(
        operation, routes.RTM_NEWROUTE, NLM_F_CREATE | NLM_F_APPEND, routes.add_body(new), frozenset({errno.EEXIST})
    )
    old = [route for route in old if route != new]
    removals = [_Request(operation, routes.RTM_DELROUTE, 0, routes.delete_body(route), _GONE) for route in old]
    if any((route.oif, route.via) == (new.oif, new.via) for route in old):  # deletion could not tell them apart
        return [*removals, append]
    return [append, *removals]


def _requests(operations: Iterable[Operation]) -> list[_Request]:
    requests: list[_Request] = []
    for operation in operations:
        if isinstance(operation, Add):
            requests.append(_addition(operation, operation.item))
        elif isinstance(operation, Delete):
            requests.append(_deletion(operation, operation.item))
        elif isinstance(operation, Take):
            flags = NLM_F_CREATE | NLM_F_REPLACE
            body = routes.add_body(operation.item)
            requests.append(_Request(operation, routes.RTM_NEWROUTE, flags, body, _NOTHING))
        elif isinstance(operation, Replace):
            requests += _replacement(operation, [operation.old], operation.new)
        else:
            forgiven = _NOTHING if operation.group else _GONE  # closing a link that is gone
            body = links.group_body(operation.ifindex, operation.group)
            requests.append(_Request(operation, links.RTM_SETLINK, 0, body, forgiven))
    return requests


def _addition(operation: Add, item: Item) -> _Request:
    if isinstance(item, Route):
        return _Request(operation, routes.RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, routes.add_body(item), _NOTHING)
    flags = NLM_F_CREATE | NLM_F_REPLACE
    if isinstance(item, Neighbour):
        return _Request(operation, neighbours.RTM_NEWNEIGH, flags, neighbours.neighbour_body(item), _NOTHING)
    return _Request(operation, neighbours.RTM_NEWADDR, flags, neighbours.address_body(item), _NOTHING)


def _deletion(operation: Delete, item: Item) -> _Request:
    if isinstance(item, Route):
        return _Request(operation, routes.RTM_DELROUTE, 0, routes.delete_body(item), _GONE)
    if isinstance(item, Neighbour):
        return _Request(operation, neighbours.RTM_DELNEIGH, 0, neighbours.neighbour_delete_body(item), _GONE)
    return _Request(operation, neighbours.RTM_DELADDR, 0, neighbours.address_body(item), _GONE)


def _device(ifindex: int) -> str:
    return Rtnl.name(ifindex) or f"#{ifindex} (gone)"


def _way(via: bytes | None, oif: int) -> str:
    return (f" via {format_address(via)}" if via else "") + (f" dev {_device(oif)}" if oif else "")


def _words(operation: Operation) -> str:
    match operation:
        case SetGroup(ifindex, group):
            return f"group {group:#x} dev {_device(ifindex)}"
        case Add(item) | Delete(item) | Replace(_, item) | Take(item):
            verb = "delete " if isinstance(operation, Delete) else ""
    match item:
        case Route():
            return f"{verb}route {item.prefix}{_way(item.via, item.oif)}"
        case Neighbour():
            mac = item.mac.hex(":")
            return f"{verb}neighbour {format_address(item.address)} lladdr {mac} dev {_device(item.ifindex)}"
        case TapAddress():
            return f"{verb}address {format_address(item.address)}/{item.length} dev {_device(item.ifindex)}"
