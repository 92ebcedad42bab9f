# Three ways, one answer: what the model says of a packet and what the kernel does with it, in random worlds whose rules
# are made and loaded as hostd makes and loads them. And the proof that it would be seen if the compiler were wrong.
from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Callable, Iterator

import filters
import pytest
from frames import SYN, Frame, _transport
from netns import Namespace, eventually, run
from nft_rig import Port, _port
from verdict_worlds import PACKETS, STRANGERS, Case, case, key

import hostd.calc
import hostd.compile
from hostd.dataplane.kernel import Kernel
from hostd.desired import ClassChains
from hostd.plan import Limits
from hostd.ruleset import Family, Guard, IcmpIs, InNets, InSet, Ports, Protocol, Rule, Side
from hostd.settle import Settler
from hostd.state import Carrier, Local, Phase
from slash32.net import format_address
from slash32.pack import Kind, ObjectKey
from slash32.policy import PortRange
from slash32.verdict import Packet
from tests.scenes import Commit, Scene

FULL = os.environ.get("SLASH32_COUNTS") == "full"
WORLDS = 100 if FULL else 15
SEED = int(os.environ.get("SLASH32_SEED", "0")) or secrets.randbelow(10**9)
GUESTS = 6
AT_ONCE = 40  # packets: what a socket's buffer surely holds


class Sentinel:
    """All runs on one CPU, whose queue is first in, first out: what is not there when a later frame has crossed the
    host's bridge was dropped."""

    def __init__(self, far: Namespace) -> None:
        self._cpus = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(self._cpus)})
        run("ip", "link", "add", "way", "up", "type", "bridge")
        self._ends = _port(30, "way30", far), _port(31, "way31", far)
        for port in self._ends:
            run("ip", "link", "set", port.name, "master", "way")
        self._count = 0

    def settle(self) -> None:
        self._count += 1
        first, last = self._ends
        frame = last.mac + first.mac + b"\x88\xb5" + self._count.to_bytes(46, "big")
        first.wire.send(frame)
        eventually(lambda: frame in last.heard(), "the sentinel crosses the host's bridge")

    def close(self) -> None:
        os.sched_setaffinity(0, self._cpus)


class Unloadable(AssertionError):
    """The kernel refuses something of a world."""


class Fabric:
    """One host with six taps and an uplink; it is given one world after the other."""

    def __init__(self, far: Namespace) -> None:
        for path in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            with open(f"/proc/sys/net/{path}", "w") as file:
                file.write("1")
        self.taps = {n: _port(n, f"vnet{n}", far) for n in range(1, GUESTS + 1)}
        self.up = _port(20, "up0", far)
        for address in map(format_address, STRANGERS):
            length, version = (32, "-4") if "." in address else (128, "-6")
            known = "lladdr", self.up.mac.hex(":"), "dev", "up0", "nud", "permanent"
            run("ip", version, "neigh", "replace", address, *known)
            run("ip", version, "route", "add", f"{address}/{length}", "dev", "up0")
        self.sentinel = Sentinel(far)
        self.kernel = Kernel(Guard(), owned=False, packet_filter=filters.chosen)
        self.kernel.load()

    def close(self) -> None:
        self.kernel.close()
        self.sentinel.close()

    def load(self, asked: Case) -> None:
        scene = Scene()
        world = asked.world
        objects = [(ObjectKey(Kind.POLICY, p.name), p) for p in world.policies]
        objects += [(ObjectKey(Kind.PROFILE, p.name), p) for p in world.profiles]
        objects += [(ObjectKey(Kind.SET, name), members) for name, members in asked.sets().items()]
        scene.take(Commit(tuple(objects)))
        scene.absorb()
        for number, endpoint in enumerate(world.endpoints, 1):
            carrier = Carrier(f"vnet{number}", self.taps[number].ifindex)
            scene.locals.put(Local(endpoint, "qemu", Phase.LIVE, carrier, endpoint))
        settler = Settler(self.kernel, scene.fresh(), Limits(Guard().group_base), ("vnet",))
        settler.resync()
        if settler.failures():
            raise Unloadable(settler.failures()[0].message)
        run("conntrack", "-F")

    def port_of(self, address: bytes, asked: Case) -> Port:
        for number, endpoint in enumerate(asked.world.endpoints, 1):
            if address in endpoint.addresses or any(p.contains(address) for p in endpoint.prefixes):
                return self.taps[number]
        return self.up

    def send(self, asked: Case) -> set[int]:
        """Which of the packets, by number, came to where they belong; none may come anywhere else."""
        arrived: set[int] = set()
        for first in range(0, PACKETS, AT_ONCE):
            some = range(first, min(first + AT_ONCE, len(asked.packets)))
            for port in self.ports():
                port.heard()
            for number in some:
                packet, _ = asked.packets[number]
                sender = self.port_of(packet.source, asked)
                sender.wire.send(frame_of(packet, number, sender))
            self.sentinel.settle()
            for port in self.ports():
                for number in filter(None, map(number_of, port.heard())):
                    if port is self.port_of(asked.packets[number - 1][0].source, asked):
                        continue  # what it sent itself
                    assert port is self.port_of(asked.packets[number - 1][0].destination, asked)
                    arrived.add(number - 1)
        return arrived

    def ports(self) -> Iterator[Port]:
        yield from (*self.taps.values(), self.up)

    def sees(self, asked: Case) -> bool:
        """That something is wrong, if only because it is refused."""
        try:
            return bool(self.wrong(asked))
        except Unloadable:
            return True

    def wrong(self, asked: Case) -> list[str]:
        """Packets on which kernel and model differ."""
        self.load(asked)
        arrived = self.send(asked)
        return [
            f"seed {asked.seed}: {_shown(packet)}: the model says {word}, the kernel {number in arrived}"
            for number, (packet, word) in enumerate(asked.packets)
            if word != (number in arrived)
        ]


def _shown(packet: Packet) -> str:
    ports = f" {packet.source_port}->{packet.destination_port}" if packet.source_port else f" {packet.icmp or ''}"
    return f"{format_address(packet.source)} -> {format_address(packet.destination)} protocol {packet.protocol}{ports}"


_MARK = b"s32!"


def frame_of(packet: Packet, number: int, sender: Port) -> bytes:
    """It ends with its number."""
    source, target = format_address(packet.source), format_address(packet.destination)
    frame, mark = Frame(sender.mac, sender.host_mac, source, target), _MARK + (number + 1).to_bytes(4, "big")
    if packet.protocol == 17:
        return frame.udp(packet.source_port or 0, packet.destination_port or 0, mark)
    if packet.protocol == 6:
        bare = frame.tcp(packet.source_port or 0, packet.destination_port or 0, SYN)
        body = bare[-20:-4] + bytes(2) + bare[-2:] + mark
        return frame.raw(6, _transport(source, target, 6, body, 16))
    if packet.icmp is not None:
        return frame.icmp(packet.icmp.type, packet.icmp.code or 0, number.to_bytes(4, "big") + mark)
    return frame.raw(packet.protocol, bytes(8) + mark)


def number_of(frame: bytes) -> int | None:
    return int.from_bytes(frame[-4:], "big") if frame[-8:-4] == _MARK else None


@pytest.fixture
def fabric(netns: Namespace, peer: Namespace, packet_filter: str) -> Iterator[Fabric]:
    fabric = Fabric(peer)
    yield fabric
    fabric.close()


def test_the_kernel_does_what_the_model_says(fabric: Fabric) -> None:
    print(f"SLASH32_SEED={SEED}")
    for seed in range(SEED, SEED + WORLDS):
        wrong = fabric.wrong(case(seed))
        assert wrong == [], f"{len(wrong)} of {PACKETS} packets; first: {wrong[0]}"


# -- bugs that it must see ------------------------------------------------------------------------------------------

Compiled = Iterator[Rule]
_compile, _steps = hostd.compile.compile_rule, hostd.calc.steps


def altered(change: Callable[[object], object]) -> Callable[..., Compiled]:
    """The compiler, with each of its matches changed; None takes it away."""

    def compile_rule(*args: object) -> Compiled:
        for rule in _compile(*args):  # type: ignore[arg-type]
            matches = [m for m in map(change, rule.matches) if m is not None]
            yield rule._replace(matches=tuple(matches))  # type: ignore[arg-type]

    return compile_rule


def on(kind: type, change: Callable[..., object]) -> Callable[..., Compiled]:
    return altered(lambda m: change(m) if isinstance(m, kind) else m)


def positive(match: object) -> object:
    return match._replace(negate=False)  # type: ignore[attr-defined]


def shorter(match: Ports) -> object:
    return match._replace(ranges=tuple(PortRange(r.first, max(r.first, r.last - 1)) for r in match.ranges))


def swapped(match: object) -> object:
    if not isinstance(match, Ports | InNets | InSet):
        return match
    return match._replace(side=Side.DST if match.side is Side.SRC else Side.SRC)


def only(keep: Callable[[Rule], bool]) -> Callable[..., Compiled]:
    return lambda *args: (r for r in _compile(*args) if keep(r))


def first_only(*args: object) -> Compiled:
    return itertools.islice(_compile(*args), 1)  # type: ignore[arg-type]


def backwards(*args: object) -> object:
    return [(tier, policies[::-1]) for tier, policies in _steps(*args)]  # type: ignore[arg-type]


def crossed(egress: str, ingress: str) -> object:
    return ClassChains(ingress, egress)


COMPILE, STEPS, PAIR = "hostd.compile.compile_rule", "hostd.calc.steps", "hostd.calc.ClassChains"
BUGS: dict[str, tuple[str, object]] = {
    "notProtocol is protocol": (COMPILE, on(Protocol, positive)),
    "notProtocol is forgotten": (COMPILE, on(Protocol, lambda m: None if m.negate else m)),
    "notPorts is ports": (COMPILE, on(Ports, positive)),
    "the last port of a range is left out": (COMPILE, on(Ports, shorter)),
    "notNets is nets": (COMPILE, on(InNets, positive)),
    "notNets is forgotten": (COMPILE, on(InNets, lambda m: None if m.negate else m)),
    "notSelector is selector": (COMPILE, on(InSet, positive)),
    "notSelector is forgotten": (COMPILE, on(InSet, lambda m: None if m.negate else m)),
    "source is destination": (COMPILE, altered(swapped)),
    "IPv6 is forgotten": (COMPILE, only(lambda r: Family(6) not in r.matches)),
    "what is behind a guest is forgotten": (
        COMPILE, only(lambda r: not any(isinstance(m, InSet) and m.kind.value[:3] == "net" for m in r.matches)),
    ),
    "the code of ICMP is forgotten": (COMPILE, on(IcmpIs, lambda m: m._replace(icmp=m.icmp._replace(code=None)))),
    "notICMP is icmp": (COMPILE, on(IcmpIs, positive)),
    "only the first alternative": (COMPILE, first_only),
    "policies run backwards": (STEPS, backwards),
    "egress is ingress": (PAIR, crossed),
}  # fmt: skip
AGAINST = 40  # worlds at most: in each of them such a bug is likely to be seen


def test_bugs_of_the_compiler_are_seen(fabric: Fabric, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worlds of fixed seeds, so that this proof does not depend on luck."""
    for name, (where, bug) in BUGS.items():
        with monkeypatch.context() as patch:
            patch.setattr(where, bug)
            seen = next((seed for seed in range(AGAINST) if fabric.sees(case(seed))), None)
        assert seen is not None, f"nobody sees that {name}"


def test_a_world_is_what_its_seed_says() -> None:
    one, again = case(7), case(7)
    assert one == again and one != case(8)
    assert {e.key for e in one.world.endpoints} <= {key(n) for n in range(1, GUESTS + 1)}
