# The dispatcher as a process, with real CURVE connections of the real feed: what hosts are told, who may have an
# address, and who may connect.
from __future__ import annotations

import random
import subprocess
import time

import zmq
from dispatcher_rig import DB, WEB, FakeHost, Rack, guest, members, policy, until

from hostd.session.feed import ClaimAnswer
from slash32 import wire
from slash32.model import SharedAddress
from slash32.net import host_prefix, parse_address
from slash32.pack import AddressSet, Kind
from slash32.sync import Applied
from slash32.wire import Failure, Hello, Members

# --- the main job ----------------------------------------------------------------------------------------------------


def test_a_policy_reaches_the_hosts_that_need_it(rack: Rack) -> None:
    h1, h2, h3 = rack.begin(3)
    h1.claim(guest(1, "web"))
    h2.claim(guest(2, "db"))
    revision = rack.dispatcher.apply(policy("web-to-db", DB, WEB))
    rack.settle()
    progress = rack.wait_live(revision)
    assert (progress["live"], progress["hosts"], progress["pending"], progress["failed"]) == (3, 3, [], [])
    assert progress["milliseconds"] > 0
    assert set(h2.objects(Kind.POLICY)) == {"web-to-db"} and h2.objects(Kind.SET) == {WEB: members("10.65.0.1")}
    for other in (h1, h3):
        assert not other.objects(Kind.POLICY) and not other.objects(Kind.SET)
    for host in (h1, h2, h3):
        assert host.objects(Kind.ROUTE) == {
            host_prefix(parse_address("10.65.0.1")): ("h1",),
            host_prefix(parse_address("10.65.0.2")): ("h2",),
        }
        assert set(host.objects(Kind.HOST)) == {"h1", "h2", "h3"}
    h3.claim(guest(3, "web"))
    rack.until(lambda: h2.get(Kind.SET, WEB) == members("10.65.0.1", "10.65.0.3"))
    last = [e for e in h2.events if isinstance(e, Applied)][-1]
    assert Members(WEB, members("10.65.0.3"), AddressSet()) in last.changes, "sets travel as deltas"
    rack.dispatcher.call("DELETE", "/v1/resources/gnp/web-to-db")
    rack.until(lambda: not h2.objects(Kind.POLICY) and not h2.objects(Kind.SET))


def test_what_a_claim_needs_is_there_before_its_answer(rack: Rack) -> None:
    (h1,) = rack.begin(1)
    rack.dispatcher.apply(policy("p", WEB, "all()"))
    rack.settle()
    assert not h1.objects(Kind.POLICY)
    h1.events.clear()
    seq = h1.claim(guest(1))
    rack.until(lambda: seq in h1.answered)
    before = [e for e in h1.events if not (isinstance(e, ClaimAnswer) and e.seq != seq)]
    assert [type(e).__name__ for e in before] == ["Applied", "ClaimAnswer"]
    assert "p" in h1.objects(Kind.POLICY) and h1.get(Kind.SET, "all()") == members("10.65.0.1")


def test_wait_tells_who_is_missing_and_who_failed(rack: Rack) -> None:
    h1, h2 = rack.begin(2)
    h1.claim(guest(1))
    h2.claim(guest(2))
    rack.settle()
    h2.acknowledges = False
    h1.failures = [Failure("policy p", "no memory")]
    revision = rack.dispatcher.apply(policy("p", WEB, WEB))
    rack.until(lambda: "p" in h1.objects(Kind.POLICY) and "p" in h2.objects(Kind.POLICY))
    rack.until(lambda: rack.dispatcher.get(f"/v1/revisions/{revision}")["live"] == 1)
    progress = rack.dispatcher.get(f"/v1/revisions/{revision}?wait=0.2")
    assert progress["pending"] == ["h2"] and not progress["done"] and progress["disconnected"] == []
    assert progress["failed"] == [{"host": "h1", "object": "policy p", "message": "no memory"}]
    assert [h["in_sync"] for h in rack.dispatcher.get("/v1/hosts")["items"]] == [True, False]
    assert h2.feed
    h2.feed.ack(h2.replica.revision)
    rack.wait_live(revision)
    h2.stop()
    rack.until(lambda: rack.dispatcher.get("/v1/status")["connected"] == 1 or ping(rack, revision))
    progress = rack.dispatcher.get(f"/v1/revisions/{revision}")
    assert progress["pending"] == progress["disconnected"] == ["h2"]
    assert rack.dispatcher.call("GET", "/v1/revisions/99999")[0] == 404


def ping(rack: Rack, revision: int) -> bool:
    """A commit that concerns all: sending finds out at once who is gone."""
    n = 100 + revision % 100 + int(time.monotonic() * 10) % 50
    h1 = rack.hosts[0]
    h1.claim(guest(n))
    h1.release(guest(n).key)
    return False


def test_a_long_poll_ends_when_the_last_host_has_it(rack: Rack) -> None:
    (h1,) = rack.begin(1)
    h1.claim(guest(1))
    rack.settle()
    revision = rack.dispatcher.apply(policy("p", WEB, WEB))
    command = ["curl", "-s", "--unix-socket", str(rack.dispatcher.socket), f"http://d/v1/revisions/{revision}?wait=15"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as curl:
        rack.until(lambda: curl.poll() is not None)
        assert curl.stdout and b'"done": true' in curl.stdout.read()


# --- ownership -------------------------------------------------------------------------------------------------------


def test_two_owners_of_one_address(rack: Rack) -> None:
    h1, h2 = rack.begin(2)
    assert rack.answered(h1, h1.claim(guest(1, "web", "10.65.0.2"))) is None
    refusal = rack.answered(h2, h2.claim(guest(2, "web", "10.65.0.2")))
    assert refusal == "address 10.65.0.2 is in use by web1 on h1"
    (alarm,) = rack.dispatcher.get("/v1/status")["alarms"]
    assert alarm["host"] == "h2" and alarm["message"] == refusal
    # The owner is away: its claim stays.
    h1.stop()
    h2.refused.clear()
    assert rack.answered(h2, h2.claim(guest(2, "web", "10.65.0.2"))) == refusal
    h1.start()
    rack.until(lambda: h1.in_sync)
    # It moves only after it was released.
    h1.release(guest(1).key)
    rack.until(lambda: not rack.dispatcher.get("/v1/endpoints")["items"])
    h2.refused.clear()
    assert rack.answered(h2, h2.claim(guest(2, "web", "10.65.0.2"))) is None
    (item,) = rack.dispatcher.get("/v1/endpoints")["items"]
    assert (item["host"], item["addresses"]) == ("h2", ["10.65.0.2"])
    assert rack.dispatcher.get("/v1/status")["alarms"] == []


def test_shared_addresses_of_one_group_only(rack: Rack) -> None:
    h1, h2 = rack.begin(2)
    vip = parse_address("10.65.9.1")
    assert rack.answered(h1, h1.claim(guest(1, shared=(SharedAddress(vip, "a"),)))) is None
    assert rack.answered(h2, h2.claim(guest(2, shared=(SharedAddress(vip, "a"),)))) is None
    assert "10.65.9.1 is in use" in (rack.answered(h2, h2.claim(guest(3, shared=(SharedAddress(vip, "b"),)))) or "")
    rack.until(lambda: h1.objects(Kind.ROUTE).get(host_prefix(vip)) == ("h1", "h2"))


def test_a_report_replaces_what_is_held(rack: Rack) -> None:
    (h1,) = rack.begin(1)
    for n in (1, 2, 3):
        h1.claim(guest(n))
    rack.settle()
    h1.stop()
    del h1.claims[guest(2).key]
    h1.claims[guest(4).key] = guest(4)
    h1.start()
    rack.until(lambda: h1.in_sync)
    rack.until(lambda: [e["domain"] for e in rack.dispatcher.get("/v1/endpoints")["items"]] == ["web1", "web3", "web4"])


def test_a_host_is_held_to_its_bounds_and_speaks_only_for_itself(rack: Rack) -> None:
    h1, h2 = rack.begin(2)
    rack.dispatcher.apply(h2.resource(nets=["10.70.0.0/16"], labels={"role": ["web"]}))
    assert rack.answered(h1, h1.claim(guest(1, "db"))) is None
    assert "spec.nets" in (rack.answered(h2, h2.claim(guest(2, "web"))) or "")
    assert "spec.labels" in (rack.answered(h2, h2.claim(guest(3, "db", "10.70.0.3"))) or "")
    h2.refused.clear()
    assert rack.answered(h2, h2.claim(guest(4, "web", "10.70.0.4"))) is None
    h2.release(guest(1).key)  # not its own
    rack.answered(h2, h2.claim(guest(5, "web", "10.70.0.5")))
    assert {e["host"] for e in rack.dispatcher.get("/v1/endpoints")["items"] if e["domain"] == "web1"} == {"h1"}


def test_tighter_bounds_end_what_they_forbid(rack: Rack) -> None:
    h1, h2 = rack.begin(2)
    h1.claim(guest(1))
    h1.claim(guest(2, "web", "10.70.0.2"))
    rack.settle()
    rack.dispatcher.apply(h1.resource(nets=["10.70.0.0/16"]))
    rack.until(lambda: guest(1).key in h1.refused and h1.in_sync)
    rack.until(lambda: set(h2.objects(Kind.ROUTE)) == {host_prefix(parse_address("10.70.0.2"))})


# --- who may connect -------------------------------------------------------------------------------------------------


def client(context: zmq.Context[zmq.Socket[bytes]], rack: Rack, keys: tuple[str, str] | None) -> zmq.Socket[bytes]:
    s = context.socket(zmq.DEALER)
    s.linger = 0
    s.setsockopt(zmq.ROUTING_ID, b"x" * 16)
    if keys is not None:
        s.curve_publickey, s.curve_secretkey = keys[0].encode(), keys[1].encode()
        s.curve_serverkey = rack.dispatcher.public_key.encode()
    s.connect(f"tcp://127.0.0.1:{rack.dispatcher.port}")
    s.send(wire.encode_to_dispatcher(Hello("", 0, 0)))
    s.send(wire.encode_to_dispatcher(wire.Report(1, ())))
    return s


def test_only_a_known_key_gets_anything(rack: Rack) -> None:
    h1 = rack.begin(1)[0]
    h1.stop()
    stranger = FakeHost(rack.dispatcher, "h9").keys
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        for keys in (stranger, None):
            s = client(context, rack, keys)
            assert not s.poll(800), "a stranger was answered"
            s.close(0)
        s = client(context, rack, h1.keys)  # the positive control
        assert s.poll(10_000)
        assert isinstance(wire.decode_from_dispatcher(s.recv_multipart()), wire.Snapshot)
        s.close(0)
    finally:
        context.term()
    until(lambda: f"unknown key {stranger.public}" in rack.dispatcher.log.read_text())
    assert rack.dispatcher.log.read_text().count(stranger.public) == 1, "said once, however often it tries"


def test_an_unknown_host_is_told_apart_and_let_in_once_known(rack: Rack) -> None:
    rack.begin(1)
    new = FakeHost(rack.dispatcher, "h2")
    rack.hosts.append(new)
    new.start()
    assert new.feed
    rack.until(lambda: new.feed and "key" in new.feed.trouble)
    rack.dispatcher.apply(new.resource())
    rack.until(lambda: new.in_sync)


def test_garbage_from_a_known_host_harms_nobody(rack: Rack) -> None:
    h1, h2 = rack.begin(2)
    h1.stop()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    noise = random.Random(5)
    try:
        s = client(context, rack, h1.keys)
        for _ in range(300):
            s.send_multipart([noise.randbytes(noise.randrange(60)) for _ in range(noise.randrange(1, 4))])
        assert s.poll(10_000)
        assert h2.feed
        h2.claim(guest(2))
        rack.until(lambda: rack.dispatcher.get("/v1/endpoints")["items"])
        s.close(0)
    finally:
        context.term()
    assert rack.dispatcher.process and rack.dispatcher.process.poll() is None
    log = rack.dispatcher.log.read_text()
    assert "Traceback" not in log and len(log) < 100_000


def test_another_host_cannot_take_a_connection_over(rack: Rack) -> None:
    """Routing ids are random, and a session belongs to the key that opened it."""
    h1, h2 = rack.begin(2)
    h1.claim(guest(1))
    rack.settle()
    h2.stop()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        s = client(context, rack, h2.keys)
        s.recv_multipart()
        s.send(wire.encode_to_dispatcher(wire.Release(5, guest(1).key)))
        s.send(wire.encode_to_dispatcher(wire.Ping()))
        while not isinstance(wire.decode_from_dispatcher(s.recv_multipart()), wire.Pong):
            pass
        assert len(rack.dispatcher.get("/v1/endpoints")["items"]) == 1
        s.close(0)
    finally:
        context.term()


def test_deleting_a_host_is_an_explicit_act(rack: Rack) -> None:
    h1, h2 = rack.begin(2)
    h1.claim(guest(1))
    rack.settle()
    assert rack.dispatcher.call("DELETE", "/v1/resources/Host/h1")[0] == 200
    rack.until(lambda: not h2.objects(Kind.ROUTE) and set(h2.objects(Kind.HOST)) == {"h2"})
    rack.until(lambda: h1.feed is not None and not h1.feed.connected)
    assert h1.objects(Kind.ROUTE), "the deleted host keeps what it had"
    h1.restart()
    rack.until(lambda: h1.feed and "key" in h1.feed.trouble)


def test_a_changed_key_needs_a_new_connection(rack: Rack) -> None:
    h1, h2 = rack.begin(2)
    other = FakeHost(rack.dispatcher, "h7")
    rack.dispatcher.apply(h1.resource(publicKey=other.keys.public))
    rack.until(lambda: h1.feed is not None and not h1.feed.connected)
    h2.claim(guest(2))
    rack.until(lambda: h2.objects(Kind.ROUTE))
    assert not h1.objects(Kind.ROUTE)
