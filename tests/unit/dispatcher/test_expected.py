# A guest that is on its way to another host: that host is told what its policies need, and gets nothing else by it.
from __future__ import annotations

from typing import Any

import pytest

from dispatcher.operators import resources as operators
from slash32.pack import Kind, ObjectKey
from slash32.sync import Applied, Replica
from slash32.wire import Claim, Claimed, Delta, Expect, Release, Report, Snapshot
from tests.unit.dispatcher.test_turns import HOSTS, Rig, document, guest

WEB = document(
    "GlobalNetworkPolicy",
    "web",
    selector='role == "web"',
    ingress=[{"action": "Allow", "source": {"selector": 'role == "web"'}}],
)
POLICY, MEMBERS = ObjectKey(Kind.POLICY, "web"), ObjectKey(Kind.SET, 'role == "web"')


class Fleet(Rig):
    """h1 has guest 1; h2 has nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.replicas = {name: Replica() for name in ("h1", "h2")}
        self.do(lambda core: operators.apply(core, [WEB], False))
        self.settle()
        for name in self.replicas:
            self.replicas[name].hello()
            self.connect(name, *([guest(1)] if name == "h1" else []))
        self.settle()

    def settle(self) -> None:
        while self.log.proposal is not None:
            self.log.land()
            self.flush()
        for name, heard in self.said.items():
            for message in heard if hasattr(self, "replicas") else ():
                if isinstance(message, Snapshot | Delta):
                    assert all(isinstance(each, Applied) for each in self.replicas[name].receive(message))

    def ask(self, name: str, message: Any) -> list[Any]:
        """What it hears by it."""
        self.said[name].clear()
        self.said["h1" if name == "h2" else "h2"].clear()
        self.say(name, message)
        self.settle()
        return self.said[name]

    def has(self, name: str) -> bool:
        found = {self.replicas[name].get(POLICY) is not None, self.replicas[name].get(MEMBERS) is not None}
        assert len(found) == 1
        return found.pop()

    def owner(self, n: int) -> str | None:
        claimed = self.core.registry.endpoints.get(guest(n).key)
        return claimed.host if claimed is not None else None


@pytest.fixture
def fleet() -> Fleet:
    fleet = Fleet()
    assert fleet.has("h1") and not fleet.has("h2") and fleet.owner(1) == "h1"
    return fleet


def refusals(heard: list[Any]) -> list[str]:
    (answer,) = [each for each in heard if isinstance(each, Claimed)]
    return [refusal.message for refusal in answer.refused]


def test_what_it_needs_comes_before_the_answer(fleet: Fleet) -> None:
    heard = fleet.ask("h2", Expect(2, guest(1)))
    assert [type(each) for each in heard] == [Delta, Claimed] and refusals(heard) == []
    assert fleet.has("h2") and fleet.owner(1) == "h1"
    members = fleet.replicas["h2"].get(MEMBERS)
    assert members is not None and len(members.addresses) == 1, "it is a member once"  # type: ignore[union-attr]


@pytest.mark.parametrize("message", [Release(3, guest(1).key), Report(3, ())], ids=["given up", "a new report"])
def test_what_it_needed_goes_with_it(fleet: Fleet, message: Any) -> None:
    fleet.ask("h2", Expect(2, guest(1)))
    assert fleet.has("h2")
    fleet.ask("h2", message)
    assert not fleet.has("h2") and fleet.owner(1) == "h1" and not fleet.core.registry.expected


def test_it_gives_no_right_to_what_another_has(fleet: Fleet) -> None:
    fleet.ask("h2", Expect(2, guest(1)))
    (why,) = refusals(fleet.ask("h2", Claim(3, guest(1))))
    assert "in use by g1 on h1" in why and fleet.owner(1) == "h1"
    fleet.ask("h1", Release(4, guest(1).key))
    assert refusals(fleet.ask("h2", Claim(5, guest(1)))) == [] and fleet.owner(1) == "h2"
    assert fleet.has("h2") and not fleet.has("h1") and not fleet.core.registry.expected


def test_what_it_needs_is_not_told_twice_when_it_arrives(fleet: Fleet) -> None:
    fleet.ask("h2", Expect(2, guest(1)))
    fleet.ask("h1", Release(4, guest(1).key))
    told = [each for each in fleet.ask("h2", Claim(5, guest(1))) if isinstance(each, Delta)]
    changed = {change.key for delta in told for change in delta.changes}
    assert POLICY not in changed and MEMBERS in changed, "only that it is a member again"


def test_a_guest_that_could_not_be_there_is_refused(fleet: Fleet) -> None:
    bounded = {**HOSTS[1], "spec": {**HOSTS[1]["spec"], "nets": ["10.66.0.0/16"]}}
    fleet.do(lambda core: operators.apply(core, [bounded], False))
    fleet.settle()
    (why,) = refusals(fleet.ask("h2", Expect(2, guest(1))))
    assert "outside what host h2 may claim" in why and not fleet.has("h2") and not fleet.core.registry.expected
    assert refusals(fleet.ask("h2", Expect(3, guest(2, "10.66.0.1")))) == [], "not so one within its bounds"


def test_it_ends_when_the_host_may_have_no_such_guest_any_more(fleet: Fleet) -> None:
    fleet.ask("h2", Expect(2, guest(1)))
    for role, still in (("web", True), ("db", False)):
        bounded = {**HOSTS[1], "spec": {**HOSTS[1]["spec"], "labels": {"role": [role]}}}
        fleet.do(lambda core, bounded=bounded: operators.apply(core, [bounded], False))
        fleet.settle()
        assert fleet.has("h2") is still and fleet.owner(1) == "h1"


def test_an_address_of_a_third_is_refused(fleet: Fleet) -> None:
    (why,) = refusals(fleet.ask("h2", Expect(2, guest(3, "10.65.0.1"))))
    assert why == "address 10.65.0.1 is in use by g1 on h1" and not fleet.has("h2")


def test_a_host_that_goes_expects_nothing(fleet: Fleet) -> None:
    fleet.ask("h2", Expect(2, guest(1)))
    fleet.do(lambda core: operators.delete(core, "host", "h2"))
    fleet.settle()
    assert not fleet.core.registry.expected


def test_it_is_part_of_what_the_store_holds(fleet: Fleet) -> None:
    """Another dispatcher, or the next start, goes on with it."""
    fleet.ask("h2", Expect(2, guest(1)))
    other = type(fleet.core.ledger)(fleet.core.ledger.saved())
    assert list(other.registry.expected) == [("h2", guest(1).key)]
    assert other.saved() == fleet.core.ledger.saved()
    follower = type(other)(type(fleet.core.ledger.saved())("e", 0))
    for commit in fleet.log.commits:
        follower.follow(commit)
    assert follower.saved() == fleet.core.ledger.saved()
