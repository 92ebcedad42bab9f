# A registered hypervisor, or a dispatcher, that says whatever it likes: nobody dies, memory and journal stay bounded,
# all others are served as before.
from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import odd
import pytest
import zmq
from dispatcher_rig import FakeHost, Rack, guest, memory_kib, policy, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from impostor import Hostile

from hostd.session.dealer import Place
from slash32 import wire
from slash32.keys import load_or_create_key
from slash32.model import EndpointKey, SharedAddress
from slash32.net import parse_address, parse_prefix
from slash32.pack import MASK, AddressSet, Kind, WireError, digest_of
from slash32.sync import Replica
from slash32.wire import Claim, Claimed, Delete, Delta, Hello, Pong, Put, Release, Report, Snapshot

FULL = os.environ.get("SLASH32_COUNTS") == "full"
EXAMPLES = 500 if FULL else 40
WEB = 'role == "web"'
RICH = guest(3, "web", "10.66.0.3", prefixes=(parse_prefix("10.67.0.0/24"),),
             shared=(SharedAddress(parse_address("10.66.9.9"), "vip"),))  # fmt: skip
KEY = EndpointKey("00000000-0000-0000-0000-00000000000a", "52:54:00:00:00:0a")
FROM_HOST = tuple(map(wire.encode_to_dispatcher, (
    Hello("", 0, 0, (parse_address("192.0.2.9"),), name="h1"), Hello("e" * 64, 7, 7), Report(1, (guest(1), RICH)),
    Claim(2, RICH), wire.Expect(2, RICH), Release(3, KEY), wire.Ack(1, (wire.Failure("policy p", "no"),)), wire.Ack(1),
    wire.Ping(), wire.Answer(1, "{}"),
)))  # fmt: skip
SET = Put(Kind.SET, WEB, AddressSet({b"\x0a\0\0\1"}))
TO_HOST = tuple(b"".join(wire.encode_to_host(message)) for message in (
    Snapshot("e", 1, digest_of(*SET), False, (SET,)), Delta("e", 1, 2, 0, (Delete(*SET.key),)),
    Claimed(1, (wire.Refusal(KEY, "no"),)), Pong(1), wire.Refused("no"), wire.Ask(1, "{}"),
))  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rack, Hostile]]:
    """A rack whose second host is good, and somebody who has the first one's key."""
    rack = Rack(tmp_path_factory.mktemp("frames"))
    bad, good = rack.begin(2)
    good.claim(guest(2))
    rack.dispatcher.apply(policy("p", WEB, WEB))
    rack.settle()
    bad.stop()
    hostile = Hostile(rack, bad)
    yield rack, hostile
    hostile.close()
    rack.end()


def served(rack: Rack, number: int) -> None:
    """The good host, as ever; and what it has nobody took."""
    good = rack.hosts[1]
    one = guest(100 + number % 100, "web", f"10.65.1.{number % 100}")
    seq = good.claim(one)
    until(lambda: seq in good.answered, [good])
    good.release(one.key)
    assert good.in_sync and not good.refused
    held = {(e["host"], e["uuid"]) for e in rack.dispatcher.get("/v1/endpoints")["items"]}
    assert ("h2", guest(2).key.uuid) in held


def test_whatever_a_host_says(pair: tuple[Rack, Hostile]) -> None:
    rack, hostile = pair
    assert rack.dispatcher.process
    pid = rack.dispatcher.process.pid
    before, said = memory_kib(pid), len(rack.dispatcher.log.read_text())
    began = time.monotonic()

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.integers(0, 2**32))
    def one(seed: int) -> None:
        noise = random.Random(seed)
        hostile.anew()
        if noise.random() < 0.8:
            hostile.socket.send(FROM_HOST[0])
            hostile.socket.send(FROM_HOST[2])
        for _ in range(60):
            frames = [odd.frame(noise.choice(FROM_HOST), noise) for _ in range(noise.choice((1, 1, 1, 1, 2, 5)))]
            hostile.socket.send_multipart(frames)
        hostile.asks(2**40 + seed)
        served(rack, seed)

    one()
    served(rack, 0)
    assert rack.dispatcher.process.poll() is None
    assert memory_kib(pid) - before < 64 << 10
    log = rack.dispatcher.log.read_text()[said:]
    assert "Traceback" not in log and all(len(line) < 700 for line in log.splitlines())
    spans = 2 + (time.monotonic() - began) / 5  # two per five seconds: of h1, and of h1 before its Hello
    assert len(log.splitlines()) < 400 * spans, "the journal is everybody's"


@pytest.mark.parametrize("size", [wire.MAX_FRAME, wire.MAX_FRAME + 1, wire.MAX_FRAME + (1 << 20)])
def test_too_large(pair: tuple[Rack, Hostile], size: int) -> None:
    rack, hostile = pair
    assert rack.dispatcher.process
    pid = rack.dispatcher.process.pid
    for _ in range(3):
        hostile.anew()
        hostile.socket.send(FROM_HOST[0])
        hostile.socket.send(bytes(size))
        served(rack, size)
    hostile.anew()
    hostile.asks()
    assert memory_kib(pid) < 300 << 10


def test_nothing_at_all(pair: tuple[Rack, Hostile]) -> None:
    rack, hostile = pair
    hostile.anew()
    for frames in ([b""], [b"", b""], [b""] * 5000, [wire.PING, b""], [b"", FROM_HOST[0]]):
        hostile.socket.send_multipart(frames)
    hostile.asks()
    served(rack, 1)


# --- the other way round ---------------------------------------------------------------------------------------------


def recomputed(replica: Replica) -> int:
    return sum(digest_of(kind, name, v) for kind in Kind for name, v in replica.objects(kind).items()) & MASK


@given(st.integers(0, 2**32))
@settings(max_examples=EXAMPLES * 20, deadline=None)
def test_whatever_a_dispatcher_says_a_replica_is_whole(seed: int) -> None:
    noise, replica = random.Random(seed), Replica()
    if noise.random() < 0.7:
        whole = wire.decode_from_dispatcher([TO_HOST[0]])
        assert isinstance(whole, Snapshot) and replica.receive(whole) and replica.in_sync
    for _ in range(10):
        try:
            message = wire.decode_from_dispatcher([odd.frame(noise.choice(TO_HOST), noise)])
        except WireError as e:
            assert "\n" not in str(e) and len(str(e)) < 700
            continue
        if isinstance(message, Snapshot | Delta | Pong):
            before = replica.dump()
            outcomes = replica.receive(message)
            assert replica.digest == recomputed(replica)
            assert outcomes or isinstance(message, Pong) or replica.dump() == before


class FakeDispatcher:
    """The right key, the wrong words."""

    def __init__(self, keys: tuple[str, str]) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.router = self.context.socket(zmq.ROUTER)
        self.router.linger, self.router.curve_server = 0, True
        self.router.curve_publickey, self.router.curve_secretkey = keys[0].encode(), keys[1].encode()
        self.port = self.router.bind_to_random_port("tcp://127.0.0.1")
        self.last = b""

    def heard(self) -> int:
        """Hellos since."""
        found = 0
        while self.router.poll(0):
            self.last, body = self.router.recv_multipart()
            found += body[1:2] == FROM_HOST[0][1:2]
        return found

    def close(self) -> None:
        self.router.close(0)
        self.context.term()


def test_whatever_a_dispatcher_says_a_host_lives(tmp_path: Path) -> None:
    keys = load_or_create_key(tmp_path / "d.key")
    fake = FakeDispatcher((keys.public, keys.secret))
    rack = Rack(tmp_path)
    rack.dispatcher.start()
    host = FakeHost(rack.dispatcher, "h1")
    rack.hosts.append(host)
    host.places = (Place(f"tcp://127.0.0.1:{fake.port}", keys.public),)
    noise, before = random.Random(1), memory_kib(os.getpid())
    try:
        host.start()
        for _ in range(20 if FULL else 6):
            rack.until(fake.heard)
            for _ in range(20):
                frames = [odd.frame(noise.choice(TO_HOST), noise) for _ in range(noise.choice((1, 1, 3)))]
                fake.router.send_multipart([fake.last, *frames])
            fake.router.send_multipart([fake.last, b"\xc1"])  # so that it surely leaves, and comes again
            assert host.replica.digest == recomputed(host.replica)
        assert memory_kib(os.getpid()) - before < 100 << 10
        rack.dispatcher.apply(host.resource())  # the control: the right words from the same key
        host.stop()
        host.places = (Place(f"tcp://127.0.0.1:{rack.dispatcher.port}", rack.dispatcher.public_key),)
        host.replica = Replica()
        host.start()
        rack.until(lambda: host.in_sync)
    finally:
        rack.end()
        fake.close()
