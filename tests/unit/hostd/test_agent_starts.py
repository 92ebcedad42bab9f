# What a running hostd does when a guest starts: every hook of libvirt's, grants and refusals, a dispatcher that is
# late, silent or gone.
from __future__ import annotations

import pytest

from hostd.guests.starting import CLAIM_WAIT
from hostd.state import Phase
from slash32.net import host_prefix
from slash32.pack import Kind, ObjectKey
from tests.scenes import Commit
from tests.unit.hostd.agent_rig import Guest, Request, Rig

# -- a start ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["qemu", "lxc"])
def test_a_whole_life(rig: Rig, driver: str) -> None:
    guest = rig.start(Guest(1, driver))
    assert rig.is_open(guest) and rig.routed(guest) and rig.phase(guest) is Phase.LIVE
    assert [e.key for e in rig.asked("claim")] == [guest.key()]
    rig.end(guest)
    assert rig.asked("release") == [guest.key()]
    assert rig.phase(guest) is None
    rig.clean()


def test_prepare_waits_for_the_grant(rig: Rig) -> None:
    prepare = rig.hook(Guest(1), "prepare")
    assert prepare.said is None
    rig.answer()
    assert prepare.said == (0, "")


def test_the_answer_to_start_comes_when_the_kernel_has_it(rig: Rig) -> None:
    guest = Guest(1, taps=["vnet1"])
    rig.hook(guest, "prepare")
    rig.answer()
    index = rig.tap("vnet1")
    rig.model.log.clear()
    request = Request("qemu", "start", "begin", guest.xml())
    request.answer = lambda code, _="": (  # type: ignore[method-assign]
        request.answers.append((code, "open" if rig.model.links[index].group else "closed")) or True
    )
    rig.ear.operations.hook(request, rig.now)
    assert request.answers == [(0, "open")]


def test_prepare_is_refused_with_the_dispatchers_word(rig: Rig) -> None:
    guest = Guest(1)
    prepare = rig.hook(guest, "prepare")
    rig.answer({guest.key(): "address 10.65.1.1 is in use by 'web9' on h2"})
    assert prepare.said == (1, "'guest1': address 10.65.1.1 is in use by 'web9' on h2")
    rig.hook(guest, "stopped", "end")
    rig.hook(guest, "release", "end")
    assert rig.phase(guest) is None


def test_one_refused_nic_refuses_the_guest_at_once(rig: Rig) -> None:
    guest = Guest(1, nics=2)
    prepare = rig.hook(guest, "prepare")
    seqs = sorted(rig.agent.claims._asked)
    assert len(seqs) == 2
    rig.agent.answered(seqs[1], {guest.key(2): "no"}, rig.now)
    assert prepare.code == 1
    rig.agent.answered(seqs[0], {}, rig.now)
    assert prepare.code == 1


def test_two_nics_wait_for_both_grants(rig: Rig) -> None:
    guest = Guest(1, nics=2)
    prepare = rig.hook(guest, "prepare")
    first, second = sorted(rig.agent.claims._asked)
    rig.agent.answered(first, {}, rig.now)
    assert prepare.said is None
    rig.agent.answered(second, {}, rig.now)
    assert prepare.code == 0
    rig.end(guest)
    guest = rig.start(Guest(1, nics=2))
    assert rig.is_open(guest, 1) and rig.is_open(guest, 2) and rig.routed(guest, 2)


@pytest.mark.parametrize("what", ["gone", "held"])
def test_without_a_dispatcher_prepare_does_not_wait_and_the_guest_is_isolated(rig: Rig, what: str) -> None:
    if what == "gone":
        rig.lose()
    else:
        rig.scene.replica.in_sync = False  # connected, but its word is not followed
    guest = rig.start(Guest(1), grant=False)
    assert not rig.is_open(guest) and not rig.routed(guest)
    if what == "gone":
        rig.connect()
    else:
        rig.scene.replica.in_sync = True
        rig.tick()
    rig.answer()
    assert rig.is_open(guest) and rig.routed(guest)


def test_a_dispatcher_that_dies_lets_waiting_guests_start_isolated(rig: Rig) -> None:
    prepare = rig.hook(Guest(1), "prepare")
    rig.lose()
    assert prepare.said == (0, "")


def test_a_dispatcher_that_is_silent_holds_a_start_no_longer_than_the_deadline(rig: Rig) -> None:
    guest = Guest(1)
    prepare = rig.hook(guest, "prepare")
    rig.tick(CLAIM_WAIT - 0.1)
    assert prepare.said is None
    rig.tick(0.2)
    assert prepare.said == (0, "")
    guest.taps = ["vnet1"]
    rig.tap("vnet1")
    rig.hook(guest, "start")
    assert not rig.is_open(guest)
    rig.answer()
    assert rig.is_open(guest)
    assert len(rig.asked("claim")) == 1


def test_prepare_twice_is_answered_twice_and_claimed_once(rig: Rig) -> None:
    one, two = rig.hook(Guest(1), "prepare"), rig.hook(Guest(1), "prepare")
    assert len(rig.asked("claim")) == 1
    rig.answer()
    assert (one.code, two.code) == (0, 0)


def test_an_answer_to_an_older_tag_does_not_start_the_guest(rig: Rig) -> None:
    prepare_old = rig.hook(Guest(1, role="db"), "prepare")
    prepare_new = rig.hook(Guest(1, role="web"), "prepare")
    old, new = sorted(rig.agent.claims._asked)
    rig.agent.answered(old, {}, rig.now)
    assert prepare_old.said is None and prepare_new.said is None
    rig.agent.answered(new, {}, rig.now)
    assert prepare_new.code == 0


def test_an_address_in_use_on_this_host_is_refused_by_hostd_itself(rig: Rig) -> None:
    rig.start(Guest(1))
    tag = Guest(1).xml().decode().split("metadata>")[1][:-2].replace("01:01", "02:01")
    twin = Guest(2, tag=tag)
    prepare = rig.hook(twin, "prepare")
    assert prepare.code == 1 and "10.65.1.1 is in use by 'guest1' on this host" in str(prepare.said)


def test_without_a_dispatcher_the_last_known_routes_tell_who_has_an_address(rig: Rig) -> None:
    rig.send(Commit(((ObjectKey(Kind.ROUTE, host_prefix(Guest(1).address())), ("h2",)),)))
    rig.lose()
    prepare = rig.hook(Guest(1), "prepare")
    assert prepare.code == 1 and "in use on host h2" in str(prepare.said)


def test_a_tap_outside_the_guard_is_refused(rig: Rig) -> None:
    for operation in ("prepare", "migrate"):
        refused = rig.hook(Guest(1, taps=["tap0"]), operation)
        assert refused.code == 1 and "outside the guarded names (vnet*)" in str(refused.said)


def test_a_tap_the_kernel_refuses_refuses_the_start(rig: Rig) -> None:
    guest = Guest(1, taps=["vnet1"])
    rig.hook(guest, "prepare")
    rig.answer()
    index = rig.tap("vnet1")
    rig.model.refuses = lambda what, item: what == "admit" and item == index
    start = rig.hook(guest, "start")
    assert start.code == 1 and "'guest1': the kernel refused it" in str(start.said)
    assert not rig.is_open(guest)


# -- rows of the hook table that may not refuse ----------------------------------------------------------------------

BAD = "<s:endpoint xmlns:s='urn:slash32:domain:1'><s:nonsense/></s:endpoint>"
ROWS = [  # operation, sub-operation, may it refuse
    ("prepare", "begin", True), ("start", "begin", True), ("started", "begin", False), ("migrate", "begin", True),
    ("stopped", "end", False), ("release", "end", False), ("reconnect", "begin", False), ("restore", "begin", False),
]  # fmt: skip


@pytest.mark.parametrize(("operation", "suboperation", "refuses"), ROWS)
@pytest.mark.parametrize("xml", [b"", b"<domain", Guest(1, tag=BAD).xml()], ids=["empty", "torn", "bad tag"])
def test_who_may_refuse(rig: Rig, operation: str, suboperation: str, refuses: bool, xml: bytes) -> None:
    request = Request("qemu", operation, suboperation, xml)
    rig.ear.operations.hook(request, rig.now)
    assert request.code == (1 if refuses else 0)
    assert bool(request.answers[0][1]) is refuses and "\n" not in request.answers[0][1]


def test_reconnect_is_answered_first_and_asks_for_a_scan(rig: Rig) -> None:
    assert rig.hook(Guest(1), "reconnect").said == (0, "")
    assert rig.watcher.scans == 1


@pytest.mark.parametrize("operation", ["stopped", "release"])
def test_a_guest_whose_tag_went_bad_still_ends(rig: Rig, operation: str) -> None:
    guest = rig.start(Guest(1))
    index = rig.index(guest.taps[0])
    guest.tag = BAD
    assert rig.hook(guest, operation, "end").said == (0, "")
    assert rig.model.links[index].group == 0 and not rig.routed(guest)
    rig.hook(guest, "release", "end")
    assert rig.asked("release") == [guest.key()]


# -- without a dispatcher, again and again ---------------------------------------------------------------------------


def test_an_unchanged_guest_starts_connected_without_a_dispatcher(rig: Rig) -> None:
    guest = rig.start(Guest(1))
    rig.lose()
    rig.end(guest)
    assert rig.phase(guest) is Phase.KEPT
    rig.clean()
    guest = rig.start(Guest(1), grant=False)
    assert rig.is_open(guest) and rig.routed(guest)


def test_a_changed_guest_does_not(rig: Rig) -> None:
    guest = rig.start(Guest(1, role="web"))
    rig.lose()
    rig.end(guest)
    guest = rig.start(Guest(1, role="db"), grant=False)
    assert not rig.is_open(guest)


def test_a_guest_that_ended_without_a_dispatcher_is_given_back_when_it_is_there(rig: Rig) -> None:
    guest = rig.start(Guest(1))
    rig.lose()
    rig.end(guest)
    rig.connect()
    assert rig.asked("report") == [()]
    assert rig.phase(guest) is None


def test_what_it_left_is_in_nobodys_way_on_this_host(rig: Rig) -> None:
    guest = rig.start(Guest(1))
    rig.lose()
    rig.end(guest)
    tag = Guest(1).xml().decode().split("metadata>")[1][:-2].replace("01:01", "02:01")
    assert rig.hook(Guest(2, tag=tag), "prepare").code == 0
