# GET /v1/watch of a real dispatcher process: what watchers hear, what they missed, and those that take nothing. Backup
# and restore by the API.
from __future__ import annotations

import base64
import http.client
import socket
from pathlib import Path

import pytest
from api_rig import Served, Watch, errors, network, pieces
from dispatcher_rig import Dispatcher, FakeHost, Rack, document, guest, until

# --- watching --------------------------------------------------------------------------------------------------------


def test_watch(served: Served) -> None:
    watch = Watch(served)
    assert watch.status == 200 and watch.response.getheader("Content-Type") == "text/event-stream"
    revision = served.apply(network("seen", "192.0.2.0/24"))
    event = watch.commit()
    (change,) = event.pop("changes")
    assert event == {"event": "commit", "revision": revision}
    assert (change["kind"], change["name"], change["change"]) == ("GlobalNetworkSet", "seen", "put")
    assert change["object"] == served.get("/v1/resources/gns/seen")
    served.call("DELETE", "/v1/resources/gns/seen")
    assert watch.commit() == {
        "event": "commit",
        "revision": revision + 1,
        "changes": [{"kind": "GlobalNetworkSet", "name": "seen", "change": "deleted"}],
    }
    watch.close()


def test_watch_resumes(served: Served) -> None:
    first = served.apply(network("a", "192.0.2.0/24"))
    served.apply(network("b", "192.0.2.0/24"))
    for watch in (
        Watch(served, f"?since={first - 1}"),
        Watch(served, Last_Event_ID=str(first - 1)),
        Watch(served, "?since=0", Last_Event_ID=str(first - 1)),
    ):
        assert [watch.commit()["revision"] for _ in range(2)] == [first, first + 1]
        watch.close()
    live = Watch(served, f"?since={first + 1}")
    after = served.apply(network("c", "192.0.2.0/24"))
    assert live.commit()["revision"] == after, "nothing twice"
    live.close()
    future = Watch(served, f"?since={after + 1000}")
    assert future.commit() == {"event": "reset", "revision": after}
    future.close()


def test_watch_sees_endpoints(tmp_path: Path) -> None:
    rack = Rack(tmp_path)
    try:
        (h1,) = rack.begin(1)
        watch = Watch(rack.dispatcher)
        h1.claim(guest(1))
        rack.until(lambda: rack.dispatcher.get("/v1/endpoints")["items"])
        (endpoint,) = rack.dispatcher.get("/v1/endpoints")["items"]
        del endpoint["effectiveLabels"]
        (change,) = watch.commit()["changes"]
        name = f"{endpoint['uuid']}/{endpoint['mac']}"
        assert change == {"kind": "Endpoint", "name": name, "change": "put", "object": endpoint}
        h1.release(guest(1).key)
        rack.until(lambda: not rack.dispatcher.get("/v1/endpoints")["items"])
        assert watch.commit()["changes"] == [{"kind": "Endpoint", "name": name, "change": "deleted"}]
        watch.close()
    finally:
        rack.end()


def test_too_late_begins_anew(served: Served) -> None:
    begun = served.apply(network("late", "192.0.2.0/24"))
    for number in range(1030):
        last = served.apply(network("late", f"10.{number >> 8}.{number & 255}.0/24"))
    old = Watch(served, f"?since={begun}")
    assert old.commit() == {"event": "reset", "revision": last}
    now = served.apply(network("late", "192.0.2.0/24"))
    assert old.commit()["revision"] == now
    old.close()


def test_a_watcher_that_takes_nothing_is_cut_off(served: Served) -> None:
    assert served.process
    slow, quick = Watch(served), Watch(served)
    nets = [f"10.{n >> 8}.{n & 255}.0/24" for n in range(20_000)]
    for number in range(60):
        last = served.apply(network("big", *nets, f"11.0.{number}.0/24"))
        assert quick.commit()["revision"] == last
    quick.close()
    with pytest.raises((EOFError, OSError, http.client.HTTPException)):
        while True:
            slow.event()
    slow.close()
    assert served.quiet()


def test_at_most_256_watch(served: Served) -> None:
    watches = [Watch(served) for _ in range(256)]
    try:
        assert Watch(served).status == 503
    finally:
        for watch in watches:
            watch.close()
    until(lambda: (again := Watch(served)).status == 200 and again.close() is None)


def test_watchers_do_not_keep_it_from_ending(fresh: Dispatcher, tmp_path: Path) -> None:
    fresh.start()
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(str(fresh.socket))
        s.settimeout(20)
        s.sendall(b"GET /v1/watch HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"retry" in b"".join(s.recv(4096) for _ in range(2))
        assert fresh.stop() == 0
        assert b"".join(pieces(s)).endswith(b"0\r\n\r\n")


# --- backups ---------------------------------------------------------------------------------------------------------


def test_backup_and_restore(served: Served, fresh: Dispatcher) -> None:
    host = FakeHost(served, "h77")
    served.apply(host.resource(), network("kept", "192.0.2.0/24"), document("Tier", "first", order=1))
    backup = served.get("/v1/backup")
    assert (backup["slash32Backup"], backup["revision"]) == (1, served.get("/v1/status")["revision"])
    fresh.start()
    assert fresh.call("POST", "/v1/restore", backup)[0] == 200
    for kind in ("gns", "tiers", "hosts"):
        assert fresh.get(f"/v1/resources/{kind}") == served.get(f"/v1/resources/{kind}")
    assert fresh.get("/v1/audit?limit=1")["items"][0]["change"] == "restored"
    assert errors(fresh.call("POST", "/v1/restore", backup), 409)
    fresh.apply(network("more", "192.0.2.0/24"))
    assert fresh.call("POST", "/v1/restore?replace=1", backup)[0] == 200
    assert fresh.get("/v1/resources/gns") == served.get("/v1/resources/gns")
    served.call("DELETE", "/v1/resources/Host/h77")


def test_a_restore_is_watched(served: Served) -> None:
    backup = served.get("/v1/backup")
    watch = Watch(served)
    served.apply(network("odd", "192.0.2.0/24"))
    assert watch.commit()["changes"][0]["change"] == "put"
    assert served.call("POST", "/v1/restore?replace=1", backup)[0] == 200
    assert watch.commit()["changes"] == [{"kind": "GlobalNetworkSet", "name": "odd", "change": "deleted"}]
    watch.close()


def test_what_is_no_backup_changes_nothing(served: Served) -> None:
    good = served.get("/v1/backup")
    before = served.get("/v1/status")["revision"]
    row = ["resource", ["Tier", "x"], base64.b64encode(b"{}").decode()]
    odd = ({"x": 1}, {"slash32Backup": 2}, {"records": [row]}, {"epoch": ""}, {"revision": -1}, {"records": [[]]})
    for wrong in ({}, [], *({**good, **each} for each in odd)):
        errors(served.call("POST", "/v1/restore?replace=1", wrong), 400)
    assert served.get("/v1/status")["revision"] == before
