# `?wait=`: one request that changes something and answers when every host has it, or when the seconds are over; and
# waiting for the revision that comes next.
from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from dispatcher_rig import WEB, Rack, guest, policy

Answer = tuple[int, Any]


def asked(rack: Rack, *request: Any) -> Future[Answer]:
    """In a thread of its own; the hosts live in this one."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(rack.dispatcher.call, *request)
        rack.until(future.done)
    return future


def body(port: int) -> dict[str, Any]:
    found = policy("p", WEB, WEB)
    found["spec"]["ingress"][0] |= {"protocol": "TCP", "destination": {"ports": [port]}}
    return {"documents": [found]}


@pytest.fixture
def two(rack: Rack) -> Rack:
    for n, host in enumerate(rack.begin(2), 1):
        host.claim(guest(n))
    rack.settle()
    return rack


def test_apply_answers_when_every_host_has_it(two: Rack) -> None:
    status, said = asked(two, "POST", "/v1/apply?wait=15", body(80)).result()
    assert status == 200 and said["changes"] == [{"kind": "GlobalNetworkPolicy", "name": "p", "change": "created"}]
    progress = said["progress"]
    assert (progress["done"], progress["live"], progress["pending"]) == (True, 2, [])
    assert progress["revision"] == said["revision"] == two.dispatcher.get("/v1/status")["revision"]
    status, said = asked(two, "DELETE", "/v1/resources/GlobalNetworkPolicy/p?wait=15").result()
    assert (status, said["progress"]["done"]) == (200, True)
    assert said["progress"]["revision"] == said["revision"] == progress["revision"] + 1


def test_without_wait_there_is_no_progress(two: Rack) -> None:
    for query in ("", "?wait=0", "?dry_run=1&wait=5"):
        status, said = two.dispatcher.call("POST", f"/v1/apply{query}", body(80))
        assert status == 200 and "progress" not in said, query


def test_it_answers_when_the_seconds_are_over(two: Rack) -> None:
    two.hosts[1].acknowledges = False
    status, said = asked(two, "POST", "/v1/apply?wait=0.3", body(81)).result()
    assert status == 200 and said["progress"]["done"] is False
    assert (said["progress"]["live"], said["progress"]["pending"]) == (1, ["h2"])
    assert two.dispatcher.get("/v1/resources/gnp/p")["spec"]["ingress"][0]["destination"] == {"ports": [81]}


def test_what_is_refused_waits_for_nobody(two: Rack) -> None:
    two.hosts[1].acknowledges = False
    for query, document in (("wait=15", {"kind": "Nonsense"}), ("wait=601", body(1)["documents"][0])):
        status, said = two.dispatcher.call("POST", f"/v1/apply?{query}", {"documents": [document]})
        assert status == 400 and len(said["errors"]) == 1
    assert two.dispatcher.call("DELETE", "/v1/resources/gnp/nobody?wait=15")[0] == 404


def test_it_is_done_also_where_the_dispatcher_ends_meanwhile(two: Rack) -> None:
    two.hosts[1].acknowledges = False
    before = two.dispatcher.get("/v1/status")["revision"]
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(two.dispatcher.call, "POST", "/v1/apply?wait=60", body(82))
        two.until(lambda: two.dispatcher.get("/v1/status")["revision"] > before)
        two.until(lambda: two.dispatcher.get(f"/v1/revisions/{before + 1}")["pending"] == ["h2"])
        assert not future.done()
        two.dispatcher.stop()
        status, said = future.result(10)
    assert status == 200 and said["progress"]["pending"] == ["h2"]
    assert said["revision"] == before + 1


def test_the_next_revision_is_waited_for_and_none_beyond(two: Rack) -> None:
    last = two.dispatcher.get("/v1/status")["revision"]
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(two.dispatcher.call, "GET", f"/v1/revisions/{last + 1}?wait=15")
        assert two.dispatcher.call("GET", f"/v1/revisions/{last + 2}?wait=15")[0] == 404
        assert two.dispatcher.call("GET", f"/v1/revisions/{last + 1}")[0] == 404
        assert not future.done()
        two.hosts[0].claim(guest(9))
        two.until(future.done)
    status, said = future.result()
    assert (status, said["revision"], said["done"], said["live"]) == (200, last + 1, True, 2)
    assert two.dispatcher.call("GET", f"/v1/revisions/{last + 2}?wait=0.2")[0] == 404
