# Owns: what the benchmarks run on: network namespaces, a host with many endpoints on real taps through the product's
# own parts, and the floor: the very bytes that the product sent, sent again with no program around them.
from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import time
from collections.abc import Iterable, Iterator

from hostd.change.plan import Limits
from hostd.change.settle import Settler
from hostd.compiler.calc import Calculation
from hostd.compiler.desired import Dirty
from hostd.compiler.forwarding import Failure, SetGroup
from hostd.compiler.ruleset import Guard
from hostd.compiler.world import World
from hostd.dataplane import sysctl, uplink
from hostd.dataplane.filter import NFTABLES
from hostd.dataplane.groups import Groups
from hostd.dataplane.kernel import Kernel
from hostd.dataplane.monitor import Monitor
from hostd.dataplane.netlink import NetlinkSocket
from hostd.dataplane.nft.transaction import NOTHING
from hostd.state import Carrier, Local, Locals, Phase
from slash32.model import Endpoint, EndpointKey
from slash32.net import parse_prefix
from slash32.pack import AddressSet
from slash32.policy import Action, Direction, Peer, Policy, PortRange, Rule, Tier

_CLONE_NEWNET = 0x40000000
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_TUNSETIFF, _TUNSETPERSIST = 0x400454CA, 0x400454CB
_TAP_NO_PI = 0x1002
_libc = ctypes.CDLL(None, use_errno=True)
_ASKS = bytes((16, 10)), bytes((7, 6))  # nf_tables' generation, a set of ipset: what is asked changes nothing
ROLES = ("web", "app", "db")
BOTH = (Direction.INGRESS, Direction.EGRESS)
NOBODY = 9  # the dispatcher's port, where a benchmark needs none
GUARD = Guard(dispatcher_port=NOBODY)


def _checked(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Namespace:
    """A fresh network namespace, entered at once; gone with the process."""

    def __init__(self) -> None:
        _checked(_libc.unshare(_CLONE_NEWNET))
        self._fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    def enter(self) -> None:
        _checked(_libc.setns(self._fd, _CLONE_NEWNET))

    def enter_alone(self) -> None:
        """Where no hostd runs."""
        self.enter()
        only(None)


def sysfs() -> str:
    """That of the namespace that is entered now, mounted nowhere."""
    context = _libc.syscall(_FSOPEN, b"sysfs", 0)
    _checked(_libc.syscall(_FSCONFIG, context, 6, None, None, 0))
    return f"/proc/self/fd/{_libc.syscall(_FSMOUNT, context, 0, 0)}"


def make_tap(name: str) -> int:
    """The ifindex of a tap that this process holds open, as QEMU does: it has a carrier. It outlives the descriptor,
    so that a namespace takes all of them along at once: one by one they take 20 ms each."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP_NO_PI))
    fcntl.ioctl(fd, _TUNSETPERSIST, 1)
    return socket.if_nametoindex(name)


def _uplink() -> None:
    """A host has an address of its own; without one the kernel looks through all links for a route's source."""
    script = "link add up0 up type veth peer name up1\nlink set up1 up\naddress add 192.0.2.1/24 dev up0\n"
    subprocess.run(["ip", "-batch", "-"], input=script.encode(), check=True)


def address4(number: int) -> bytes:
    return (0x0A400000 + number).to_bytes(4, "big")


def endpoint(number: int) -> Endpoint:
    """One v4 and one v6 address; its role decides its class of policies."""
    key = EndpointKey(f"00000000-0000-4000-8000-{number:012x}", f"52:54:00:{number >> 16:02x}:{number >> 8 & 255:02x}"
                      f":{number & 255:02x}")  # fmt: skip
    labels = {"role": ROLES[number % len(ROLES)], "env": "prod"}
    own = (address4(number), bytes.fromhex("fd006500000000000000000000") + number.to_bytes(3, "big"))
    return Endpoint(key, f"guest{number}", labels, (), own)


def local(number: int, ifindex: int) -> Local:
    one = endpoint(number)
    return Local(one, "qemu", Phase.LIVE, Carrier(f"vnet{number}", ifindex), one)


SECURITY = Tier("security", 10.0)


def policies() -> dict[str, Policy]:
    """As in examples/: web from anywhere, app from web, db from app; before them a tier of the platform's, which logs
    and denies telnet and passes everything else on."""
    def allow(port: int, source: str | None) -> Rule:
        return Rule(Action.ALLOW, 6, source=Peer(selector=source), destination=Peer(ports=(PortRange(port, port),)))

    inside = Rule(Action.ALLOW, destination=Peer(nets=(parse_prefix("10.0.0.0/8"), parse_prefix("fd00:65::/64"))))
    asked = {"web": allow(80, None), "app": allow(8080, 'role == "web"'), "db": allow(5432, 'role == "app"')}
    telnet = Peer(ports=(PortRange(23, 23),))
    no_telnet = tuple(Rule(action, 6, destination=telnet) for action in (Action.LOG, Action.DENY))
    platform = Policy("platform", "all()", BOTH, 1.0, (*no_telnet, Rule(Action.PASS)), (Rule(Action.PASS),),
                      SECURITY.name)  # fmt: skip
    return {"platform": platform} | {
        role: Policy(role, f'role == "{role}"', BOTH, 100.0, (rule, allow(22, None)), (inside,))
        for role, rule in asked.items()
    }


def staged() -> dict[str, Policy]:
    """What somebody tries out: ssh from the application's guests only."""
    ssh = Peer(ports=(PortRange(22, 22),))
    rules = Rule(Action.ALLOW, 6, source=Peer(selector='role == "app"'), destination=ssh), Rule(Action.DENY, 6,
                 destination=ssh)  # fmt: skip
    return {"tighter-ssh": Policy("tighter-ssh", "has(role)", BOTH[:1], 50.0, rules, staged=True)}


def world(members: int) -> World:
    found: dict[str, AddressSet] = {f'role == "{role}"': AddressSet() for role in ROLES[:2]}
    for number in range(members):
        for value in (v for s, v in found.items() if ROLES[number % len(ROLES)] in s):
            value.addresses.update(endpoint(number).addresses)
    return World(policies(), {}, found, {}, {}, {SECURITY.name: SECURITY}, staged())


_hosts: list[Host] = []


def only(listening: Host | None) -> None:
    """As on a machine of its own: the kernel asks who listens to nf_tables whatever the namespace, and tells of each
    element as long as anybody does. A peer's machine has no slash32."""
    for host in _hosts:
        host.monitor.hear_ruleset(host is listening)


class Host:
    """One hypervisor in a namespace of its own with `present` endpoints, and the tap of one more."""

    packet_filter = NFTABLES  # of those that are made from now on

    def __init__(self, present: int, given: World | None = None) -> None:
        self.namespace = Namespace()
        self.kernel = Kernel(GUARD, owned=False, packet_filter=self.packet_filter)
        links = f"{sysfs()}/class/net"  # /sys is that of the first namespace
        self.kernel.groups = Groups(lambda op: self.kernel.rtnl.change([op]), links)
        self.kernel.rtnl.set_up(1)
        _uplink()
        uplink.switch_on([], uplink.Forwarding(False, False))
        self.locals = Locals({})
        for number in range(present):
            self.locals.put(local(number, self.tap(number)))
        self.monitor = Monitor(self.kernel.rtnl.port, self.kernel.table.port)
        self.kernel.table.heard_by(self.monitor.hear_ruleset)
        self.world = given or world(present)
        self.calc = Calculation.build("h1", self.world, self.locals)
        self.settler = Settler(self.kernel, self.calc, Limits(self.kernel.guard.group_base), ("vnet",))
        self._settle_first()
        self.drain()
        _hosts.append(self)

    def enter(self) -> None:
        self.namespace.enter()
        only(self)

    def _settle_first(self) -> None:
        """Thousands of fresh links keep changing for a while, which tears a read."""
        deadline = time.monotonic() + 120
        while problems := self.settler.resync():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{problems[0]}")
            time.sleep(0.5)

    def tap(self, number: int) -> int:
        ifindex = make_tap(f"vnet{number}")
        self.kernel.rtnl.set_up(ifindex)
        return ifindex

    def drain(self) -> None:
        while self.monitor.read():
            pass

    def settle(self, dirty: Dirty) -> None:
        problems = self.settler.settle(dirty)
        if problems:
            raise RuntimeError(f"{problems[0]}")

    def add(self, one: Local) -> None:
        self.locals.put(one)
        self.settle(self.calc.local_changed(one.endpoint.key))

    def remove(self, one: Local) -> None:
        self.locals.remove(one.endpoint.key)
        self.settle(self.calc.local_changed(one.endpoint.key))


class Recording:
    """What the product sent on its netlink sockets, and the sysctls it wrote, in order; `replay` does it again."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, bytes]] = []  # protocol, batch
        self._sysctls: dict[str, list[tuple[str, bytes]]] = {}  # by folder
        self._groups: list[tuple[str, int]] = []  # of links

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        send, write_all, write_group = NetlinkSocket._send, sysctl.write_all, Groups.set

        def sent(which: NetlinkSocket, data: bytes) -> None:
            if data != NOTHING and data[4:6] not in _ASKS:
                self._steps.append((which._socket.proto, bytes(data)))
            send(which, data)

        def written(settings: Iterable[sysctl.Setting]) -> None:
            for key, value in (found := list(settings)):
                folder, _, name = f"/proc/sys/net/{key}".rpartition("/")
                self._sysctls.setdefault(folder, []).append((name, value.encode()))
            write_all(found)

        def grouped(which: Groups, op: SetGroup) -> list[Failure]:
            self._groups.append((f"{which.links}/{socket.if_indextoname(op.ifindex)}/netdev_group", op.group))
            return write_group(which, op)

        NetlinkSocket._send, sysctl.write_all = sent, written  # type: ignore[method-assign,assignment]
        Groups.set = grouped  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            NetlinkSocket._send, sysctl.write_all = send, write_all  # type: ignore[method-assign]
            Groups.set = write_group  # type: ignore[method-assign]

    def dumps(self) -> list[tuple[int, bytes]]:
        """The requests for whole tables, each once whatever its number."""
        found = {(p, m[:8] + m[12:]): (p, m) for p, m in self._steps if int.from_bytes(m[6:8], "little") & 0x300}
        return list(found.values())

    def replay(self, sockets: dict[int, socket.socket], only: int | None = None) -> None:
        """The sysctls come after the packet filter, as in the product."""
        pending = self._sysctls if only is None else {}
        for protocol, batch in self._steps:
            if only not in (None, protocol):
                continue
            if protocol == 0:
                _write(pending)
                pending = {}
            _exchange(sockets[protocol], batch)
        _write(pending)
        for path, group in self._groups if only is None else ():
            fd = os.open(path, os.O_WRONLY)
            os.write(fd, b"%d" % group)
            os.close(fd)


def raw_sockets() -> dict[int, socket.socket]:
    """Of the present namespace, by protocol."""
    found = {}
    for protocol in (0, 12):
        s = found[protocol] = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        s.setsockopt(270, 10, 1)
        for option in (32, 33):
            s.setsockopt(socket.SOL_SOCKET, option, 1 << 27)
        if protocol == 0:
            s.setsockopt(270, 12, 1)
        s.bind((0, 0))
    return found


def _write(settings: dict[str, list[tuple[str, bytes]]]) -> None:
    for folder, found in settings.items():
        way = os.open(folder, os.O_PATH)
        for name, value in found:
            fd = os.open(name, os.O_WRONLY, dir_fd=way)
            os.write(fd, value)
            os.close(fd)
        os.close(way)


def _exchange(s: socket.socket, batch: bytes) -> None:
    """The acknowledgement of the last message, or the first error."""
    s.send(batch)
    reply = s.recv(1 << 16)
    code = struct.unpack_from("=i", reply, 16)[0]
    if code:
        raise OSError(-code, f"the floor: {os.strerror(-code)}")
