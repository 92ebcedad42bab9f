# What is decided and not yet durable can be taken back without a trace; another dispatcher's commit comes first; a
# store that fails loses nothing, refuses what operators want, and delays nobody who only looks.
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.core import Core
from dispatcher.decisions.inputs import Command, Refused
from dispatcher.decisions.ledger import Ledger
from dispatcher.operators import fleet
from dispatcher.operators import resources as operators
from dispatcher.store.commits import (
    Commit,
    Failed,
    Foreign,
    Head,
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
from slash32.sync import NO_SESSION
from slash32.wire import Ack, Claim, Claimed, Delta, Hello, Pong, Release, Report, Snapshot

KEYS = {f"h{n}": "x" * 39 + str(n) for n in (1, 2)}


class Log:
    """A store that others share; the test says what comes of a proposal."""

    shared = True

    def __init__(self) -> None:
        self.trouble = ""
        self.commits: list[Commit] = []
        self.proposal: Commit | None = None
        self.outcomes: list[Outcome] = []
        self.asked = 0

    def load(self) -> Saved:
        return Saved("e", 0)

    def propose(self, commit: Commit) -> None:
        assert self.proposal is None, "one at a time"
        self.proposal = Commit(commit.revision, decode_writes(encode_writes(commit.writes)))

    def ask_head(self) -> None:
        self.asked += 1

    def take(self) -> list[Outcome]:
        outcomes, self.outcomes = self.outcomes, []
        return outcomes

    def close(self) -> None: ...

    # what the test says

    def land(self) -> Commit:
        assert self.proposal
        landed, self.proposal = self.proposal, None
        self.commits.append(landed)
        self.outcomes.append(Landed(landed.revision))
        return landed

    def foreign(self, commit: Commit) -> None:
        self.proposal = None
        self.commits.append(commit)
        self.outcomes.append(Foreign(commit))

    def fail(self, reason: str, unknown: bool = False) -> None:
        self.proposal = None
        self.outcomes.append(Failed(reason, unknown))


def document(kind: str, name: str, **spec: Any) -> dict[str, Any]:
    return {"apiVersion": "slash32/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}


HOSTS = [document("Host", name, publicKey=key) for name, key in KEYS.items()]
POLICY = document("GlobalNetworkPolicy", "p", selector="all()", ingress=[{"action": "Allow"}])


def guest(n: int, address: str = "") -> Endpoint:
    key = EndpointKey(f"00000000-0000-0000-0000-{n:012x}", "52:54:00:00:00:01")
    return Endpoint(key, f"g{n}", {"role": "web"}, addresses=(parse_address(address or f"10.65.0.{n}"),))


class Rig:
    def __init__(self) -> None:
        self.now = 100.0
        self.log = Log()
        self.core = Core(self.log, lambda: self.now, lambda: 0.0)
        self.said: dict[str, list[Any]] = {name: [] for name in KEYS}
        self.do(lambda core: operators.apply(core, HOSTS, False))
        self.log.land()
        self.flush()

    def do(self, run: Callable[[Core], Any]) -> Command:
        command = Command(self.core, run, "test")
        self.core.turns.add(command)
        self.flush()
        return command

    def say(self, host: str, message: wire.FromHost) -> None:
        identity = host.encode().ljust(16, b".")
        self.core.receive(identity, wire.encode_to_dispatcher(message), f"{host} {KEYS[host]}")
        self.flush()

    def flush(self) -> None:
        for identity, frames in self.core.flush():
            self.said[identity.decode().rstrip(".")].append(wire.decode_from_dispatcher(frames))
        done, self.core.done = self.core.done, []
        for command in done:
            command.finish()

    def heard(self, host: str) -> list[Any]:
        found, self.said[host] = self.said[host], []
        return found

    def connect(self, host: str, *endpoints: Endpoint) -> None:
        self.say(host, Hello("", 0, 0))
        self.say(host, Report(1, endpoints))

    def policies(self) -> Command:
        return self.do(lambda core: operators.get(core, "policy"))


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_nothing_is_told_before_it_is_durable(rig: Rig) -> None:
    rig.connect("h1", guest(1))
    assert rig.heard("h1") == [] and rig.log.proposal
    rig.log.land()
    rig.flush()
    (snapshot, claimed) = rig.heard("h1")
    assert isinstance(snapshot, Snapshot) and snapshot.revision == 2
    assert claimed == Claimed(1, ())
    asked = rig.do(lambda core: operators.apply(core, [POLICY], False))
    look = rig.policies()
    assert not asked.future.done() and not look.future.done(), "what is not durable is not shown either"
    rig.log.land()
    rig.flush()
    assert asked.future.result(0)["revision"] == 3 and len(look.future.result(0)["items"]) == 1


def test_another_dispatchers_commit_comes_first(rig: Rig) -> None:
    """Both hosts claim one address, each through its own dispatcher."""
    other = Ledger(rig.core.ledger.saved())
    rig.connect("h1", guest(1))
    other.claim("h2", guest(2, "10.65.0.1"))
    rig.log.foreign(other.landed(2))
    rig.flush()
    (_, claimed) = rig.heard("h1")
    assert "10.65.0.1 is in use by g2 on h2" in claimed.refused[0].message
    assert rig.core.revision == 2 and rig.log.proposal is None
    assert rig.core.turns.conflicts == 1


def test_a_command_is_decided_anew_and_answered_once(rig: Rig) -> None:
    asked = rig.do(lambda core: operators.apply(core, [POLICY], False))
    other = Ledger(rig.core.ledger.saved())
    other.undo()
    rig.core.ledger.undo()
    theirs = Ledger(rig.core.ledger.saved())
    theirs.delete("Host", "h2")
    rig.log.foreign(theirs.landed(2))
    rig.flush()
    assert rig.log.proposal and rig.log.proposal.revision == 3
    rig.log.land()
    rig.flush()
    assert asked.future.result(0) == {
        "revision": 3,
        "changes": [{"kind": "GlobalNetworkPolicy", "name": "p", "change": "created"}],
    }
    assert set(rig.core.registry.hosts) == {"h1"}


def test_a_store_that_fails_refuses_operators_and_keeps_hosts_waiting(rig: Rig) -> None:
    rig.connect("h1", guest(1))
    asked, look = rig.do(lambda core: operators.apply(core, [POLICY], False)), rig.policies()
    rig.log.fail("disk full")
    rig.flush()
    assert rig.log.proposal and not asked.future.done(), "the operator's came in while the host's was under way"
    rig.log.fail("disk full")
    rig.flush()
    with pytest.raises(Refused, match="disk full; nothing was changed"):
        asked.future.result(0)
    assert look.future.result(0)["items"] == []
    (snapshot,) = rig.heard("h1")
    assert isinstance(snapshot, Snapshot), "its Hello is answered, its claim is not"
    rig.now += 2
    rig.flush()
    rig.log.land()
    rig.flush()
    delta, claimed = rig.heard("h1")
    assert isinstance(delta, Delta) and claimed == Claimed(1, ())
    assert not rig.core.turns.failing


def test_a_failure_is_told_until_the_store_is_well(rig: Rig) -> None:
    rig.do(lambda core: operators.apply(core, [POLICY], False))
    rig.log.fail("disk full")
    rig.flush()
    for word in (Failed("still full"), None):
        rig.now += 40
        asked = rig.log.asked
        rig.core.sweep()
        rig.core.sweep()
        assert rig.log.asked == asked + 1 and rig.core.turns.failing
        rig.log.outcomes += [word] if word else []
        rig.log.outcomes.append(Head(0))
        rig.flush()
        assert rig.core.turns.failing == (word.reason if word else "")


def test_who_waits_for_a_store_without_contact_costs_nothing(rig: Rig) -> None:
    rig.log.trouble = "no quorum"
    rig.connect("h1", guest(1))
    rig.flush()
    assert rig.core.turns.waiting() and rig.core.turns.deadline == float("inf")
    rig.log.trouble = ""  # the control
    assert rig.core.turns.deadline <= rig.now


def test_a_fault_of_ours_harms_one_command(rig: Rig) -> None:
    def broken(core: Core) -> None:
        operators.apply(core, [POLICY], False)
        raise ZeroDivisionError

    asked, other = rig.do(broken), rig.do(lambda core: operators.apply(core, [POLICY], True))
    with pytest.raises(Refused, match="its journal has it, and nothing was changed"):
        asked.future.result(0)
    assert rig.policies().future.result(0) == {"items": []} and other.future.result(0)["changes"]


def test_trouble_is_known_before_anything_is_tried(rig: Rig) -> None:
    rig.log.trouble = "no quorum"
    asked = rig.do(lambda core: operators.apply(core, [POLICY], False))
    with pytest.raises(Refused, match="no quorum; nothing"):
        asked.future.result(0)
    assert rig.policies().future.result(0) == {"items": []}
    assert rig.log.proposal is None


def test_an_unknown_end_says_so_and_may_come_true(rig: Rig) -> None:
    asked = rig.do(lambda core: operators.apply(core, [POLICY], False))
    proposal = rig.log.proposal
    assert proposal
    rig.log.fail("no answer", unknown=True)
    rig.flush()
    with pytest.raises(Refused, match="may be done all the same"):
        asked.future.result(0)
    assert rig.policies().future.result(0)["items"] == []
    rig.log.foreign(proposal)
    rig.flush()
    assert len(rig.policies().future.result(0)["items"]) == 1


def test_a_host_that_knows_more_waits_until_we_do(rig: Rig) -> None:
    rig.say("h1", Hello("e", 2, 0))
    rig.say("h1", Report(1, ()))
    assert rig.heard("h1") == [Claimed(1, ())] and rig.log.asked == 1
    theirs = Ledger(rig.core.ledger.saved())
    theirs.claim("h2", guest(2))
    rig.log.foreign(theirs.landed(2))
    rig.log.outcomes.append(Head(2))
    rig.flush()
    (opened,) = rig.heard("h1")
    assert isinstance(opened, Snapshot) and opened.revision == 2
    assert rig.core.ledger.host("h1").ahead is None


def test_a_store_that_is_an_old_copy_is_seen(rig: Rig) -> None:
    rig.say("h1", Hello("e", 9, 0))
    rig.say("h1", Report(1, ()))
    rig.log.outcomes.append(Head(1))
    rig.flush()
    rig.log.land()
    rig.flush()
    assert rig.core.ledger.host("h1").ahead == 9
    assert rig.core.fanout.publishers["h1"].held


def test_an_old_copy_does_not_catch_up_by_what_it_writes_itself(rig: Rig) -> None:
    rig.log.shared = False
    for name in ("h1", "h2"):  # the first costs a commit: the second is no further than that, and yet elsewhere
        rig.say(name, Hello("e", 1, 7))
        rig.say(name, Report(1, ()))
        rig.flush()
        rig.log.land()
        rig.flush()
        assert rig.core.ledger.host(name).ahead == 1 and rig.core.fanout.publishers[name].held
    assert rig.core.revision == 3
    rig.do(lambda core: core.adopt(["h2"]))
    rig.log.land()
    rig.flush()
    rig.say("h2", Hello("e", rig.core.revision, 0))  # the control: it has that from us
    rig.say("h2", Report(1, ()))
    rig.flush()
    assert not rig.core.fanout.publishers["h2"].held and rig.core.fanout.publishers["h1"].held


def test_too_much_was_missed(rig: Rig) -> None:
    rig.connect("h1", guest(1))
    rig.log.land()
    rig.flush()
    rig.say("h1", Ack(2))
    theirs = Ledger(rig.core.ledger.saved())
    operators_policy = Rig()
    operators_policy.do(lambda core: operators.apply(core, [POLICY], False))
    assert operators_policy.log.proposal
    for write in operators_policy.log.proposal.writes:
        theirs.write(*write)
    theirs.delete("Host", "h2")
    theirs.claim("h1", guest(3))
    theirs.landed(900)
    rig.heard("h1")
    rig.log.outcomes.append(Replaced(theirs.saved()))
    rig.flush()
    assert rig.core.ledger.saved() == theirs.saved()
    (delta,) = rig.heard("h1")
    assert isinstance(delta, Delta) and (delta.previous, delta.revision) == (2, 900)


def test_a_fence_frees_and_refuses_until_it_is_lifted(rig: Rig) -> None:
    for host, endpoint in (("h1", guest(1)), ("h2", guest(2))):
        rig.connect(host, endpoint)
        rig.log.land()
        rig.flush()
    rig.heard("h1"), rig.heard("h2")
    rig.do(lambda core: fleet.fence(core, "h1", "burnt"))
    assert rig.heard("h1") == []
    rig.log.land()
    rig.flush()
    assert rig.heard("h1")[-1] == Pong(NO_SESSION), "its claims are asked for again"
    assert list(rig.core.registry.endpoints) == [guest(2).key]
    rig.connect("h1", guest(1))
    assert "fenced by an operator (burnt)" in rig.heard("h1")[-1].refused[0].message
    rig.say("h2", Claim(2, guest(5, "10.65.0.1")))
    rig.log.land()
    rig.flush()
    assert rig.heard("h2")[-1] == Claimed(2, ())
    rig.do(lambda core: fleet.unfence(core, "h1"))
    rig.log.land()
    rig.flush()
    assert rig.heard("h1")[-1] == Pong(NO_SESSION)


def test_a_next_key_becomes_the_key_when_it_is_used(rig: Rig) -> None:
    fresh = "y" * 40
    rig.do(lambda core: fleet.rotate(core, "h1", fresh))
    rig.log.land()
    rig.flush()
    assert rig.core.ledger.keys == {KEYS["h1"]: "h1", KEYS["h2"]: "h2", fresh: "h1"}
    rig.core.receive(b"h1".ljust(16, b"."), wire.encode_to_dispatcher(Hello("", 0, 0)), f"h1 {fresh}")
    rig.flush()
    rig.log.land()
    rig.flush()
    assert rig.core.ledger.keys == {fresh: "h1", KEYS["h2"]: "h2"}
    assert rig.core.registry.hosts["h1"].public_key == fresh


STEP = st.one_of(
    st.tuples(st.just("claim"), st.sampled_from(["h1", "h2"]), st.integers(1, 4)),
    st.tuples(st.just("release"), st.integers(1, 4)),
    st.tuples(st.just("policy"), st.sampled_from(["a", "b"]), st.sampled_from(["all()", 'role == "web"'])),
    st.tuples(st.just("no policy"), st.sampled_from(["a", "b"])),
    st.tuples(st.just("no host"), st.sampled_from(["h1", "h2"])),
    st.tuples(st.just("host"), st.sampled_from(["h1", "h2"])),
    st.tuples(st.just("fence"), st.sampled_from(["h1", "h2"])),
)


def step(core: Core, what: str, *given_: Any) -> None:
    registry, ledger = core.registry, core.ledger
    match what, *given_:
        case "claim", host, n if host in registry.hosts:
            core.claims.claim(host, guest(n))
        case "release", n if guest(n).key in registry.endpoints:
            ledger.release(guest(n).key)
        case "policy", name, selector:
            peer = [{"action": "Allow", "source": {"selector": selector}}]
            document_ = document("GlobalNetworkPolicy", name, selector=selector, ingress=peer)
            operators.apply(core, [document_], False)
        case "no policy", name if name in registry.policies:
            operators.delete(core, "policy", name)
        case "no host", name if name in registry.hosts:
            operators.delete(core, "host", name)
        case "host", name:
            operators.apply(core, [document("Host", name, publicKey=KEYS[name])], False)
        case "fence", name if name in registry.hosts:
            fleet.fence(core, name, "why")


@given(st.lists(STEP, max_size=8), st.lists(STEP, min_size=1, max_size=10))
@settings(max_examples=150, deadline=None)
def test_what_is_undone_leaves_no_trace(before: list[Any], undone: list[Any]) -> None:
    """Not in the content, and not in what hosts would be told."""
    core = Rig().core
    for what in before:
        step(core, *what)
    core.ledger.landed(2)
    core.fanout.publish(2, core.registry.take())
    saved, keys = core.ledger.saved(), dict(core.ledger.keys)
    for what in undone:
        step(core, *what)
    core.ledger.undo()
    assert core.ledger.saved() == saved and core.ledger.keys == keys
    batch = core.registry.take()
    assert not any((batch.changes, batch.gained, batch.lost, batch.fresh, batch.gone))


@given(st.lists(STEP, max_size=10), st.lists(STEP, max_size=10))
@settings(max_examples=100, deadline=None)
def test_the_difference_leads_there(one: list[Any], other: list[Any]) -> None:
    here, there = Rig().core, Rig().core
    for core, steps in ((here, one), (there, other)):
        for what in steps:
            step(core, *what)
        core.ledger.landed(2)
    here.ledger.follow(here.ledger.difference(there.ledger.saved()))
    assert here.ledger.saved() == there.ledger.saved()
    here.fanout.publish(2, here.registry.take())
    there.fanout.publish(2, there.registry.take())
    for name in here.registry.hosts:
        assert here.fanout.digest(name) == there.fanout.digest(name)


def test_a_release_of_its_own_drops_nobody(rig: Rig) -> None:
    rig.connect("h1", guest(1))
    rig.log.land()
    rig.flush()
    rig.heard("h1")
    rig.say("h1", Release(2, guest(1).key))
    rig.log.land()
    rig.flush()
    assert rig.heard("h1")[-1] == Claimed(2, ()) and "h1" in rig.core.connected
