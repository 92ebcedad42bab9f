# The dispatcher as a process ends, is killed, begins anew, empty or with an old copy of its database; a host sleeps. No
# host loses anything by it.
from __future__ import annotations

import random
import time

from dispatcher_rig import WEB, Rack, guest, members, policy, turn, until

from slash32.pack import Kind
from slash32.sync import Applied, Held

# --- ends of the dispatcher ------------------------------------------------------------------------------------------


def test_kill_loses_nothing_that_was_acknowledged(rack: Rack) -> None:
    h1, h2 = rack.begin(2)
    noise = random.Random(11)
    granted: set[object] = set()
    n, applied = 10, 0
    for _ in range(4):
        pending = {}
        for _ in range(noise.randrange(20, 60)):
            n += 1
            pending[h1.claim(guest(n, "web", f"10.65.{n >> 8}.{n & 255}"))] = guest(n).key
        applied = max(applied, rack.dispatcher.apply(policy(f"p{n}", WEB, WEB)))
        end = time.monotonic() + noise.random() * 0.05
        while time.monotonic() < end:
            turn(rack.hosts, 0.002)
        rack.dispatcher.kill()
        turn(rack.hosts, 0.01)
        granted |= {key for seq, key in pending.items() if seq in h1.answered}
        h1.answered.clear()
        keep = dict(h1.claims)
        h1.claims = {}  # so that nothing but the disk can bring them back
        h1.stop()
        rack.dispatcher.start()
        held = {(e["uuid"], e["mac"]) for e in rack.dispatcher.get("/v1/endpoints")["items"]}
        assert {tuple(key) for key in granted} <= held  # type: ignore[arg-type]
        assert rack.dispatcher.get("/v1/status")["revision"] >= applied
        assert f"p{n}" in {d["metadata"]["name"] for d in rack.dispatcher.get("/v1/resources/gnp")["items"]}
        h1.claims = keep
        h1.start()
        rack.until(lambda: h1.in_sync and h2.in_sync)
        rack.settle()
    assert granted


def test_restart_changes_nothing_on_the_hosts(rack: Rack) -> None:
    h1, h2 = rack.begin(2)
    for n in range(1, 20):
        h1.claim(guest(n))
    rack.dispatcher.apply(policy("p", WEB, WEB))
    rack.settle()
    for end in (rack.dispatcher.kill, rack.dispatcher.stop):
        for host in rack.hosts:
            host.events.clear()
        end()
        rack.until(lambda: not h1.feed.connected and not h2.feed.connected)  # type: ignore[union-attr]
        assert h1.objects(Kind.SET), "the last state stays"
        rack.dispatcher.start()
        rack.until(lambda: h1.in_sync and h2.in_sync)
        rack.settle()
        changes = [c for host in rack.hosts for e in host.events if isinstance(e, Applied) for c in e.changes]
        assert changes == []


def test_a_host_that_calls_itself_otherwise_is_told(rack: Rack) -> None:
    (h1,) = rack.begin(1)
    h1.stop()
    h1.calls_itself = "server17"
    h1.start()
    rack.until(lambda: h1.feed and "server17" in h1.feed.trouble)
    assert h1.feed and 'Host h1: set host = "h1" in its hostd.toml' in h1.feed.trouble and not h1.in_sync
    h1.stop()
    h1.calls_itself = "h1"  # the control
    h1.start()
    rack.until(lambda: h1.in_sync)


def test_an_empty_dispatcher_cannot_wipe_the_fleet(rack: Rack) -> None:
    h1, h2 = rack.begin(2)
    h1.claim(guest(1))
    h2.claim(guest(2))
    rack.dispatcher.apply(policy("p", WEB, WEB))
    rack.settle()
    before = [h.replica.dump() for h in rack.hosts]
    rack.dispatcher.stop()
    for path in rack.dispatcher.folder.glob("d.db*"):
        path.unlink()
    rack.dispatcher.start()
    rack.dispatcher.apply(*(h.resource() for h in rack.hosts))
    rack.until(lambda: all(any(isinstance(e, Held) for e in h.events) for h in rack.hosts))
    rack.until(lambda: len(rack.dispatcher.get("/v1/status")["held"]) == 2)
    rack.dispatcher.apply(policy("other", WEB, WEB))
    h2.restart()  # also over a restart of the host
    rack.until(lambda: h2.replica.held)
    assert [h.replica.dump() for h in rack.hosts] == before and not h1.in_sync and not h2.in_sync
    # The positive control: an operator's explicit word.
    rack.until(lambda: len(rack.dispatcher.get("/v1/status")["held"]) == 2)
    status, body = rack.dispatcher.call("POST", "/v1/adopt", {"hosts": ["h1", "nobody"]})
    assert status == 404 and "nobody" in body["errors"][0]
    status, body = rack.dispatcher.call("POST", "/v1/adopt", {"hosts": ["h1"]})
    assert (status, body["adopted"]) == (200, ["h1"])
    rack.until(lambda: h1.in_sync)
    assert h2.replica.held, "a word for one host is none for another"
    status, body = rack.dispatcher.call("POST", "/v1/adopt", {"all": True})
    assert (status, body["adopted"]) == (200, ["h2"])
    rack.until(lambda: h1.in_sync and h2.in_sync)
    assert set(h1.objects(Kind.POLICY)) == {"other"} and h1.get(Kind.SET, WEB) == members("10.65.0.1", "10.65.0.2")


def test_an_old_copy_of_the_database_cannot_wipe_either(rack: Rack) -> None:
    h1, h2 = rack.begin(2)
    h1.claim(guest(1))
    h2.claim(guest(2))
    rack.settle()
    rack.dispatcher.stop()
    old = {path: path.read_bytes() for path in rack.dispatcher.folder.glob("d.db*")}
    rack.dispatcher.start()
    rack.until(lambda: h1.in_sync and h2.in_sync)
    rack.dispatcher.apply(policy("p", WEB, WEB))
    rack.settle()
    h2.stop()
    rack.dispatcher.stop()
    for path in rack.dispatcher.folder.glob("d.db*"):
        path.unlink()
    for path, content in old.items():
        path.write_bytes(content)
    rack.dispatcher.start()
    rack.until(lambda: h1.replica.held)
    assert "old copy" in rack.dispatcher.log.read_text()
    for n in range(20):  # however many revisions the copy makes since
        rack.dispatcher.apply(policy(f"x{n}", WEB, WEB))
    h1.restart()
    rack.until(lambda: h1.replica.held)
    rack.dispatcher.kill()
    rack.dispatcher.start()
    rack.until(lambda: h1.replica.held and rack.dispatcher.get("/v1/status")["held"])
    assert set(h1.objects(Kind.POLICY)) == {"p"}
    rack.dispatcher.call("POST", "/v1/adopt", {"all": True})
    rack.until(lambda: h1.in_sync and len(h1.objects(Kind.POLICY)) == 20)


def test_a_sleeping_host_delays_nobody_and_costs_its_state_only(rack: Rack) -> None:
    h1, h2, h3 = rack.begin(3)
    h1.claim(guest(1))
    h2.claim(guest(2))
    rack.dispatcher.apply(policy("p", WEB, WEB))
    rack.settle()
    awake = [h1, h3]
    for n in range(300):  # h2 takes nothing meanwhile
        revision = rack.dispatcher.apply(policy("p", WEB, f'role == "web" || n == "{n % 7}"'))
        turn(awake, 0.001)
    until(lambda: rack.dispatcher.get(f"/v1/revisions/{revision}")["pending"] == ["h2"], awake)
    h2.events.clear()
    rack.wait_live(revision)
    applied = [e for e in h2.events if isinstance(e, Applied)]
    assert 1 <= len(applied) <= 12, "a window, and then the state"
    assert h2.replica.digest and h2.objects(Kind.POLICY) == h1.objects(Kind.POLICY)
