# What a running hostd does with what it is told: every hook of libvirt's, its events and scans, the dispatcher with
# its delays, refusals and deaths. The kernel is a model, the dispatcher is played; a tap in a group is open.
from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest

from hostd.agent import Agent
from hostd.change.plan import Limits
from hostd.change.settle import Settler
from hostd.compiler.forwarding import Link
from hostd.compiler.ruleset import Guard
from hostd.guests.claims import GRACE, RETRY
from hostd.guests.ear import Ear
from hostd.guests.operations import AWAY
from hostd.guests.sightings import BadTag, Gone, How, Runs, Scanned, Seen, Stopped, Suspended
from hostd.guests.starting import CLAIM_WAIT
from hostd.state import Phase
from slash32.model import Endpoint, EndpointKey
from slash32.net import host_prefix, parse_address
from slash32.pack import Kind, ObjectKey
from slash32.policy import Action, Direction, Policy, Rule
from slash32.sync import Replica
from slash32.tag import parse_domain
from slash32.wire import Failure
from tests.fake_kernel import FakeKernel, Model
from tests.scenes import Commit, Scene, Step

OPEN = Policy("open", "all()", tuple(Direction), ingress=(Rule(Action.ALLOW),), egress=(Rule(Action.ALLOW),))
WEB = Policy("web", 'role == "web"', (Direction.INGRESS,), 1, ingress=(Rule(Action.ALLOW),))
UPLINK = 3


@dataclass
class Guest:
    """One domain; NIC n has address 10.65.NUMBER.n."""

    number: int
    driver: str = "qemu"
    role: str = "web"
    nics: int = 1
    taps: list[str] = field(default_factory=list)
    tagged: bool = True
    tag: str = ""  # instead of the right one

    @property
    def uuid(self) -> str:
        return f"00000000-0000-0000-0000-{self.number:012}"

    def key(self, nic: int = 1) -> EndpointKey:
        return EndpointKey(self.uuid, f"52:54:00:00:{self.number:02x}:{nic:02x}")

    def address(self, nic: int = 1) -> bytes:
        return parse_address(f"10.65.{self.number}.{nic}")

    def xml(self) -> bytes:
        inside = "".join(
            f"<s:interface mac='{self.key(n).mac}'><s:address>10.65.{self.number}.{n}</s:address></s:interface>"
            for n in range(1, self.nics + 1)
        )
        inside = f"<s:label key='role' value='{self.role}'/>{inside}"
        tag = self.tag or f"<s:endpoint xmlns:s='urn:slash32:domain:1'>{inside}</s:endpoint>"
        nics = "".join(
            f"<interface type='ethernet'><mac address='{self.key(n).mac}'/>"
            + (f"<target dev='{self.taps[n - 1]}'/>" if len(self.taps) >= n else "") + "</interface>"
            for n in range(1, self.nics + 1)
        )  # fmt: skip
        meta = f"<metadata>{tag}</metadata>" if self.tagged else ""
        head = f"<name>guest{self.number}</name><uuid>{self.uuid}</uuid>"
        return f"<domain>{head}{meta}<devices>{nics}</devices></domain>".encode()


class FakeFeed:
    """The dispatcher as hostd.agent sees it. What it is told is in `said`; it answers when the test says so."""

    def __init__(self, replica: Replica) -> None:
        self.replica, self.connected, self.trouble = replica, True, ""
        self.endpoint, self.key_trouble = "tcp://192.0.2.1:5532", ""
        self.said: list[tuple[str, object]] = []
        self.acks: list[tuple[int, tuple[Failure, ...]]] = []
        self._seq = itertools.count(1)

    @property
    def in_sync(self) -> bool:
        return self.connected and self.replica.in_sync

    def _say(self, what: str, item: object) -> int:
        self.said.append((what, item))
        return next(self._seq)

    def claim(self, endpoint: Endpoint) -> int:
        return self._say("claim", endpoint)

    def release(self, key: EndpointKey) -> int:
        return self._say("release", key)

    def report(self, endpoints: Iterable[Endpoint]) -> int:
        return self._say("report", tuple(endpoints))

    def ack(self, revision: int, failures: Iterable[Failure]) -> None:
        self.acks.append((revision, tuple(failures)))


@dataclass
class Request:
    driver: str
    operation: str
    suboperation: str
    xml: bytes
    answers: list[tuple[int, str]] = field(default_factory=list)

    def answer(self, code: int, message: str = "") -> bool:
        self.answers.append((code, message))
        return True

    @property
    def said(self) -> tuple[int, str] | None:
        assert len(self.answers) <= 1, "a hook is answered once"
        return self.answers[0] if self.answers else None

    @property
    def code(self) -> int | None:
        return self.said[0] if self.said else None


class FakeWatcher:
    """libvirt is not asked."""

    def __init__(self) -> None:
        self.scans, self.refreshed = 0, 0

    def rescan(self) -> None:
        self.scans += 1

    def refresh(self, _driver: str, _uuid: str) -> None:
        self.refreshed += 1


class Rig:
    def __init__(self, feed: bool = True) -> None:
        self.scene, self.now = Scene(), 1000.0
        self.model = Model(links={UPLINK: Link(UPLINK, "eth0", 0, bytes(6), True)})
        self.settler = Settler(FakeKernel(self.model), self.scene.calc, Limits(Guard().group_base), ("vnet",))
        self.settler.resync()
        self.feed = FakeFeed(self.scene.replica)
        self.agent = Agent(self.scene.calc, self.settler, self.feed if feed else None, ("vnet",))
        self.watcher = FakeWatcher()
        self.ear = Ear((), self.agent, lambda: None)
        self.ear.watcher = self.watcher  # type: ignore[assignment]
        self.ear.operations.rescan = self.watcher.rescan
        self._indexes = itertools.count(100)
        self.send(Commit(((ObjectKey(Kind.POLICY, "open"), OPEN), (ObjectKey(Kind.POLICY, "web"), WEB))))

    # -- what comes in

    def send(self, step: Step) -> None:
        """From the dispatcher."""
        self.scene.take(step)
        self.scene.absorb()
        dirty, self.scene.dirty = self.scene.dirty, type(self.scene.dirty)()
        self.agent.applied(self.scene.revision, dirty)
        self.agent.settle()

    def tap(self, name: str) -> int:
        """A new link of that name; one that had it is gone."""
        for old in [i for i, link in self.model.links.items() if link.name == name]:
            self.untap(old)
        index = next(self._indexes)
        self.model.links[index] = Link(index, name, 0, bytes(6), True)
        return index

    def untap(self, index: int, told: bool = True) -> None:
        del self.model.links[index]
        self.model.routes -= {r for r in self.model.routes if r.oif == index}
        self.model.neighbours -= {n for n in self.model.neighbours if n.ifindex == index}
        self.model.gateways -= {g for g in self.model.gateways if g.ifindex == index}
        if told:
            self.agent.link_gone(index)
            self.agent.settle()

    def hook(self, guest: Guest, operation: str, suboperation: str = "begin") -> Request:
        request = Request(guest.driver, operation, suboperation, guest.xml())
        self.ear.operations.hook(request, self.now)
        self.agent.settle()
        return request

    def event(self, event: object) -> None:
        self.ear._take(event, self.now)  # type: ignore[arg-type]
        self.agent.settle()

    def seen(self, guest: Guest, migrating: bool = False) -> None:
        domain = parse_domain(guest.xml(), guest.driver, absent_ok=True)
        self.event(Seen(domain, not migrating, migrating))

    def tick(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.agent.tick(self.now)
        self.agent.settle()

    def answer(self, refused: dict[EndpointKey, str] | None = None) -> None:
        """The dispatcher answers all that is open; what it does not refuse it grants."""
        for seq in sorted(self.agent.claims._asked):
            self.agent.answered(seq, refused or {}, self.now)
        self.agent.settle()

    def lose(self) -> None:
        self.feed.connected = False
        self.scene.replica.lost()
        self.agent.disconnected()
        self.agent.settle()

    def connect(self) -> None:
        self.feed.connected = True
        self.agent.connected(self.now)
        self.scene.replica.in_sync = True
        self.send(Commit(()))

    # -- lives

    def start(self, guest: Guest, grant: bool = True) -> Guest:
        """A whole start, as libvirt has it. LXC names its links only at `started`."""
        prepare = self.hook(guest, "prepare")
        if grant:
            self.answer()
        assert prepare.code == 0 or not grant
        guest.taps = [f"vnet{guest.number * 10 + n}" for n in range(guest.nics)]
        for name in guest.taps:
            self.tap(name)
        if guest.driver == "qemu":
            assert self.hook(guest, "start").code == 0
        self.hook(guest, "started")
        return guest

    def end(self, guest: Guest) -> None:
        for name in guest.taps:
            self.untap(self.index(name))
        self.hook(guest, "stopped", "end")
        self.hook(guest, "release", "end")

    # -- what is

    def index(self, name: str) -> int:
        return next(i for i, link in self.model.links.items() if link.name == name)

    def is_open(self, guest: Guest, nic: int = 1) -> bool:
        index = self.index(guest.taps[nic - 1])
        admitted = (index, bytes.fromhex(guest.key(nic).mac.replace(":", "")), guest.address(nic))
        group = self.model.links[index].group != 0
        assert group == (admitted in self.model.tables.grants), "an open tap is an admitted one"
        return group

    def routed(self, guest: Guest, nic: int = 1) -> bool:
        return any(r.prefix == host_prefix(guest.address(nic)) and r.oif >= 100 for r in self.model.routes)

    def chains(self, guest: Guest) -> tuple[str, str] | None:
        return self.model.tables.classes.get(self.model.links[self.index(guest.taps[0])].group)

    def phase(self, guest: Guest) -> Phase | None:
        local = self.agent.locals.get(guest.key())
        return local.phase if local is not None else None

    def problem(self, guest: Guest) -> str:
        local = self.agent.locals.get(guest.key())
        assert local is not None
        return local.problem

    def asked(self, what: str) -> list[object]:
        return [item for said, item in self.feed.said if said == what]

    def clean(self) -> None:
        """Nothing of any guest is left."""
        tables = self.model.tables
        assert not tables.grants and not self.model.neighbours and not self.model.gateways
        assert {r.oif for r in self.model.routes} <= {1, 0}
        assert list(self.settler.pending()) == [] and self.settler.failures() == []


@pytest.fixture
def rig() -> Rig:
    return Rig()


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


# -- migrations ------------------------------------------------------------------------------------------------------


def arriving(rig: Rig) -> Guest:
    guest = Guest(1)
    assert rig.hook(guest, "migrate").code == 0
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
    assert rig.feed.said == []
    rig.clean()


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
    assert rig.asked("release") == [guest.key()]
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
