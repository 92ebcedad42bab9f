# Questions that wait: bounded in number, ended by time, and nothing is left behind.
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dispatcher.core import Core
from dispatcher.decisions.inputs import Command
from dispatcher.hosts.questions import MOST, SECONDS, Outcome, Questions
from dispatcher.operators import fleet
from dispatcher.operators import resources as operators
from dispatcher.store.disk import Disk
from slash32 import wire
from slash32.wire import Answer, Ask, Hello, Report


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Core]:
    store = Disk(tmp_path / "d.db")
    made = Core(store, lambda: 100.0, lambda: 0.0)
    spec = {"apiVersion": "slash32/v1", "kind": "Host"}
    hosts = [{**spec, "metadata": {"name": f"h{n}"}, "spec": {"publicKey": "x" * 39 + str(n)}} for n in (1, 2)]
    made.turns.add(Command(made, lambda core: operators.apply(core, hosts, False), "test"))
    made.flush()
    for n in (1, 2):
        for message in (Hello("", 0, 0), Report(1, ())):
            made.receive(bytes([n]) * 16, wire.encode_to_dispatcher(message), f"h{n} {'x' * 39}{n}")
    made.flush()
    yield made
    store.close()


def asks(core: Core) -> dict[bytes, Ask]:
    found = {identity: wire.decode_from_dispatcher(frames) for identity, frames in core.flush()}
    return {identity: message for identity, message in found.items() if isinstance(message, Ask)}


def test_time_ends_an_inquiry(core: Core) -> None:
    inquiry = fleet.ask(core, ["h1", "h2"], "{}")
    first = asks(core)[b"\1" * 16]
    assert asks(core) == {}, "nothing is asked twice"
    assert core.questions.deadline == 100 + SECONDS
    core.receive(b"\1" * 16, wire.encode_to_dispatcher(Answer(first.seq, "yes")), "")
    core.questions.expire(100 + SECONDS - 0.01)
    assert not inquiry.future.done()
    core.questions.expire(100 + SECONDS)
    assert inquiry.future.result(0) == Outcome({"h1": "yes"}, ["h2"])
    assert len(core.questions) == 0 and core.questions.deadline == float("inf")
    core.receive(b"\1" * 16, wire.encode_to_dispatcher(Answer(first.seq, "late")), "")
    assert inquiry.future.result(0) == Outcome({"h1": "yes"}, ["h2"])


def test_as_many_as_may_wait(core: Core) -> None:
    for _ in range(MOST // 2):
        fleet.ask(core, ["h1", "h2"], "{}")
    with pytest.raises(operators.Refused, match=f"^{MOST} questions to hosts wait"):
        fleet.ask(core, ["h1"], "{}")
    (seq, *_) = core.questions._open
    assert core.questions.answer("h1", seq, "{}")
    fleet.ask(core, ["h1"], "{}")
    core.drop("h1", "gone")
    core.questions.expire(1000)
    assert len(core.questions) == 0


def test_who_waits_may_go(core: Core) -> None:
    inquiry = fleet.ask(core, ["h1"], "{}")
    assert not inquiry.future.cancel()
    core.questions.expire(1000)
    assert inquiry.future.result(0) == Outcome({}, ["h1"])


def test_of_another_host() -> None:
    questions = Questions()
    inquiry = questions.begin(["h3"], 1.0)
    seq = questions.ask(inquiry, "h1")
    assert not questions.answer("h2", seq, "x") and not questions.answer("h1", seq + 1, "x") and not inquiry.answers
    assert questions.answer("h1", seq, "x") and inquiry.future.result(0) == Outcome({"h1": "x"}, ["h3"])
    assert not questions.answer("h1", seq, "y")
