# A running hostd without its edges: the kernel is a model, the dispatcher is played, libvirt says what the test says; a
# tap in a group is open.
from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

from hostd.agent import Agent
from hostd.change.plan import Limits
from hostd.change.settle import Settler
from hostd.compiler.forwarding import Link
from hostd.compiler.ruleset import Guard
from hostd.guests.ear import Ear
from hostd.guests.sightings import Seen
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

    def expect(self, endpoint: Endpoint) -> int:
        return self._say("expect", endpoint)

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
        for seq in sorted([*self.agent.claims._asked, *self.agent.coming._asked]):
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
