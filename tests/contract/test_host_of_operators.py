# What operators do to a host, with a real dispatcher and the real agent over a kernel that is a model: fence, unfence,
# rotate. A tap in a group is open.
from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dispatcher_rig import PATIENCE, Dispatcher, Rack, document, policy

from hostd.agent import Agent
from hostd.change.plan import Limits
from hostd.change.settle import Settler
from hostd.compiler.absorb import absorb
from hostd.compiler.calc import Calculation
from hostd.compiler.forwarding import Link
from hostd.compiler.ruleset import Guard
from hostd.compiler.world import world_of
from hostd.guests.ear import Ear
from hostd.guests.sightings import Seen
from hostd.reporting.status import of
from hostd.session.feed import ClaimAnswer, Connected, Disconnected, Feed, FeedConfig, Held, Place
from hostd.state import Locals
from slash32.keys import load_next, load_or_create_key, next_file
from slash32.sync import Applied, Replica
from slash32.tag import parse_domain
from tests.fake_kernel import FakeKernel, Model
from tests.unit.hostd.agent_rig import UPLINK, FakeWatcher, Guest, Request


class ModelHost:
    """hostd but for its descriptors: what its daemon does with what its feed says."""

    def __init__(self, dispatcher: Dispatcher, name: str) -> None:
        self.name, self.key_file = name, dispatcher.folder / f"{name}.key"
        self.place = Place(f"tcp://127.0.0.1:{dispatcher.port}", dispatcher.public_key)
        self.replica = Replica()
        self.model = Model(links={UPLINK: Link(UPLINK, "eth0", 0, bytes(6), True)})
        calc = Calculation.build(name, world_of(self.replica), Locals({}))
        self.settler = Settler(FakeKernel(self.model), calc, Limits(Guard().group_base), ("vnet",))
        self.settler.resync()
        load_or_create_key(self.key_file)
        self.feed = Feed(FeedConfig((self.place,), self.key_file, host=name), self.replica)
        self.agent = Agent(calc, self.settler, self.feed, ("vnet",))
        self.ear = Ear((), self.agent, lambda: None)
        self.ear.watcher = FakeWatcher()  # type: ignore[assignment]
        self.reconnected = 0

    def turn(self) -> None:
        now = time.monotonic()
        events = self.feed.tick(now)
        batch = [event for event in events if isinstance(event, Applied)]
        if batch:
            self.agent.applied(batch[-1].revision, absorb(self.settler.calc, batch))
        for event in events:
            match event:
                case Connected():
                    self.reconnected += 1
                    self.agent.connected(now)
                case Disconnected():
                    self.agent.disconnected()
                case ClaimAnswer(seq, refused):
                    self.agent.answered(seq, {r.key: r.message for r in refused}, now)
                case Held(reason):
                    self.agent.held = reason
        self.agent.tick(now)
        self.agent.settle()

    def hook(self, guest: Guest, operation: str) -> Request:
        request = Request(guest.driver, operation, "begin", guest.xml())
        self.ear.operations.hook(request, time.monotonic())
        return request

    def is_open(self, guest: Guest) -> bool:
        return any(link.group != 0 for link in self.model.links.values() if link.name in guest.taps)

    def says(self) -> list[str]:
        return [endpoint["problem"] for endpoint in of(self.agent, 1)["endpoints"]]


class Site:
    def __init__(self, rack: Rack) -> None:
        self.rack, self.dispatcher = rack, rack.dispatcher
        self.dispatcher.start()
        self.hosts: list[ModelHost] = []
        self._index = 100

    def host(self, name: str) -> ModelHost:
        host = ModelHost(self.dispatcher, name)
        self.hosts.append(host)
        key = load_or_create_key(host.key_file).public
        self.dispatcher.apply(document("Host", name, publicKey=key, addresses=[f"192.0.2.{len(self.hosts)}"]))
        self.until(lambda: host.feed.in_sync)
        return host

    def until(self, holds: Callable[[], Any]) -> None:
        end = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < end, [host.says() for host in self.hosts]
            for host in self.hosts:
                host.turn()
            time.sleep(0.005)

    def start(self, host: ModelHost, guest: Guest) -> Request:
        prepare = host.hook(guest, "prepare")
        self.until(lambda: prepare.said is not None)
        if prepare.code == 0:
            guest.taps = [f"vnet{guest.number}"]
            self._index += 1
            host.model.links[self._index] = Link(self._index, guest.taps[0], 0, bytes(6), True)
            host.hook(guest, "start")
            host.hook(guest, "started")
        return prepare

    def say(self, path: str, body: object = None) -> Any:
        status, answer = self.dispatcher.call("POST", path, body or {})
        assert status == 200, answer
        return answer

    def shown(self, name: str) -> dict[str, Any]:
        return next(item for item in self.dispatcher.get("/v1/hosts")["items"] if item["name"] == name)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(Rack(tmp_path))
    site.dispatcher.apply(policy("web", 'role == "web"', 'role == "web"'))
    yield site
    for host in site.hosts:
        host.feed.close()
    site.rack.end()


def test_a_fenced_host_closes_all_and_opens_all_when_it_is_over(site: Site) -> None:
    h1, h2 = site.host("h1"), site.host("h2")
    plain, second, other = Guest(1), Guest(2), Guest(3)
    for host, guest in ((h1, plain), (h1, second), (h2, other)):
        assert site.start(host, guest).code == 0
        site.until(lambda host=host, guest=guest: host.is_open(guest))
    site.say("/v1/hosts/h1/fence", {"reason": "its disk lies"})
    site.until(lambda: not h1.is_open(plain) and not h1.is_open(second))
    site.until(lambda: all("fenced by an operator (its disk lies): slash32 host unfence h1" in w for w in h1.says()))
    assert h2.is_open(other), "the control"
    refused = site.start(h1, Guest(4))
    assert refused.code == 1 and "fenced" in str(refused.said)
    # It stays closed, also over a new session and to claims that are made again.
    asked = h1.agent.claims._refused[plain.key()][1]
    before = h1.reconnected
    site.rack.dispatcher.kill()
    site.until(lambda: not h1.feed.connected)
    assert not h1.is_open(plain)
    site.dispatcher.start()
    site.until(lambda: h1.reconnected > before and h1.feed.in_sync)
    site.until(lambda: h1.agent.claims._refused[plain.key()][1] > asked + 2.0)
    assert not h1.is_open(plain) and not h1.is_open(second)
    site.say("/v1/hosts/h1/unfence")
    site.until(lambda: h1.is_open(plain) and h1.is_open(second))
    assert not any(h1.says()) and site.shown("h1")["fenced"] == ""
    assert site.start(h1, Guest(4)).code == 0


def test_a_retagged_guest_of_a_fenced_host_does_not_go_on_with_its_old_rights(site: Site) -> None:
    """Its new tag was refused, so that it has the old one's; these end with the fence, too."""
    h1, h2 = site.host("h1"), site.host("h2")
    site.start(h2, Guest(9))
    guest = Guest(1)
    site.start(h1, guest)
    site.until(lambda: h1.is_open(guest))
    guest.tag = (
        "<s:endpoint xmlns:s='urn:slash32:domain:1'><s:label key='role' value='web'/>"
        f"<s:interface mac='{guest.key().mac}'><s:address>10.65.9.1</s:address></s:interface></s:endpoint>"
    )
    h1.ear._take(_seen(guest), time.monotonic())
    site.until(lambda: any("in use" in line for line in h1.says()))
    assert h1.is_open(guest), "the old one stays"
    site.say("/v1/hosts/h1/fence", {})
    site.until(lambda: not h1.is_open(guest))
    site.until(lambda: any("fenced" in line for line in h1.says()))
    assert not h1.is_open(guest)


def _seen(guest: Guest) -> Seen:
    return Seen(parse_domain(guest.xml(), guest.driver, absent_ok=True), True, False)


def test_a_rotated_host_comes_back_with_its_next_key(site: Site) -> None:
    h1 = site.host("h1")
    guest = Guest(1)
    site.start(h1, guest)
    site.until(lambda: h1.is_open(guest))
    old, new = load_or_create_key(h1.key_file), load_or_create_key(next_file(h1.key_file))
    site.say("/v1/hosts/h1/rotate", {"publicKey": new.public})
    site.until(lambda: load_next(h1.key_file) is None and h1.feed.in_sync)
    assert load_or_create_key(h1.key_file) == new != old
    site.until(lambda: (site.shown("h1")["publicKey"], site.shown("h1")["nextPublicKey"]) == (new.public, ""))
    assert h1.is_open(guest)
    # The old key is nobody's any more.
    stranger = Feed(FeedConfig((h1.place,), _file(h1.key_file.parent / "old.key", old), host="h1"), Replica())
    try:
        site.until(lambda: (stranger.tick(time.monotonic()), "refuses this host's key" in stranger.trouble)[1])
        assert not stranger.connected
    finally:
        stranger.close()


def _file(path: Path, pair: Any) -> Path:
    path.write_text(f"public {pair.public}\nsecret {pair.secret}\n")
    path.chmod(0o600)
    return path
