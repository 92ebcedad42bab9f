# Many tiers, each of which passes on what it chooses and counts what a staged policy would drop: both kernels take
# them, for guests and for what guests and the host say to each other, and do what the specification says.
from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import filters
import pytest
from netns import Namespace, eventually, run
from town import TAP, Guest, Town

from hostd.dataplane.witness import Witness
from hostd.revocation.judge import View, judge
from slash32.net import parse_address
from slash32.pack import Kind, ObjectKey, Value
from slash32.policy import Action, Direction, HostEndpoint, Peer, Policy, PortRange, Profile, Rule, Tier
from slash32.verdict import Judge, Packet, World
from tests.scenes import FULL, HERE

TIERS = 40 if FULL else 12
OWN = {4: "192.0.2.1", 6: "2001:db8::1"}  # the host's
UDP = 17
OPEN = Profile("open", (Rule(Action.ALLOW),), (Rule(Action.ALLOW),))


def udp(action: Action, first: int, last: int = 0) -> Rule:
    return Rule(action, UDP, destination=Peer(ports=(PortRange(first, last or first),)))


def policies(tier: int) -> Iterator[Policy]:
    """Each of the first kind denies one port and passes on others, and there is something left to ask in its tier."""
    passing = udp(Action.PASS, 7000, 7099), Rule(Action.DENY, 132)
    choosing = udp(Action.PASS, 8000, 9999), Rule(Action.DENY, UDP)
    yield made("a", tier, (udp(Action.DENY, 7000 + tier), *passing))
    yield made("s", tier, (udp(Action.DENY, 9500 + tier), udp(Action.ALLOW, 9600 + tier)), staged=True)
    yield made("b", tier, (udp(Action.DENY, 8000 + tier), *choosing))


def made(name: str, tier: int, rules: tuple[Rule, ...], staged: bool = False) -> Policy:
    order = {"a": 1.0, "s": 2.0, "b": 3.0}[name]
    return Policy(f"{name}{tier}", "all()", tuple(Direction), order, rules, rules, f"t{tier}", staged=staged)


ENDPOINT = HostEndpoint("any", HERE, "*", {}, tuple(map(parse_address, OWN.values())), ("open",))
ALL = [policy for tier in range(TIERS) for policy in policies(tier)]
LAST = TIERS - 1
DENIED = (100, 7000, 7000 + LAST // 2, 7000 + LAST, 8000, 8000 + LAST)
ALLOWED = (7050, 8050, 9001, 9500, 9500 + LAST, 9600 + LAST)


@pytest.fixture
def town(netns: Namespace, packet_filter: str) -> Iterator[Town]:
    for address in OWN.values():
        run("ip", "address", "add", address, "dev", "lo")
    town = Town("web", "db")
    values: dict[ObjectKey, Value | None] = {
        ObjectKey(Kind.STAGED if policy.staged else Kind.POLICY, policy.name): policy for policy in ALL
    }
    values |= {ObjectKey(Kind.TIER, f"t{n}"): Tier(f"t{n}", float(n)) for n in range(TIERS)}
    values |= {ObjectKey(Kind.PROFILE, "open"): OPEN, ObjectKey(Kind.HOSTENDPOINT, "any"): ENDPOINT}
    town.tell(values)
    yield town
    town.close()


def world(town: Town) -> World:
    tiers = [Tier(f"t{n}", float(n)) for n in range(TIERS)]
    guests = town.endpoints()
    return World(guests, ALL, [OPEN], tiers, [], [ENDPOINT], {guest.key: HERE for guest in guests})


def test_what_the_kernel_lists_says_what_the_model_says(town: Town) -> None:
    listed, model = Witness(filters.chosen).listed(), Judge(world(town))
    web, db = town.guests
    chains = town.settler.calc.desired.taps[TAP + web.number].chains
    view = View({**listed.chains_from(chains.egress), **listed.chains_from(chains.ingress)}, listed.contains)
    for version in (4, 6):
        ends = parse_address(web.address(version)), parse_address(db.address(version))
        for port in (*DENIED, *ALLOWED):
            packet = Packet(*ends, UDP, 1000, port)
            said = model.verdict(packet)
            assert said.egress is not None and said.ingress is not None
            assert said.egress.allowed is said.ingress.allowed is (port in ALLOWED)
            for chain in chains:
                assert judge(view, chain, packet).accept is (port in ALLOWED), (chain, port)


def heard(listeners: dict[int, socket.socket]) -> set[int]:
    found = set()
    for port, listener in listeners.items():
        try:
            listener.recv(100)
        except BlockingIOError:
            continue
        found.add(port)
    return found


def bound(whose: Guest | None, version: int, port: int = 0) -> socket.socket:
    """To an address of a guest, or of the host."""
    if whose is None:
        made = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
        made.setblocking(False)
    else:
        made = whose.socket(version, socket.SOCK_DGRAM)
    made.bind((where(whose, version), port))
    return made


def where(whose: Guest | None, version: int) -> str:
    return OWN[version] if whose is None else whose.address(version)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("ends", [(0, 1), (0, None), (None, 0)], ids=["guests", "to the host", "from the host"])
def test_packets(town: Town, ends: tuple[int | None, int | None], version: int) -> None:
    sender, receiver = (None if end is None else town.guests[end] for end in ends)
    listeners = {port: bound(receiver, version, port) for port in (*DENIED, *ALLOWED)}
    mouth = bound(sender, version)
    for port in (*DENIED, *ALLOWED):
        with contextlib.suppress(PermissionError):  # the host itself is told at once
            mouth.sendto(b"hello", (where(receiver, version), port))
    got = set[int]()
    eventually(lambda: got.update(heard(listeners)) or got >= {*ALLOWED}, "what is allowed arrives")
    assert got == {*ALLOWED}
