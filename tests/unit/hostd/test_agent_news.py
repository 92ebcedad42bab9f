# What a running hostd makes of events and scans that come late, early, or not at all, of exempt guests, and what it
# tells the dispatcher.
from __future__ import annotations

import pytest

from hostd.guests.sightings import Gone, Scanned, Stopped
from hostd.state import Phase
from slash32.pack import Kind, ObjectKey
from slash32.policy import Direction, Policy
from slash32.tag import parse_domain
from tests.scenes import Commit
from tests.unit.hostd.agent_rig import Guest, Rig

# -- events and scans that come late, early, or not at all -----------------------------------------------------------


def test_a_scan_finds_what_no_hook_told(rig: Rig) -> None:
    guest = Guest(1, taps=["vnet1"])
    rig.tap("vnet1")
    rig.seen(guest)
    rig.answer()
    assert rig.is_open(guest) and rig.routed(guest)
    rig.event(Scanned("qemu", frozenset(), rig.now))
    assert rig.phase(guest) is None
    rig.clean()


@pytest.mark.parametrize("began", [-30.0, 1.0], ids=["begun before the start", "begun after prepare"])
def test_a_scan_does_not_end_a_guest_that_is_being_started(rig: Rig, began: float) -> None:
    """libvirt's LXC driver lists a guest only when it is started; its new link itself makes hostd scan."""
    guest = Guest(1, "lxc")
    rig.hook(guest, "prepare")
    rig.answer()
    rig.event(Scanned("lxc", frozenset(), rig.now + began))
    assert rig.phase(guest) is Phase.RESERVED and rig.asked("release") == []


def test_a_scan_of_one_driver_says_nothing_of_the_other(rig: Rig) -> None:
    guest = Guest(1, taps=["vnet1"])
    rig.tap("vnet1")
    rig.seen(guest)
    rig.event(Scanned("lxc", frozenset(), rig.now))
    assert rig.phase(guest) is Phase.LIVE


@pytest.mark.parametrize("late", [Stopped(Guest(1).uuid, "shutdown", "qemu"), Gone(Guest(1).uuid, "qemu")], ids=str)
def test_late_news_of_an_end_does_not_end_the_next_life(rig: Rig, late: object) -> None:
    rig.end(rig.start(Guest(1)))
    guest = rig.start(Guest(1))
    rig.event(late)
    assert rig.is_open(guest) and rig.routed(guest)
    rig.tick(100)
    rig.event(late)
    assert rig.phase(guest) is None, "the control: later it counts"


def test_late_sight_of_a_guest_does_not_revive_it(rig: Rig) -> None:
    guest = rig.start(Guest(1))
    taps = list(guest.taps)
    rig.end(guest)
    rig.tap(taps[0])  # the name is somebody else's already
    rig.seen(guest)
    assert rig.phase(guest) is None
    rig.clean()


def test_the_same_tap_name_is_another_link(rig: Rig) -> None:
    """hostd saw nothing of the end of the first guest; the second has its tap's name, and is nobody's yet."""
    rig.start(Guest(1, taps=["vnet10"]))
    old = rig.index("vnet10")
    rig.untap(old, told=False)
    new = rig.tap("vnet10")
    rig.tick(1)
    assert rig.model.links[new].group == 0
    assert not {g for g in rig.model.tables.grants if g[0] == new}
    rig.agent.link_gone(old)
    rig.agent.settle()
    rig.clean()


def test_two_guests_cannot_have_one_tap(rig: Rig) -> None:
    first = rig.start(Guest(1))
    thief = Guest(2, taps=list(first.taps))
    rig.seen(thief)
    rig.answer()
    assert rig.is_open(first)
    assert not {g for g in rig.model.tables.grants if g[2] == thief.address()}


def test_a_tap_that_is_gone_carries_nobody(rig: Rig) -> None:
    guest = rig.start(Guest(1))
    rig.untap(rig.index(guest.taps[0]))
    assert rig.settler.failures() == [] and rig.phase(guest) is Phase.RESERVED
    rig.clean()
    rig.tap(guest.taps[0])
    rig.seen(guest)
    assert rig.is_open(guest), "the control: a new one does"


# -- exempt guests ---------------------------------------------------------------------------------------------------


def exempt(rig: Rig) -> tuple[Guest, int]:
    guest = Guest(9, tagged=False, taps=["vnet9"])
    index = rig.tap("vnet9")
    rig.agent.exempt.listed = {guest.key()}
    return guest, index


def test_a_listed_untagged_guest_is_let_be_until_it_ends(rig: Rig) -> None:
    guest, index = exempt(rig)
    stranger = Guest(8, tagged=False, taps=["vnet8"])
    rig.tap("vnet8")
    for one in (guest, stranger):
        rig.seen(one)
    assert rig.model.tables.exempt == {index}
    rig.hook(guest, "stopped", "end")
    rig.hook(guest, "release", "end")
    assert rig.model.tables.exempt == set()


def test_a_listed_guest_that_is_tagged_is_a_guest_like_others(rig: Rig) -> None:
    guest, _ = exempt(rig)
    rig.seen(guest)
    guest.tagged = True
    rig.seen(guest)
    assert rig.model.tables.exempt == set() and not rig.is_open(guest), "isolated until it is granted"
    rig.answer()
    assert rig.is_open(guest)


# -- the dispatcher is told ------------------------------------------------------------------------------------------


def test_who_comes_back_reports_what_is_its_own(rig: Rig) -> None:
    guest = rig.start(Guest(1))
    arriving_one = Guest(2)
    rig.hook(arriving_one, "migrate")
    rig.lose()
    rig.connect()
    ((reported,),) = rig.asked("report")
    assert reported.key == guest.key()


def test_a_revision_is_acknowledged_once_the_kernel_has_it(rig: Rig) -> None:
    rig.start(Guest(1))
    rig.feed.acks.clear()
    rig.model.refuses = lambda what, item: what == "put chain" and item == "pi-web"
    rig.send(Commit(((ObjectKey(Kind.POLICY, "web"), Policy("web", 'role == "web"', (Direction.INGRESS,), 1)),)))
    ((revision, failures),) = rig.feed.acks
    assert revision == rig.scene.revision and [f.object for f in failures] == ["chain pi-web"]
    rig.tick()
    assert len(rig.feed.acks) == 1
    rig.model.refuses = lambda *_: False
    rig.settler.retry(rig.now)
    rig.tick()
    assert rig.feed.acks[1:] == [(rig.scene.revision, ())], "what was made good is said, too"


def test_a_host_that_remembers_nothing_looks_before_it_reports(rig: Rig) -> None:
    rig.agent.knows = False
    rig.connect()
    assert rig.asked("report") == []
    guest = Guest(1, taps=["vnet1"])
    rig.tap("vnet1")
    rig.seen(guest)
    rig.agent.everything_seen(rig.now)
    assert [e.key for (e,) in rig.asked("report")] == [guest.key()]


def test_who_remembers_nothing_deletes_nothing_before_its_claims_are_answered(rig: Rig) -> None:
    """Else guests that run would be cut off for a moment."""
    assert rig.agent.knows_all(), "the control"
    guest = Guest(1, taps=["vnet1"])
    rig.tap("vnet1")
    rig.seen(guest)
    assert not rig.agent.knows_all()
    rig.answer()
    assert rig.agent.knows_all()
    rig.lose()
    assert not rig.agent.knows_all()


def test_what_changed_is_on_disk_before_a_resync_writes_it(rig: Rig) -> None:
    guest, order = Guest(1, taps=["vnet1"]), []
    rig.hook(guest, "prepare")
    rig.answer()
    rig.tap("vnet1")
    rig.agent.remember = lambda keys: order.append((keys, len(rig.model.log)))
    domain = parse_domain(guest.xml(), "qemu")
    rig.agent.seen(domain, False, rig.now)
    before = len(rig.model.log)
    rig.agent.resync()
    assert order == [({guest.key()}, before)] and len(rig.model.log) > before


def test_when_notifications_were_lost_everything_is_looked_at(rig: Rig) -> None:
    gone, stays = rig.start(Guest(1)), rig.start(Guest(2))
    rig.untap(rig.index(gone.taps[0]), told=False)
    rig.model.routes -= {r for r in rig.model.routes if r.oif == rig.index(stays.taps[0])}
    assert rig.agent.notifications_lost() == []
    assert rig.phase(gone) is Phase.RESERVED and not rig.routed(gone)
    assert rig.is_open(stays) and rig.routed(stays) and list(rig.settler.pending()) == []


def test_without_any_dispatcher_configured_new_guests_stay_isolated() -> None:
    rig = Rig(feed=False)
    guest = rig.start(Guest(1), grant=False)
    assert not rig.is_open(guest)
    rig.end(guest)
    rig.clean()
