# What a running hostd does with a guest that changes: a new tag, a bad one, none, a NIC unplugged, a migration from
# here or to here.
from __future__ import annotations

import pytest

from hostd.guests.claims import GRACE, RETRY
from hostd.guests.operations import AWAY
from hostd.guests.sightings import BadTag, How, Runs, Suspended
from hostd.guests.starting import CLAIM_WAIT
from hostd.state import Phase
from tests.scenes import Commit
from tests.unit.hostd.agent_rig import Guest, Rig

# -- tags that change ------------------------------------------------------------------------------------------------


def test_a_new_tag_counts_when_it_is_granted(rig: Rig) -> None:
    guest = rig.start(Guest(1, role="web"))
    before = rig.chains(guest)
    guest.role = "db"
    rig.seen(guest)
    assert rig.chains(guest) == before, "until then the old one does"
    rig.answer()
    assert rig.is_open(guest) and rig.chains(guest) != before


def test_a_new_tag_that_is_refused_leaves_the_old_one(rig: Rig) -> None:
    guest = rig.start(Guest(1, role="web"))
    before = rig.chains(guest)
    guest.role = "db"
    rig.seen(guest)
    rig.answer({guest.key(): "label role=db is not one that host h1 may use"})
    assert rig.is_open(guest) and rig.chains(guest) == before
    assert "role=db" in rig.problem(guest)
    claims = len(rig.asked("claim"))
    rig.tick(RETRY / 2)
    assert len(rig.asked("claim")) == claims
    rig.tick(RETRY)
    assert len(rig.asked("claim")) == claims + 1, "it is asked for again"
    guest.role = "web"
    rig.seen(guest)
    assert rig.problem(guest) == ""


def test_a_new_tag_without_a_dispatcher_isolates_until_it_is_back(rig: Rig) -> None:
    guest = rig.start(Guest(1))
    rig.lose()
    rig.seen(guest)
    assert rig.is_open(guest), "the control: an unchanged one stays"
    guest.role = "db"
    rig.seen(guest)
    assert not rig.is_open(guest) and not rig.routed(guest)
    assert "isolated until" in rig.problem(guest)
    rig.connect()
    rig.answer()
    assert rig.is_open(guest) and rig.problem(guest) == ""


def test_a_dispatcher_that_dies_over_a_new_tag_isolates(rig: Rig) -> None:
    guest, other = rig.start(Guest(1)), rig.start(Guest(2))
    guest.role = "db"
    rig.seen(guest)
    assert rig.is_open(guest)
    rig.lose()
    assert not rig.is_open(guest) and rig.is_open(other)


def test_a_dispatcher_that_is_silent_over_a_new_tag_has_its_grace(rig: Rig) -> None:
    guest = rig.start(Guest(1))
    guest.role = "db"
    rig.seen(guest)
    rig.tick(GRACE - 0.1)
    assert rig.is_open(guest)
    rig.tick(0.2)
    assert not rig.is_open(guest)
    rig.answer()
    assert rig.is_open(guest)


def test_a_bad_tag_of_a_running_guest_keeps_the_last_good_one(rig: Rig) -> None:
    guest = rig.start(Guest(1))
    rig.event(BadTag(guest.uuid, "guest1", "domain 'guest1': no", "qemu"))
    assert rig.is_open(guest) and "no" in rig.problem(guest)
    rig.seen(guest)
    assert rig.problem(guest) == "", "the good one is back"


def test_a_tag_that_is_taken_away_isolates(rig: Rig) -> None:
    guest = rig.start(Guest(1))
    guest.tagged = False
    rig.seen(guest)
    assert rig.model.links[rig.index(guest.taps[0])].group == 0
    assert rig.asked("release") == [guest.key()]
    rig.clean()


def test_what_was_granted_and_is_refused_now_is_isolated(rig: Rig) -> None:
    """The dispatcher gave the address to somebody else while this host was away."""
    guest = rig.start(Guest(1))
    rig.lose()
    rig.connect()
    rig.answer({guest.key(): "address 10.65.1.1 is in use by 'web9' on h2"})
    assert not rig.is_open(guest) and not rig.routed(guest)


def test_a_nic_that_is_unplugged_goes_and_the_other_stays(rig: Rig) -> None:
    guest = rig.start(Guest(1, nics=2))
    guest.nics = 1
    rig.seen(guest)
    assert rig.is_open(guest, 1) and not rig.is_open(guest, 2) and not rig.routed(guest, 2)
    assert rig.asked("release") == [guest.key(2)]


# -- migrations ------------------------------------------------------------------------------------------------------


def arriving(rig: Rig) -> Guest:
    guest = Guest(1)
    migrate = rig.hook(guest, "migrate")
    assert migrate.said is None, "what it needs is not here yet"
    rig.answer()
    assert migrate.code == 0
    rig.feed.said.clear()
    assert rig.hook(guest, "prepare").code == 0
    guest.taps = ["vnet1"]
    rig.tap("vnet1")
    assert rig.hook(guest, "start").code == 0
    assert rig.hook(guest, "started").code == 0
    rig.seen(guest, migrating=True)
    rig.tick(10)
    return guest


def test_a_guest_on_its_way_here_is_filtered_but_has_neither_route_nor_claim(rig: Rig) -> None:
    guest = arriving(rig)
    assert rig.is_open(guest) and not rig.routed(guest)
    assert rig.feed.said == []


@pytest.mark.parametrize("how", ["event", "scan"])
def test_it_takes_both_when_it_runs_here(rig: Rig, how: str) -> None:
    guest = arriving(rig)
    opened = len(rig.model.log)
    if how == "event":
        rig.event(Runs(guest.uuid, How.MIGRATED, "qemu"))
    else:
        rig.seen(guest)
    assert [e.key for e in rig.asked("claim")] == [guest.key()]
    assert rig.is_open(guest) and not rig.routed(guest)
    rig.answer()
    assert rig.is_open(guest) and rig.routed(guest)
    assert len(rig.model.log) == opened + 1, "the route, and nothing else, is written"


def test_it_is_isolated_when_its_claim_is_refused(rig: Rig) -> None:
    """Its source has not let go yet, or it lies: isolated until the claim is granted."""
    guest = arriving(rig)
    rig.event(Runs(guest.uuid, How.MIGRATED, "qemu"))
    rig.answer({guest.key(): "address 10.65.1.1 is in use by 'guest1' on h2"})
    assert not rig.is_open(guest)
    rig.tick(RETRY)
    rig.answer()
    assert rig.is_open(guest) and rig.routed(guest)


def test_it_is_isolated_when_it_arrives_without_a_dispatcher(rig: Rig) -> None:
    guest = arriving(rig)
    rig.lose()
    assert rig.is_open(guest), "it does not run here yet"
    rig.event(Runs(guest.uuid, How.MIGRATED, "qemu"))
    assert not rig.is_open(guest)
    rig.connect()
    rig.answer()
    assert rig.is_open(guest) and rig.routed(guest)


def test_a_migration_that_is_given_up_claims_nothing(rig: Rig) -> None:
    guest = arriving(rig)
    rig.untap(rig.index("vnet1"))
    rig.hook(guest, "stopped", "end")
    rig.tick(RETRY)
    rig.hook(guest, "release", "end")
    rig.tick(RETRY)
    assert rig.feed.said == [("release", guest.key())], "it is not expected any more"
    rig.clean()


def test_what_a_guest_needs_is_asked_for_before_it_may_come(rig: Rig) -> None:
    migrate = rig.hook(Guest(1), "migrate")
    assert [e.key for e in rig.asked("expect")] == [Guest(1).key()] and not rig.asked("claim")
    rig.answer()
    assert migrate.said == (0, "")


def test_a_guest_that_may_not_be_here_stays_where_it_is(rig: Rig) -> None:
    guest = Guest(1)
    migrate = rig.hook(guest, "migrate")
    rig.answer({guest.key(): "label role=web is not one that host h1 may use"})
    assert migrate.said == (1, "'guest1': label role=web is not one that host h1 may use")
    assert rig.phase(guest) is None, "libvirt tells no more of it"
    assert rig.asked("release") == [guest.key()]
    rig.clean()


@pytest.mark.parametrize("how", ["no dispatcher", "it goes", "no answer"])
def test_a_guest_stays_where_it_is_while_no_dispatcher_could_move_its_addresses(rig: Rig, how: str) -> None:
    guest = Guest(1)
    if how == "no dispatcher":
        rig.lose()
    migrate = rig.hook(guest, "migrate")
    if how == "it goes":
        rig.lose()
    rig.tick(CLAIM_WAIT if how == "no answer" else 0)
    assert migrate.code == 1 and migrate.said is not None and "stays where it is" in migrate.said[1]
    assert rig.phase(guest) is None
    untagged = Guest(2, tagged=False)
    assert rig.hook(untagged, "migrate").code == 0


def test_a_guest_on_its_way_is_expected_again_by_another_dispatcher(rig: Rig) -> None:
    guest = arriving(rig)
    rig.lose()
    rig.connect()
    assert [said for said, _ in rig.feed.said] == ["report", "expect"]
    rig.event(Runs(guest.uuid, How.MIGRATED, "qemu"))
    rig.feed.said.clear()
    expected, *_ = rig.agent.coming._asked
    rig.agent.answered(expected, {}, rig.now)
    assert rig.phase(guest) is Phase.ARRIVED, "that it may come is no answer to its claim"
    rig.answer()
    assert rig.is_open(guest) and rig.routed(guest)


def test_a_claim_that_came_before_the_source_let_go_waits_for_no_clock(rig: Rig) -> None:
    guest = arriving(rig)
    rig.event(Runs(guest.uuid, How.MIGRATED, "qemu"))
    rig.answer({guest.key(): "address 10.65.1.1 is in use by 'guest1' on h2"})
    rig.tick()
    assert len(rig.asked("claim")) == 1, "nothing was heard since"
    rig.send(Commit(()))
    rig.tick()
    assert len(rig.asked("claim")) == 2
    rig.answer()
    assert rig.is_open(guest) and rig.routed(guest)
    other = rig.start(Guest(2), grant=False)
    rig.answer({other.key(): "address 10.65.2.1 is in use by 'x' on h2"})
    asked = len(rig.asked("claim"))
    rig.send(Commit(()))
    rig.tick()
    assert len(rig.asked("claim")) == asked, "one that only starts asks at its pace"


def test_the_source_lets_go_at_the_handover(rig: Rig) -> None:
    guest = rig.start(Guest(1))
    rig.event(Suspended(guest.uuid, True, "qemu"))
    assert rig.asked("release") == [guest.key()]
    assert not rig.routed(guest)
    claims = len(rig.asked("claim"))
    rig.seen(guest)  # read a moment before
    rig.seen(guest, migrating=True)
    rig.tick(1)
    assert len(rig.asked("claim")) == claims and not rig.routed(guest)
    rig.end(guest)
    assert set(rig.asked("release")) == {guest.key()}
    rig.clean()


@pytest.mark.parametrize("told", [True, False], ids=["told", "found by a later scan"])
def test_a_handover_that_fails_gives_the_guest_back(rig: Rig, told: bool) -> None:
    guest = rig.start(Guest(1))
    rig.event(Suspended(guest.uuid, True, "qemu"))
    if told:
        rig.event(Runs(guest.uuid, How.RESUMED, "qemu"))
    rig.tick(0 if told else AWAY + 1)
    rig.seen(guest)
    rig.answer()
    assert rig.is_open(guest) and rig.routed(guest)


def test_a_pause_is_no_handover(rig: Rig) -> None:
    guest = rig.start(Guest(1))
    rig.event(Suspended(guest.uuid, False, "qemu"))
    assert rig.is_open(guest) and rig.routed(guest)
