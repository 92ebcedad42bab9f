# What hostd remembers across its death: the same after any life, something that was true after any damage, and never
# less than what the kernel was given. A disk that takes nothing stops nothing.
from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hostd.journal
from hostd.change.plan import Limits
from hostd.change.settle import Settler
from hostd.compiler.calc import Calculation
from hostd.compiler.desired import Dirty
from hostd.compiler.forwarding import Link
from hostd.compiler.ruleset import Guard
from hostd.compiler.world import world_of
from hostd.journal import Journal
from hostd.memory import Memory
from hostd.state import Carrier, Local, Phase
from slash32.model import Endpoint
from slash32.net import parse_address
from slash32.pack import AddressSet, Kind, ObjectKey
from slash32.sync import Applied
from tests.fake_kernel import FakeKernel, Killed, Model
from tests.scenes import FULL, HERE, TAPS, Absorb, Commit, Run, Scene, Step, key, lives, many

BOOT = "this boot"
State = tuple[object, ...]


class Remembering(Scene):
    """Writes down what happens, as the daemon does."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.memory = Memory(Journal(path), BOOT)
        self.memory.recall()
        self.memory.replica, self.memory.locals = self.replica, self.locals
        self.memory._rebase()

    def absorb(self, snapshot: bool = False) -> None:
        before, self.waiting = list(self.waiting), []
        if snapshot:
            super().absorb(True)  # a snapshot that changes nothing is still one
            self.memory.applied([*before, Applied(self.revision, (), True)])
        elif before:
            self.memory.applied(before)
        self.waiting = before
        super().absorb()

    def take(self, step: Step) -> None:
        super().take(step)
        if isinstance(step, Run):
            self.memory.changed({key(step.number)})

    def state(self) -> State:
        return state(self.memory)


def state(memory: Memory) -> State:
    replica = memory.replica
    content = {
        (kind.value, name): value.copy() if isinstance(value, AddressSet) else value
        for kind in Kind
        for name, value in replica.objects(kind).items()
    }
    locals_ = {local.endpoint.key: replace(local, problem="") for local in memory.locals}
    return replica.epoch, replica.revision, replica.digest, content, locals_


def recalled(path: Path, boot: str = BOOT) -> Memory:
    memory = Memory(Journal(path), boot)
    memory.recall()
    memory.close()
    return memory


def live(number: int = 0) -> Run:
    address = parse_address(f"10.65.0.{number + 1}")
    endpoint = Endpoint(key(number), f"guest{number}", {"role": "web"}, (), (address,))
    return Run(number, Local(endpoint, "qemu", Phase.LIVE, Carrier(f"vnet{100 + number}", 100 + number), endpoint))


SET = ObjectKey(Kind.SET, "all()")


@settings(
    max_examples=500 if FULL else 60, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(steps=lives(), compact=st.sampled_from([0, 500, 4 << 20]))
def test_any_life_is_remembered(steps: list[Step], compact: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("state") / "hostd.state"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hostd.journal, "_COMPACT_AT", compact)
        scene = Remembering(path)
        for step in steps:
            scene.take(step)
        scene.absorb()
        scene.memory.close()
    assert scene.memory.trouble == ""
    again = recalled(path)
    expected = scene.state()
    assert state(again)[:4] == expected[:4]
    for local in scene.locals:
        kept = again.locals.get(local.endpoint.key)
        assert kept is not None and kept.endpoint == local.endpoint and kept.carrier == local.carrier
        assert kept.phase is local.phase or (local.phase in (Phase.LIVE, Phase.ARRIVED) and not local.carrier)
    assert len(list(again.locals)) == len(list(scene.locals))
    assert state(recalled(path)) == state(again), "and remembered again"


def written(path: Path) -> tuple[list[State], int]:
    """A base and some changes behind it. All states there were, and the length of the base."""
    scene = Remembering(path)
    base = path.stat().st_size
    states = [scene.state()]
    for step in (
        live(0), Commit(((SET, AddressSet(many(3))),)), Absorb(), live(1), Commit(((SET, AddressSet(many(2))),)),
        Absorb(), Run(0, None), Commit(((SET, None),)), Absorb(),
    ):  # fmt: skip
        scene.take(step)
        states.append(scene.state())
    scene.memory.close()
    return states, base


def test_a_tail_torn_at_any_byte_loses_the_tail_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "hostd.state"
    states, base = written(path)
    whole = path.read_bytes()
    best = 0
    for length in range(base, len(whole) + 1):
        path.write_bytes(whole[:length])
        found = state(recalled(path))
        assert found in states, f"torn at byte {length}"
        at = states.index(found)
        assert at >= best, "more bytes, more memory"
        best, last = at, found
        assert state(recalled(path)) == found, "what is written anew is whole"
    assert last == states[-1], "the control: untorn, it is all there"


def test_any_byte_that_is_wrong_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "hostd.state"
    states, base = written(path)
    whole = path.read_bytes()
    nothing = state(Memory(Journal(tmp_path / "none"), BOOT))
    for at in range(0, len(whole), 1 if FULL else 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        found = state(recalled(path))
        assert found in (nothing, *states) or at < base, f"byte {at}"


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"#!/bin/sh\n", b"slash32-hostd 9\n" + b"x" * 50])
def test_what_is_not_ours_is_nothing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "hostd.state"
    path.write_bytes(content)
    memory = recalled(path)
    assert memory.replica.epoch == "" and not list(memory.locals)
    assert path.read_bytes() != content, "and is put in order"


def test_interfaces_of_another_boot_are_not_those_of_this_one(tmp_path: Path) -> None:
    path = tmp_path / "hostd.state"
    scene = Remembering(path)
    run = live(0)
    assert run.local is not None
    coming = replace(run.local, endpoint=replace(run.local.endpoint, key=key(1)), phase=Phase.INCOMING, accepted=None)
    kept = replace(run.local, endpoint=replace(run.local.endpoint, key=key(2)), phase=Phase.KEPT, carrier=None)
    for number, local in enumerate((run.local, coming, kept)):
        scene.take(Run(number, local))
    scene.memory.close()
    same = recalled(path)
    assert [local.phase for local in same.locals] == [Phase.LIVE, Phase.INCOMING, Phase.KEPT]
    assert same.locals.get(key(0)) == run.local
    other = recalled(path, "another boot")
    assert [local.phase for local in other.locals] == [Phase.RESERVED, Phase.INCOMING, Phase.KEPT]
    assert all(local.carrier is None for local in other.locals)
    same.locals.verify(lambda tap, index: False)
    assert [local.phase for local in same.locals] == [Phase.RESERVED, Phase.INCOMING, Phase.KEPT]


@pytest.mark.parametrize("moment", range(12))
def test_killed_between_the_disk_and_the_kernel(tmp_path: Path, moment: int) -> None:
    """What is on disk is never older than what the kernel enforces: started again, both are the same."""
    path = tmp_path / "hostd.state"
    scene = Remembering(path)
    model = Model(links={i: Link(i, f"vnet{i}", 0, bytes(6), True) for i in TAPS})
    settler = Settler(FakeKernel(model), scene.calc, Limits(Guard().group_base), ("vnet",))
    settler.resync()
    for step in (Commit(((SET, AddressSet(many(3))),)), Absorb(), live(0), live(1)):
        scene.take(step)
    dirty, scene.dirty = scene.dirty, Dirty()
    model.left = moment
    with contextlib.suppress(Killed):
        settler.settle(dirty)
    model.left = None
    memory = recalled(path)
    assert state(memory) == scene.state()
    calc = Calculation.build(HERE, world_of(memory.replica), memory.locals)
    again = Settler(FakeKernel(model), calc, Limits(Guard().group_base), ("vnet",))
    assert again.resync() == [] and list(again.pending()) == []
    assert {i for i, link in model.links.items() if link.group} == {100, 101}


# -- disks that do not do what they should ----------------------------------------------------------------------------


def broken(monkeypatch: pytest.MonkeyPatch, what: str, code: int) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(f"hostd.journal.os.{what}", fail)


@pytest.mark.parametrize(("what", "code"), [("open", errno.EROFS), ("write", errno.ENOSPC), ("fsync", errno.EIO)])
def test_a_disk_that_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, code: int) -> None:
    path = tmp_path / "hostd.state"
    scene = Remembering(path)
    scene.take(live(0))
    with monkeypatch.context() as patch:
        broken(patch, what, code)
        scene.memory.journal.close()  # the next change needs a new file
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        for number in range(20):
            scene.take(live(number % 3))
            scene.take(Commit(((SET, AddressSet(many(number))),)))
            scene.absorb()
        assert os.strerror(code) in scene.memory.trouble
        assert len(list(Path("/proc/self/fd").iterdir())) == descriptors, "nothing is left open"
    scene.take(live(2))
    assert scene.memory.trouble == "", "it is good again with the next change"
    scene.memory.close()
    assert state(recalled(path)) == scene.state()


def test_a_write_that_fails_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torn record does not hide those that follow."""
    path = tmp_path / "hostd.state"
    scene = Remembering(path)
    real, count = os.write, [0]

    def half(fd: int, data: bytes) -> int:
        count[0] += 1
        if count[0] == 2:
            raise OSError(errno.ENOSPC, "full")
        return real(fd, data[: len(data) // 2])

    with monkeypatch.context() as patch:
        patch.setattr("hostd.journal.os.write", half)
        scene.take(live(0))
    assert "full" in scene.memory.trouble
    scene.take(live(1))
    scene.memory.close()
    assert state(recalled(path)) == scene.state()


def test_reading_beside_a_running_hostd_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "hostd.state"
    states, _ = written(path)
    before = path.read_bytes()
    memory = Memory(Journal(path), "whatever boot")
    memory.recall(read_only=True)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    assert state(memory) == states[-1]


def test_a_state_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    memory = recalled(tmp_path / "file" / "hostd.state")
    assert memory.trouble and memory.replica.epoch == ""


def test_an_unknown_record_is_dropped_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "hostd.state"
    states, _ = written(path)
    journal = Journal(path)
    journal.rebase([*journal.load(), b"\x92\x63\xc0", b"\xc1", b"\x01"])
    journal.close()
    assert state(recalled(path)) == states[-1]
    assert caplog.text.count("a record was dropped") == 3


def test_flows_that_are_owed_are_remembered_until_they_are_ended(tmp_path: Path) -> None:
    path = tmp_path / "state"
    memory = Remembering(path).memory

    def again() -> bool:
        found = Memory(Journal(path), BOOT)
        found.recall()
        return found.owed

    assert not again()
    memory.owes(True)
    assert again()
    size = path.stat().st_size
    memory.owes(True)
    assert path.stat().st_size == size, "once is enough"
    memory._rebase()
    assert again()
    memory.owes(False)
    assert not again()
