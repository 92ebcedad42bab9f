# The fan-out: bytes are made once and shared, a slow host costs its state, who leaves is forgotten.
from __future__ import annotations

import pytest

from dispatcher.hosts.fanout import Fanout
from dispatcher.hosts.live import KEPT, Commits, Took
from dispatcher.registry.registry import Batch
from slash32 import wire
from slash32.net import Prefix
from slash32.pack import AddressSet, Kind, ObjectKey
from slash32.sync import WINDOW, Applied, Replica
from slash32.wire import Change, Delete, Delta, Members, Put, Snapshot

SET = ObjectKey(Kind.SET, "all()")


def address(n: int) -> bytes:
    return (0x0A000000 + n).to_bytes(4, "big")


def route(n: int) -> Put:
    return Put(Kind.ROUTE, Prefix(address(n), 32), ("h1",))


class Rig:
    def __init__(self, *hosts: str) -> None:
        self.fanout, self.revision = Fanout(), 0
        self.replicas = {name: Replica() for name in hosts}
        for name in hosts:
            self.fanout.add_host(name)
            self.open(name)

    def open(self, name: str) -> None:
        self.deliver(name, self.fanout.open(name, self.replicas[name].hello(), "e", self.revision, False))

    def deliver(self, name: str, frames: list[bytes] | None, ack: bool = True) -> None:
        assert frames is not None
        message = wire.decode_from_dispatcher(frames)
        assert isinstance(message, Snapshot | Delta)
        (outcome,) = self.replicas[name].receive(message)
        assert isinstance(outcome, Applied)
        if ack:
            self.fanout.publishers[name].ack(outcome.revision)

    def publish(self, *changes: Change, gained: str = "", lost: str = "") -> dict[str, list[bytes] | None]:
        """`gained`, `lost`: hosts whose interest in the set begins or ends."""
        self.revision += 1
        batch = Batch(list(changes), [(h, SET) for h in gained.split()], [(h, SET) for h in lost.split()])
        return dict(self.fanout.publish(self.revision, batch))


def test_the_same_bytes_for_every_host() -> None:
    rig = Rig("h1", "h2", "h3")
    big = AddressSet({address(n) for n in range(20_000)})
    told = rig.publish(Put(*SET, big), gained="h1 h2")
    assert set(told) == {"h1", "h2"}
    frames = [{id(f) for f in told[h] or [] if len(f) > wire.INLINE} for h in told]
    assert frames[0] == frames[1] and len(frames[0]) == 1
    for host in told:
        rig.deliver(host, told[host])
    told = rig.publish(Members("all()", AddressSet({address(99_999)}), AddressSet()))
    assert set(told) == {"h1", "h2"} and all(sum(map(len, frames or [])) < 100 for frames in told.values())


def test_snapshots_share_the_common_blocks() -> None:
    rig = Rig("h1", "h2")
    for n in range(3000):
        rig.publish(route(n))
    blocks = [{id(f) for f in rig.fanout.everything(h)} for h in ("h1", "h2")]
    assert blocks[0] == blocks[1] and len(blocks[0]) == 1
    rig.publish(route(9999))
    assert wire.encode_change(route(9999))[0] in b"".join(rig.fanout.everything("h1"))


def test_interest_and_change_in_one_commit() -> None:
    rig = Rig("h1", "h2")
    for host, frames in rig.publish(Put(*SET, AddressSet({address(1)})), gained="h1").items():
        rig.deliver(host, frames)
    told = rig.publish(Members("all()", AddressSet({address(2)}), AddressSet()), gained="h2", lost="h1")
    for host, frames in told.items():
        rig.deliver(host, frames)
    assert rig.replicas["h1"].get(SET) is None
    assert rig.replicas["h2"].get(SET) == AddressSet({address(1), address(2)})
    told = rig.publish(Delete(*SET), lost="h2")
    rig.deliver("h2", told["h2"])
    assert rig.replicas["h2"].get(SET) is None and not rig.fanout._objects


def test_a_slow_host_gets_its_state_and_delays_nobody() -> None:
    rig = Rig("h1", "h2")
    for host, frames in rig.publish(Put(*SET, AddressSet()), gained="h1 h2").items():
        rig.deliver(host, frames)
    late = []
    for n in range(2000):
        told = rig.publish(Members("all()", AddressSet({address(n)}), AddressSet()), route(n % 10))
        rig.deliver("h1", told["h1"])
        late += [told["h2"]] if told["h2"] else []
    assert len(late) == WINDOW
    for frames in late:
        rig.deliver("h2", frames)
    frames = rig.fanout.publishers["h2"].resume(rig.fanout.whole)
    assert frames and sum(map(len, frames)) < 2 * 6 * 2000
    rig.deliver("h2", frames)
    assert rig.replicas["h2"].get(SET) == rig.replicas["h1"].get(SET)
    assert rig.replicas["h2"].digest == rig.fanout.digest("h2")
    assert rig.fanout.publishers["h2"].has(rig.revision)


def test_a_host_that_is_away_costs_nothing() -> None:
    rig = Rig("h1", "h2")
    rig.fanout.publishers["h2"].close()
    for n in range(100):
        assert set(rig.publish(route(n))) == {"h1"}
    assert not rig.fanout.publishers["h2"]._pending
    rig.open("h2")
    assert len(rig.replicas["h2"].objects(Kind.ROUTE)) == 100


def test_a_host_that_is_made_anew_is_concerned() -> None:
    """It may be connected elsewhere, from before it was deleted."""
    rig = Rig("h1")
    rig.fanout.publish(1, Batch([], [], [], fresh=["h2"]))
    assert rig.fanout.away == ["h2"]
    rig.fanout.publish(2, Batch([route(1)], [], [], fresh=["h3"]))
    assert rig.fanout.away == ["h2", "h3"]


def test_a_removed_host_is_forgotten() -> None:
    rig = Rig("h1", "h2")
    rig.publish(Put(*SET, AddressSet({address(1)})), gained="h1 h2")
    rig.fanout.remove_host("h2")
    assert set(rig.publish(Members("all()", AddressSet({address(2)}), AddressSet()))) == {"h1"}
    with pytest.raises(KeyError):
        rig.fanout.digest("h2")


def test_the_time_of_a_commit_ends_with_the_last_host() -> None:
    commits = Commits()
    commits.add(1, 10.0, 10.001, ["h1", "h2"])
    commits.add(2, 10.5, 10.5, [])
    assert not commits.acknowledged("h1", None, 10.002)
    assert commits.of(1, 11.0) == pytest.approx(Took(1000, 2, 2, 1), rel=1e-4)
    assert commits.lag("h1", 11.0) == 0 and commits.lag("h2", 11.0) == pytest.approx(1)
    assert commits.acknowledged("h2", 2, 10.004)
    assert commits.of(1, 11.0) == pytest.approx(Took(4, 4, 4, 2), rel=1e-4)
    assert commits.of(2, 11.0) == Took(0, None, None)
    for n in range(3, 3 + 2 * KEPT):
        commits.add(n, 12.0, 12.0, ["gone"])
    assert commits.of(1, 13.0) is None and len(commits._commits) == KEPT
    assert len(commits._owed["gone"]) <= KEPT


def test_a_host_that_is_elsewhere_counts_where_it_is_concerned() -> None:
    commits = Commits()
    commits.add(5, 10.0, 10.0, ["here"], ["there"])
    commits.add(6, 10.5, 10.5, [], ["other"])
    assert not commits.concerned("idle", 4, 6), "it is served by one that lags"
    assert commits.concerned("there", 4, 5) and not commits.concerned("there", 5, 6)
    assert commits.concerned("other", 4, 6) and not commits.concerned("other", 4, 5)
    assert commits.concerned("idle", 3, 5), "nobody knows what was before"
    commits.elsewhere("there", 6, 10.2, True)
    commits.elsewhere("other", 6, 99.0, False)
    commits.elsewhere("idle", 6, 99.0, True)
    assert commits.of(5, 11.0) == pytest.approx(Took(1000, 200, 200, 1), rel=1e-4)
    assert commits.of(6, 11.0) == Took(0, None, None), "it was not connected"
    for n in range(7, 7 + 2 * KEPT):
        commits.add(n, 12.0, 12.0, [], ["gone"])
    assert commits.concerned("gone", 6, 7) and len(commits._beyond["gone"]) == KEPT
    commits.forget("gone")
    assert not commits.concerned("gone", 6, 7)


def test_nothing_is_known_of_a_host_that_has_just_come() -> None:
    commits = Commits()
    commits.add(1, 10.0, 10.0, [], ["h1"])
    commits.add(2, 10.0, 10.0, [], ["h2"])
    commits.elsewhere("h1", 1, 10.0, True)
    assert not commits.concerned("h1", 1, 2), "the control"
    assert commits.concerned("h1", 0, 1) and commits.concerned("h1", 0, 2), "it came anew: it may have lost all"
    commits.add(5, 11.0, 11.0, [], ["h2"])  # too much was missed: it stands for 3 to 5
    assert commits.concerned("h1", 2, 3) and commits.concerned("h2", 2, 4) and not commits.concerned("h1", 5, 5)
