# Owns: a host under test in one namespace and everybody else, as bare Ethernet ports, in another. Frames go in by
# hand and come out at other ports. No waiting: all runs on one CPU, whose queue is first in, first out, so a frame that
# is not there when a later sentinel has crossed was dropped.
from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field

import filters
from frames import Frame, same_packet
from netns import Namespace, eventually, run

from hostd.compiler.ruleset import Guard, Rule, Verdict
from hostd.dataplane.nft import Admission
from slash32.net import Address, parse_address, parse_prefix

BASE = Guard().group_base
OPEN, SILENT, DEAF = BASE + 1, BASE + 2, BASE + 3  # all; may not send; may not be spoken to
HOST4, HOST6 = "10.65.255.1", "fd00:65::ffff"
ACCEPT = Rule((), Verdict.ACCEPT)


@dataclass
class Port:
    """The far end of one of the host's interfaces."""

    name: str  # of the host's interface
    number: int
    wire: socket.socket
    ifindex: int
    host_mac: bytes
    v4: str = ""
    v6: str = ""
    behind: tuple[str, ...] = ()
    mac: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.mac = mac(self.number)

    @property
    def admission(self) -> Admission:
        own: tuple[Address, ...] = tuple(parse_address(a) for a in (self.v4, self.v6))
        return Admission(self.ifindex, self.mac, own, tuple(parse_prefix(p) for p in self.behind))

    def to(self, other: Port | str, version: int = 4) -> Frame:
        """An honest packet from this port."""
        own = self.v4 if version == 4 else self.v6
        target = other if isinstance(other, str) else (other.v4 if version == 4 else other.v6)
        return Frame(self.mac, self.host_mac, own, target)

    def heard(self) -> list[bytes]:
        found = []
        while True:
            try:
                found.append(self.wire.recv(2048))
            except BlockingIOError:
                return found


def mac(number: int) -> bytes:
    return bytes.fromhex("5254000000") + bytes([number])


def _port(number: int, name: str, far: Namespace) -> Port:
    run("ip", "link", "add", name, "type", "veth", "peer", "name", f"far{number}", "netns", far.path)
    run("ip", "link", "set", name, "up")
    with far.entered():
        run("ip", "link", "set", f"far{number}", "address", mac(number).hex(":"), "up")
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(3))
        wire.bind((f"far{number}", 3))
    with open(f"/proc/sys/net/ipv6/conf/{name}/accept_dad", "w") as dad:
        dad.write("0")
    shown = run("ip", "-o", "link", "show", name)
    host_mac = bytes.fromhex(shown.split("link/ether ")[1][:17].replace(":", ""))
    return Port(name, number, wire, socket.if_nametoindex(name), host_mac)


class Rig:
    """Guests alice, bob and carol on vnet1 to vnet3; the outside on up0; a bridge as the sentinel's own way."""

    def __init__(self, far: Namespace, guard: Guard | None = None) -> None:
        self._cpus = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(self._cpus)})
        self.far, self._count = far, 0
        for path in ("ipv4/ip_forward", "ipv6/conf/all/forwarding", "ipv4/conf/all/proxy_arp"):
            _sysctl(path, "1")
        for path in ("ipv4/conf/all/rp_filter", "ipv4/conf/default/rp_filter"):
            _sysctl(path, "0")
        for version, own in ((4, HOST4), (6, HOST6)):
            run("ip", f"-{version}", "address", "add", own, "dev", "lo", *(["nodad"] if version == 6 else []))
        self.alice, self.bob, self.carol = (self.guest(n) for n in (1, 2, 3))
        self.outside = self.attach(20, "up0", "203.0.113.2", "2001:db8::2")
        self.outside.behind = ("198.51.100.0/24",)
        run("ip", "link", "add", "way", "up", "type", "bridge")
        self._sentinel = _port(8, "way8", far), _port(9, "way9", far)
        for port in self._sentinel:
            run("ip", "link", "set", port.name, "master", "way")
        run("ip", "route", "add", "198.51.100.0/24", "dev", "up0", "via", "203.0.113.2", "onlink")
        self.table = filters.make(guard)
        self.table.load()
        self._policy()

    def attach(self, number: int, name: str, v4: str, v6: str) -> Port:
        port = _port(number, name, self.far)
        port.v4, port.v6 = v4, v6
        for version, own in ((4, v4), (6, v6)):
            known = "lladdr", port.mac.hex(":"), "dev", name, "nud", "permanent"
            run("ip", f"-{version}", "neigh", "replace", own, *known)
            run("ip", f"-{version}", "route", "add", own, "dev", name)
        return port

    def guest(self, number: int) -> Port:
        port = self.attach(number, f"vnet{number}", f"10.65.0.{number}", f"fd00:65::{number}")
        port.behind = (f"10.66.{number}.0/26", f"fd00:66:{number}::/64")
        run("ip", "address", "add", "fe80::1/64", "dev", port.name, "nodad")
        return port

    def _policy(self) -> None:
        change = self.table.transaction()
        out, into = ("say", "say") if filters.chosen == filters.NFTABLES else ("from", "to")  # iptables asks which way
        for way in {out, into}:
            change.put_chain(f"{way}-all", [ACCEPT], 0)
            change.put_chain(f"{way}-none", [], 0)
        change.put_class(OPEN, f"{out}-all", f"{into}-all", 0)
        change.put_class(SILENT, f"{out}-none", f"{into}-all", 0)
        change.put_class(DEAF, f"{out}-all", f"{into}-none", 0)
        for port in (self.alice, self.bob, self.carol):
            change.admit(port.admission, port.name)
        change.commit()
        for port in (self.alice, self.bob, self.carol):
            self.group(port, OPEN)

    @staticmethod
    def group(port: Port, number: int) -> None:
        run("ip", "link", "set", port.name, "group", str(number))

    def close(self) -> None:
        self.table.close()
        os.sched_setaffinity(0, self._cpus)

    def settle(self) -> None:
        """Everything sent before has come through or was dropped."""
        self._count += 1
        first, last = self._sentinel
        frame = last.mac + first.mac + b"\x88\xb5" + self._count.to_bytes(46, "big")
        first.wire.send(frame)
        eventually(lambda: frame in last.heard(), "the sentinel crosses the host's bridge")

    def crosses(self, sender: Port, frame: bytes, receiver: Port) -> bool:
        receiver.heard()
        sender.wire.send(frame)
        self.settle()
        return any(same_packet(f, frame) for f in receiver.heard())

    def answer(self, sender: Port, frame: bytes) -> list[bytes]:
        """What the host says to the sender upon a frame, and nothing that the sender's own side said."""
        sender.heard()
        sender.wire.send(frame)
        self.settle()
        return [f for f in sender.heard() if f[6:12] == sender.host_mac]


def ask(rig: Rig, chain: str, *rules: Rule) -> None:
    """From here on the chain of host endpoints asks these."""
    change = rig.table.transaction()
    change.put_chain(chain, rules, 0)
    change.commit()


def _sysctl(path: str, value: str) -> None:
    with open(f"/proc/sys/net/{path}", "w") as file:
        file.write(value)


def receives(rig: Rig, sender: Port, frame: bytes, port: int, target: str = "") -> bool:
    """The host's UDP socket gets the frame's payload."""
    family = socket.AF_INET6 if frame[12:14] == b"\x86\xdd" else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if target:
            index = sender.ifindex.to_bytes(4, "little")
            listener.setsockopt(socket.IPPROTO_IPV6, 20, socket.inet_pton(family, target) + index)
        listener.bind(("", port))
        sender.wire.send(frame)
        rig.settle()
        try:
            return bool(listener.recv(2048))
        except BlockingIOError:
            return False
