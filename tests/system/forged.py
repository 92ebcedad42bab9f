# Owns: what a hostile guest sends, as a table: each frame with the rule that stops it, and where it turns up without
# that rule. Pure: text in, frames out.
from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import NamedTuple

from lab import packets

NOBODY = {4: "10.65.200.200", 6: "fd00:65::dead"}
GATEWAY = {4: "169.254.1.1", 6: "fe80::1"}
ALL_NODES, ALL_NODES_MAC = "ff02::1", "33:33:00:00:00:01"
OTHER_MAC = "52:54:00:66:fe:fe"

# What stops a frame: the comment of the rules to take away, or one of these.
SOURCE = "source address or MAC is not the guest's"
INPUT = "guest to host is closed"
KERNEL = "the kernel itself stops it"
NO_REDIRECT4 = "no redirects from a guest"
NO_RA = "no router advertisements, no redirects"
NO_DHCP, NO_DHCP6 = "no DHCP server", "no DHCPv6 server"
NOT_SYN = "a TCP flow begins with SYN"
TWICE = "that rule, and conntrack calls it invalid"
NOTHING = ""  # it is to arrive


class Place(NamedTuple):
    """Where a frame arrives: NEAR the other guest's tap on this host, FAR the uplink, or the HOST itself."""

    name: str


NEAR, FAR, HOST = Place("near"), Place("far"), Place("host")


@dataclass(frozen=True)
class Case:
    name: str
    stopped_by: str
    arrives: Place
    marker: bytes
    frame: str


@dataclass(frozen=True)
class Peer:
    """A party by its addresses: {4: ..., 6: ...}; MAC is what its frames carry."""

    address: dict[int, str]
    mac: str = ""


@dataclass(frozen=True)
class Scene:
    """Who attacks, through which MAC of the tap; a guest on the same host, one on another, the host, the dispatcher."""

    tap_mac: str
    attacker: Peer
    near: Peer
    far: Peer
    host: Peer
    outside: Peer

    def ends(self, version: int, target: str, source: str = "", mac: str = "") -> tuple[str, str, str, str]:
        """MAC to, MAC from, address from, address to: rightful unless told otherwise."""
        return self.tap_mac, mac or self.attacker.mac, source or self.attacker.address[version], target

    @property
    def link_local(self) -> str:
        mac = bytes.fromhex(self.attacker.mac.replace(":", ""))
        return str(IPv6Address(b"\xfe\x80" + bytes(6) + bytes([mac[0] ^ 2]) + mac[1:3] + b"\xff\xfe" + mac[3:]))


def cases(scene: Scene, run: str) -> list[Case]:
    """All frames; RUN makes their markers unique."""
    made = []
    for number, (name, stopped_by, arrives, build) in enumerate(_table(scene)):
        marker = f"<{run}-{number}>".encode()
        made.append(Case(name, stopped_by, arrives, marker, build(marker)))
    return made


Row = tuple[str, str, Place, "Build"]


class Build:
    """A frame that waits for its marker."""

    def __init__(self, kind: str, ends: tuple[str, str, str, str], *numbers: int, vlan: bool = False) -> None:
        self.kind, self.ends, self.numbers, self.vlan = kind, ends, numbers, vlan

    def __call__(self, marker: bytes) -> str:
        frame = self._frame(marker)
        return packets.tagged(frame) if self.vlan else frame

    def _frame(self, marker: bytes) -> str:
        match self.kind:
            case "udp":
                return packets.udp(*self.ends, self.numbers[1], source_port=self.numbers[0], data=marker)
            case "tcp":
                source_port, port, flags = self.numbers
                return packets.tcp(*self.ends, port, source_port=source_port, flags=flags, data=marker)
            case "message":
                return packets.icmp_message(self.ends, self.numbers[0], bytes(12) + marker)
            case "echo":
                kind = 8 if ip_address(self.ends[2]).version == 4 else 128
                return packets.icmp_message(self.ends, kind, struct.pack("!HH", *self.numbers) + marker, hops=64)
            case "redirect":  # of a flow that exists: the answers to our own datagram
                to_mac, mac, source, target = self.ends
                inner = bytes.fromhex(packets.udp(to_mac, mac, target, source, 4000, source_port=9, data=marker))[14:]
                return packets.icmp_message(self.ends, 5, bytes([10, 65, 200, 200]) + inner)
            case "ip":
                return packets.other(self.ends, self.numbers[0], bytes(4) + marker)
        raise ValueError(self.kind)


def _table(scene: Scene) -> Iterator[Row]:
    for version in (4, 6):
        yield from _rightful(scene, version)
        yield from _sources(scene, version)
        yield from _pretenders(scene, version)
        yield from _to_host(scene, version)


def _rightful(scene: Scene, version: int) -> Iterator[Row]:
    """The positive controls: the same kinds of frame with the right source."""
    near, far = scene.ends(version, scene.near.address[version]), scene.ends(version, scene.far.address[version])
    yield f"udp v{version} near", NOTHING, NEAR, Build("udp", near, 4000, 9)
    yield f"udp v{version} near, priority tag", NOTHING, NEAR, Build("udp", near, 4001, 9, vlan=True)
    yield f"udp v{version} far", NOTHING, FAR, Build("udp", far, 4000, 9)
    yield (
        f"udp v{version} outside",
        NOTHING,
        FAR,
        Build("udp", scene.ends(version, scene.outside.address[version]), 1, 9),
    )
    yield f"syn v{version} far", NOTHING, FAR, Build("tcp", far, 4000, 80, 2)
    yield f"echo v{version} near", NOTHING, NEAR, Build("echo", near, 77, 1)
    yield f"vxlan v{version} to a guest", NOTHING, NEAR, Build("udp", near, 4000, 4789)
    yield f"gre v{version} to a guest", NOTHING, NEAR, Build("ip", near, 47)
    if version == 4:
        ends = (packets.BROADCAST, scene.attacker.mac, "0.0.0.0", "255.255.255.255")
        yield "dhcp question", NOTHING, HOST, Build("udp", ends, 68, 67)
    else:
        ends = ("33:33:00:00:00:02", scene.attacker.mac, scene.link_local, "ff02::2")
        yield "router solicitation", NOTHING, HOST, Build("message", ends, 133)


def _sources(scene: Scene, version: int) -> Iterator[Row]:
    """Somebody else's address or MAC."""
    near, far, outside = (peer.address[version] for peer in (scene.near, scene.far, scene.outside))

    def row(name: str, target: str, source: str = "", mac: str = "", *, vlan: bool = False) -> Row:
        place = NEAR if target == near else FAR
        ends = scene.ends(version, target, source, mac)
        return f"udp v{version} as {name} to {place.name}", SOURCE, place, Build("udp", ends, 4000, 9, vlan=vlan)

    yield row("another guest", near, far)
    yield row("another guest", far, near)
    yield row("another guest, with its MAC", far, near, scene.near.mac)
    yield row("another guest, priority tag", far, near, vlan=True)
    yield row("nobody", near, NOBODY[version])
    yield row("nobody", far, NOBODY[version])
    yield row("nobody, to the world", outside, NOBODY[version])
    yield row("another MAC", near, mac=OTHER_MAC)
    yield row("another MAC", far, mac=OTHER_MAC)
    if version == 6:
        neighbour = str(IPv6Address(int(IPv6Address(scene.attacker.address[6])) ^ 0xFFFF))
        yield row("another of its /64", near, neighbour)
        yield row("another of its /64", far, neighbour)
    ends = scene.ends(version, far, near)
    yield f"syn v{version} as another guest", SOURCE, FAR, Build("tcp", ends, 4000, 80, 2)
    yield f"echo v{version} as another guest", SOURCE, FAR, Build("echo", ends, 78, 1)
    for name, source in (("the host", scene.host.address[version]), ("the gateway", GATEWAY[version])):
        ends = scene.ends(version, near, source)
        yield f"udp v{version} as {name}", KERNEL, NEAR, Build("udp", ends, 4000, 9)


def _pretenders(scene: Scene, version: int) -> Iterator[Row]:
    """With the right source, what only routers and servers say."""
    near = scene.ends(version, scene.near.address[version])
    yield f"ack without syn v{version}", NOT_SYN, NEAR, Build("tcp", near, 4009, 80, 0x10)
    if version == 4:
        yield "redirect v4", NO_REDIRECT4, NEAR, Build("redirect", near)
        yield "dhcp server", NO_DHCP, NEAR, Build("udp", near, 67, 68)
        return
    yield "dhcpv6 server", NO_DHCP6, NEAR, Build("udp", near, 547, 546)
    yield "router advertisement to a guest", NO_RA, NEAR, Build("message", near, 134)
    yield "redirect v6", TWICE, NEAR, Build("message", near, 137)


def _to_host(scene: Scene, version: int) -> Iterator[Row]:
    """With the right source, to the host: nothing but DHCP and ND."""

    def row(name: str, build: Build) -> Row:
        return f"{name} v{version} to the host", INPUT, HOST, build

    host = scene.ends(version, scene.host.address[version])
    for name, port in (("vxlan", 4789), ("geneve", 6081), ("linux vxlan", 8472), ("dns", 53)):
        yield row(name, Build("udp", host, 4000, port))
    for name, protocol in (("gre", 47), ("ip in ip", 4), ("6in4", 41)):
        if (version, protocol) != (6, 4):
            yield row(name, Build("ip", host, protocol))
    yield row("ssh", Build("tcp", host, 4000, 22, 2))
    yield row("echo", Build("echo", host, 79, 1))
    if version == 4:
        broadcast = (packets.BROADCAST, scene.attacker.mac, scene.attacker.address[4], "255.255.255.255")
        yield row("dhcp server, broadcast", Build("udp", broadcast, 67, 68))
        return
    gateway = scene.ends(6, GATEWAY[6], scene.link_local)
    yield row("ssh over fe80", Build("tcp", gateway, 4000, 22, 2))
    yield row("ssh to fe80::1 as itself", Build("tcp", scene.ends(6, GATEWAY[6]), 4000, 22, 2))
    yield row("vxlan over fe80", Build("udp", gateway, 4000, 4789))
    yield row("echo over fe80", Build("echo", gateway, 80, 1))
    yield row("redirect over fe80", Build("message", gateway, 137))
    everybody = (ALL_NODES_MAC, scene.attacker.mac, scene.link_local, ALL_NODES)
    yield row("router advertisement", Build("message", everybody, 134))
    yield row("dhcpv6 server", Build("udp", gateway, 547, 546))
