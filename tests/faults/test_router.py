# What a registered hypervisor can do to libzmq itself, below everything that is ours: which option it needs for that,
# that the dispatcher does without it, and that where nothing helps, dying does no harm.
from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from dispatcher_rig import REPO, FakeHost, Rack, free_port, guest, memory_kib, policy, turn, until

from slash32 import wire
from slash32.pack import Kind
from slash32.wire import Claimed, Hello, Report

WEB = 'role == "web"'
SAME = b"\1" * 16


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield made
    made.destroy(0)


def dealer(context: zmq.Context[zmq.Socket[bytes]], host: FakeHost | None = None) -> zmq.Socket[bytes]:
    s = context.socket(zmq.DEALER)
    s.linger, s.sndhwm, s.rcvhwm = 0, 0, 1
    s.setsockopt(zmq.RCVBUF, 2304)
    s.setsockopt(zmq.ROUTING_ID, SAME)
    if host is not None:
        s.curve_publickey, s.curve_secretkey = host.keys.public.encode(), host.keys.secret.encode()
        s.curve_serverkey = host.dispatcher.public_key.encode()
    return s


@pytest.mark.parametrize("handover", [True, False])
def test_an_identity_that_is_taken_over_kills_a_router(
    context: zmq.Context[zmq.Socket[bytes]], handover: bool
) -> None:
    """libzmq 4.3.4: one connection whose queue is full sends a message of many frames; while that is being read,
    another takes its routing id (ROUTER_HANDOVER): the first is put back among the writable ones though it is full.
    It begins to read, and socket_base.cpp asserts `!it->second.active`."""
    port = free_port()
    argv = [sys.executable, str(Path(__file__).parent / "bare_router.py"), str(port), str(int(handover))]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as router:
        assert router.stdout and router.stderr
        try:
            assert router.stdout.readline() == "listens\n"
            first, second = dealer(context), dealer(context)
            first.connect(f"tcp://127.0.0.1:{port}")
            first.send(b"x")
            assert router.stdout.readline() == "full\n"
            first.send_multipart([b""] * 60_000)
            assert router.stdout.readline() == "reads\n"
            watched = second.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
            second.connect(f"tcp://127.0.0.1:{port}")
            assert watched.poll(20_000)
            end = time.monotonic() + 20
            while router.poll() is None and first.poll(200):
                first.recv()
                assert time.monotonic() < end
            if handover:
                assert router.wait(20) == -signal.SIGABRT
                assert "Assertion failed: !it->second.active" in router.stderr.read()
            else:
                assert router.stdout.readline() == "has read\n"
                assert router.poll() is None
            second.disable_monitor()
        finally:
            router.kill()


def said(s: zmq.Socket[bytes], number: int) -> bool:
    """It gets the answer to that."""
    end = time.monotonic() + 20
    while s.poll(max(0, int((end - time.monotonic()) * 1000))):
        message = wire.decode_from_dispatcher(s.recv_multipart())
        if isinstance(message, Claimed) and message.seq == number:
            return True
    return False


def test_nobody_takes_a_routing_id_over(rack: Rack, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    """Hosts have a new one for each connection, so the dispatcher needs no handover."""
    h1, h2 = rack.begin(2)
    h1.stop()
    first, second = dealer(context, h1), dealer(context, h1)
    where = f"tcp://127.0.0.1:{rack.dispatcher.port}"
    first.connect(where)
    first.send(wire.encode_to_dispatcher(Hello("", 0, 0)))
    first.send(wire.encode_to_dispatcher(Report(1, ())))
    assert said(first, 1)
    watched = second.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    second.connect(where)
    assert watched.poll(20_000)
    second.disable_monitor()
    second.send(wire.encode_to_dispatcher(Report(2, ())))
    first.send(wire.encode_to_dispatcher(Report(3, ())))
    assert said(first, 3), "its session, and its routing id, are its own"
    assert not second.poll(300)
    h2.claim(guest(2))
    rack.until(lambda: h2.objects(Kind.ROUTE))


def test_a_message_without_end_harms_nobody_else(rack: Rack, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    """MAXMSGSIZE bounds a frame, nothing bounds their number before the last one is here, and nothing tells us whose
    they are: memory's bound is the unit's. What it ends begins again from the store."""
    bad, good = rack.begin(2)
    good.claim(guest(2))
    revision = rack.dispatcher.apply(policy("p", WEB, WEB))
    rack.settle()
    bad.stop()
    assert rack.dispatcher.process
    pid = rack.dispatcher.process.pid
    room = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize() + (128 << 20)
    resource.prlimit(pid, resource.RLIMIT_AS, (room, room))
    before = memory_kib(pid)
    s = dealer(context, bad)
    watched = s.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    s.connect(f"tcp://127.0.0.1:{rack.dispatcher.port}")
    s.send(wire.encode_to_dispatcher(Hello("", 0, 0)))
    large = bytes(4 << 20)  # our own libzmq sends messages that have an end; others need not
    s.send_multipart([large] * 80, copy=False)
    most = before

    def ended() -> bool:
        nonlocal most
        dead = rack.dispatcher.process is not None and rack.dispatcher.process.poll() is not None
        most = most if dead else max(most, memory_kib(pid))
        return dead or bool(watched.poll(0))

    until(ended, [good])
    s.disable_monitor()
    s.close(0)
    assert most > before + (40 << 10), "the control: it took all of it, up to the limit"
    held = good.replica.dump()
    if rack.dispatcher.process.poll() is not None:
        turn([good], 0.1)
        assert good.replica.dump() == held, "a host keeps what it has"
        rack.dispatcher.start()  # as systemd does
    rack.until(lambda: good.in_sync)
    assert rack.dispatcher.get("/v1/status")["revision"] >= revision
    good.claim(guest(5))
    rack.until(lambda: len(good.objects(Kind.ROUTE)) == 2)
    assert set(good.objects(Kind.POLICY)) == {"p"}


def test_systemd_begins_it_again() -> None:
    unit = (REPO / "packaging/deb/debian/slash32-dispatcher.slash32-dispatcher.service").read_text().splitlines()
    assert {"Restart=always", "StartLimitIntervalSec=0"} <= set(unit)
    assert any(line.startswith("MemoryMax=") for line in unit), "an endless message ends it, not the machine"
