# A host and its dispatchers: whom it speaks with, when it leaves, with which key; and that whatever a dispatcher does,
# the host keeps what it has.
from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dispatcher_rig import REPO, Dispatcher, FakeHost, Rack, document, guest, policy
from played_dispatcher import Played, Stage, up_to_date

from dispatcher.store.witness import note_path
from hostd.session.dealer import SEVERAL
from hostd.session.feed import HELLO_AGAIN, SILENCE, Disconnected, Missed, Place
from slash32 import wire
from slash32.keys import load_next, load_or_create_key, next_file
from slash32.pack import Kind
from slash32.sync import NO_SESSION, Applied, Held
from slash32.wire import Hello


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path)
    yield stage
    stage.close()


def leave(stage: Stage, played: Played) -> None:
    """Its process is gone."""
    played.close()
    stage.played.remove(played)


# --- one after the other ---------------------------------------------------------------------------------------------


def test_the_next_one_when_the_present_is_lost(stage: Stage) -> None:
    stage.dispatchers(3)
    feed = stage.start()
    seen = []
    for _ in range(3):
        stage.until(stage.in_sync)
        present = stage.present()
        seen.append(present.place)
        (hello,) = present.hellos
        assert (hello.epoch, hello.revision, hello.name, hello.about) == ("e", 5, "h1", {"version": "9"})
        stage.events.clear()
        leave(stage, present)
        stage.until(lambda: not feed.connected)
    assert len(set(seen)) == 3
    stage.until(lambda: all(f"{place.endpoint}: it cannot be reached" in feed.trouble for place in seen))
    assert (stage.replica.epoch, stage.replica.revision) == ("e", 5)
    name = next(f"d{n}" for n in range(3) if load_or_create_key(stage.folder / f"d{n}.server").public == seen[0].key)
    stage.played.append(Played(stage.folder, name, port=int(seen[0].endpoint.rpartition(":")[2])))
    stage.until(stage.in_sync)
    assert feed.trouble == "" and feed.endpoint == seen[0].endpoint


def test_same_revision_nothing_is_sent_again(stage: Stage) -> None:
    stage.dispatchers(2)
    stage.start()
    stage.until(stage.in_sync)
    stage.events.clear()
    leave(stage, stage.present())
    stage.until(lambda: any(isinstance(event, Applied) for event in stage.events))
    assert [event for event in stage.events if isinstance(event, Applied)] == [Applied(5, (), False)]


def test_hosts_begin_anywhere(stage: Stage) -> None:
    stage.dispatchers(3)
    begun = set()
    for _ in range(30):
        stage.start()
        stage.until(stage.in_sync)
        begun.add(stage.present().place)
        stage.restart()
    assert len(begun) > 1


def test_a_dispatcher_that_hangs_is_left(stage: Stage) -> None:
    """Stopped, or its machine vanished: no word of its end comes, and what is asked of it stays unanswered."""
    stage.dispatchers(2)
    feed = stage.start()
    stage.until(stage.in_sync)
    first = stage.present()
    first.mute = True
    stage.until(lambda: feed.connected and feed.endpoint == first.place.endpoint)
    stage.later += SILENCE / 2  # its sockets still answer heartbeats: only the clock tells
    stage.for_a_while(0.1)
    assert feed.endpoint == first.place.endpoint
    stage.later += SILENCE
    stage.until(lambda: stage.in_sync() and feed.endpoint != first.place.endpoint)
    assert f"no word from the dispatcher for {SILENCE:.0f} s" in stage.reasons()


def test_one_that_never_finishes_the_handshake_is_left(stage: Stage) -> None:
    stage.dispatchers(2)
    for played in stage.played:
        played.mute = True
    feed = stage.start()
    stage.until(lambda: any(isinstance(event, Missed) for event in stage.events))
    assert not feed.connected
    for played in stage.played:
        played.mute = False
    stage.until(stage.in_sync)


def test_vanished_machines_are_left_within_two_seconds() -> None:
    assert SEVERAL.heartbeat + SEVERAL.silence < 2000 and SEVERAL.connect < 1000
    assert SEVERAL.silence > 2 * SEVERAL.heartbeat, "one lost heartbeat is no death"


# --- refusals --------------------------------------------------------------------------------------------------------


def refusing(text: str) -> Callable[[wire.FromHost], list[wire.FromDispatcher]]:
    return lambda message: [wire.Refused(text)] if isinstance(message, Hello) else []


@pytest.mark.parametrize("away", [True, False])
def test_refused_by_one_is_taken_by_another(stage: Stage, away: bool) -> None:
    one, other = stage.dispatchers(2)
    feed = stage.start()
    stage.until(stage.in_sync)
    first = stage.present()
    second = other if first is one else one
    text = f"{wire.AWAY}d1 does not reach its store" if away else "host h1 has no such key any more"
    first.send(*wire.encode_to_host(wire.Refused(text)))
    stage.until(lambda: stage.in_sync() and feed.endpoint == second.place.endpoint)
    (lost,) = [event for event in stage.events if isinstance(event, Disconnected)]
    assert lost.away == away and text in lost.reason


def test_refused_by_all_is_asked_again_but_seldom(stage: Stage) -> None:
    stage.dispatchers(3)
    for played in stage.played:
        played.answers = refusing("not now")
    feed = stage.start()
    stage.for_a_while(2.0)
    attempts = sum(len(played.hellos) for played in stage.played)
    assert 3 <= attempts <= 3 * 6, "0.1 s, 0.2 s, 0.4 s, ... between rounds"
    assert not feed.connected and feed.trouble.count("not now") == 3
    stage.played[1].answers = up_to_date
    stage.until(stage.in_sync)
    assert feed.trouble == ""


def test_a_dispatcher_that_is_behind_is_asked_again(stage: Stage) -> None:
    """Another replica told the host more than this one knows yet: no operator is needed."""
    stage.dispatchers(2)
    behind = [True]

    def answers(message: wire.FromHost) -> list[wire.FromDispatcher]:
        if isinstance(message, Hello) and behind[0]:
            return [wire.Snapshot("e", 4, 0, False, ())]
        return up_to_date(message)

    for played in stage.played:
        played.answers = answers
    stage.start()
    stage.until(lambda: any(isinstance(event, Held) for event in stage.events))
    assert stage.replica.revision == 5
    behind[0] = False
    stage.until(stage.in_sync)


def test_of_two_that_disagree_the_one_is_taken_that_can_be(stage: Stage) -> None:
    """One has been cut off from the others for a while: hosts need no operator to find that out."""
    stage.dispatchers(2)
    feed = stage.start()
    stage.until(stage.in_sync)
    good, old = stage.present(), next(played for played in stage.played if played is not stage.present())
    old.answers = lambda message: [wire.Snapshot("e", 4, 0, False, ())] if isinstance(message, Hello) else []
    good.send(*wire.encode_to_host(wire.Refused("away")))
    stage.until(lambda: any(isinstance(event, Held) for event in stage.events))
    assert feed.endpoint == old.place.endpoint

    def hurried() -> bool:
        stage.later += 0.05
        return stage.in_sync()

    stage.until(hurried)
    assert feed.endpoint == good.place.endpoint and stage.replica.revision == 5


def test_where_all_hold_back_it_stays_and_waits_for_the_operator(stage: Stage) -> None:
    stage.dispatchers(2)
    for played in stage.played:
        played.answers = lambda message: [wire.Snapshot("e", 4, 0, False, ())] if isinstance(message, Hello) else []
    feed = stage.start()

    def hurried() -> bool:
        stage.later += 0.05
        return all(len(played.hellos) >= 2 for played in stage.played)

    stage.until(hurried)
    stays, greeted = feed.endpoint, sum(len(played.hellos) for played in stage.played)
    stage.later += 3600.0
    for _ in range(20):
        stage.turn()
    assert feed.connected and feed.endpoint == stays and stage.replica.held
    assert sum(len(played.hellos) for played in stage.played) <= greeted + 1
    stage.present().send(*wire.encode_to_host(wire.Snapshot("e", 4, 0, True, ())))  # `slash32 adopt`
    stage.until(stage.in_sync)
    assert stage.replica.revision == 4


# --- keys ------------------------------------------------------------------------------------------------------------


def test_a_dispatcher_with_another_key_is_never_spoken_with(stage: Stage) -> None:
    (played,) = stage.dispatchers(1)
    pinned = load_or_create_key(stage.folder / "somebody").public
    feed = stage.start(Place(played.place.endpoint, pinned))
    stage.until(lambda: pinned in feed.trouble)
    assert "dispatcher_key" in feed.trouble and "`slash32-dispatcher key`" in feed.trouble
    stage.for_a_while(1.0)
    assert not played.heard and not played.asked and not feed.connected
    assert (stage.replica.epoch, stage.replica.revision, stage.replica.held) == ("e", 5, "")
    feed.close()
    feed = stage.start()  # the control
    stage.until(stage.in_sync)


def test_the_next_key_is_the_key_once_it_was_answered(stage: Stage) -> None:
    (played,) = stage.dispatchers(1)
    old = load_or_create_key(stage.key_file)
    played.welcome = {old.public}
    stage.start()
    stage.until(stage.in_sync)
    new = load_or_create_key(next_file(stage.key_file))
    played.send(*wire.encode_to_host(wire.Pong(NO_SESSION)))  # the session ends: it is tried, refused
    stage.later += HELLO_AGAIN
    stage.until(lambda: new.public in played.asked)
    stage.until(stage.in_sync)
    assert played.asked[-2:] == [new.public, old.public] and load_or_create_key(stage.key_file) == old
    played.answers = lambda _: []  # `host rotate`: both keys are good; the dispatcher is slow to answer
    played.welcome = {old.public, new.public}
    played.send(*wire.encode_to_host(wire.Pong(NO_SESSION)))
    stage.later += HELLO_AGAIN
    greeted = len(played.hellos)
    stage.until(lambda: len(played.hellos) > greeted)
    stage.for_a_while(0.1)
    assert played.asked[-1] == new.public
    assert load_or_create_key(stage.key_file) == old and load_next(stage.key_file) == new, "a handshake is no answer"
    stage.restart()  # killed now
    stage.until(lambda: len(played.hellos) > greeted + 1)
    assert played.asked[-1] == new.public
    played.answers, played.welcome = up_to_date, {new.public}
    stage.restart()
    stage.until(stage.in_sync)
    assert load_or_create_key(stage.key_file) == new and load_next(stage.key_file) is None
    stage.restart()
    stage.until(stage.in_sync)
    assert old.public not in played.asked[-2:]


def test_both_keys_are_tried_before_the_next_dispatcher(stage: Stage) -> None:
    stage.dispatchers(2)
    old, new = load_or_create_key(stage.key_file), load_or_create_key(next_file(stage.key_file))
    for played in stage.played:
        played.welcome = {"nobody"}
    feed = stage.start()
    stage.until(lambda: all(len(played.asked) >= 2 for played in stage.played))
    assert all(played.asked[:2] == [new.public, old.public] for played in stage.played)
    stage.until(lambda: feed.trouble.count("refuses this host's key") == 2)
    stage.played[0].welcome = {old.public}
    stage.until(stage.in_sync)
    assert load_or_create_key(stage.key_file) == old and load_next(stage.key_file) == new


# --- frames that are not what they should be -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frames",
    [
        [b""], [b"\xc1"], [b"\x95\x12"], [b"GET / HTTP/1.1\r\n\r\n"], [b"\x92\xcd\x03\xe7\x01"], [b"\0" * 100_000],
        [b"\xdd\xff\xff\xff\xff"], [wire.packb([18, "e", 5, 6, 7]), b"\xa5ab"], [b"x" * (wire.MAX_FRAME + 1)],
        [wire.packb([21, "x" * 1000])], [wire.packb([22, -1, "q"])],
    ],
    ids=lambda frames: f"{frames[0][:12]!r}"[:20],
)  # fmt: skip
def test_bad_frames_cost_a_dispatcher_its_session(stage: Stage, frames: list[bytes]) -> None:
    stage.dispatchers(2)
    feed = stage.start()
    stage.until(stage.in_sync)
    first = stage.present()
    stage.events.clear()
    first.send(*frames)
    stage.until(lambda: stage.in_sync() and feed.endpoint != first.place.endpoint)
    (lost,) = [event for event in stage.events if isinstance(event, Disconnected)]
    assert lost.reason.isprintable() and len(lost.reason) < 300
    assert (stage.replica.epoch, stage.replica.revision) == ("e", 5)


def test_bad_frames_for_ever_are_taken_seldom(stage: Stage) -> None:
    """From all of them, at once after each Hello: the host does not hammer, nor fill its journal."""
    stage.dispatchers(2)
    for played in stage.played:
        played.answers = lambda message: [wire.Ask(2**63, "x" * 5000)] if isinstance(message, Hello) else []
    feed = stage.start()
    stage.for_a_while(2.0)
    assert 2 <= sum(len(played.hellos) for played in stage.played) <= 2 * 6
    assert "does not understand" in feed.trouble and len(set(stage.reasons())) == 1
    for played in stage.played:
        played.answers = up_to_date
    stage.until(stage.in_sync)


# --- time ------------------------------------------------------------------------------------------------------------


def test_a_loop_that_slept_hears_before_it_judges(stage: Stage) -> None:
    (played,) = stage.dispatchers(1)
    stage.start()
    stage.until(lambda: stage.in_sync() and any(isinstance(message, wire.Ping) for message in played.heard))
    stage.events.clear()
    for _ in range(3):
        played.pump()
        played.send(*wire.encode_to_host(wire.Pong(5)))
        time.sleep(0.05)  # it is there when the host wakes
        stage.later += 600.0
        stage.turn()
    assert not stage.reasons() and stage.in_sync()
    assert len(played.hellos) == 1


def test_a_clock_that_stands_still_or_was_set_back_harms_nothing(stage: Stage) -> None:
    """Monotonic seconds do not go back; whoever gives others anyway gets no exception and no storm."""
    stage.dispatchers(2)
    stage.start()
    stage.until(stage.in_sync)
    stage.later -= 1_000_000.0
    stage.for_a_while(0.2)
    assert stage.in_sync() and not stage.reasons()


# --- real dispatchers ------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Rack, Dispatcher, Dispatcher]]:
    """Two dispatchers with the same content, as replicas have it, and h1, which knows both."""
    (tmp_path / "a").mkdir()
    rack = Rack(tmp_path / "a")
    (h1,) = rack.begin(1)
    seq = h1.claim(guest(1, "web"))
    rack.until(lambda: seq in h1.answered)
    revision = rack.dispatcher.apply(policy("p", 'role == "web"', 'role == "web"'))
    rack.wait_live(revision)
    h1.stop()
    rack.dispatcher.stop()
    (tmp_path / "b").mkdir()
    second = Dispatcher(tmp_path / "b")
    shutil.copy(rack.dispatcher.database, second.database)
    shutil.copy(note_path(rack.dispatcher.socket), note_path(second.socket))  # or it is another epoch
    rack.dispatcher.start()
    second.start()
    h1.places = tuple(Place(f"tcp://127.0.0.1:{d.port}", d.public_key) for d in (rack.dispatcher, second))
    yield rack, rack.dispatcher, second
    rack.end()
    second.stop()


def spoken_with(host: FakeHost, *dispatchers: Dispatcher) -> Dispatcher:
    assert host.feed
    return next(d for d in dispatchers if host.feed.endpoint.endswith(f":{d.port}"))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
def test_from_one_real_dispatcher_to_the_other(
    pair: tuple[Rack, Dispatcher, Dispatcher], how: signal.Signals
) -> None:
    rack, one, other = pair
    (h1,) = rack.hosts
    h1.start()
    rack.until(lambda: h1.in_sync)
    first = spoken_with(h1, one, other)
    second = other if first is one else one
    before = {kind: h1.objects(kind) for kind in Kind}
    h1.events.clear()
    assert first.process
    try:
        first.process.send_signal(how)
        rack.until(lambda: h1.in_sync and spoken_with(h1, one, other) is second)
    finally:
        first.process.send_signal(signal.SIGCONT)
    assert [event.changes for event in h1.events if isinstance(event, Applied)] == [()]
    assert before == {kind: h1.objects(kind) for kind in Kind}
    revision = second.apply(policy("q", 'role == "web"', 'role == "db"'))
    rack.until(lambda: "q" in h1.objects(Kind.POLICY))
    rack.until(lambda: second.get(f"/v1/revisions/{revision}")["done"])


CHILD = """
import sys
from pathlib import Path
from dispatcher_rig import FakeHost, Rack, turn
from hostd.session.feed import Place
rack = Rack(Path(sys.argv[1]) / "child")
h1 = FakeHost(rack.dispatcher, "h1")
h1.key_file = Path(sys.argv[2])
h1.places = tuple(Place(*each.split(" ", 1)) for each in sys.argv[3:])
h1.start()
while True:
    turn([h1])
"""


def test_stopped_and_continued(pair: tuple[Rack, Dispatcher, Dispatcher], tmp_path: Path) -> None:
    """SIGSTOP of the host's process until its dispatcher has given it up: it comes back without a restart."""
    rack, one, other = pair
    (tmp_path / "child").mkdir()
    (h1,) = rack.hosts
    words = [sys.executable, "-c", CHILD, str(tmp_path), str(h1.key_file), *(" ".join(place) for place in h1.places)]
    path = f"{REPO}:{Path(__file__).parent}"

    def connected() -> list[Dispatcher]:
        found = []
        for each in (one, other):
            if each.process is None or each.process.poll() is not None:
                continue
            item = next(item for item in each.get("/v1/hosts")["items"] if item["name"] == "h1")
            found += [each] if item["connected"] and item["in_sync"] else []
        return found

    with subprocess.Popen(words, cwd=REPO, env={**os.environ, "PYTHONPATH": path}) as child:
        try:
            rack.until(lambda: len(connected()) == 1)
            time.sleep(3 * SEVERAL.heartbeat / 1000)  # libzmq's time-to-live begins anew with a heartbeat only
            child.send_signal(signal.SIGSTOP)
            ping = connected()[0]
            (other if ping is one else one).stop()  # it would not hear of what follows
            n = itertools.count(1)

            def given_up() -> bool:
                time.sleep(0.5)  # so that not all that a host may have under way is sent before it counts as gone
                ping.apply(document("Host", "h2", addresses=[f"198.51.100.{next(n) % 250 + 1}"]))  # all are told
                return not next(item for item in ping.get("/v1/hosts")["items"] if item["name"] == "h1")["connected"]

            rack.until(given_up)
            child.send_signal(signal.SIGCONT)
            rack.until(connected)
        finally:
            child.kill()
