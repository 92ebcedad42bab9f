# What a hostile review found, each once more: hosts that get around their bounds, dispatchers that were removed, words
# that fill memory, clients whose token has ended. The core is real, its store is a file; where it matters, a process.
from __future__ import annotations

import asyncio
import http.client
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from api_rig import Served
from dispatcher_rig import PATIENCE, document, guest

from dispatcher import core as cores
from dispatcher.api.looks import Look
from dispatcher.core import Core
from dispatcher.decisions.inputs import Command, Refused
from dispatcher.decisions.ledger import DISPATCHER, Ledger
from dispatcher.operators import fleet
from dispatcher.operators import resources as operators
from dispatcher.replicas import rolls
from dispatcher.replicas.rolls import Presence, Roll
from dispatcher.store.commits import Peer, Table
from dispatcher.store.disk import Disk
from slash32 import wire
from slash32.model import Endpoint
from slash32.wire import Claimed, FromDispatcher, FromHost, Hello, Report

EMPTY = Hello("", 0, 0)


def key(number: int) -> str:
    return "x" * 37 + f"{number:03d}"


class Played:
    """A core, its hosts and its operators, in one thread."""

    def __init__(self, folder: Path) -> None:
        self.store = Disk(folder / "d.db")
        self.now = 0.0
        self.core = Core(self.store, lambda: self.now, lambda: 0.0, "d1")

    def do(self, run: Callable[[Core], Any]) -> Any:
        command = Command(self.core, run, "test")
        self.core.turns.add(command)
        self.core.flush()
        done, self.core.done = self.core.done, []
        for each in done:
            each.finish()
        future: Future[Any] = command.future
        return future.result(0)

    def apply(self, *documents: dict[str, Any]) -> Any:
        return self.do(lambda core: operators.apply(core, documents, False))

    def say(self, number: int, *messages: FromHost) -> list[FromDispatcher]:
        """A host does; all that is sent then, to whomever."""
        for message in messages:
            body = wire.encode_to_dispatcher(message)
            self.core.receive(bytes([number]) * 16, body, f"h{number} {key(number)}")
        return [wire.decode_from_dispatcher(frames) for _, frames in self.core.flush()]

    def refusals(self, number: int, *endpoints: Endpoint) -> list[str]:
        heard = self.say(number, EMPTY, Report(1, endpoints))
        return [refusal.message for answer in heard if isinstance(answer, Claimed) for refusal in answer.refused]

    def owners(self) -> dict[str, dict[str, str]]:
        return {e["domain"]: e["effectiveLabels"] for e in fleet.endpoints(self.core)["items"]}


@pytest.fixture
def played(tmp_path: Path) -> Iterator[Played]:
    made = Played(tmp_path)
    made.apply(*(document("Host", f"h{n}", publicKey=key(n)) for n in (1, 2)))
    yield made
    made.store.close()


# --- a host gets around its bounds -----------------------------------------------------------------------------------


def gives(name: str, **labels: str) -> dict[str, Any]:
    return document("Profile", name, labelsToApply=labels)


def test_a_profile_that_comes_later_gives_no_label_that_the_host_may_not_use(played: Played) -> None:
    played.apply(document("Host", "h1", publicKey=key(1), labels={"role": ["web"]}))
    early = replace(guest(1), labels={}, profiles=("p",))
    assert played.refusals(1, early) == [], "there is no such profile yet"
    played.apply(gives("p", role="web"))
    assert played.owners() == {"web1": {"role": "web"}}, "the control: what the host may use"
    played.apply(gives("p", role="admin"))
    assert played.owners() == {}
    assert [alarm["host"] for alarm in fleet.status(played.core)["alarms"]] == ["h1"]
    assert len(played.refusals(1, early)) == 1
    assert played.refusals(2, early) == [], "the control: a host without such bounds"


def test_nor_does_a_profile_that_stood_before_another(played: Played) -> None:
    played.apply(document("Host", "h1", publicKey=key(1), labels={"role": ["web"]}))
    played.apply(gives("p", role="web"), gives("q", role="admin"))
    for shadowed in (("p", "q"), ("q", "p")):  # whichever counts
        if not played.refusals(1, replace(guest(1), labels={}, profiles=shadowed)):
            break
    assert played.owners() == {"web1": {"role": "web"}}
    played.do(lambda core: operators.delete(core, "Profile", "p"))
    assert played.owners() == {}


def test_bounds_that_a_backup_brings_count(played: Played) -> None:
    played.apply(document("Host", "h1", publicKey=key(1), nets=["10.65.0.1/32"]))
    saved = played.core.ledger.saved()
    played.apply(document("Host", "h1", publicKey=key(1)))
    assert played.refusals(1, guest(1), guest(2)) == []
    played.do(lambda core: fleet.restore(core, saved, True))
    assert set(played.owners()) == {"web1"}


# --- whose key it is -------------------------------------------------------------------------------------------------


def test_the_next_key_of_a_host_is_no_other_hosts_key(played: Played) -> None:
    played.do(lambda core: fleet.rotate(core, "h1", key(7)))
    with pytest.raises(Refused) as refused:
        played.apply(document("Host", "h2", publicKey=key(7)))
    assert "next key of host h1" in refused.value.errors[0]
    played.apply(document("Host", "h2", publicKey=key(8)))  # the control
    keys = {key(1): "h1", key(7): "h1", key(8): "h2"}
    assert played.core.ledger.keys == keys == Ledger(played.core.ledger.saved()).keys


# --- what nobody was to see ------------------------------------------------------------------------------------------


def test_who_lets_hosts_adopt_is_written_down(played: Played) -> None:
    played.say(1, Hello("another", 5, 5), Report(1, ()))
    played.say(2, EMPTY, Report(1, ()))
    assert played.do(lambda core: fleet.adopt(core, ["h2"])) == {"adopted": []}
    assert played.do(lambda core: fleet.adopt(core, None)) == {"adopted": ["h1"]}
    items = fleet.audit(played.core, 1, 10)["items"]
    assert [(item["who"], item["what"], item["change"]) for item in items] == [("test", "Host h1", "adopted")]


def test_a_dispatcher_that_was_removed_says_nothing_for_others(played: Played) -> None:
    """Its connection is still open, and it gives itself another's name."""

    def three(core: Core) -> None:
        for number in (2, 3):
            core.ledger.write(Table.DISPATCHER, (f"d{number}",), Peer("tcp://192.0.2.9:1", key(50 + number)))

    def roll(name: str) -> None:
        word = rolls.encode(name, Roll(9, True, {"h1": Presence(9, age=-1.0)}))
        played.core.receive(b"d" * 16, word, f"{DISPATCHER} {key(52)}")

    played.do(three)
    played.say(1, EMPTY, Report(1, ()))
    roll("d3")
    assert "h1" in played.core.connected, "its key is not d3's"
    roll("d2")
    assert "h1" not in played.core.connected, "the control: as long as it is one, it is believed"
    played.say(1, EMPTY, Report(1, ()))
    played.do(lambda core: fleet.forget_dispatcher(core, "d2"))
    roll("d3")
    roll("d2")
    assert "h1" in played.core.connected


# --- words that fill memory, or a terminal ---------------------------------------------------------------------------


def array(number: int) -> bytes:
    return b"\xdd" + number.to_bytes(4, "big")


@pytest.mark.parametrize("head", [b"\x93\x02\x01", b"\x93\x07\x01", b"\x93\x02", b"\x91", b""])
@pytest.mark.parametrize("filling", [b"\x90", b"\x80", b"\x81\xa0\xc0"])
def test_a_large_frame_does_not_become_a_hundred_times_as_large(head: bytes, filling: bytes) -> None:
    number = wire.MAX_FRAME // len(filling) - 16
    bombs = [head + array(number) + filling * number]
    per = number // 9000
    bombs.append(head + array(9000) + (array(per) + filling * per) * 9000)
    for bomb in bombs:
        tracemalloc.start()
        try:
            with pytest.raises(wire.WireError) as error:
                wire.decode_from_host(bomb)
            assert tracemalloc.get_traced_memory()[1] < 5 * wire.MAX_FRAME
        finally:
            tracemalloc.stop()
        assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_what_is_large_and_well_formed_is_taken() -> None:
    many = tuple(guest(n, "web", f"10.9.{n >> 8}.{n & 255}") for n in range(9000))
    report, answer = Report(2**40, many), wire.Answer(2**64 - 1, "x" * wire.MAX_ANSWER)
    for message in (report, answer):
        body = wire.encode_to_dispatcher(message)
        assert len(body) > wire.LARGE and wire.decode_from_host(body) == message
        for spoiled in (body[:-1], body + b"\x01", body[:2] + b"\xc1" + body[3:]):
            with pytest.raises(wire.WireError):
                wire.decode_from_host(spoiled)


def test_the_largest_endpoint_is_a_part_that_may_be() -> None:
    labels = {f"{n:03d}" + "k" * 509: "\N{ROCKET}" * 512 for n in range(128)}
    one = replace(guest(1), domain="\N{ROCKET}" * 4096, labels=labels, profiles=("\N{ROCKET}" * 253,) * 16)
    body = wire.encode_to_dispatcher(Report(1, (one, one)))
    assert len(body) > wire.LARGE and wire.decode_from_host(body) == Report(1, (one, one))


@pytest.mark.parametrize("epoch", ["a\nb", "\x1b[2J", "\u202e"])
def test_an_epoch_is_no_way_to_a_terminal(played: Played, epoch: str) -> None:
    (refused,) = played.say(1, Hello(epoch, 5, 5))
    assert isinstance(refused, wire.Refused) and refused.message.isprintable()
    played.say(1, Hello("another", 5, 5), Report(1, ()))
    assert fleet.status(played.core)["held"]["h1"].isprintable(), "the control"


# --- what waits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replaced", [True, False])
def test_while_the_store_fails_a_host_waits_with_little(
    played: Played, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    """Whether it says all of it on one session, or begins a session each time."""
    core = played.core
    report = Report(1, tuple(guest(n) for n in range(1, 51)))
    monkeypatch.setattr(cores, "MAX_ASKED", 10 * len(wire.encode_to_dispatcher(report)))
    played.say(1, EMPTY)
    played.store.trouble = "the disk is full"
    for number in range(100):
        played.say(1, *([EMPTY] if replaced else []), report._replace(seq=number))
        assert core.turns.waiting() <= 11
    played.say(1, EMPTY, report)
    assert core.turns.waiting() == 2, "what others or sessions that ended asked is not kept"
    played.store.trouble = ""
    played.now += 5
    (answer,) = (m for m in played.say(1) if isinstance(m, Claimed))
    assert answer.refused == () and len(played.owners()) == 50, "the control: what was said last is done"


def test_answers_that_are_not_taken_have_a_measure(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "MAX_ASKED", 50_000)
    refused = Report(1, tuple(guest(n, "web", "127.0.0.1") for n in range(1, 101)))
    played.say(1, EMPTY, Report(0, ()))
    for number in range(20):  # it acknowledges nothing: its window is full, and answers wait
        played.apply(document("Host", "h2", publicKey=key(2), addresses=[f"192.0.2.{number + 1}"]))
    before = played.core.connected["h1"]
    played.say(1, refused)
    assert before.answers and played.core.connected.get("h1") is before, "the control: one is kept"
    for _ in range(20):
        played.say(1, refused)
    assert "h1" not in played.core.connected and len(before.answers) < 10


def test_many_hellos_ask_the_other_dispatchers_store_once(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    core, asked = played.core, list[Callable[[], None]]()
    monkeypatch.setattr(played.store, "shared", True, raising=False)
    monkeypatch.setattr(core.turns, "ask_head", asked.append)
    ahead = Hello(core.epoch, 1000, 0)
    for _ in range(50):
        played.say(1, ahead, Report(1, ()))
    assert len(asked) == 1
    asked.pop()()
    assert len(asked) == 1, "for the Hello that came meanwhile it is asked once more"
    asked.pop()()
    assert not asked and not core.connected["h1"].behind, "the control: then it is served"
    played.say(1, ahead)
    assert len(asked) == 1


# --- clients of the API ----------------------------------------------------------------------------------------------


def test_whose_token_ends_watches_no_more(tmp_path: Path) -> None:
    served = Served(tmp_path)
    served.start()
    connection = http.client.HTTPSConnection("127.0.0.1", served.api_port, timeout=PATIENCE, context=served.context())
    try:
        connection.request("GET", "/v1/watch", headers={"Authorization": f"Bearer {served.tokens['ro']}"})
        response = connection.getresponse()
        served.apply(document("Host", "early"))
        while b'"early"' not in response.readline():  # the control
            pass
        kept = [line for line in served.token_file.read_text().splitlines(True) if not line.startswith("ci-ro ")]
        served.token_file.write_text("".join(kept))
        served.apply(document("Host", "late"))
        assert b'"late"' not in _rest(response)
        assert served.tcp("GET", "/v1/status", served.tokens["admin"])[0] == 200, "the control: others stay"
    finally:
        connection.close()
        served.stop()


def _rest(response: http.client.HTTPResponse) -> bytes:
    found = b""
    try:
        while line := response.readline():
            found += line
    except (ConnectionResetError, http.client.IncompleteRead, OSError):
        pass
    return found


def test_many_who_ask_share_a_look_that_is_not_older_than_their_question() -> None:
    looks = [0]

    async def look() -> bytes:
        looks[0] += 1
        seen = looks[0]
        await asyncio.sleep(0.001)
        return b"%d" % seen

    async def play() -> None:
        shared = Look(look)
        first = asyncio.ensure_future(shared.ask())
        while not looks[0]:
            await asyncio.sleep(0)
        later = await asyncio.gather(*(shared.ask() for _ in range(50)))
        assert await first == b"1" and set(later) == {b"2"} and looks == [2]
        assert await shared.ask() == b"3", "the control: nobody is told what was"

    asyncio.run(play())


def test_a_look_that_fails_fails_for_those_who_wait_for_it() -> None:
    answers: list[bytes | Exception] = [Refused(503, "stopping"), b"well"]

    async def look() -> bytes:
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    async def play() -> None:
        shared = Look(look)
        with pytest.raises(Refused):
            await shared.ask()
        assert await shared.ask() == b"well"

    asyncio.run(play())
