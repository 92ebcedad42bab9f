# Measures: what a packet from guest to guest costs the processor, sent, forwarded and received on one CPU: of an
# established flow, and the first of a flow with one, two and three tiers, on a host of 2, 1,000 and 5,000 endpoints.
# Against the same host with no packet filter (`plain`), and for comparison one whose only rule asks conntrack.
# Bar 10: established at most 1.15, a first packet 1.35 and 0.08 for each further tier; within 10 % whatever is there.
#   python -m bench.packets [--json] [-n N] [--present 2,1000,5000]
from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import random
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterable

from bench.measure import Report, Stats, stats
from bench.rig import BOTH, Host, Namespace, address4, endpoint
from hostd.compiler.world import World
from hostd.dataplane.netlink import NETLINK_NETFILTER, NLM_F_ACK, NetlinkSocket, message
from slash32.net import format_address, parse_prefix
from slash32.pack import AddressSet
from slash32.policy import Action, Peer, Policy, PortRange, Rule, Tier

PACKETS = 8192  # in one run
AT_ONCE = 512
SINK = 2000
ROUNDS = 3  # unmeasured, at first
_PAYLOAD = bytes(64)
_CT_FLUSH = 1 << 8 | 2
_CT_ONLY = "table ip c { chain f { type filter hook forward priority 0; ct state invalid drop; }; }"


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Message(ctypes.Structure):
    """struct mmsghdr"""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint),
        ("iov", ctypes.POINTER(_Iovec)),
        ("iov_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_ssize_t),
        ("sent", ctypes.c_size_t),
    )


class Burst:
    """Whole IPv4 packets, handed to the kernel many at a time: a program's own time is none of a packet's."""

    def __init__(self, s: socket.socket, source: bytes, target: bytes, ports: Iterable[tuple[int, int]]) -> None:
        self._fd = s.fileno()
        self._send = ctypes.CDLL(None, use_errno=True).sendmmsg
        packets = [_udp(source, target, *pair) for pair in ports]
        self._bytes = [ctypes.create_string_buffer(p, len(p)) for p in packets]
        self._to = ctypes.create_string_buffer(struct.pack("=HH4s8x", socket.AF_INET, 0, target), 16)
        self._iovecs = (_Iovec * len(packets))()
        self._messages = (_Message * len(packets))()
        for i, data in enumerate(self._bytes):
            self._iovecs[i] = _Iovec(ctypes.addressof(data), len(packets[i]))
            one = self._messages[i]
            one.name, one.name_length = ctypes.addressof(self._to), 16
            one.iov, one.iov_count = ctypes.pointer(self._iovecs[i]), 1

    def send(self) -> None:
        size, total = ctypes.sizeof(_Message), len(self._messages)
        start = 0
        while start < total:
            sent = self._send(self._fd, ctypes.byref(self._messages, start * size), min(AT_ONCE, total - start), 0)
            if sent <= 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            start += sent


def _udp(source: bytes, target: bytes, sport: int, dport: int) -> bytes:
    udp = struct.pack(">HHHH", sport, dport, 8 + len(_PAYLOAD), 0) + _PAYLOAD
    return struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0, source, target) + udp


class Rack(Host):
    """A host whose endpoints 0 and 1 are in namespaces of their own, at the far ends of veth pairs."""

    def __init__(self, present: int, tiers: int) -> None:
        self.guests = [Namespace(), Namespace()]
        super().__init__(present, _world(tiers))
        for number, guest in enumerate(self.guests):
            host_mac = self._mac(number)
            guest.enter()
            _guest(number, host_mac)
            self.namespace.enter()
        self.flows = NetlinkSocket(NETLINK_NETFILTER)
        self.guests[0].enter()
        self.wire = _raw()
        self.guests[1].enter()
        self.back, self.sink = _raw(), _sink()
        self.namespace.enter()

    def tap(self, number: int) -> int:
        if number >= len(self.guests):
            return super().tap(number)
        there = f"/proc/{os.getpid()}/fd/{self.guests[number]._fd}"
        _ip(f"link add vnet{number} type veth peer name eth0 netns {there}")
        ifindex = socket.if_nametoindex(f"vnet{number}")
        self.kernel.rtnl.set_up(ifindex)
        return ifindex

    @staticmethod
    def _mac(number: int) -> str:
        shown = subprocess.run(["ip", "-o", "link", "show", f"vnet{number}"], check=True, capture_output=True)
        return shown.stdout.decode().split("link/ether ")[1][:17]

    def forget_flows(self) -> None:
        """With no address family: all."""
        seq = self.flows.reserve()
        refused = self.flows.exchange(message(_CT_FLUSH, NLM_F_ACK, seq, bytes(4)), seq)
        if refused:
            raise RuntimeError(f"conntrack: {refused[0]}")

    def arrived(self) -> int:
        """Packets that came to the second guest's socket."""
        found = 0
        with contextlib.suppress(BlockingIOError):
            while self.sink.recv(64):
                found += 1
        return found


def _ip(script: str) -> None:
    subprocess.run(["ip", "-batch", "-"], input=script.encode() + b"\n", check=True)


def _raw() -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW)
    made.setsockopt(socket.SOL_SOCKET, 32, 1 << 27)
    return made


def _sink() -> socket.socket:
    """It can hold a whole run, and is read when that is over."""
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    made.setsockopt(socket.SOL_SOCKET, 33, 1 << 27)
    made.bind(("", SINK))
    return made


def _guest(number: int, host_mac: str) -> None:
    """It has its address, and everything else is behind the host."""
    mac, own = endpoint(number).key.mac, format_address(address4(number))
    _ip(
        f"link set eth0 address {mac} up\nlink set lo up\naddress add {own}/32 dev eth0\n"
        f"neigh replace 169.254.1.1 lladdr {host_mac} dev eth0 nud permanent\n"
        "route add default via 169.254.1.1 dev eth0 onlink"
    )


def _world(tiers: int) -> World:
    """Each tier but the last asks a set and a port, and passes; the last lets guests speak to each other."""
    quarantine = 'quarantine == "yes"'
    ask = Rule(Action.DENY, source=Peer(selector=quarantine))
    telnet = Rule(Action.DENY, 6, destination=Peer(ports=(PortRange(23, 23),)))
    inside = Rule(Action.ALLOW, destination=Peer(nets=(parse_prefix("10.0.0.0/8"),)))
    rules = (ask, telnet, Rule(Action.PASS))
    policies = {
        f"tier{n}": Policy(f"tier{n}", "all()", BOTH, 1.0, rules, rules, tier=f"tier{n}") for n in range(1, tiers)
    }
    policies["last"] = Policy("last", "all()", BOTH, 1.0, (inside,), (inside,))
    sets = {quarantine: AddressSet({bytes([10, 9, 0, n]) for n in range(100)})}
    return World(policies, {}, sets, {}, {}, {f"tier{n}": Tier(f"tier{n}", float(n)) for n in range(1, tiers)})


class Path:
    """One host, and the two ways to send through it."""

    def __init__(self, present: int, tiers: int = 1, text: str | None = None) -> None:
        """`text`: in the place of our packet filter."""
        self.rack = Rack(present, tiers)
        if text is not None:
            subprocess.run(["nft", "-f", "-"], input=f"flush ruleset; {text}\n".encode(), check=True)
        here, there = address4(0), address4(1)
        self._old = Burst(self.rack.wire, here, there, [(1000, SINK)] * PACKETS)
        self._opening = Burst(self.rack.wire, here, there, [(1000, SINK)])
        self._answer = Burst(self.rack.back, there, here, [(SINK, 1000)])
        self._new = Burst(self.rack.wire, here, there, [(1024 + n, SINK) for n in range(PACKETS)])

    def measured(self, established: bool) -> float:
        """Seconds of the processor's time that a packet took: what others do on the machine is not in it."""
        self._before(established)
        burst = self._old if established else self._new
        start = time.thread_time()
        burst.send()
        spent = time.thread_time() - start
        self._after()
        return spent / PACKETS

    def _before(self, established: bool) -> None:
        self.rack.namespace.enter()
        self.rack.forget_flows()
        if established:
            self._opening.send()
            self._answer.send()
        self.rack.arrived()

    def _after(self) -> None:
        arrived = self.rack.arrived()
        if arrived < PACKETS:
            raise RuntimeError(f"{PACKETS - arrived} of {PACKETS} packets were lost")


def _paths(present: list[int]) -> dict[str, Path]:
    few = present[0]
    found = {"plain": Path(few, text=""), "conntrack only": Path(few, text=_CT_ONLY)}
    found |= {f"{n} tiers": Path(few, n) for n in (2, 3)}
    return found | {f"1 tier @{count}": Path(count) for count in present}


def run(n: int, present: list[int], json: bool) -> bool:
    os.sched_setaffinity(0, {random.choice(sorted(os.sched_getaffinity(0)))})
    paths = _paths(present)
    measured = _measured(paths, n)

    def ratio(one: str, two: str) -> float:
        return measured[one].median / measured[two].median

    few = present[0]
    ratios, bars = {}, {}
    for what, limit in (("established", 1.15), ("first", 1.35)):
        for reference in ("plain", "conntrack only"):
            ratios[f"{what} / {reference}"] = ratio(f"{what}, 1 tier @{few}", f"{what}, {reference}")
        bars[f"{what} / plain"] = limit
        for count in present[1:]:
            key = f"{what} @{count} / @{few}"
            ratios[key], bars[key] = ratio(f"{what}, 1 tier @{count}", f"{what}, 1 tier @{few}"), 1.1
    three, one = measured["first, 3 tiers"].median, measured[f"first, 1 tier @{few}"].median
    ratios["a further tier / plain"] = (three - one) / 2 / measured["first, plain"].median
    bars["a further tier / plain"] = 0.08
    return Report("packets", measured, ratios, bars).tell(json)


def _measured(paths: dict[str, Path], n: int) -> dict[str, Stats]:
    """In rounds, each in an order of its own."""
    cases = [(what, name) for what in ("established", "first") for name in paths]
    found: dict[str, list[float]] = {f"{what}, {name}": [] for what, name in cases}
    for number in range(ROUNDS + n):
        random.shuffle(cases)
        for what, name in cases:
            spent = paths[name].measured(established=what == "established")
            if number >= ROUNDS:
                found[f"{what}, {name}"].append(spent)
    return {name: stats(spent) for name, spent in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.packets")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("-n", type=int, default=31)
    parser.add_argument("--present", default="2,1000,5000")
    given = parser.parse_args()
    return 0 if run(given.n, [int(x) for x in given.present.split(",")], given.json) else 1


if __name__ == "__main__":
    sys.exit(main())
