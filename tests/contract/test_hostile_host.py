# A registered hypervisor that turned, or a stranger: what it says in any number and size costs itself, not the others.
from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from dispatcher_rig import Rack, document, guest, until

from dispatcher import core as cores
from dispatcher.core import Core
from dispatcher.decisions import claims
from dispatcher.decisions.inputs import Command
from dispatcher.hosts.zap import Zap
from dispatcher.operators import fleet
from dispatcher.operators import resources as operators
from dispatcher.store.disk import Disk
from slash32 import wire
from slash32.model import Endpoint, EndpointKey
from slash32.net import Address, parse_address, parse_prefix
from slash32.wire import Hello, Refusal, Report

ROUNDS, GUESTS = 12, 3000


def test_a_flood_of_reports_delays_others_by_a_few_of_them(rack: Rack) -> None:
    bad, good = rack.begin(2)
    rack.settle()
    bad.stop()
    reports = [_report(number) for number in range(2)]
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    flood = context.socket(zmq.DEALER)
    try:
        flood.linger, flood.sndhwm = 0, 1000
        flood.setsockopt(zmq.ROUTING_ID, b"s" + bytes(15))
        flood.curve_publickey, flood.curve_secretkey = bad.keys.public.encode(), bad.keys.secret.encode()
        flood.curve_serverkey = rack.dispatcher.public_key.encode()
        flood.connect(f"tcp://127.0.0.1:{rack.dispatcher.port}")
        flood.send(wire.encode_to_dispatcher(Hello("", 0, 0)))
        for number in range(ROUNDS):
            flood.send(reports[number % 2])
        assert flood.poll(20_000), "it is at work on them"
        seq = good.claim(guest(7, "web", "10.200.0.7"))
        until(lambda: seq in good.answered, [good])
        assert _answers(flood) < ROUNDS - 2, "the good host's claim waited for all of the flood"
        assert not good.refused
    finally:
        flood.close(0)
        context.term()


def _report(number: int) -> bytes:
    """The same addresses every time, by other endpoints."""
    found = []
    for index in range(GUESTS):
        key = EndpointKey(f"00000000-0000-0000-{number + 1:04x}-{index:012x}", "52:54:00:00:00:01")
        address = (10 << 24 | 1 << 20 | index).to_bytes(4, "big")
        found.append(Endpoint(key, "bad", {"n": str(index)}, addresses=(address,)))
    return wire.encode_to_dispatcher(Report(number, tuple(found)))


def _answers(flood: zmq.Socket[bytes]) -> int:
    """That have come by now."""
    found = 0
    while flood.poll(0):
        found += isinstance(wire.decode_from_dispatcher(flood.recv_multipart()), wire.Claimed)
    return found


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Core]:
    store = Disk(tmp_path / "d.db")
    made = Core(store, lambda: 0.0, lambda: 0.0)
    hosts = [document("Host", f"h{n}", publicKey="x" * 39 + str(n)) for n in (1, 2)]
    made.turns.add(Command(made, lambda core: operators.apply(core, hosts, False), "test"))
    made.flush()
    for number in (1, 2):
        _hello(made, number)
    yield made
    store.close()


def _hello(core: Core, number: int, *addresses: Address) -> None:
    hello = Hello("", 0, 0, addresses)
    core.receive(bytes([number]) * 16, wire.encode_to_dispatcher(hello), f"h{number} {'x' * 39}{number}")
    core.flush()


def _ask(core: Core, number: int, *endpoints: Endpoint) -> list[Refusal]:
    core.receive(bytes([number]) * 16, wire.encode_to_dispatcher(Report(1, endpoints)), "")
    answers = (wire.decode_from_dispatcher(frames) for _, frames in core.flush())
    return [refusal for answer in answers if isinstance(answer, wire.Claimed) for refusal in answer.refused]


def test_a_host_holds_so_much_and_no_more(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "MAX_HELD", 4)
    two, three = (guest(n, "web", *(f"10.65.{n}.{k}" for k in range(n))) for n in (2, 3))
    prefixes = parse_prefix("10.66.0.0/24"), parse_prefix("fd00::/64")
    behind = guest(2, "web", "10.65.2.0", "10.65.2.1", prefixes=prefixes)
    assert _ask(core, 1, two) == []
    (refusal,) = _ask(core, 1, two, three)
    assert refusal.key == three.key and "more than 4" in refusal.message
    assert _ask(core, 1, behind) == [], "what it holds already is not counted twice"
    assert _ask(core, 1, three) == [], "what it gave back is not counted"
    assert _ask(core, 2, two) == [], "nor what others hold"


def test_a_host_hides_no_other_hosts_alarms(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "MAX_ALARMS", 3)
    _ask(core, 1, guest(1), guest(2))
    _ask(core, 2, *(guest(n, "web", "10.65.0.1") for n in range(10, 30)))
    _ask(core, 1, guest(1), guest(2), guest(3, "web", "127.0.0.1"))
    alarms = fleet.status(core)["alarms"]
    assert [alarm["host"] for alarm in alarms] == ["h1", "h2", "h2", "h2"]
    _ask(core, 2)
    assert [alarm["host"] for alarm in fleet.status(core)["alarms"]] == ["h1"]


@pytest.mark.parametrize(
    "claimed", [("127.0.0.1",), ("169.254.1.1",), ("224.0.0.1",), ("fe80::1",), ("::1",), ("192.0.2.1", "192.0.2.2")]
)
def test_a_host_is_no_next_hop_by_an_address_that_nobody_can_have(core: Core, claimed: tuple[str, ...]) -> None:
    _hello(core, 1, *map(parse_address, claimed))
    assert core.registry.next_hops("h1") == ()
    good = parse_address("192.0.2.1"), parse_address("2001:db8::1")
    _hello(core, 1, *good)
    assert core.registry.next_hops("h1") == good


def test_a_stranger_does_not_fill_the_journal(caplog: pytest.LogCaptureFixture) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    zap = Zap(context)

    def knock(number: int, now: float) -> None:
        credentials = number.to_bytes(32, "big")
        assert not zap._user([b"1.0", b"1", b"slash32", b"192.0.2.1", b"", b"CURVE", credentials], {}, now)

    try:
        for number in range(3000):
            knock(number, 0.0)
        assert len(caplog.messages) == 1000
        knock(9999, 3601.0)
        assert len(caplog.messages) == 1001, "an hour later there is room again"
    finally:
        zap.socket.close()
        context.term()


def test_nor_does_a_client_of_the_api(rack: Rack) -> None:
    rack.dispatcher.start()
    head = b"POST /v1/apply HTTP/1.1\r\nHost: x\r\n"
    said = [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9\r\n\r\n",
        head + b"X: y\r\n" * 40_000 + b"\r\n",
        head + b"Content-Length: 100\r\n\r\n{",
        head + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
        head + b"Content-Length: -1\r\n\r\n",
        head + b"Content-Length: 20\r\n\r\n" + b"[" * 20,
    ]
    for request in said:
        for _ in range(3):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(rack.dispatcher.socket))
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    client.sendall(request)
    assert rack.dispatcher.get("/v1/status")["endpoints"] == 0
    assert "Traceback" not in rack.dispatcher.log.read_text()


def test_nor_does_a_host(core: Core, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(500):
        core.receive(bytes([1]) * 16, b"\xc1", "")
        core.receive(bytes([3]) * 16, b"\xc1", "h2 key")
        core.receive(bytes([1]) * 16, wire.encode_to_dispatcher(wire.Ack(0, (wire.Failure("x", str(number)),))), "")
        _ask(core, 1, guest(1, "web", f"127.0.{number % 250}.1"))
    lines = [line for line in caplog.messages if line.startswith("host h1")]
    assert len(lines) == cores.MAX_WORDS and "and more" in lines[-1]
    core.sweep()
    core.receive(bytes([1]) * 16, b"\xc1", "")
    assert len([line for line in caplog.messages if line.startswith("host h1")]) == len(lines) + 1
