# Dispatchers of one store against a model that sees everything: the log in its order, what each revision holds, what is
# in hosts' kernels. Proposals land, come second, fail, or land after they were given up; some of the log is skipped;
# hosts come and go while hosts are added, deleted and given each other's keys. At every step each dispatcher has
# exactly what its revision holds, whatever it had decided and taken back, and nobody is told what is not so.
from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from dispatcher.core import Core
from dispatcher.decisions import ledger as ledgers
from dispatcher.decisions.inputs import Command, Refused
from dispatcher.decisions.ledger import DISPATCHER, Ledger
from dispatcher.hosts.fanout import Fanout
from dispatcher.operators import fleet
from dispatcher.operators import resources as operators
from dispatcher.store.commits import (
    Commit,
    Failed,
    Foreign,
    Head,
    Holding,
    Landed,
    Outcome,
    Replaced,
    Saved,
    decode_writes,
    encode_writes,
)
from slash32 import wire
from slash32.model import Endpoint, EndpointKey
from slash32.net import parse_address
from slash32.sync import Applied, Held, NeedSnapshot, Publisher, Replica
from slash32.wire import Claim, Claimed, Delta, Expect, Pong, Release, Report, Snapshot

FULL = os.environ.get("SLASH32_COUNTS") == "full"
HOSTS = ("h1", "h2", "h3")
KEYS = tuple(letter * 40 for letter in "abc")
AUDIT = 4  # entries that are kept: so that some go


def document(kind: str, name: str, **spec: Any) -> dict[str, Any]:
    return {"apiVersion": "slash32/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}


def policy(name: str, number: int) -> dict[str, Any]:
    """No two are alike."""
    peer = [{"action": "Allow", "source": {"selector": f'role == "n{number}n" || role == "web"'}}]
    return document("GlobalNetworkPolicy", name, selector='role == "web"', ingress=peer)


def guest(n: int, address: int) -> Endpoint:
    key = EndpointKey(f"00000000-0000-0000-0000-{n:012x}", "52:54:00:00:00:01")
    return Endpoint(key, f"g{n}", {"role": "web"}, addresses=(parse_address(f"10.65.0.{address}"),))


@dataclass
class Moment:
    """What is true at a revision."""

    saved: Saved
    keys: dict[str, str]
    digests: dict[str, int]


class Truth:
    """The log, and one who follows it and decides nothing."""

    def __init__(self) -> None:
        self.log: list[bytes] = []
        self.late: list[Commit] = []  # given up by who proposed them, and perhaps still on their way
        self.ledger, self.fanout = Ledger(Saved("e", 0)), Fanout()
        self.moments: list[Moment] = []
        self.granted: dict[tuple[str, str], int] = {}  # host, endpoint -> first revision
        self._remember()

    def append(self, commit: Commit) -> None:
        assert commit.revision == len(self.log) + 1
        self.log.append(encode_writes(commit.writes))
        self.ledger = Ledger(self.ledger.saved())  # anew: nothing rests on how one got there
        self.ledger.follow(Commit(commit.revision, decode_writes(self.log[-1])))
        for write in decode_writes(self.log[-1]):
            if isinstance(write.record, Holding):
                self.granted.setdefault((write.record.host, repr(write.record.endpoint)), commit.revision)
        self.fanout = Fanout()
        self.ledger = Ledger(self.ledger.saved())
        self.fanout.publish(commit.revision, self.ledger.registry.take())
        self._remember()

    def _remember(self) -> None:
        digests = {name: self.fanout.digest(name) for name in self.fanout.publishers}
        self.moments.append(Moment(self.ledger.saved(), dict(self.ledger.keys), digests))

    def ever_had(self, host: str, revision: int, digest: int) -> bool:
        return any(moment.digests.get(host) == digest for moment in self.moments[revision:])


class End:
    """One dispatcher's end of the log."""

    shared = True

    def __init__(self, truth: Truth) -> None:
        self.truth, self.at, self.trouble = truth, 0, ""
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

    # what the test says

    def step(self) -> bool:
        if self.at < len(self.truth.log):
            self.proposal, self.at = None, self.at + 1
            self.outcomes.append(Foreign(Commit(self.at, decode_writes(self.truth.log[self.at - 1]))))
        elif self.proposal is not None:
            proposal, self.proposal, self.at = self.proposal, None, self.at + 1
            self.truth.append(proposal)
            self.outcomes.append(Landed(self.at))
        elif self.asked:
            self.asked -= 1
            self.outcomes.append(Head(self.at))
        return bool(self.outcomes)

    def fail(self, known: bool) -> None:
        proposal, self.proposal = self.proposal, None
        if proposal is not None:
            self.truth.late += [] if known else [proposal]
            self.outcomes.append(Failed("no", unknown=not known))

    def skip(self) -> None:
        """More was missed than the log still has."""
        if self.at < len(self.truth.log):
            self.proposal, self.at = None, len(self.truth.log)
            self.outcomes.append(Replaced(self.truth.moments[-1].saved))


@dataclass
class Machine:
    """A host: what it was told, and what is in its kernel."""

    name: str
    key: str
    replica: Replica = field(default_factory=Replica)
    kernel: int = 0  # digest
    visits: int = 0
    seq: int = 0
    at: Core | None = None
    heard: list[Any] = field(default_factory=list)  # under way to it
    settled: int | None = None  # revision to be acknowledged
    claims: dict[EndpointKey, Endpoint] = field(default_factory=dict)
    asked: dict[int, tuple[Endpoint, ...]] = field(default_factory=dict)

    @property
    def identity(self) -> bytes:
        return f"{self.name}.{self.visits}".encode().ljust(16, b".")


NAMES, PLACES, SLOTS = st.sampled_from(HOSTS), st.integers(0, 1), st.integers(0, 2)


class Agreement(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.now, self.number = 100.0, 0
        self.truth = Truth()
        self.cores = [Core(End(self.truth), lambda: self.now, lambda: 0.0, f"d{n}") for n in (1, 2)]
        self.hosts = {name: Machine(name, key) for name, key in zip(HOSTS, KEYS, strict=True)}
        self.rolls: list[tuple[Core, Core, bytes]] = []  # to whom, whose, what
        self.commands: list[tuple[int, Command]] = []  # with the number that only this one writes
        for n, core in enumerate(self.cores):
            core.company.join(f"tcp://10.0.0.{n}:1", f"{n}" * 40)
        self.do(0, lambda core: operators.apply(core, [*self.all_hosts(0)[:2], policy("p", 0)], False))
        self.settle()
        for n, name in enumerate(HOSTS[:2]):
            self.connect(name, n)
            self.claim(name, n + 1, n + 1, False)
        self.settle()

    def all_hosts(self, shift: int) -> list[dict[str, Any]]:
        return [document("Host", name, publicKey=KEYS[(n + shift) % 3]) for n, name in enumerate(HOSTS)]

    def end(self, core: Core) -> End:
        assert isinstance(core.store, End)
        return core.store

    # -- operators ------------------------------------------------------------------------------------------------

    def do(self, place: int, run: Callable[[Core], Any], number: int = 0) -> None:
        command = Command(self.cores[place], run, "test")
        self.commands.append((number, command))
        self.cores[place].turns.add(command)
        self.flush(self.cores[place])

    @rule(place=PLACES, name=st.sampled_from("pq"), two=st.booleans())
    def policy(self, place: int, name: str, two: bool) -> None:
        for _ in range(1 + two):  # the second waits while the first is under way
            self.number += 1
            documents = [policy(name, self.number)]
            self.do(place, partial(operators.apply, documents=documents, dry_run=False), self.number)

    @rule(place=PLACES, name=st.sampled_from("pq"))
    def no_policy(self, place: int, name: str) -> None:
        self.do(place, lambda core: operators.delete(core, "policy", name))

    @rule(place=PLACES, shift=SLOTS)
    def keys_go_round(self, place: int, shift: int) -> None:
        self.do(place, lambda core: operators.apply(core, self.all_hosts(shift), False))

    @rule(place=PLACES, name=NAMES)
    def no_host(self, place: int, name: str) -> None:
        self.do(place, lambda core: operators.delete(core, "host", name))

    @rule(place=PLACES, name=NAMES, on=st.booleans())
    def fence(self, place: int, name: str, on: bool) -> None:
        self.do(place, lambda core: fleet.fence(core, name, "why") if on else fleet.unfence(core, name))

    @rule(place=PLACES, name=NAMES)
    def rotate(self, place: int, name: str) -> None:
        self.do(place, lambda core: fleet.rotate(core, name, name[1] * 40))

    @rule(place=PLACES)
    def look(self, place: int) -> None:
        self.do(place, fleet.hosts)
        self.do(place, fleet.status)

    # -- hosts ----------------------------------------------------------------------------------------------------

    @rule(name=NAMES, place=PLACES, forgets=st.booleans())
    def connect(self, name: str, place: int, forgets: bool = False) -> None:
        host, core = self.hosts[name], self.cores[place]
        key = next((key for key, whose in reversed(core.ledger.keys.items()) if whose == name), "")
        if not key:
            return  # the handshake fails
        host.replica = Replica() if forgets else host.replica
        host.visits += 1
        host.at, host.key, host.heard, host.asked, host.settled = core, key, [], {}, None
        host.replica.lost()
        self.say(host, host.replica.hello())
        host.seq += 1
        host.asked[host.seq] = tuple(host.claims.values())
        self.say(host, Report(host.seq, tuple(host.claims.values())))
        self.flush(core)

    @rule(name=NAMES, n=st.integers(1, 3), address=st.integers(1, 2), gone=st.booleans())
    def claim(self, name: str, n: int, address: int, gone: bool) -> None:
        host, endpoint = self.hosts[name], guest(n, address)
        host.seq += 1
        if gone:
            host.claims.pop(endpoint.key, None)
            self.say(host, Release(host.seq, endpoint.key))
        else:
            host.claims[endpoint.key] = endpoint
            host.asked[host.seq] = (endpoint,)
            self.say(host, Claim(host.seq, endpoint))
        if host.at is not None:
            self.flush(host.at)

    @rule(name=NAMES, n=st.integers(1, 3), address=st.integers(1, 2))
    def expect(self, name: str, n: int, address: int) -> None:
        host = self.hosts[name]
        host.seq += 1
        self.say(host, Expect(host.seq, guest(n, address)))
        if host.at is not None:
            self.flush(host.at)

    def say(self, host: Machine, message: wire.FromHost) -> None:
        if host.at is not None:
            host.at.receive(host.identity, wire.encode_to_dispatcher(message), f"{host.name} {host.key}")

    @rule(name=NAMES)
    def hears(self, name: str) -> None:
        host = self.hosts[name]
        while host.heard and host.at is not None:
            self._hears(host, host.heard.pop(0))

    def _hears(self, host: Machine, message: Any) -> None:
        match message:
            case Pong() | wire.Refused():
                host.at = None
            case Claimed(seq, refused):
                for refusal in refused:
                    host.claims.pop(refusal.key, None)
                host.asked.pop(seq, None)
            case Snapshot() | Delta():
                for outcome in host.replica.receive(message):
                    assert not isinstance(outcome, NeedSnapshot), f"{host.name}: {outcome.reason}, and nothing was lost"
                    assert not isinstance(outcome, Held), outcome.reason
                    if isinstance(outcome, Applied):
                        host.settled = outcome.revision

    @rule(name=NAMES)
    def kernel(self, name: str) -> None:
        """It has all that was heard."""
        host = self.hosts[name]
        if host.settled is not None and host.at is not None and host.replica.in_sync:
            host.kernel, revision, host.settled = host.replica.digest, host.settled, None
            self.say(host, wire.Ack(revision))
            self.flush(host.at)

    # -- the store, and the dispatchers among themselves ----------------------------------------------------------

    @rule(place=PLACES)
    def store(self, place: int) -> None:
        self.end(self.cores[place]).step()
        self.flush(self.cores[place])

    @rule(place=PLACES, known=st.booleans())
    def fails(self, place: int, known: bool) -> None:
        self.end(self.cores[place]).fail(known)
        self.flush(self.cores[place])

    @rule()
    def lands_late(self) -> None:
        while self.truth.late:
            commit = self.truth.late.pop(0)
            if commit.revision == len(self.truth.log) + 1:
                self.truth.append(commit)
                return

    @rule(place=PLACES)
    def skips(self, place: int) -> None:
        self.end(self.cores[place]).skip()
        self.flush(self.cores[place])

    @rule(number=st.integers(0, 9), lost=st.booleans())
    def roll(self, number: int, lost: bool) -> None:
        if self.rolls:
            core, sender, word = self.rolls.pop(number % len(self.rolls))
            if not lost:
                key = str(self.cores.index(sender)) * 40
                core.receive(b"dispatcher", word, f"{DISPATCHER} {key}")
                self.flush(core)

    @rule(seconds=st.sampled_from([0.1, 1.2]))
    def time(self, seconds: float) -> None:
        self.now += seconds
        for core in self.cores:
            self.flush(core)

    def flush(self, core: Core) -> None:
        self.now += 0.01
        core.company.look(self.now)
        for identity, frames in core.flush():
            host = self.hosts[identity.decode().split(".")[0]]
            if host.at is core and host.identity == identity:
                message = wire.decode_from_dispatcher(frames)
                if isinstance(message, Claimed):
                    self.granted(core, host, message)
                host.heard.append(message)
        core.company.tick(self.now)
        said, core.company.out = core.company.out, []
        self.rolls += [(other, core, word) for _, word in said for other in self.cores if other is not core]
        done, core.done = core.done, []
        for command in done:
            command.finish()

    # -- what must be so ------------------------------------------------------------------------------------------

    def granted(self, core: Core, host: Machine, message: Claimed) -> None:
        no = {refusal.key for refusal in message.refused}
        for endpoint in host.asked.get(message.seq, ()):
            since = self.truth.granted.get((host.name, repr(endpoint)), len(self.truth.log) + 1)
            assert endpoint.key in no or since <= core.revision, f"{host.name} was granted what no revision holds"

    @invariant()
    def each_has_what_its_revision_holds(self) -> None:
        for core in self.cores if hasattr(self, "truth") else ():
            moment = self.truth.moments[core.revision]
            assert {name: core.fanout.digest(name) for name in core.fanout.publishers} == moment.digests
            if core.turns._batch:
                continue
            saved = core.ledger.saved()
            assert saved == moment.saved, "another content"
            assert core.ledger.keys == moment.keys, "others may connect"
            entries = list(core.ledger.audit)
            assert entries == sorted(entries), "the audit's order"
            b = core.registry.take()
            assert not any((b.changes, b.gained, b.lost, b.fresh, b.gone)), "what was taken back would be told"

    @invariant()
    def done_is_done(self) -> None:
        for core in self.cores if hasattr(self, "truth") else ():
            for revision in (core.revision, max(0, core.revision - 1)):
                pending = fleet.progress(core, revision)["pending"]
                for name in self.truth.moments[core.revision].digests.keys() - set(pending):
                    kernel = self.hosts[name].kernel
                    assert self.truth.ever_had(name, revision, kernel), f"{name} has not got revision {revision}"

    @invariant()
    def answers_are_true(self) -> None:
        for number, command in getattr(self, "commands", ()):
            if not command.future.done():
                continue
            error = command.future.exception(0)
            assert error is None or isinstance(error, Refused)
            assert error is None or error.status != 500, "a fault of ours"
            if number:
                text = f"n{number}n".encode()
                there = [n for n, data in enumerate(self.truth.log, 1) if text in data]
                if error is None:
                    assert there == [command.future.result(0)["revision"]], (there, command.future.result(0), number)
                elif "nothing was changed" in error.errors[0]:
                    assert not there, "a change that was said not to be"

    def settle(self) -> None:
        for _ in range(60):
            self.now += 0.4
            busy = False
            for core in self.cores:
                while self.end(core).step():
                    self.flush(core)
                    busy = True
                self.flush(core)
                busy = busy or bool(core.turns.waiting())
            while self.rolls:
                self.roll(0, False)
            for host in self.hosts.values():
                self.hears(host.name)
                self.kernel(host.name)
                if host.at is None and host.visits:
                    self.connect(host.name, host.visits % 2)
                    busy = busy or host.at is not None
            if not busy:
                return
        raise AssertionError("it never settles")

    def teardown(self) -> None:
        if not hasattr(self, "truth"):
            return
        self.truth.late.clear()
        for _ in range(2):
            self.do(0, lambda core: operators.apply(core, self.all_hosts(0), False))
            self.settle()
        for n, name in enumerate(HOSTS):
            if self.hosts[name].at is None:
                self.connect(name, n % 2)
        self.settle()
        self.now += 2.0
        self.settle()
        self.each_has_what_its_revision_holds()
        self.answers_are_true()
        assert all(command.future.done() for _, command in self.commands)
        one, other = self.cores
        assert one.revision == other.revision == len(self.truth.log)
        for core in self.cores:
            assert fleet.progress(core, core.revision)["done"], "it waits for ever"


def play(examples: int, shrink: bool = True) -> None:
    phases = tuple(Phase) if shrink else (Phase.generate,)
    run_state_machine_as_test(
        Agreement,
        settings=settings(
            max_examples=examples, stateful_step_count=50, deadline=None, phases=phases, database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def few_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "AUDIT_KEPT", AUDIT)
    monkeypatch.setattr(Publisher.__init__, "__defaults__", (2,))  # messages that are not acknowledged


def test_each_has_what_its_revision_holds_at_every_step() -> None:
    play(1500 if FULL else 25)
