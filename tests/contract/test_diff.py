# `slash32 diff` against a real dispatcher: it says what apply then does, for every kind, and changes nothing itself.
from __future__ import annotations

from collections.abc import Iterator

import pytest
from cli_rig import PROFILE, Fleet, text_of
from dispatcher_rig import DB, WEB, guest, policy


@pytest.fixture
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("diff"))
    try:
        for n, host in enumerate(fleet.begin(3), 1):
            host.claim(guest(n, "web" if n < 3 else "db", profiles=("base",)))
        fleet.settle()
        fleet.dispatcher.apply({**PROFILE, "spec": {"egress": [{"action": "Allow"}]}})
        yield fleet
    finally:
        fleet.end()


def test_it_says_what_apply_then_does(fleet: Fleet) -> None:
    others = (
        {"kind": "Tier", "metadata": {"name": "first"}, "spec": {"order": 1}},
        {"kind": "GlobalNetworkSet", "metadata": {"name": "office"}, "spec": {"nets": ["203.0.113.0/24"]}},
        {"kind": "HostEndpoint", "metadata": {"name": "h1"}, "spec": {"node": "h1", "interfaceName": "eth0"}},
    )
    new = text_of(policy("to-db", DB, WEB), *({"apiVersion": "slash32/v1", **other} for other in others))
    before = fleet.revision()
    said = fleet.ok("diff", "-f", "-", text=new)
    assert [line.split()[-1] for line in said.splitlines()[:4]] == ["created"] * 4
    assert "2 pairs gain" in said.splitlines()[-1] and fleet.revision() == before
    assert fleet.run("diff", "--exit-code", "-f", "-", text=new)[0] == 3
    fleet.ok("apply", "-f", "-", text=new)
    code, said, _ = fleet.run("diff", "--exit-code", "-f", "-", text=new)
    assert code == 0 and said.endswith("0 resources change; no verdict changes\n")
    said = fleet.ok("diff", "--delete", "-f", "-", text=text_of(policy("to-db", DB, WEB)))
    assert said.startswith("GlobalNetworkPolicy to-db deleted\n") and "2 pairs lose" in said
    assert fleet.ok("get", "gnp").count("to-db") == 1


def test_what_apply_refuses_it_refuses(fleet: Fleet) -> None:
    lost = policy("lost", DB, WEB)
    lost["spec"]["tier"] = "nowhere"
    refused = [fleet.run(word, "-f", "-", text=text_of(lost)) for word in ("diff", "apply")]
    assert [code for code, _, _ in refused] == [1, 1]
    assert "nowhere" in refused[0][2] and refused[1][2].startswith(refused[0][2].rstrip())
