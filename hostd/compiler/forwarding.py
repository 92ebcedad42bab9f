# Owns: how a host's kernel forwards to its guests, as data: links, routes, neighbours, tap addresses, and the
# operations on them. hostd.dataplane.rtnl writes and reads them. Pure.
from __future__ import annotations

from typing import NamedTuple

from slash32.net import Address, Prefix

LOOPBACK = 1  # the ifindex of lo, in every network namespace
GATEWAY4 = bytes([169, 254, 1, 1])
GATEWAY6 = bytes.fromhex("fe80000000000000 0000000000000001")


class Link(NamedTuple):
    ifindex: int
    name: str
    group: int  # the device group
    mac: bytes
    up: bool  # administratively
    master: int = 0  # ifindex of the bridge, bond or vrf it is enslaved to; 0: none
    kind: str = ""  # "tun", "veth", "bridge", ...; "" is hardware


class Route(NamedTuple):
    """A unicast route of ours: table main, protocol 132."""

    prefix: Prefix
    oif: int  # 0, when written: the kernel finds what reaches `via`
    via: Address | None = None  # None: directly on the link
    onlink: bool = False  # `via` is on the link although no route says so (a prefix behind a guest)


class Way(NamedTuple):
    """To an address, from this host: it is its own, or is sent to through this interface ("": it is not)."""

    local: bool
    interface: str


class Neighbour(NamedTuple):
    """A permanent entry of ours."""

    ifindex: int
    address: Address
    mac: bytes


class TapAddress(NamedTuple):
    """An IPv6 address of ours on a link, usable at once (no duplicate address detection)."""

    ifindex: int
    address: Address = GATEWAY6
    length: int = 64


Item = Route | Neighbour | TapAddress


class Add(NamedTuple):
    """Makes it so: what is there with other values is replaced, what is there already is fine."""

    item: Item


class Delete(NamedTuple):
    """Exactly this one; missing is fine."""

    item: Item


class Replace(NamedTuple):
    """The same prefix, another way, with no moment in between that has no route."""

    old: Route
    new: Route


class Take(NamedTuple):
    """Adds a route in place of the foreign one that took its place."""

    item: Route


class SetGroup(NamedTuple):
    ifindex: int
    group: int


Operation = Add | Delete | Replace | Take | SetGroup


class Failure(NamedTuple):
    operation: Operation
    errno: int
    message: str  # one line, for people


# Proxy ARP answers only for what is routed through another device, so the guests' v4 gateway must be routed somewhere.
GATEWAY4_ROUTE = Route(Prefix(GATEWAY4, 32), LOOPBACK)
