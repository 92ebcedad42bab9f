# The edges of what a set can hold: 0.0.0.0, ::, and all addresses, from a GlobalNetworkSet through the dispatcher's
# registry to either packet filter, and packets; and ICMP in the IP version that is not its own.
from __future__ import annotations

import socket
from collections.abc import Iterator

import filters
import pytest
from fabric import Fabric, one_cpu
from netns import Namespace, run
from town import Town
from verdict_packets import Case, Model, Shot
from verdict_worlds import HERE, HOST, OWN, STRANGERS, UP0

from hostd.change.settle import Settler
from slash32.net import Address, Prefix, parse_address, parse_prefix
from slash32.policy import Action, Direction, HostEndpoint, NetworkSet, Peer, Policy, Rule
from slash32.verdict import Packet, World, verdict

THEM = 'kind == "them"'
ZEROS = tuple(map(parse_prefix, ("0.0.0.0/32", "::/128")))
EVERYWHERE = tuple(map(parse_prefix, ("0.0.0.0/0", "::/0")))


@pytest.fixture
def fabric(packet_filter: str) -> Iterator[Fabric]:
    with one_cpu():
        made = Fabric(filters.chosen)
        yield made
        made.close()


def world(nets: tuple[Prefix, ...], peer: Peer) -> World:
    """A host endpoint on up0, which lets this peer in."""
    policy = Policy("in", "has(up)", (Direction.INGRESS,), ingress=(Rule(Action.ALLOW, 17, source=peer),))
    up = HostEndpoint("up", HERE, UP0, {"up": "yes"}, tuple(OWN))
    return World((), [policy], sets=[NetworkSet("them", {"kind": "them"}, nets)], host_endpoints=[up])


def loaded(fabric: Fabric, asked: World) -> Settler:
    """It is as it should be: who looks again finds nothing to write."""
    fabric.load(Case(1, asked, []))
    anew = fabric.settler_of(fabric.fleet)
    assert anew.resync() == [] and anew.counters.writes == 0
    return anew


def prefixes(fabric: Fabric) -> set[Prefix]:
    members = fabric.kernel.table.read().members
    found = {m for name, some in members.items() if not name.startswith("addr") for m in some}
    assert not any(some for name, some in members.items() if name.startswith("addr"))
    return {m for m in found if isinstance(m, Prefix)}


def spoken_to(fabric: Fabric, source: Address, target: Address) -> bool:
    """By somebody behind up0."""
    packet = Packet(source, target, 17, 30000, 4000, in_interface=UP0)
    shot = Shot(packet, UP0, HOST)
    found = bool(fabric.send([shot]))
    assert Model(fabric.fleet_world).judged(shot).word == found, packet
    return found


PEERS = {"of them": Peer(selector=THEM), "none of them": Peer(not_selector=THEM)}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("nets", [ZEROS, EVERYWHERE, ZEROS + EVERYWHERE, ()], ids=["zero", "all", "both", "none"])
def test_what_a_set_holds_at_its_edges(fabric: Fabric, nets: tuple[Prefix, ...], peer: str) -> None:
    with fabric.home.entered():
        loaded(fabric, world(nets, PEERS[peer]))
        assert prefixes(fabric) == (set(EVERYWHERE) if EVERYWHERE[0] in nets else set(nets))
        for own in OWN:
            stranger = next(a for a in STRANGERS[UP0] if len(a) == len(own))
            said = spoken_to(fabric, stranger, own)
            assert said == ((EVERYWHERE[0] in nets) == (peer == "of them"))


@pytest.mark.parametrize("net", [*ZEROS, *EVERYWHERE], ids=str)
def test_such_members_come_and_go(fabric: Fabric, net: Prefix) -> None:
    """One after the other, in a set that is there."""
    other = parse_prefix("203.0.113.0/24")
    with fabric.home.entered():
        loaded(fabric, world((), PEERS["of them"]))
        for nets in ((other,), (other, net), (net,), (other,), (other, *ZEROS)):
            fabric.change(Case(1, world(nets, PEERS["of them"]), []))
            here = set(nets) - ({other} if net == EVERYWHERE[0] and net in nets else set())
            assert prefixes(fabric) == here
            anew = fabric.settler_of(fabric.fleet)
            assert anew.resync() == [] and anew.counters.writes == 0


def test_a_source_of_nothing_but_zeros(fabric: Fabric) -> None:
    """What asks for its address, to all, at a port that is nobody's failsafe."""
    nothing, everybody = parse_address("0.0.0.0"), parse_address("255.255.255.255")
    with fabric.home.entered():
        for nets, peer, passes in ((ZEROS, "of them", True), ((), "of them", False), (ZEROS, "none of them", False),
                                   ((), "none of them", True)):  # fmt: skip
            loaded(fabric, world(nets, PEERS[peer]))
            assert bool(fabric.send([Shot(Packet(nothing, everybody, 17, 30000, 4000), UP0, HOST)])) is passes




# -- ICMP in the other IP version -------------------------------------------------------------------------------------

ICMP, ICMPV6 = 1, 58
PING = {ICMP: bytes.fromhex("0800f7ff00000000"), ICMPV6: bytes.fromhex("800077ff00000000")}  # with ICMP's checksum


@pytest.fixture
def town(netns: Namespace, packet_filter: str) -> Iterator[Town]:
    made = Town("web", "db")
    yield made
    made.close()


def spoken(town: Town, version: int, protocol: int) -> bool:
    """The second guest hears the first one's bare packet of this protocol."""
    sender, receiver = town.guests
    run("conntrack", "-F")
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    ends = []
    for guest in (receiver, sender):
        with guest.space.entered():
            ends.append(socket.socket(family, socket.SOCK_RAW, protocol))
    with ends[0] as there, ends[1] as here:
        there.setblocking(False)
        here.sendto(PING[protocol], (receiver.address(version), 0))
        try:
            return bool(there.recv(2000))
        except BlockingIOError:
            return False


@pytest.mark.parametrize("asked", [ICMP, ICMPV6, None])
def test_icmp_is_of_its_own_ip_version(town: Town, asked: int | None) -> None:
    """Where the model has a word on it; what is of the other version begins no flow, whatever policy says."""
    everything = Policy("out", "all()", (Direction.EGRESS,), egress=(Rule(Action.ALLOW),))
    town.put(everything, Policy("in", "all()", (Direction.INGRESS,), ingress=(Rule(Action.ALLOW, asked),)))
    model = World(town.endpoints(), [p for p in town.items.values() if isinstance(p, Policy)])
    for version, own in ((4, ICMP), (6, ICMPV6)):
        ends = (parse_address(guest.address(version)) for guest in town.guests)
        said = verdict(model, Packet(*ends, own)).allowed
        assert spoken(town, version, own) == said == (asked in (None, own))
        assert not spoken(town, version, {ICMP: ICMPV6, ICMPV6: ICMP}[own])
