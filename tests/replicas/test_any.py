# Three dispatchers of one store: whichever is asked knows all hosts and says the same, and what is done at one holds at
# all of them at once.
from __future__ import annotations

import json
import os
import threading
from typing import Any

import pytest
from dispatcher_rig import guest, policy
from trio import One, Trio, content

from slash32.keys import load_or_create_key, next_file

FULL = os.environ.get("SLASH32_COUNTS") == "full"


def test_any_dispatcher_counts_the_hosts_of_all(trio: Trio) -> None:
    trio.begin(6, spread=True)
    for n, host in enumerate(trio.hosts, 1):
        host.claim(guest(n))
    trio.settle()
    for one in trio.all:
        revision = one.apply(policy(f"p-{one.name}", "all()", f'role == "{one.name}"'))
        for other in trio.all:
            found = trio.wait_live(other, revision)
            assert (found["live"], found["hosts"], found["pending"]) == (6, 6, [])
            assert 0 < found["p50"] <= found["p99"]
        items = one.get("/v1/hosts")["items"]
        assert [item["dispatcher"] for item in items] == ["d1", "d2", "d3"] * 2
        assert all(item["connected"] and item["in_sync"] and item["endpoints"] == 1 for item in items)
        status = one.get("/v1/status")
        assert (status["connected"], status["inSync"], status["endpoints"]) == (6, 6, 6)
    views = [content(one.get("/v1/backup")) for one in trio.all]
    assert views[0] == views[1] == views[2]


def test_who_has_not_acknowledged_is_named_by_any(trio: Trio) -> None:
    late = trio.begin(3, spread=True)[1]
    late.acknowledges = False
    revision = trio.all[0].apply(policy("p", "all()", "all()"))
    host = guest(1)
    late.claim(host)  # so that something concerns it
    trio.until(lambda: late.answered)
    for one in trio.all:
        trio.follow(revision + 1)

        def names_it(one: One = one) -> bool:
            """A host of a machine that is busy may be away for a moment."""
            found = one.get(f"/v1/revisions/{revision + 1}")
            lags = [(each["host"], each["connected"]) for each in found["lagging"]]
            return found["pending"] == ["h2"] and lags == [("h2", True)] and not found["done"]

        trio.until(names_it)
    late.acknowledges = True
    assert late.feed
    late.feed.ack(late.replica.revision)
    trio.settle()


def test_a_wait_at_one_ends_when_hosts_of_others_have_it(trio: Trio) -> None:
    trio.begin(3, spread=True)
    for n, host in enumerate(trio.hosts, 1):
        host.claim(guest(n))
    trio.settle()
    revision, found = trio.all[2].apply(policy("p", "all()", "all()")), []
    asks = threading.Thread(target=lambda: found.append(trio.all[2].get(f"/v1/revisions/{revision}?wait=15")))
    asks.start()
    trio.until(lambda: not asks.is_alive())
    assert found[0]["done"] and found[0]["milliseconds"] < 10_000


def test_questions_reach_hosts_of_others(trio: Trio) -> None:
    trio.begin(4, spread=True)
    trio.settle()
    for host in trio.hosts[:2]:
        host.says = json.dumps({"said": host.name})
    found: list[Any] = []
    body = {"hosts": ["h1", "h2", "h3", "h4"], "question": {"what": "weather"}}
    asks = threading.Thread(target=lambda: found.append(trio.all[2].call("POST", "/v1/ask", body)))
    asks.start()
    trio.until(lambda: not asks.is_alive())
    assert found[0][0] == 200, found
    assert sorted(found[0][1]["answers"]) == ["h1", "h2"]
    assert found[0][1]["silent"] == ["h3", "h4"], "h4 is where h1 is, which is heard all the same"


def test_adopted_by_a_word_at_another(trio: Trio) -> None:
    host = trio.begin(3, spread=True)[1]
    host.stop()
    host.replica.epoch = "another"
    host.start()
    trio.until(lambda: host.was_held)
    for one in trio.all:
        trio.until(lambda one=one: list(one.get("/v1/status")["held"]) == ["h2"])
    status, body = trio.all[0].call("POST", "/v1/adopt", {"hosts": ["h2"]})
    assert (status, body["adopted"]) == (200, ["h2"])
    trio.until(lambda: host.in_sync)
    trio.until(lambda: all(one.get("/v1/status")["held"] == {} for one in trio.all))


def test_an_operators_word_holds_at_all_at_once(trio: Trio) -> None:
    """Fence, unfence, rotate, remove: said at one, of a host at another."""
    one, (_, host, _) = trio.all[0], trio.begin(3, spread=True)
    host.claim(guest(1))
    trio.settle()
    assert one.call("POST", "/v1/hosts/h2/fence", {"reason": "burnt"})[0] == 200
    trio.until(lambda: any("fenced by an operator (burnt)" in why for why in host.refused.values()))
    trio.settle()
    assert all(each.get("/v1/status")["endpoints"] == 0 for each in trio.all)
    for each in trio.all:
        trio.until(lambda each=each: [alarm["host"] for alarm in each.get("/v1/status")["alarms"]] == ["h2"])
    host.claims[guest(1).key] = guest(1)
    assert one.call("POST", "/v1/hosts/h2/unfence")[0] == 200
    trio.until(lambda: one.get("/v1/status")["endpoints"] == 1)
    before = host.keys.public
    following = load_or_create_key(next_file(host.key_file)).public
    assert one.call("POST", "/v1/hosts/h2/rotate", {"publicKey": following})[0] == 200
    trio.until(lambda: one.get("/v1/hosts")["items"][1]["publicKey"] == following)
    assert before != following
    trio.until(lambda: host.in_sync)
    assert one.call("DELETE", "/v1/resources/Host/h2")[0] == 200
    trio.until(lambda: not host.in_sync and host.feed and "deleted by an operator" in host.feed.trouble)
    trio.until(lambda: host.feed and "refuses this host's key" in host.feed.trouble)
    assert all(each.get("/v1/status")["endpoints"] == 0 for each in trio.all)


@pytest.mark.parametrize("rounds", [40 if FULL else 10])
def test_two_claim_one_address_at_two_dispatchers(trio: Trio, rounds: int) -> None:
    one, other, _ = trio.begin(3, spread=True)
    won = {one.name: 0, other.name: 0}
    for n in range(rounds):
        both = [(one, guest(1000 + n, "web", f"10.66.0.{n}")), (other, guest(2000 + n, "web", f"10.66.0.{n}"))]
        asked = [(host, host.claim(endpoint), endpoint) for host, endpoint in both[:: 1 if n % 2 else -1]]
        trio.until(lambda asked=asked: all(seq in host.answered for host, seq, _ in asked))
        refused = [host.name for host, _, endpoint in asked if endpoint.key in host.refused]
        assert len(refused) == 1, (n, refused)
        won[one.name if refused == [other.name] else other.name] += 1
    trio.settle()
    held = [item for item in trio.all[2].get("/v1/endpoints")["items"] if item["addresses"][0].startswith("10.66.")]
    assert len(held) == rounds and {item["host"] for item in held} <= won.keys()
    assert all(sum(item["host"] == name for item in held) == count for name, count in won.items())


def test_a_guest_moves_from_one_to_another(trio: Trio) -> None:
    """The destination asks until the source has let go."""
    one, other, looks = trio.begin(3, spread=True)
    for n in range(1, 6):
        source, destination = (one, other) if n % 2 else (other, one)
        moved = guest(1)
        if n == 1:
            source.claim(moved)
            trio.settle()
        seq = destination.claim(moved)
        trio.until(lambda d=destination, seq=seq: seq in d.answered)
        assert "is in use by web1 on" in destination.refused.pop(moved.key)
        source.release(moved.key)
        seq = destination.claim(moved)
        while True:
            trio.until(lambda d=destination, seq=seq: seq in d.answered)
            if destination.refused.pop(moved.key, None) is None:
                break
            seq = destination.claim(moved)
        trio.settle()
        (item,) = trio.all[2].get("/v1/endpoints")["items"]
        assert item["host"] == destination.name
    assert not looks.was_held and one.in_sync and other.in_sync
