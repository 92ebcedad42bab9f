# Questions to hosts: through the operators' socket, the dispatcher, the real feed, and back.
from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from dispatcher_rig import FakeHost, Rack

from dispatcher.hosts import questions
from slash32 import wire

QUESTION = {"what": "weather", "where": "Zürich"}
STRANGE = {"problems": ["its answer is of no known form"]}


def ask(rack: Rack, *hosts: str) -> tuple[int, Any]:
    """The hosts live on meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        asking = asked(rack, pool, *hosts)
        rack.until(asking.done)
        return asking.result()


def asked(rack: Rack, pool: ThreadPoolExecutor, *hosts: str) -> Future[tuple[int, Any]]:
    body = {"hosts": list(hosts), "question": QUESTION}
    return pool.submit(rack.dispatcher.call, "POST", "/v1/ask", body)


def test_answers_come_back_and_who_says_nothing_is_named(rack: Rack) -> None:
    h1, h2, h3 = rack.begin(3)
    h1.says, h2.says = '{"sun": true}', '{"sun": false}'
    rack.dispatcher.apply(FakeHost(rack.dispatcher, "h4").resource())
    assert ask(rack, "h1", "h2", "h1") == (200, {"answers": {"h1": {"sun": True}, "h2": {"sun": False}}, "silent": []})
    assert len(h1.asked) == 1 and json.loads(h1.asked[0].question) == QUESTION and not h3.asked
    assert ask(rack, "h1", "h3", "h4") == (200, {"answers": {"h1": {"sun": True}}, "silent": ["h3", "h4"]})
    assert ask(rack, "h4") == (200, {"answers": {}, "silent": ["h4"]})
    assert ask(rack) == (200, {"answers": {}, "silent": []})
    status, body = ask(rack, "h1", "h9")
    assert status == 404 and body["errors"] == ['Host "h9": there is none; `slash32 get hosts` lists them']


def test_a_host_answers_only_for_itself_and_only_what_it_was_asked(rack: Rack) -> None:
    h1, h2 = rack.begin(2)
    h2.says = '{"mine": 2}'
    with ThreadPoolExecutor(1) as pool:
        asking = asked(rack, pool, "h1", "h2")
        rack.until(lambda: h1.asked and h2.asked)
        assert h1.feed and h2.feed
        h2.feed.answer(h1.asked[0].seq, '{"mine": 1}')
        h2.feed.answer(99, '{"mine": 3}')
        h2.feed.answer(h2.asked[0].seq, '{"mine": 4}')
        rack.until(asking.done)
    assert asking.result() == (200, {"answers": {"h2": {"mine": 2}}, "silent": ["h1"]})
    h1.feed.answer(h1.asked[0].seq, '{"late": 1}')
    h1.says = '{"mine": 1}'
    assert ask(rack, "h1", "h2")[1]["answers"] == {"h1": {"mine": 1}, "h2": {"mine": 2}}, "nobody was harmed"
    assert all(host["connected"] for host in rack.dispatcher.get("/v1/hosts")["items"])


def test_a_host_that_goes_is_silent_at_once(rack: Rack) -> None:
    h1, h2 = rack.begin(2)
    h2.says = "{}"
    with ThreadPoolExecutor(1) as pool:
        asking = asked(rack, pool, "h1", "h2")
        rack.until(lambda: h1.asked)
        rack.dispatcher.call("DELETE", "/v1/resources/host/h1")
        rack.until(asking.done)
    assert asking.result() == (200, {"answers": {"h2": {}}, "silent": ["h1"]})


@pytest.mark.parametrize("said", ["", "nonsense", "[1]", "NaN", '{"a": NaN}', '{"a": 1e999}', "[" * 100_000, '"x"'])
def test_nonsense_is_its_own_problem(rack: Rack, said: str) -> None:
    h1, h2 = rack.begin(2)
    h1.says, h2.says = said, '{"well": true}'
    status, body = ask(rack, "h1", "h2")
    assert (status, body) == (200, {"answers": {"h1": STRANGE, "h2": {"well": True}}, "silent": []})


def test_what_is_asked_is_bounded(rack: Rack) -> None:
    (h1,) = rack.begin(1)
    rack.dispatcher.apply(*(FakeHost(rack.dispatcher, f"h{n}").resource() for n in range(2, questions.MOST + 2)))

    def refusal(**body: object) -> tuple[int, str]:
        status, answer = rack.dispatcher.call("POST", "/v1/ask", body)
        (line,) = answer["errors"]
        return status, line

    many = [f"h{n}" for n in range(1, questions.MOST + 2)]
    assert refusal(hosts=many, question={}) == (400, "65 hosts; at most 64 can be asked at once")
    fits = {"what": "x" * (wire.MAX_QUESTION - len('{"what": ""}'))}
    assert refusal(hosts=["h1"], question={"what": fits["what"] + "x"})[1].startswith("the question has 4097 charac")
    for body in ({}, {"hosts": "h1", "question": {}}, {"hosts": [1], "question": {}}, {"hosts": ["h1"], "question": 1}):
        assert refusal(**body) == (400, 'the body is not {"hosts": [...], "question": {...}}')
    h1.says = "{}"
    with ThreadPoolExecutor(1) as pool:  # the positive control
        asking = pool.submit(rack.dispatcher.call, "POST", "/v1/ask", {"hosts": many[:-1], "question": fits})
        rack.until(asking.done)
    assert asking.result()[1] == {"answers": {"h1": {}}, "silent": sorted(many[1:-1])}


def test_a_dispatcher_that_stops_lets_nobody_wait(rack: Rack) -> None:
    (h1,) = rack.begin(1)
    with ThreadPoolExecutor(1) as pool:
        asking = asked(rack, pool, "h1")
        rack.until(lambda: h1.asked)
        assert rack.dispatcher.stop() == 0
        assert asking.result()[1] == {"answers": {}, "silent": ["h1"]}
