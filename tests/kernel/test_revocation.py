# Revocation on the real kernel: what a change forbids is over when the change is in force, though the server pushes and
# its own direction is allowed; what else flows loses nothing.
from __future__ import annotations

import contextlib
import random
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace

import filters
import pytest
from netns import Namespace, eventually, run
from town import Session, Town, tracked

from hostd.dataplane import sockets
from hostd.revocation.revoke import Flow, OwnSocket
from slash32.net import parse_prefix
from slash32.pack import Kind, ObjectKey
from slash32.policy import Action, Direction, HostEndpoint, Peer, Policy, PortRange, Profile, Rule
from slash32.verdict import Packet, World, verdict
from tests.scenes import FULL, HERE

ALLOW, DENY = Rule(Action.ALLOW), Rule(Action.DENY)
OPEN = Profile("open", (ALLOW,), (ALLOW,))
ASK_DB = Rule(Action.ALLOW, 6, destination=Peer(selector='role == "db"', ports=(PortRange(5432, 5432),)))
ASK_ADMIN = Rule(Action.ALLOW, destination=Peer(selector='role == "db"', ports=(PortRange(9000, 9009),)), protocol=6)
POSTGRES = Peer(ports=(PortRange(5432, 5432),))
NOT_FROM_WEB = Rule(Action.DENY, 6, source=Peer(selector='role == "web"'), destination=POSTGRES)
TALK = Rule(Action.ALLOW, 17, destination=Peer(ports=(PortRange(9000, 9009),)))


def web(*rules: Rule, keep: bool = False) -> Policy:
    return Policy("web", 'role == "web"', (Direction.EGRESS,), egress=rules, keep_established=keep)


def to_db(*rules: Rule) -> Policy:
    return Policy("db", 'role == "db"', (Direction.INGRESS,), ingress=rules)


@pytest.fixture
def town(netns: Namespace, packet_filter: str) -> Iterator[Town]:
    made = Town("web", "db", "other")
    made.put(OPEN, web(ASK_DB, ASK_ADMIN, TALK))
    yield made
    made.close()


CHANGES: dict[str, Callable[[Town], object]] = {
    "the rule goes": lambda t: t.put(web(ASK_ADMIN, TALK)),
    "a policy goes before": lambda t: t.put(Policy("no", 'role == "web"', (Direction.EGRESS,), 1.0, egress=(
        replace(ASK_DB, action=Action.DENY),))),
    "the receiver does not want it": lambda t: t.put(to_db(NOT_FROM_WEB, ALLOW)),
    "the sender's labels change": lambda t: (
        t.put(Policy("x", 'role == "x"', (Direction.EGRESS,), egress=(ASK_ADMIN, TALK))),
        t.label(t.guests[0], role="x"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("change", CHANGES)
def test_a_session_dies_though_the_server_pushes_and_others_lose_nothing(town: Town, change: str, version: int) -> None:
    guests = town.guests
    doomed = Session(guests[0], guests[1], 5432, version)
    others = [
        Session(guests[0], guests[1], 9000, version),  # of the same two, on another port
        Session(guests[1], guests[0], 5432, version),  # the other way round
        Session(guests[2], guests[1], 5432, version),  # of another guest to the same port
    ]
    assert doomed.lives() and all(other.lives() for other in others)
    before = tracked()
    for session in (doomed, *others):
        session.push()
    CHANGES[change](town)
    ends = (guests[0].address(version), guests[1].address(version))
    assert before - tracked() == {("tcp", *ends, 5432)} and tracked() <= before
    doomed.listen()
    heard = doomed.heard
    for _ in range(3):
        doomed.push()
        assert all(other.lives() for other in others)
    assert doomed.listen() == heard
    assert before - tracked() == {("tcp", *ends, 5432)}, "nor does the server's next packet begin it anew"
    assert town.settler.counters.ended == 1


def test_without_that_it_would_live_on(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(town.kernel, "end_condemned", lambda *_: 0)
    session = Session(town.guests[0], town.guests[1], 5432, 4)
    town.put(web(ASK_ADMIN, TALK))
    assert session.lives()


def test_a_member_that_leaves_a_set_loses_its_sessions(town: Town) -> None:
    """db becomes something else: web may not speak to it any more, while it still may to web."""
    guests = town.guests
    town.label(guests[2], role="db")
    doomed, other = Session(guests[0], guests[1], 5432, 4), Session(guests[0], guests[2], 5432, 4)
    assert doomed.lives() and other.lives()
    town.label(guests[1], role="nothing")
    heard = doomed.listen()
    doomed.push()
    assert other.lives() and doomed.listen() == heard
    assert {flow[2] for flow in tracked() if flow[0] == "tcp"} == {guests[2].v4}


def test_keep_established_keeps_it(town: Town) -> None:
    guests = town.guests
    town.put(web(ASK_DB, ASK_ADMIN, TALK, keep=True))
    session = Session(guests[0], guests[1], 5432, 4)
    assert session.lives()
    town.put(web(ASK_ADMIN, TALK))
    assert session.lives() and town.settler.counters.ended == 0
    town.put(to_db(DENY))
    heard = session.listen()
    session.push()
    assert Session(guests[2], guests[0], 80, 4).lives() and session.listen() == heard


@pytest.mark.parametrize("version", [4, 6])
def test_udp_both_directions(town: Town, version: int) -> None:
    """The direction that is forbidden ends; its answers begin a flow of their own, where they may."""
    guests = town.guests
    ends = [guest.socket(version, socket.SOCK_DGRAM) for guest in guests[:2]]
    for end, guest in zip(ends, guests, strict=False):
        end.bind((guest.address(version), 9001))

    def says(speaker: int) -> None:
        ends[speaker].sendto(b"hello", (guests[1 - speaker].address(version), 9001))

    def hears(listener: int) -> bool:
        try:
            return bool(ends[listener].recv(100))
        except BlockingIOError:
            return False

    says(0)
    eventually(lambda: hears(1), "the first packet")
    says(1)
    eventually(lambda: hears(0), "its answer")
    there = ("udp", guests[0].address(version), guests[1].address(version), 9001)
    assert there in tracked()
    town.put(web(ASK_ADMIN))
    assert there not in tracked()
    says(0)
    assert Session(guests[0], guests[1], 9000, version).lives() and not hears(1)
    says(1)
    eventually(lambda: hears(0), "the other direction is allowed")
    assert {flow[1:3] for flow in tracked() if flow[0] == "udp"} == {there[1:3][::-1]}
    town.put(
        to_db(ALLOW),
        Policy("in", 'role == "web"', (Direction.INGRESS,), ingress=(replace(ASK_DB, destination=Peer()),)),
    )
    assert not any(flow[0] == "udp" for flow in tracked())


def test_what_leaked_while_there_was_no_filter_ends_and_what_is_allowed_goes_on(town: Town) -> None:
    guests = town.guests
    session = Session(guests[0], guests[1], 5432, 4)
    assert session.lives()
    filters.open_up()
    leaked = Session(guests[0], guests[1], 22, 4)
    assert leaked.lives()
    assert town.settler.resync() == []
    heard = leaked.listen()
    leaked.push()
    assert session.lives() and leaked.listen() == heard


@pytest.mark.parametrize("killed", [True, False])
def test_killed_between_the_change_and_the_end_of_what_it_forbids(
    town: Town, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """Who starts again with that noted judges everything; who starts as usual ends nothing, and writes nothing."""
    guests = town.guests
    doomed, other = Session(guests[0], guests[1], 5432, 4), Session(guests[0], guests[1], 9000, 4)
    with monkeypatch.context() as patch:
        patch.setattr(town.kernel, "end_condemned", lambda *_: 0)
        town.put(web(ASK_ADMIN, TALK))
    settler = town.start()
    if killed:
        settler.force.owe_all(town.scene.calc.desired.taps)
    assert settler.resync() == [] and settler.counters.writes == 0
    assert settler.counters.ended == killed
    heard = doomed.listen()
    doomed.push()
    assert other.lives() and (doomed.listen() == heard) == killed


@pytest.mark.parametrize("version", [4, 6])
def test_pings_and_what_was_never_answered(town: Town, version: int) -> None:
    guests = town.guests
    town.put(web(ASK_ADMIN, TALK, replace(ALLOW, protocol=1), replace(ALLOW, protocol=58)))
    with guests[0].space.entered():
        run("ping", "-c1", "-W5", guests[1].address(version))
    say = guests[0].socket(version, socket.SOCK_DGRAM)
    say.sendto(b"hello", (guests[1].address(version), 9005))
    assert {packet.protocol for packet in look(town, anything=True)} == {17, 1 if version == 4 else 58}
    town.put(web(ASK_ADMIN))
    assert not look(town, anything=True)


@pytest.mark.parametrize("mapped", [False, True], ids=["v4", "v4 in v6 sockets"])
def test_host_endpoints(town: Town, peer: Namespace, mapped: bool) -> None:
    """A session with the host itself dies, ssh does not."""
    run("ip", "link", "add", "up0", "type", "veth", "peer", "name", "eth0", "netns", peer.path)
    run("ip", "address", "add", "192.0.2.1/24", "dev", "up0")
    run("ip", "link", "set", "up0", "up")
    with peer.entered():
        run("ip", "address", "add", "192.0.2.9/24", "dev", "eth0")
        run("ip", "link", "set", "eth0", "up")
    far, here = Far(peer, "192.0.2.9", mapped), Far(None, "192.0.2.1", mapped)
    town.tell({ObjectKey(Kind.HOSTENDPOINT, "up"): HostEndpoint("up", HERE, "up0", {"host": "yes"}, (), ("open",))})
    ssh, doomed, back = Session(far, here, 22, 4), Session(far, here, 8080, 4), Session(here, far, 8080, 4)
    assert all(session.lives() for session in (ssh, doomed, back))
    town.put(Policy("up", "has(host)", (Direction.INGRESS,), ingress=(replace(ALLOW, protocol=17),)))
    assert ssh.lives() and back.lives() and town.settler.counters.ended == 1
    with pytest.raises(ConnectionAbortedError):
        doomed.server.recv(1)
    with pytest.raises(ConnectionResetError):
        doomed.listen()
    alive = {flow for flow in look(town, anything=True) if flow.protocol == 6 and flow.source_port != 8080}
    assert {flow.destination_port for flow in alive} == {22, 8080}


@pytest.mark.parametrize("mapped", [False, True], ids=["v4", "v4 in v6 sockets"])
def test_who_listens_outlives_a_session_that_is_over(netns: Namespace, mapped: bool) -> None:
    """Its flow is known for two minutes more; the kernel then finds the listener by its names."""
    family, address = (socket.AF_INET6, "::") if mapped else (socket.AF_INET, "127.0.0.1")
    with contextlib.closing(socket.create_server((address, 0), family=family, dualstack_ipv6=mapped)) as server:
        server.settimeout(5)
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as far:
            accepted, _ = server.accept()
            own = OwnSocket(bytes([127, 0, 0, 1]), port, bytes([127, 0, 0, 1]), far.getsockname()[1])
            far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        accepted.close()
        sockets.destroy([own])
        with socket.create_connection(("127.0.0.1", port)) as far:
            accepted, _ = server.accept()
            sockets.destroy([own._replace(far_port=far.getsockname()[1])])
            accepted.settimeout(5)
            with pytest.raises(ConnectionAbortedError):
                accepted.recv(1)
            accepted.close()
        socket.create_connection(("127.0.0.1", port)).close()
        server.accept()[0].close()


class Far:
    """Somebody with sockets who is no guest: elsewhere, or the host."""

    def __init__(self, space: Namespace | None, own: str, mapped: bool) -> None:
        self.space, self.own, self.mapped = space, own, mapped

    def socket(self, _version: int, kind: int) -> socket.socket:
        with self.space.entered() if self.space else contextlib.nullcontext():
            made = socket.socket(socket.AF_INET6 if self.mapped else socket.AF_INET, kind)
        made.setblocking(False)
        return made

    def address(self, _version: int) -> str:
        return f"::ffff:{self.own}" if self.mapped else self.own


# -- any change -------------------------------------------------------------------------------------------------------

ROLES = ("web", "db", "other")
SELECTORS = tuple(f'role == "{role}"' for role in ROLES)


class Guesswork:
    """Random policies, labels and flows, and what the model says of them."""

    def __init__(self, town: Town, chance: random.Random) -> None:
        self.town, self.chance = town, chance
        self.alive: set[Packet] = set()

    def world(self) -> World:
        items = self.town.items.values()
        policies = [i for i in items if isinstance(i, Policy)]
        return World(self.town.endpoints(), policies, [i for i in items if isinstance(i, Profile)])

    def change(self) -> None:
        chance, town = self.chance, self.town
        match chance.randrange(4):
            case 0:
                town.label(chance.choice(town.guests), role=chance.choice(ROLES))
            case 1:
                name = chance.choice("abc")
                town.gone(Kind.POLICY, name)
            case _:
                name, kept = chance.choice("abc"), chance.random() < 0.3
                types = chance.choice(((Direction.INGRESS,), (Direction.EGRESS,)))
                rules = tuple(self._rule() for _ in range(chance.randint(1, 3)))
                ingress, egress = (rules, ()) if types == (Direction.INGRESS,) else ((), rules)
                order = chance.choice((1.0, 2.0, 3.0))
                town.put(Policy(name, chance.choice(SELECTORS), types, order, ingress, egress, keep_established=kept))

    def _rule(self) -> Rule:
        def peer() -> Peer:
            selector = self.chance.choice((None, *SELECTORS))
            return Peer(selector=selector) if self.chance.random() < 0.8 else Peer(not_selector=selector)

        protocol = self.chance.choice((6, 17, None))
        ports = (PortRange(80, self.chance.choice((80, 443))),) if protocol and self.chance.random() < 0.5 else ()
        action = Action.ALLOW if self.chance.random() < 0.7 else Action.DENY
        return Rule(action, protocol, source=peer(), destination=replace(peer(), ports=ports))

    def begin(self, file: str) -> None:
        """Those flows of some that the model allows."""
        world, places = self.world(), [e.addresses for e in self.town.endpoints()]
        for _ in range(30):
            one, two = self.chance.sample(places, 2)
            at = self.chance.randrange(2)
            port, protocol = self.chance.choice((22, 80, 443)), self.chance.choice((6, 17))
            packet = Packet(one[at], two[at], protocol, 1024 + len(self.alive), port)
            if verdict(world, packet).allowed:
                self.alive.add(packet)
        load(self.alive - look(self.town), file)

    def still(self, before: World) -> set[Packet]:
        """Of those that were alive."""
        after, policies = self.world(), {p.name: p for p in self.world().policies}
        old = {p.name: p for p in before.policies}

        def goes_on(packet: Packet) -> bool:
            was, now = verdict(before, packet), verdict(after, packet)
            for then, at_end in ((was.egress, now.egress), (was.ingress, now.ingress)):
                if then is None or at_end is None or at_end.allowed or not then.allowed:
                    continue
                keeps = (old.get(then.name), policies.get(then.name)) if then.kind == "policy" else ()
                if not any(policy is not None and policy.keep_established for policy in keeps):
                    return False
            return True

        return {packet for packet in self.alive if goes_on(packet)}


def load(flows: set[Packet], file: str) -> None:
    def words(p: Packet) -> str:
        family = socket.AF_INET if len(p.source) == 4 else socket.AF_INET6
        ends = f"-s {socket.inet_ntop(family, p.source)} -d {socket.inet_ntop(family, p.destination)}"
        kind = "udp" if p.protocol == 17 else "tcp --state ESTABLISHED"
        return f"-I -t 600 {ends} -p {kind} --sport {p.source_port} --dport {p.destination_port}\n"

    with open(file, "w") as out:
        out.write("".join(map(words, flows)))
    if flows:
        run("conntrack", "--load-file", file)


def look(town: Town, anything: bool = False) -> set[Packet]:
    """What is tracked."""
    found: set[Packet] = set()

    def note(flow: Flow) -> bool:
        found.add(flow.packet)
        return False

    town.kernel.end_condemned([parse_prefix("0.0.0.0/0"), parse_prefix("::/0")], note)
    return {packet for packet in found if anything or packet.protocol in (6, 17)}


@pytest.mark.parametrize("seed", range(100 if FULL else 20))
def test_after_any_change_the_flows_are_those_that_are_allowed_or_kept(
    netns: Namespace, packet_filter: str, tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    chance, file = random.Random(seed), str(tmp_path_factory.mktemp("flows") / "flows")
    town = Town("web", "db", "other", "web")
    try:
        town.put(OPEN)
        guess = Guesswork(town, chance)
        for _ in range(8):
            guess.begin(file)
            before = guess.world()
            guess.change()
            guess.alive = guess.still(before)
            assert look(town) == guess.alive
    finally:
        town.close()
