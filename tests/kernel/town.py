# Owns: a host with its real door to the kernel in one namespace and guests with real sockets in their own: what the
# dispatcher says goes in at one end, packets at the other.
from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from typing import Protocol

import filters
from netns import Namespace, eventually, run

from hostd.change.plan import Limits
from hostd.change.settle import Settler
from hostd.compiler.desired import Dirty
from hostd.compiler.ruleset import Guard
from hostd.dataplane.kernel import Kernel
from hostd.state import Carrier, Local, Phase
from slash32 import selector as selectors
from slash32.model import Endpoint
from slash32.net import parse_address
from slash32.pack import AddressSet, Kind, ObjectKey, Value
from slash32.policy import Policy, Profile
from slash32.verdict import effective_labels
from tests.scenes import Commit, Run, Scene, key

TAP = 100  # interface indexes of guests begin here


class Guest:
    """Number n has 10.65.0.n and fd00:65::n."""

    def __init__(self, number: int, role: str) -> None:
        self.number, self.role = number, role
        self.v4, self.v6 = f"10.65.0.{number}", f"fd00:65::{number}"
        self.space = Namespace()

    def plug(self) -> None:
        tap, mac = f"vnet{self.number}", f"52:54:00:00:00:{self.number:02x}"
        words = f"link add {tap} index {TAP + self.number} type veth peer name eth0 netns {self.space.path}"
        run("ip", *words.split())
        run("ip", "link", "set", tap, "up")
        with self.space.entered():
            for words in (
                f"link set eth0 address {mac} up", f"address add {self.v4}/32 dev eth0",
                f"address add {self.v6}/128 dev eth0 nodad", "route add 169.254.1.1 dev eth0",
                "route add default via 169.254.1.1", "-6 route add default via fe80::1 dev eth0",
            ):  # fmt: skip
                run("ip", *words.split())

    def endpoint(self, **labels: str) -> Endpoint:
        own = (parse_address(self.v4), parse_address(self.v6))
        return Endpoint(key(self.number), f"guest{self.number}", labels or {"role": self.role}, ("open",), own)

    def socket(self, version: int, kind: int) -> socket.socket:
        with self.space.entered():
            made = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, kind)
        made.setblocking(False)
        return made

    def address(self, version: int) -> str:
        return self.v4 if version == 4 else self.v6


class Town:
    """In the namespace that is entered. All runs on one CPU, first in, first out."""

    def __init__(self, *roles: str) -> None:
        self._cpus = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(self._cpus)})
        for path in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            with open(f"/proc/sys/net/{path}", "w") as file:
                file.write("1")
        self.guests = [Guest(number, role) for number, role in enumerate(roles, 1)]
        for guest in self.guests:
            guest.plug()
        self.scene, self.kernel = Scene(), Kernel(Guard(), owned=False, packet_filter=filters.chosen)
        self.kernel.load()
        self.settler = Settler(self.kernel, self.scene.calc, Limits(Guard().group_base), ("vnet",))
        self.settler.resync()
        self.selectors: set[str] = set()
        self.items: dict[tuple[Kind, str], Policy | Profile] = {}
        for guest in self.guests:
            self.label(guest)

    def close(self) -> None:
        self.kernel.close()
        for guest in self.guests:
            guest.space.close()
        os.sched_setaffinity(0, self._cpus)

    # -- what the dispatcher and libvirt say ----------------------------------------------------------------------

    def label(self, guest: Guest, **labels: str) -> None:
        endpoint = guest.endpoint(**labels)
        tap = Carrier(f"vnet{guest.number}", TAP + guest.number)
        self.scene.take(Run(guest.number, Local(endpoint, "qemu", Phase.LIVE, tap, endpoint)))
        self.tell({})

    def put(self, *items: Policy | Profile) -> None:
        kinds = {Policy: Kind.POLICY, Profile: Kind.PROFILE}
        self.tell({ObjectKey(kinds[type(item)], item.name): item for item in items})

    def gone(self, kind: Kind, name: str) -> None:
        self.tell({ObjectKey(kind, name): None})

    def tell(self, values: dict[ObjectKey, Value | None]) -> None:
        """With what the selectors find then, as the dispatcher does."""
        for at, value in values.items():
            self.items.pop((at.kind, str(at.name)), None)
            if isinstance(value, Policy | Profile):
                self.items[at.kind, str(at.name)] = value
                peers = [p for r in (*value.ingress, *value.egress) for p in (r.source, r.destination)]
                self.selectors |= {s for p in peers for s in (p.selector, p.not_selector) if s is not None}
        sets: dict[ObjectKey, Value | None] = {ObjectKey(Kind.SET, s): self._members(s) for s in self.selectors}
        self.scene.take(Commit(tuple({**values, **sets}.items())))
        self.scene.rest()
        dirty, self.scene.dirty = self.scene.dirty, Dirty()
        assert self.settler.settle(dirty) == []

    def start(self) -> Settler:
        """hostd starts again, and remembers nothing but what it was told."""
        calc = self.scene.fresh()
        self.settler = Settler(self.kernel, calc, Limits(Guard().group_base), ("vnet",))
        self.scene.calc = calc
        return self.settler

    def endpoints(self) -> list[Endpoint]:
        return [local.endpoint for local in self.scene.locals]

    def _members(self, selector: str) -> AddressSet:
        profiles = {i.name: i for i in self.items.values() if isinstance(i, Profile)}
        found = (e for e in self.endpoints() if selectors.parse(selector).matches(effective_labels(e, profiles)))
        return AddressSet({address for endpoint in found for address in endpoint.addresses})


class Somebody(Protocol):
    def socket(self, version: int, kind: int, /) -> socket.socket: ...
    def address(self, version: int, /) -> str: ...


class Session:
    """A TCP connection."""

    def __init__(self, client: Somebody, server: Somebody, port: int, version: int) -> None:
        listener = server.socket(version, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((server.address(version), port))
        listener.listen()
        self.client = client.socket(version, socket.SOCK_STREAM)
        with contextlib.suppress(BlockingIOError):
            self.client.connect((server.address(version), port))
        accepted: list[socket.socket] = []
        eventually(lambda: accepted.extend(_accepted(listener)) or accepted, "the connection is accepted")
        self.server = accepted[0]
        self.server.setblocking(False)
        listener.close()
        self.sent = self.heard = 0

    def push(self) -> None:
        """The server says something."""
        self.sent += self.server.send(b"x" * 100)

    def listen(self) -> int:
        """What the client has heard since."""
        with contextlib.suppress(BlockingIOError):
            while data := self.client.recv(1 << 16):
                self.heard += len(data)
        return self.heard

    def lives(self) -> bool:
        """Both ways, with nothing lost on the way."""
        self.push()
        eventually(lambda: self.listen() == self.sent, "what the server says arrives")
        self.client.send(b"y" * 100)
        got = bytearray()
        eventually(lambda: got.extend(_read(self.server)) or len(got) == 100, "what the client says arrives")
        return all(_retransmitted(end) == 0 for end in (self.client, self.server))

    def close(self) -> None:
        self.client.close()
        self.server.close()


def _accepted(listener: socket.socket) -> Iterator[socket.socket]:
    with contextlib.suppress(BlockingIOError):
        yield listener.accept()[0]


def _read(end: socket.socket) -> bytes:
    with contextlib.suppress(BlockingIOError):
        return end.recv(1 << 16)
    return b""


def _retransmitted(end: socket.socket) -> int:
    """Segments, ever (tcpi_total_retrans)."""
    return int.from_bytes(end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)[100:104], "little")


def tracked() -> set[tuple[str, str, str, int]]:
    """(protocol, source, destination, destination port) of every tracked flow that has ports."""
    listed = run("conntrack", "-L", "-f", "ipv4") + run("conntrack", "-L", "-f", "ipv6")
    found = re.findall(r"(?m)^(\w+) .*? src=(\S+) dst=(\S+) sport=\d+ dport=(\d+)", listed)
    return {(protocol, source, destination, int(port)) for protocol, source, destination, port in found}
