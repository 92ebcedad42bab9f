# Host endpoints' chains: what ends at the host, begins there or is forwarded by it, asked by real packets. Whatever is
# dropped passes once the chain that drops it is empty.
from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence

import pytest
from frames import BROADCAST, SYN, Frame, solicitation
from netns import Namespace, run
from nft_rig import HOST4, HOST6, OPEN, SILENT, Port, Rig, ask, receives

from hostd.compiler.ruleset import (
    GUEST_EGRESS,
    HOST_CHAINS,
    HOST_FORWARD_IN,
    HOST_FORWARD_OUT,
    HOST_FROM_GUESTS,
    HOST_GUESTS,
    HOST_IN,
    HOST_OUT,
    HOST_TO_GUESTS,
    Guard,
    Interface,
    Jump,
    Rule,
    Verdict,
)

ACCEPT, DROP = Rule((), Verdict.ACCEPT), Rule((), Verdict.DROP)
ASKED = Rule((), Jump(GUEST_EGRESS))
pytestmark = pytest.mark.usefixtures("packet_filter")
VERSIONS = pytest.mark.parametrize("version", [4, 6])


@pytest.fixture
def rig(netns: Namespace, peer: Namespace) -> Iterator[Rig]:
    made = Rig(peer, Guard(dispatcher_port=7332))
    yield made
    made.close()


def ask_nobody(rig: Rig) -> None:
    change = rig.table.transaction()
    for chain in HOST_CHAINS:
        change.delete_chain(chain, chain)
    change.commit()


def own(version: int) -> str:
    return HOST4 if version == 4 else HOST6


def says(rig: Rig, receiver: Port, port: int, version: int, *, tcp: bool = False, sport: int = 0) -> bool:
    """The host's packet to there comes out."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    kind = socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM
    target = receiver.v4 if version == 4 else receiver.v6
    receiver.heard()
    with socket.socket(family, kind | socket.SOCK_NONBLOCK) as local:
        local.bind((own(version), sport))
        try:
            local.connect((target, port))
            if not tcp:
                local.send(b"slash32")
        except BlockingIOError:
            pass  # a connection under way
        except PermissionError:
            return False
        rig.settle()
    word = port.to_bytes(2, "big")
    offset = 14 + (20 if version == 4 else 40) + 2
    return any(frame[offset : offset + 2] == word for frame in receiver.heard())


# ---- the host itself --------------------------------------------------------------------------------------------


@VERSIONS
def test_to_the_host(rig: Rig, version: int) -> None:
    frame = rig.outside.to(own(version), version).udp(1000, 2000)
    assert receives(rig, rig.outside, frame, 2000), "no host endpoint: as it was before us"
    ask(rig, HOST_IN, Rule((Interface(True, "other"),), Verdict.DROP), Rule((Interface(True, "up0"),), Verdict.DROP))
    assert not receives(rig, rig.outside, rig.outside.to(own(version), version).udp(1001, 2000), 2000)
    ask(rig, HOST_IN, Rule((Interface(True, "other"),), Verdict.DROP))
    assert receives(rig, rig.outside, rig.outside.to(own(version), version).udp(1002, 2000), 2000)


@VERSIONS
@pytest.mark.parametrize("port", [22, 179, 16509, 16514, 49152, 49215])
def test_failsafe_to_the_host(rig: Rig, version: int, port: int) -> None:
    ask(rig, HOST_IN, DROP)
    ask(rig, HOST_OUT, DROP)
    to = rig.outside.to(own(version), version)
    assert rig.answer(rig.outside, to.tcp(5000, port, SYN)), "refused by TCP, not by us"
    assert not rig.answer(rig.outside, to.tcp(5000, port + 1000, SYN))
    ask_nobody(rig)
    assert rig.answer(rig.outside, to.tcp(5001, port + 1000, SYN))


@VERSIONS
def test_from_the_host(rig: Rig, version: int) -> None:
    assert says(rig, rig.outside, 2000, version)
    ask(rig, HOST_OUT, Rule((Interface(False, "other"),), Verdict.DROP))
    assert says(rig, rig.outside, 2000, version)
    ask(rig, HOST_OUT, Rule((Interface(False, "up0"),), Verdict.DROP))
    assert not says(rig, rig.outside, 2000, version)
    assert says(rig, rig.outside, 53, version), "failsafe"
    assert not says(rig, rig.outside, 2000, version, tcp=True)
    for port in (22, 53, 179, 7332, 16514, 49200):
        assert says(rig, rig.outside, port, version, tcp=True), port


@VERSIONS
def test_answers_to_the_host_pass(rig: Rig, version: int) -> None:
    ask(rig, HOST_IN, DROP)
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    far = rig.outside.v4 if version == 4 else rig.outside.v6
    answer = rig.outside.to(own(version), version).udp(1000, 3000)
    assert not receives(rig, rig.outside, answer, 3000), "unasked"
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as local:
        local.bind((own(version), 3000))
        local.connect((far, 1000))
        local.send(b"ask")
        rig.outside.wire.send(answer)
        rig.settle()
        assert local.recv(100)


@VERSIONS
def test_the_host_speaks_to_itself(rig: Rig, version: int) -> None:
    ask(rig, HOST_IN, DROP)
    ask(rig, HOST_OUT, DROP)
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with (
        socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as one,
        socket.socket(family, socket.SOCK_DGRAM) as two,
    ):
        one.bind((own(version), 3000))
        two.sendto(b"hello", (own(version), 3000))
        assert one.recv(100) == b"hello"


def test_neighbours_of_the_host(rig: Rig) -> None:
    ask(rig, HOST_IN, DROP)
    ask(rig, HOST_OUT, DROP)
    run("ip", "address", "add", "2001:db8::1/64", "dev", "up0", "nodad")
    group = Frame(rig.outside.mac, bytes.fromhex("3333ff000001"), rig.outside.v6, "ff02::1:ff00:1", 255)
    assert rig.answer(rig.outside, group.icmp(135, 0, solicitation("2001:db8::1")))
    echo = rig.outside.to("2001:db8::1").but(source=rig.outside.v6)
    assert not rig.answer(rig.outside, echo.icmp(128))
    ask_nobody(rig)
    assert rig.answer(rig.outside, echo.icmp(128))


# ---- what the host forwards -------------------------------------------------------------------------------------


@VERSIONS
def test_forwarded_in(rig: Rig, version: int) -> None:
    def comes(port: int) -> bool:
        return rig.crosses(rig.outside, rig.outside.to(rig.alice, version).udp(port, 2000), rig.alice)

    ask(rig, HOST_FORWARD_IN, Rule((Interface(True, "up0"),), Verdict.DROP))
    ask(rig, HOST_FORWARD_OUT, Rule((Interface(False, "vnet1"),), Verdict.DROP))  # a tap is never asked here
    ask(rig, HOST_IN, DROP)
    assert not comes(1)
    assert rig.crosses(rig.alice, rig.alice.to(rig.bob, version).udp(1, 2000), rig.bob), "between guests: not asked"
    assert rig.crosses(rig.alice, rig.alice.to(rig.outside, version).udp(2000, 2), rig.outside)
    assert comes(2), "an answer"
    ask(rig, HOST_FORWARD_IN, Rule((Interface(True, "up1"),), Verdict.DROP))
    assert comes(3)
    ask(rig, HOST_FORWARD_IN, ACCEPT)
    rig.group(rig.alice, 0)
    assert not comes(4), "the guard is asked as well"


@VERSIONS
def test_forwarded_out(rig: Rig, version: int) -> None:
    def goes(port: int) -> bool:
        return rig.crosses(rig.alice, rig.alice.to(rig.outside, version).udp(2000, port), rig.outside)

    ask(rig, HOST_FORWARD_OUT, Rule((Interface(False, "up0"),), Verdict.DROP))
    ask(rig, HOST_FORWARD_IN, Rule((Interface(True, "vnet1"),), Verdict.DROP))
    ask(rig, HOST_OUT, DROP)
    assert not goes(1)
    assert rig.crosses(rig.alice, rig.alice.to(rig.bob, version).udp(1, 2000), rig.bob), "between guests: not asked"
    assert rig.crosses(rig.outside, rig.outside.to(rig.alice, version).udp(2, 2000), rig.alice)
    assert goes(2), "an answer"
    ask_nobody(rig)
    assert goes(3)


@VERSIONS
def test_transit_stays_dropped(netns: Namespace, peer: Namespace, version: int) -> None:
    rig = Rig(peer, Guard(drop_transit=(4, 6)))
    inside = rig.attach(21, "up1", "192.0.2.9", "2001:db8:9::9")
    ask(rig, HOST_FORWARD_IN, ACCEPT)
    ask(rig, HOST_FORWARD_OUT, ACCEPT)
    frame = rig.outside.to(inside, version)
    assert not rig.crosses(rig.outside, frame.udp(1, 2), inside)
    assert rig.crosses(rig.outside, rig.outside.to(rig.alice, version).udp(1, 2), rig.alice)
    rig.table.close()
    rig.table = type(rig.table)(Guard())
    rig.table.load()
    assert rig.crosses(rig.outside, frame.udp(1, 3), inside)
    ask(rig, HOST_FORWARD_OUT, Rule((Interface(False, "up1"),), Verdict.DROP))
    assert not rig.crosses(rig.outside, frame.udp(1, 4), inside)
    rig.close()


# ---- guests and their host --------------------------------------------------------------------------------------


@VERSIONS
def test_guest_to_host(rig: Rig, version: int) -> None:
    to = rig.alice.to(own(version), version)

    def reaches(port: int) -> bool:
        return receives(rig, rig.alice, to.udp(port, 2000), 2000)

    ask(rig, HOST_IN, DROP)  # not theirs
    assert not reaches(1)
    ask(rig, HOST_GUESTS, ASKED)
    assert reaches(2)
    ask(rig, HOST_FROM_GUESTS, Rule((Interface(True, "up0"),), Verdict.ACCEPT), DROP)
    assert not reaches(3)
    ask(rig, HOST_FROM_GUESTS, ACCEPT)
    assert reaches(4)
    rig.group(rig.alice, SILENT)
    assert not reaches(5), "its own egress policy"
    rig.group(rig.alice, OPEN)
    spoofed = to.but(source=rig.carol.v4 if version == 4 else rig.carol.v6)
    assert not receives(rig, rig.alice, spoofed.udp(6, 2000), 2000)
    assert not receives(rig, rig.alice, to.udp(7, 4789), 4789), "no tunnels"
    assert reaches(7)


@VERSIONS
def test_no_failsafe_for_guests(rig: Rig, version: int) -> None:
    to = rig.alice.to(own(version), version)
    ask(rig, HOST_GUESTS, ASKED)
    ask(rig, HOST_FROM_GUESTS, DROP)
    assert not rig.answer(rig.alice, to.tcp(5000, 22, SYN))
    ask(rig, HOST_FROM_GUESTS)
    assert rig.answer(rig.alice, to.tcp(5000, 22, SYN))
    ask(rig, HOST_TO_GUESTS, DROP)
    assert not says(rig, rig.alice, 53, version)
    assert not says(rig, rig.alice, 22, version, tcp=True)
    ask(rig, HOST_TO_GUESTS)
    assert says(rig, rig.alice, 53, version)
    assert says(rig, rig.alice, 22, version, tcp=True)


def test_guests_are_configured_whatever_is_asked(rig: Rig) -> None:
    ask(rig, HOST_FROM_GUESTS, DROP)
    ask(rig, HOST_TO_GUESTS, DROP)
    ask(rig, HOST_GUESTS, DROP)
    discover = Frame(rig.alice.mac, BROADCAST, "0.0.0.0", "255.255.255.255")
    assert receives(rig, rig.alice, discover.udp(68, 67), 67)
    assert receives(rig, rig.alice, rig.alice.to(HOST4).udp(68, 67), 67)
    assert says(rig, rig.alice, 68, 4, sport=67)
    group = Frame(rig.alice.mac, bytes.fromhex("3333ff000001"), rig.alice.v6, "ff02::1:ff00:1", 255)
    assert rig.answer(rig.alice, group.icmp(135, 0, solicitation("fe80::1")))
    ask(rig, HOST_GUESTS, ASKED)
    behind = rig.alice.to(HOST4).but(source="10.66.1.5").udp(68, 67)
    assert not receives(rig, rig.alice, behind, 67), "from a prefix behind it: no DHCP client"
    ask(rig, HOST_FROM_GUESTS)
    assert receives(rig, rig.alice, behind, 67)


@VERSIONS
def test_host_to_guest(rig: Rig, version: int) -> None:
    ask(rig, HOST_OUT, DROP)  # not theirs
    assert says(rig, rig.alice, 2000, version)
    ask(rig, HOST_TO_GUESTS, DROP)
    assert not says(rig, rig.alice, 2001, version)


def test_an_exempt_guest_is_let_be(rig: Rig) -> None:
    rig.group(rig.alice, 0)
    change = rig.table.transaction()
    change.exempt(rig.alice.ifindex, True, 0)
    change.commit()
    chains: Sequence[str] = HOST_CHAINS
    for chain in chains:
        ask(rig, chain, DROP)
    assert receives(rig, rig.alice, rig.alice.to(HOST4).udp(1, 2000), 2000)
    assert says(rig, rig.alice, 2000, 4)
    assert not receives(rig, rig.outside, rig.outside.to(HOST4).udp(1, 2000), 2000), "the control"
