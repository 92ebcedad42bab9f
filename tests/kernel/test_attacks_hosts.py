# What host endpoints must neither open nor close: guests that may speak to their host, machines on its uplink, and an
# operator who denies everything. Each attack works once the rule that stops it is taken away.
from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from filters import let_pass, open_up
from frames import ACK, SYN, SYN_ACK, Frame, solicitation
from hostile import DESTINATION, FRAGMENT, HOP_BY_HOP, extended, fragments
from netns import Namespace, eventually, run
from nft_rig import HOST4, HOST6, OPEN, Rig, ask, receives

from hostd.compiler.ruleset import (
    GUEST_EGRESS,
    HOST_CHAINS,
    HOST_FORWARD_IN,
    HOST_FROM_GUESTS,
    HOST_GUESTS,
    HOST_IN,
    HOST_OUT,
    Family,
    Guard,
    Jump,
    Ports,
    Protocol,
    Rule,
    Side,
    Verdict,
)
from slash32.policy import PortRange

ACCEPT, DROP = Rule((), Verdict.ACCEPT), Rule((), Verdict.DROP)
pytestmark = pytest.mark.usefixtures("packet_filter")
VERSIONS = pytest.mark.parametrize("version", [4, 6])


@pytest.fixture
def rig(netns: Namespace, peer: Namespace) -> Iterator[Rig]:
    made = Rig(peer, Guard(dispatcher_port=7332))
    yield made
    made.close()


def welcome(rig: Rig) -> None:
    """A host endpoint "*" that lets guests say anything to the host."""
    ask(rig, HOST_GUESTS, Rule((), Jump(GUEST_EGRESS)))
    ask(rig, HOST_FROM_GUESTS, ACCEPT)


def close_all(rig: Rig) -> None:
    """An operator who denies everything, everywhere."""
    for chain in HOST_CHAINS:
        ask(rig, chain, DROP)


def own(version: int) -> str:
    return HOST4 if version == 4 else HOST6


# ---- guests that are welcome ----------------------------------------------------------------------------------------


@VERSIONS
@pytest.mark.parametrize("port", [4789, 6081, 8472])
def test_the_welcome_is_none_for_tunnels(rig: Rig, version: int, port: int) -> None:
    welcome(rig)
    to = rig.alice.to(own(version), version)
    assert receives(rig, rig.alice, to.udp(1, port + 1), port + 1)
    assert not receives(rig, rig.alice, to.udp(2, port), port)
    if version == 6:
        assert not receives(rig, rig.alice, extended(to.udp(3, port), HOP_BY_HOP, DESTINATION), port)
        assert receives(rig, rig.alice, extended(to.udp(4, port + 1), HOP_BY_HOP, DESTINATION), port + 1)
    let_pass("guest-input")
    assert receives(rig, rig.alice, to.udp(5, port), port)


@VERSIONS
@pytest.mark.parametrize("number", [4, 41, 47])
def test_the_welcome_is_none_for_encapsulation(rig: Rig, version: int, number: int) -> None:
    welcome(rig)
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    to = rig.alice.to(own(version), version)

    def heard(protocol: int) -> bool:
        with socket.socket(family, socket.SOCK_RAW | socket.SOCK_NONBLOCK, protocol) as end:
            rig.alice.wire.send(to.raw(protocol, b"inside a tunnel" * 4))
            rig.settle()
            try:
                return b"inside" in end.recv(200)
            except BlockingIOError:
                return False

    assert heard(253) and not heard(number)
    let_pass("guest-input")
    assert heard(number)


@VERSIONS
def test_the_welcome_is_for_own_sources(rig: Rig, version: int) -> None:
    welcome(rig)
    honest = rig.alice.to(own(version), version)
    lies = (rig.bob.v4, "0.0.0.0", own(4), "169.254.9.9") if version == 4 else (rig.bob.v6, "::", own(6), "fe80::77")
    assert receives(rig, rig.alice, honest.udp(1, 2000), 2000)
    for number, lie in enumerate(lies):
        assert not receives(rig, rig.alice, honest.but(source=lie).udp(2 + number, 2000), 2000), lie
    open_up()
    assert receives(rig, rig.alice, honest.but(source=lies[0]).udp(9, 2000), 2000)


@VERSIONS
def test_the_welcome_is_for_beginnings(rig: Rig, version: int) -> None:
    welcome(rig)
    to = rig.alice.to(own(version), version)
    assert rig.answer(rig.alice, to.tcp(5000, 2000, SYN))
    for number, flags in enumerate((0, ACK, SYN_ACK, SYN | 1, 0x29)):
        assert not rig.answer(rig.alice, to.tcp(5001 + number, 2000, flags)), hex(flags)
    let_pass("guest-input")
    assert rig.answer(rig.alice, to.tcp(5010, 2000, ACK))


def test_the_welcome_is_not_to_what_listens_on_loopback_only(rig: Rig) -> None:
    """Where somebody has set route_localnet, as kube-proxy does."""
    for name in ("all", rig.alice.name):
        with open(f"/proc/sys/net/ipv4/conf/{name}/route_localnet", "w") as file:
            file.write("1")

    def reaches(port: int) -> bool:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as private:
            private.bind(("127.0.0.1", 2000))
            rig.alice.wire.send(rig.alice.to("127.0.0.1").udp(port, 2000))
            rig.settle()
            try:
                return bool(private.recv(100))
            except BlockingIOError:
                return False

    assert not reaches(1)
    welcome(rig)
    assert receives(rig, rig.alice, rig.alice.to(HOST4).udp(1, 2000), 2000)
    assert not reaches(2)
    let_pass("guest-input")
    assert reaches(3)


@VERSIONS
def test_another_guests_gateway_is_the_host(rig: Rig, version: int) -> None:
    """All addresses of the host are the same door, whichever interface they are on."""
    run("ip", "address", "add", "10.99.0.1/24", "dev", "vnet2")
    run("ip", "address", "add", "fd00:99::1/64", "dev", "up0", "nodad")
    other = "10.99.0.1" if version == 4 else "fd00:99::1"
    assert not receives(rig, rig.alice, rig.alice.to(other, version).udp(1, 2000), 2000)
    only_53 = Rule((Family(version), Protocol(17), Ports(Side.DST, (PortRange(53, 53),))), Verdict.ACCEPT)
    ask(rig, HOST_GUESTS, Rule((), Jump(GUEST_EGRESS)))
    ask(rig, HOST_FROM_GUESTS, only_53, DROP)
    for target in (other, own(version), *(["fe80::1"] if version == 6 else [])):
        to = rig.alice.to(target, version)
        assert not receives(rig, rig.alice, to.udp(2, 2000), 2000), target
        assert receives(rig, rig.alice, to.udp(2, 53), 53), target


# ---- machines on the uplink -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [(HOP_BY_HOP,), (DESTINATION, DESTINATION), (FRAGMENT,)], ids=str)
def test_extension_headers_hide_nothing_from_a_host_endpoint(rig: Rig, headers: tuple[int, ...]) -> None:
    closed = Rule((Family(6), Protocol(17), Ports(Side.DST, (PortRange(2000, 2000),))), Verdict.DROP)
    ask(rig, HOST_IN, closed)
    to = rig.outside.to(HOST6, 6)
    assert not receives(rig, rig.outside, extended(to.udp(1, 2000), *headers), 2000)
    assert receives(rig, rig.outside, extended(to.udp(1, 2001), *headers), 2001)
    ask(rig, HOST_IN)
    assert receives(rig, rig.outside, extended(to.udp(1, 2000), *headers), 2000)


@VERSIONS
def test_fragments_hide_nothing_from_a_host_endpoint(rig: Rig, version: int) -> None:
    closed = Rule((Family(version), Protocol(17), Ports(Side.DST, (PortRange(2000, 2000),))), Verdict.DROP)
    to = rig.outside.to(own(version), version)
    family = socket.AF_INET if version == 4 else socket.AF_INET6

    def arrives(port: int, ident: int) -> bool:
        with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as end:
            end.bind(("", port))
            for piece in fragments(to.udp(1, port, b"A" * 40), 24, ident):
                rig.outside.wire.send(piece)
            rig.settle()
            try:
                return bool(end.recv(100))
            except BlockingIOError:
                return False

    ask(rig, HOST_IN, closed)
    assert not arrives(2000, 1)
    assert arrives(2001, 2)
    ask(rig, HOST_IN)
    assert arrives(2000, 3)


@VERSIONS
def test_a_failsafe_port_is_none_of_a_guests(rig: Rig, version: int) -> None:
    """What is left open of the host is not left open of those behind it."""
    ask(rig, HOST_FORWARD_IN, DROP)
    to = rig.outside.to(rig.alice, version)
    assert not rig.crosses(rig.outside, to.tcp(5000, 22, SYN), rig.alice)
    ask(rig, HOST_FORWARD_IN)
    assert rig.crosses(rig.outside, to.tcp(5000, 22, SYN), rig.alice)


# ---- an operator who denies everything ------------------------------------------------------------------------------


@VERSIONS
def test_ssh_lives_on(rig: Rig, version: int) -> None:
    close_all(rig)
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    to = rig.outside.to(own(version), version)
    with socket.socket(family, socket.SOCK_STREAM) as server:
        server.bind((own(version), 22))
        server.listen()
        (answer,) = rig.answer(rig.outside, to.tcp(5000, 22, SYN, seq=1))
        assert answer[(34 if version == 4 else 54) + 13] == SYN_ACK
    assert not rig.answer(rig.outside, to.tcp(5000, 2222, SYN))


def test_the_host_finds_its_neighbours(rig: Rig) -> None:
    close_all(rig)
    run("ip", "address", "add", "2001:db8::1/64", "dev", "up0", "nodad")
    heard = rig.outside.heard
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as local:
        with pytest.raises(BlockingIOError):
            local.connect(("2001:db8::99", 22))
        eventually(lambda: any(f[12:14] == b"\x86\xdd" and f[20] == 58 and f[54] == 135 for f in heard()), "a question")
    group = Frame(rig.outside.mac, bytes.fromhex("3333ff000001"), rig.outside.v6, "ff02::1:ff00:1", 255)
    assert rig.answer(rig.outside, group.icmp(135, 0, solicitation("2001:db8::1")))


def test_the_host_says_which_groups_it_hears(rig: Rig) -> None:
    """Switches that snoop do not pass on solicitations to who has not reported its groups."""
    close_all(rig)
    rig.outside.heard()

    def reported() -> bool:
        ours = [f for f in rig.outside.heard() if f[6:12] == rig.outside.host_mac and f[12:14] == b"\x86\xdd"]
        return any(f[20] == 0 and f[62] == 143 for f in ours)

    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as member:
        index = socket.if_nametoindex("up0").to_bytes(4, "little")
        group = socket.inet_pton(socket.AF_INET6, "ff02::99")
        member.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group + index)
        eventually(reported, "a report of multicast listeners")


def test_open_stays_open_only_by_the_failsafes(rig: Rig) -> None:
    """The control of them all: else nothing comes in, nothing goes out."""
    close_all(rig)
    for version in (4, 6):
        to = rig.outside.to(own(version), version)
        assert not receives(rig, rig.outside, to.udp(1, 2000), 2000)
        assert not rig.answer(rig.outside, to.icmp(8 if version == 4 else 128))
    rig.group(rig.alice, OPEN)
    assert rig.crosses(rig.alice, rig.alice.to(rig.bob).udp(1, 2), rig.bob), "between guests nobody was asked"
    ask(rig, HOST_IN)
    ask(rig, HOST_OUT)
    assert receives(rig, rig.outside, rig.outside.to(HOST4).udp(1, 2000), 2000)
