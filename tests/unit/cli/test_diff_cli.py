# `slash32 diff`: by files and against a dispatcher of plain answers: what it prints, refuses and exits with.
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slash32.cli import commands
from slash32.cli.__main__ import main
from slash32.cli.client import CallError
from slash32.documents import load_yaml
from slash32.edits import Field, edits, identified
from slash32.resources import decode, encode

Run = Callable[..., tuple[int, str, str]]


def endpoint(name: str, role: str, number: int) -> str:
    return (
        f"apiVersion: slash32/v1\nkind: Endpoint\nmetadata: {{name: {name}, labels: {{role: {role}}}}}\n"
        f"spec: {{host: h1, addresses: [10.65.0.{number}], profiles: [default]}}\n---\n"
    )


def policy(port: int, name: str = "to-db", more: str = "", kind: str = "GlobalNetworkPolicy") -> str:
    return (
        f"apiVersion: slash32/v1\nkind: {kind}\nmetadata: {{name: {name}}}\n"
        f"spec:\n  selector: role == 'db'\n  {more}\n  ingress:\n  - action: Allow\n    protocol: TCP\n"
        f"    source: {{selector: role == 'web'}}\n    destination: {{ports: [{port}]}}\n---\n"
    )


PROFILE = "apiVersion: slash32/v1\nkind: Profile\nmetadata: {name: default}\nspec: {egress: [{action: Allow}]}\n---\n"
GUESTS = endpoint("web1", "web", 2) + endpoint("web2", "web", 3) + endpoint("db1", "db", 4)


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Files by name, in the directory where it runs."""
    monkeypatch.chdir(tmp_path)

    def with_files(*arguments: str, **files: str) -> tuple[int, str, str]:
        for name, content in files.items():
            (tmp_path / f"{name}.yaml").write_text(content)
        code = main(["diff", *arguments])
        return (code, *capsys.readouterr())

    return with_files


class Dispatcher:
    """In place of the client: answers from a table, remembers what was posted."""

    def __init__(self, resources: str, *, guests: bool = True) -> None:
        self.resources = [encode(decode(document)) for document in load_yaml(resources, "there")]
        self.revisions = [7]
        self.posted: list[tuple[str, ...]] = []
        self.refuses: list[str] = []
        self.guests = [self.guest("web1", "web", 2), self.guest("db1", "db", 4)] if guests else []

    @staticmethod
    def guest(name: str, role: str, number: int) -> dict[str, Any]:
        return {
            "uuid": f"u-{name}", "mac": "52:54:00:00:00:01", "domain": name, "host": "h1", "labels": {"role": role},
            "profiles": ["default"], "addresses": [f"10.65.0.{number}"], "shared": [], "prefixes": [],
        }  # fmt: skip

    def get(self, *parts: str) -> dict[str, Any]:
        assert parts == ("status",)
        return {"revision": self.revisions.pop(0) if len(self.revisions) > 1 else self.revisions[0]}

    def items(self, *parts: str) -> list[dict[str, Any]]:
        if parts == ("endpoints",):
            return self.guests
        return [document for document in self.resources if ("resources", document["kind"]) == parts]

    def post(self, *parts: str, body: Any, query: str) -> dict[str, Any]:
        self.posted.append((*parts, query))
        if self.refuses:
            raise CallError(self.refuses, 400)
        return {"revision": 7, "changes": []}


@pytest.fixture
def dispatcher(monkeypatch: pytest.MonkeyPatch) -> Dispatcher:
    fake = Dispatcher(PROFILE + policy(5432))
    monkeypatch.setattr(commands, "Client", lambda path: fake)
    return fake


def test_by_files(run: Run) -> None:
    files = {"world": GUESTS + PROFILE + policy(5432), "new": policy(5433)}
    code, out, err = run("--before", "world.yaml", "-f", "new.yaml", **files)
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == "GlobalNetworkPolicy to-db configured"
    assert lines[1].startswith("- ingress[0]: {") and lines[2].startswith("+ ingress[0]: {") and "5433" in lines[2]
    assert lines[4] == "FROM TO TRAFFIC BEFORE AFTER PAIRS"
    assert lines[5] == "role=web (2 endpoints: web1, web2) db1 tcp/5433 deny allow 2"
    assert lines[8] == "role=web (2 endpoints: web1, web2) db1 tcp/5432 allow deny 2"
    assert lines[-2] == "note: flows that are open and no longer allowed would be ended"
    assert lines[-1] == "1 resource changes; 2 pairs gain tcp/5433; 2 pairs lose tcp/5432"


def test_nothing_changes(run: Run) -> None:
    world = GUESTS + PROFILE + policy(5432)
    code, out, _ = run("--before", "world.yaml", "-f", "same.yaml", "--exit-code", world=world, same=policy(5432))
    assert (code, out) == (0, "GlobalNetworkPolicy to-db unchanged\n\n0 resources change; no verdict changes\n")


def test_exit_code_only_where_it_is_asked_for(run: Run) -> None:
    world = {"world": GUESTS + PROFILE, "new": policy(5432)}
    assert run("--before", "world.yaml", "-f", "new.yaml", **world)[0] == 0
    assert run("--before", "world.yaml", "-f", "new.yaml", "--exit-code")[0] == 3


def test_two_whole_worlds_and_endpoints_that_come_and_go(run: Run) -> None:
    before, after = GUESTS + PROFILE + policy(5432), endpoint("web3", "web", 9) + GUESTS + PROFILE + policy(5432)
    code, out, _ = run("--before", "a.yaml", "--after", "b.yaml", "-o", "json", a=before, b=after)
    said = json.loads(out)
    assert code == 0 and said["resources"] == []
    ends = {(c["from"]["description"], c["to"]["description"], c["after"]) for c in said["changes"]}
    assert ("web3", "db1", "allow") in ends  # it may, as its label says
    assert not [e for e in ends if {"web1", "db1"} == set(e[:2])]  # who stays is the same, wherever it stands


def test_delete(run: Run) -> None:
    files = {"world": GUESTS + PROFILE + policy(5432), "old": policy(1)}
    code, out, _ = run("--before", "world.yaml", "--delete", "-f", "old.yaml", **files)
    assert code == 0
    assert out.startswith("GlobalNetworkPolicy to-db deleted\n") and out.endswith("2 pairs lose tcp/5432\n")
    code, out, err = run("--before", "world.yaml", "--delete", "-f", "old.yaml", old=policy(1, "another"))
    assert (code, out, err) == (1, "", "GlobalNetworkPolicy another: does not exist\n")


def test_staged_policies_are_said_to_change_nothing(run: Run) -> None:
    new = policy(1, kind="StagedGlobalNetworkPolicy")
    _, out, _ = run("--before", "world.yaml", "-f", "new.yaml", world=GUESTS + PROFILE, new=new)
    assert "note: staged policies change no verdict, they count: to-db" in out
    assert out.endswith("1 resource changes; no verdict changes\n")


def test_keep_established_is_said(run: Run) -> None:
    files = {"world": GUESTS + PROFILE + policy(5432, more="keepEstablished: true"), "new": policy(1)}
    _, out, _ = run("--before", "world.yaml", "-f", "new.yaml", **files)
    assert "would be ended, but for those that policies with keepEstablished had allowed (to-db)" in out


def test_many_rows_are_cut_unless_asked_for(run: Run) -> None:
    guests = "".join(endpoint(f"vm{n}", f"r{n}", n + 10) for n in range(30))
    new = "".join(policy(1000 + n, f"p{n}").replace("'db'", f"'r{n}'").replace("'web'", "'r0'") for n in range(30))
    _, out, _ = run("--before", "world.yaml", "-f", "new.yaml", world=guests + PROFILE, new=new)
    assert "... and 9 more (allow after); --all shows them" in out
    _, everything, _ = run("--before", "world.yaml", "-f", "new.yaml", "--all")
    assert "more" not in everything and everything.count(" tcp/") == 29


def test_json_says_it_all(run: Run) -> None:
    files = {"world": GUESTS + PROFILE, "new": policy(5432)}
    _, out, _ = run("--before", "world.yaml", "-f", "new.yaml", "-o", "json", **files)
    said = json.loads(out)
    (change,) = said["changes"]
    groups = {group["id"]: group for group in said["groups"]}
    assert said["resources"] == [{"kind": "GlobalNetworkPolicy", "name": "to-db", "change": "created", "fields": []}]
    assert (change["before"], change["after"], change["where"], change["pairs"]) == ("deny", "allow", "anywhere", 2)
    assert [groups[n]["members"] for n in change["from"]["groups"]] == [["web1", "web2"]]
    assert change["traffic"] == [{"description": "tcp/5432", "protocol": "TCP", "ports": [5432]}]
    assert said["summary"] == {"resources": 1, "pairsGaining": 2, "pairsLosing": 0, "verdictsChange": True}
    _, out, _ = run("--before", "world.yaml", "-f", "new.yaml", "-o", "yaml")
    assert load_yaml(out, "out")[0].value == said


def test_hostile_names_stay_on_their_line(run: Run) -> None:
    guests = endpoint('"e\\e[31m\\nvil"', "web", 2) + endpoint("db1", "db", 4)
    code, out, err = run("--before", "world.yaml", "-f", "new.yaml", world=guests + PROFILE, new=policy(5432))
    assert "\x1b" not in out + err
    assert code == 1 or "e\\x1b[31m\\nvil" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "name the files with -f FILE"),
        (("x.yaml",), "name the files with -f FILE"),
        (("--after", "x.yaml"), "--after needs --before"),
        (("--before", "x.yaml"), "name the files with -f FILE"),
        (("--before", "x.yaml", "--after", "x.yaml", "-f", "x.yaml"), "not both"),
        (("--before", "x.yaml", "--after", "x.yaml", "--delete"), "not both"),
    ],
)
def test_usage(run: Run, arguments: tuple[str, ...], said: str) -> None:
    code, out, err = run(*arguments, x=GUESTS)
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1


def test_what_is_wrong_in_a_file_is_one_line(run: Run) -> None:
    for new in (policy(0), policy(5432).replace("role ==", "role =")):
        code, out, err = run("--before", "world.yaml", "-f", "new.yaml", world=GUESTS + PROFILE, new=new)
        assert (code, out, err.count("\n")) == (1, "", 1) and err.startswith("new.yaml:1: GlobalNetworkPolicy to-db: ")


# --- with a dispatcher


def test_against_the_dispatcher(run: Run, dispatcher: Dispatcher) -> None:
    code, out, err = run("-f", "new.yaml", new=policy(5433))
    assert (code, err) == (0, "")
    assert out.endswith("1 resource changes; 1 pair gains tcp/5433; 1 pair loses tcp/5432\n")
    assert dispatcher.posted == [("apply", "dry_run=1")]  # and nothing else: it only asks
    code, out, err = run("--delete", "-f", "new.yaml")
    assert (code, out.splitlines()[0]) == (0, "GlobalNetworkPolicy to-db deleted")
    assert len(dispatcher.posted) == 1


def test_what_apply_would_refuse_is_refused(run: Run, dispatcher: Dispatcher) -> None:
    dispatcher.refuses = ["GlobalNetworkPolicy to-db: spec.tier: there is no Tier x"]
    assert run("-f", "new.yaml", new=policy(5433)) == (1, "", dispatcher.refuses[0] + "\n")


def test_a_fleet_that_changes_meanwhile(run: Run, dispatcher: Dispatcher) -> None:
    dispatcher.revisions = [7, 8, 9, 9]
    assert "changed while" not in run("-f", "new.yaml", new=policy(5433))[1]
    dispatcher.revisions = list(range(10))
    assert "note: the fleet changed while it was read" in run("-f", "new.yaml")[1]


def test_a_fleet_without_guests(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Dispatcher(PROFILE, guests=False)
    monkeypatch.setattr(commands, "Client", lambda path: fake)
    code, out, _ = run("-f", "new.yaml", new=policy(5432))
    assert (code, out) == (0, "GlobalNetworkPolicy to-db created\n\n1 resource changes; no verdict changes\n")


def test_an_answer_that_is_no_endpoint(run: Run, dispatcher: Dispatcher) -> None:
    dispatcher.guests[0]["addresses"] = ["nonsense"]
    code, _, err = run("-f", "new.yaml", new=policy(5432))
    assert code == 1 and "cannot read" in err and err.count("\n") == 1


def test_the_tier_that_always_exists_is_not_created() -> None:
    """As Calico exports it; apply says the same."""
    always = decode(load_yaml("{apiVersion: projectcalico.org/v3, kind: Tier, metadata: {name: default},"
                              " spec: {order: 1e6, defaultAction: Deny}}", "f")[0])  # fmt: skip
    named = identified([always])
    assert [edit.change for edit in edits({}, named, named)] == ["unchanged"]
    assert edits({}, {}, {}) == []


def test_edits_of_fields() -> None:
    old = load_yaml(policy(1, more="order: 3") + policy(2, "gone"), "x")
    new = load_yaml(policy(1, more="order: 4") + policy(2, "new"), "x")
    before, after = (identified(map(decode, documents)) for documents in (old, new))
    found = {edit.name: edit for edit in edits(before, after, [])}
    assert {name: edit.change for name, edit in found.items()} == {
        "to-db": "configured", "gone": "deleted", "new": "created",
    }  # fmt: skip
    assert found["to-db"].fields == (Field("order", 3, 4),)
