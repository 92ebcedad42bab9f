# Dispatchers of one store, without sockets: a log that they share, words that come late, doubled or never, hosts that
# go from one to the other. Whatever the order, they never disagree about what a revision holds.
from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dispatcher.core import Core
from dispatcher.decisions.inputs import Command, Refused
from dispatcher.operators import fleet
from dispatcher.operators import resources as operators
from dispatcher.replicas.company import AGAIN, LOST, TOGETHER
from dispatcher.replicas.rolls import FRESH, Adopt, Answer, Peers, Presence, Question, Roll, decode, encode
from dispatcher.store.commits import Commit, Failed, Foreign, Head, Landed, Outcome, Saved, decode_writes, encode_writes
from slash32 import wire
from slash32.model import Endpoint, EndpointKey
from slash32.net import parse_address
from slash32.pack import WireError
from slash32.sync import Applied, Held, Replica
from slash32.wire import Claim, Claimed, Pong, Release, Report

HOSTS = ("h1", "h2", "h3")
KEYS = {name: "x" * 39 + name[1] for name in HOSTS}


class Log:
    """What all of them share: commits in their order. Each follows it at its own pace."""

    def __init__(self) -> None:
        self.commits: list[bytes] = []


class Store:
    """One dispatcher's end of the log."""

    shared = True

    def __init__(self, log: Log) -> None:
        self.log = log
        self.trouble = ""
        self.at = 0
        self.proposal: Commit | None = None
        self.asked = 0
        self.outcomes: list[Outcome] = []

    def load(self) -> Saved:
        return Saved("e", 0)

    def propose(self, commit: Commit) -> None:
        assert self.proposal is None and commit.revision == self.at + 1
        self.proposal = commit

    def ask_head(self) -> None:
        self.asked += 1

    def take(self) -> list[Outcome]:
        outcomes, self.outcomes = self.outcomes, []
        return outcomes

    def close(self) -> None: ...

    def step(self) -> bool:
        """The proposal gets to the log, or the next commit of it gets here. False: nothing to do."""
        proposal, behind = self.proposal, self.at < len(self.log.commits)
        if proposal is not None and not behind:
            self.log.commits.append(encode_writes(proposal.writes))
            self.proposal, self.at = None, self.at + 1
            self.outcomes.append(Landed(self.at))
        elif behind:
            self.proposal, self.at = None, self.at + 1
            self.outcomes.append(Foreign(Commit(self.at, decode_writes(self.log.commits[self.at - 1]))))
        elif self.asked:
            self.asked -= 1
            self.outcomes.append(Head(self.at))
        return behind or proposal is not None or bool(self.outcomes)

    def fail(self) -> None:
        """Unknown to the one that proposed it, it is a commit all the same, if none came before."""
        proposal, self.proposal = self.proposal, None
        if proposal is not None:
            if self.at == len(self.log.commits):
                self.log.commits.append(encode_writes(proposal.writes))
            self.outcomes.append(Failed("no answer", unknown=True))


class Guests:
    """A host: what it was told, what it was granted."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.replica = Replica()
        self.claims: dict[EndpointKey, Endpoint] = {}
        self.asked: dict[int, tuple[Endpoint, ...]] = {}  # by number, what was claimed
        self.granted: dict[EndpointKey, Endpoint] = {}  # and not released since
        self.at: Core | None = None
        self.visits = self.seq = 0
        self.held = False

    @property
    def identity(self) -> bytes:
        return f"{self.name}.{self.visits}".encode().ljust(16, b".")


def document(kind: str, name: str, **spec: Any) -> dict[str, Any]:
    return {"apiVersion": "slash32/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}


def guest(n: int, address: int) -> Endpoint:
    key = EndpointKey(f"00000000-0000-0000-0000-{n:012x}", "52:54:00:00:00:01")
    return Endpoint(key, f"g{n}", {"role": "web"}, addresses=(parse_address(f"10.65.0.{address}"),))


class Three:
    def __init__(self, count: int = 3) -> None:
        self.now = 100.0
        self.log = Log()
        self.cores = [Core(Store(self.log), lambda: self.now, lambda: 0.0, f"d{n}") for n in range(1, count + 1)]
        self.guests = {name: Guests(name) for name in HOSTS}
        self.said: list[tuple[Core, bytes]] = []  # rolls and questions on their way: to whom, what
        for n, core in enumerate(self.cores):
            core.company.join(f"tcp://10.0.0.{n}:1", f"{n}" * 40)
        self.settle()
        self.do(
            self.cores[0], lambda c: operators.apply(c, [document("Host", n, publicKey=KEYS[n]) for n in HOSTS], False)
        )
        self.settle()

    def store(self, core: Core) -> Store:
        assert isinstance(core.store, Store)
        return core.store

    def do(self, core: Core, run: Callable[[Core], Any]) -> Future[Any]:
        command = Command(core, run, "test")
        core.turns.add(command)
        self.flush(core)
        return command.future

    def flush(self, core: Core) -> None:
        core.company.look(self.now)
        for identity, frames in core.flush():
            self._told(core, identity, wire.decode_from_dispatcher(frames))
        core.company.tick(self.now)
        said, core.company.out = core.company.out, []
        for to, word in said:
            self.said += [(other, word) for other in self.cores if other is not core and to in ("", other.name)]
        done, core.done = core.done, []
        for command in done:
            command.finish()

    def _told(self, core: Core, identity: bytes, message: Any) -> None:
        host = self.guests[identity.decode().split(".")[0]]
        if host.at is not core or host.identity != identity:
            return  # that connection is gone
        match message:
            case Pong() | wire.Refused():
                host.at = None
            case Claimed(seq, refused):
                keys = {refusal.key for refusal in refused}
                for endpoint in host.asked.pop(seq, ()):
                    if endpoint.key in keys:
                        host.claims.pop(endpoint.key, None)
                        host.granted.pop(endpoint.key, None)
                    elif endpoint.key in host.claims:
                        host.granted[endpoint.key] = endpoint
            case _:
                for outcome in host.replica.receive(message):
                    host.held = host.held or isinstance(outcome, Held)
                    if isinstance(outcome, Applied):
                        self.say(host, wire.Ack(outcome.revision))

    def say(self, host: Guests, message: wire.FromHost) -> None:
        if host.at is not None:
            host.at.receive(host.identity, wire.encode_to_dispatcher(message), f"{host.name} {KEYS[host.name]}")

    def connect(self, name: str, core: Core) -> None:
        host = self.guests[name]
        host.visits += 1
        host.at, host.asked = core, {}
        self.say(host, host.replica.hello())
        self.claim(name)
        self.flush(core)

    def claim(self, name: str, *endpoints: Endpoint) -> None:
        """One, or all that it has (a report)."""
        host = self.guests[name]
        host.claims |= {endpoint.key: endpoint for endpoint in endpoints}
        host.seq += 1
        host.asked[host.seq] = endpoints or tuple(host.claims.values())
        word = Claim(host.seq, endpoints[0]) if endpoints else Report(host.seq, tuple(host.claims.values()))
        self.say(host, word)

    def release(self, name: str, key: EndpointKey) -> None:
        host = self.guests[name]
        host.claims.pop(key, None)
        host.granted.pop(key, None)
        host.seq += 1
        self.say(host, Release(host.seq, key))

    def hear(self, number: int = 0) -> None:
        core, word = self.said.pop(number % len(self.said))
        core.company.hear(word, str(int(decode(word)[0].removeprefix("d")) - 1) * 40, self.now)
        self.flush(core)

    def settle(self) -> None:
        """Everything that is under way arrives."""
        for _ in range(200):
            self.now += 0.3
            busy = False
            for core in self.cores:
                while self.store(core).step():
                    self.flush(core)
                    busy = True
                self.flush(core)
                busy = busy or bool(core.turns.waiting())
            while self.said:
                self.hear()
            for host in self.guests.values():
                if host.at is None and host.visits:
                    self.connect(host.name, self.cores[host.visits % len(self.cores)])
                    busy = True
            if not busy:
                return
        raise AssertionError("it never settles")

    def check(self) -> None:
        """All have the same, and so have the hosts."""
        first = self.cores[0]
        for core in self.cores:
            assert core.ledger.saved() == first.ledger.saved() and not core.ledger.writes
            assert core.revision == len(self.log.commits)
            for name in core.registry.hosts:
                assert core.fanout.digest(name) == first.fanout.digest(name)
        for host in self.guests.values():
            if host.at is not None:
                assert host.replica.digest == first.fanout.digest(host.name) and not host.held
                mine = {c.endpoint.key for c in first.registry.endpoints.values() if c.host == host.name}
                assert mine == set(host.granted)
                assert first.company.presences(self.now)[host.name][0] == host.at.name
        held = [a for c in first.registry.endpoints.values() for a in c.endpoint.addresses]
        assert len(held) == len(set(held))


NAMES, PLACES = st.sampled_from(HOSTS), st.integers(0, 2)
STEP = st.one_of(
    st.tuples(st.just("connect"), NAMES, PLACES),
    st.tuples(st.just("claim"), NAMES, st.integers(1, 5), st.integers(1, 3)),
    st.tuples(st.just("release"), NAMES, st.integers(1, 5)),
    st.tuples(st.just("policy"), PLACES, st.sampled_from("ab")),
    st.tuples(st.just("no policy"), PLACES, st.sampled_from("ab")),
    st.tuples(st.just("fence"), PLACES, NAMES),
    st.tuples(st.just("unfence"), PLACES, NAMES),
    st.tuples(st.just("store"), PLACES),
    st.tuples(st.just("store"), PLACES),
    st.tuples(st.just("fail"), PLACES),
    st.tuples(st.just("hear"), st.integers(0, 20)),
    st.tuples(st.just("lose"), st.integers(0, 20)),
    st.tuples(st.just("time"), st.sampled_from([0.01, 1.0, 5.0])),
)


def play(three: Three, step: tuple[Any, ...]) -> None:
    cores = three.cores
    match step:
        case "connect", name, place:
            three.connect(name, cores[place])
        case "claim", name, n, address:
            three.claim(name, guest(n, address))
        case "release", name, n:
            three.release(name, guest(n, 1).key)
        case "policy", place, name:
            rules = [{"action": "Allow", "source": {"selector": f'role == "{place}"'}}]
            made = document("GlobalNetworkPolicy", name, selector="all()", ingress=rules)
            three.do(cores[place], lambda c: operators.apply(c, [made], False))
        case "no policy", place, name:
            three.do(cores[place], lambda c: operators.delete(c, "policy", name))
        case "fence", place, name:
            three.do(cores[place], lambda c: fleet.fence(c, name, "why"))
        case "unfence", place, name:
            three.do(cores[place], lambda c: fleet.unfence(c, name))
        case "store", place:
            three.store(cores[place]).step()
            three.flush(cores[place])
        case "fail", place:
            three.store(cores[place]).fail()
            three.flush(cores[place])
        case "hear", number if three.said:
            three.hear(number)
        case "lose", number if three.said:
            three.said.pop(number % len(three.said))
        case "time", seconds:
            three.now += seconds
            for core in cores:
                three.flush(core)


@given(st.lists(STEP, max_size=40))
@example([("claim", "h1", 1, 1), ("connect", "h1", 0), ("connect", "h1", 1)])  # at the same moment
@settings(max_examples=5000 if os.environ.get("SLASH32_COUNTS") == "full" else 120, deadline=None)
def test_they_never_disagree(steps: list[tuple[Any, ...]]) -> None:
    three = Three()
    for step in steps:
        play(three, step)
        for core in three.cores:
            flown = {a for c in core.registry.endpoints.values() for a in c.endpoint.addresses}
            assert len(flown) == len(core.registry.endpoints), "one address, one endpoint"
    three.settle()
    three.now += FRESH + 1
    three.settle()
    three.settle()
    three.check()


# --- rolls -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word",
    [
        Roll(7, True, {"h1": Presence(5, 0.5, "why", "1.0", "nftables", 99.0, 3.0, (("a", "b"),), (("c", "d"),))}),
        Roll(0, False, {}),
        Question(3, ("h1", "h2"), "{}"),
        Answer(3, {"h1": "{}"}),
        Adopt(None),
        Adopt(("h1",)),
    ],
)
def test_words_come_as_they_went(word: Any) -> None:
    data = encode("d1", word)
    assert decode(data) == ("d1", word)
    for end in range(len(data)):
        with pytest.raises(WireError):
            decode(data[:end])


def test_a_host_is_where_it_came_to_last() -> None:
    peers = Peers()
    peers.take("d2", Roll(5, True, {"h1": Presence(5, age=9.0)}), now=100.0)
    peers.take("d3", Roll(5, True, {"h1": Presence(4, age=1.0)}), now=100.5)
    assert peers.presence("h1", 101.0) == ("d3", Presence(4, age=1.0))
    assert peers.others(101.0)["h1"][0] == "d3"
    assert peers.take("d3", Roll(6, True, {"h1": Presence(6, age=1.1)}), now=100.6) == [("h1", 6, True)]
    assert peers.take("d3", Roll(6, True, {"h1": Presence(6, age=1.1)}), now=100.6) == []
    assert peers.presence("h1", 100.4 + FRESH) == ("d3", Presence(6, age=1.1))
    assert peers.presence("h1", 101 + FRESH) is None


# --- sent away -------------------------------------------------------------------------------------------------------


@pytest.fixture
def three() -> Three:
    three = Three()
    three.connect("h1", three.cores[0])
    three.settle()
    assert "h1" in three.cores[0].connected
    return three


def pass_time(three: Three, seconds: float, hears: bool = True) -> None:
    for _ in range(int(seconds / 0.1)):
        three.now += 0.1
        for core in three.cores:
            three.flush(core)
        while three.said:
            three.hear() if hears else three.said.clear()


def test_who_lost_its_store_sends_hosts_to_who_has_it(three: Three) -> None:
    core = three.cores[0]
    three.store(core).trouble = "no contact"
    pass_time(three, LOST / 2)
    assert "h1" in core.connected
    pass_time(three, 2 * LOST)
    assert "h1" not in core.connected and three.guests["h1"].at is None
    three.connect("h1", core)
    assert "h1" in core.connected, "it came back: nobody else took it"
    pass_time(three, AGAIN / 2)
    assert "h1" in core.connected
    pass_time(three, AGAIN)
    assert "h1" not in core.connected, "worth another attempt"
    three.store(core).trouble = ""
    pass_time(three, 1.0)
    three.connect("h1", core)
    pass_time(three, 1.0)
    assert "h1" in core.connected


def test_who_hears_nobody_and_has_no_store_sends_them_away_once(three: Three) -> None:
    core = three.cores[0]
    three.store(core).trouble = "no contact"
    pass_time(three, FRESH + LOST + 1, hears=False)
    assert "h1" not in core.connected
    three.connect("h1", core)
    pass_time(three, 3 * AGAIN, hears=False)
    assert "h1" in core.connected


def test_where_nobody_has_the_store_hosts_stay(three: Three) -> None:
    for core in three.cores:
        three.store(core).trouble = "no quorum"
    pass_time(three, 10)
    assert "h1" in three.cores[0].connected
    three.store(three.cores[1]).trouble = ""  # they do not all get it back at the same moment
    pass_time(three, LOST + TOGETHER / 2)
    for core in three.cores:
        three.store(core).trouble = ""
    pass_time(three, 5)
    assert "h1" in three.cores[0].connected


def test_one_that_joins_while_the_store_fails_joins_later() -> None:
    three = Three(2)
    late = Core(Store(three.log), lambda: three.now, lambda: 0.0, "d9")
    three.cores.append(late)
    store = three.store(late)
    store.trouble = "no quorum"
    late.company.join("tcp://10.0.0.9:1", "9" * 40)
    pass_time(three, 5)
    assert "d9" not in three.cores[0].ledger.dispatchers
    store.trouble = ""
    three.settle()
    assert all("d9" in core.ledger.dispatchers for core in three.cores)


def test_a_command_that_is_refused_elsewhere_is_refused_here(three: Three) -> None:
    """Both delete the same: the second one finds nothing."""
    made = document("GlobalNetworkPolicy", "p", selector="all()")
    three.do(three.cores[0], lambda c: operators.apply(c, [made], False))
    three.settle()
    both = [three.do(core, lambda c: operators.delete(c, "policy", "p")) for core in three.cores[:2]]
    three.settle()
    first, second = both
    assert first.result(0)
    with pytest.raises(Refused, match="p"):
        second.result(0)
    three.check()


def test_adopt_is_said_until_it_is_done(three: Three) -> None:
    host, (one, other, _) = three.guests["h1"], three.cores
    host.replica.epoch = "another"
    three.connect("h1", one)
    three.settle()
    assert host.held and other.company.presences(three.now)["h1"][1].held
    host.held = False
    asked = three.do(other, lambda core: fleet.adopt(core, ["h1"]))
    three.said.clear()  # it is lost
    pass_time(three, 3.0)
    three.settle()
    assert asked.result(0) == {"adopted": ["h1"]}
    assert host.replica.epoch == "e" and not host.held and host.at is one
    pass_time(three, 3.0)
    assert not any(isinstance(decode(word)[1], Adopt) for _, word in three.said)
    assert not other.company.presences(three.now)["h1"][1].held
