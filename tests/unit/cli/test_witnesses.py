# `slash32 explain` beside a fleet: the dispatcher's state is judged, kernels are asked; where they differ it shouts.
from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest

from slash32 import questions
from slash32.cli.__main__ import main
from slash32.cli.client import CallError, Client, Json
from slash32.questions import Answer, Word

POLICY = {
    "apiVersion": "slash32/v1", "kind": "GlobalNetworkPolicy", "metadata": {"name": "db"},
    "spec": {"selector": 'role == "db"', "types": ["Ingress"], "ingress": [
        {"action": "Allow", "protocol": "TCP", "source": {"selector": 'role == "web"'},
         "destination": {"ports": [5432]}}
    ]},
}  # fmt: skip
OUT = {
    "apiVersion": "slash32/v1", "kind": "GlobalNetworkPolicy", "metadata": {"name": "out"},
    "spec": {"selector": "all()", "types": ["Egress"], "egress": [{"action": "Allow"}]},
}  # fmt: skip


def endpoint(name: str, number: int, host: str) -> Json:
    return {
        "uuid": f"00000000-0000-0000-0000-{number:012}", "mac": f"52:54:00:00:00:{number:02x}", "domain": name,
        "host": host, "labels": {"role": name[:-1]}, "effectiveLabels": {}, "profiles": [],
        "addresses": [f"10.65.0.{number}"], "shared": [], "prefixes": [],
    }  # fmt: skip


class Fleet:
    """A dispatcher of two hosts; `words` are what their kernels say."""

    def __init__(self, words: Mapping[str, Mapping[str, Word]], silent: tuple[str, ...] = ()) -> None:
        self.words, self.silent, self.asked = words, silent, list[Json]()

    def get(self, *parts: str, **_: object) -> Json:
        return {"revision": 7}

    def items(self, *parts: str) -> list[Json]:
        if parts == ("endpoints",):
            return [endpoint("web1", 2, "h1"), endpoint("db1", 3, "h2")]
        return [POLICY, OUT] if parts[-1] == "GlobalNetworkPolicy" else []

    def post(self, path: str, *, body: Json) -> Json:
        if path != "ask":
            raise CallError(["no"])
        self.asked.append(body)
        answers = {h: questions.encode_answer(Answer(dict(w))) for h, w in self.words.items() if h in body["hosts"]}
        return {"answers": answers, "silent": [h for h in self.silent if h in body["hosts"]]}


OUT_WORD = Word(True, "policy out egress[0]", "po-out")
IN_WORD = Word(True, "policy db ingress[0]", "pi-db")
AGREE = {"h1": {"egress": OUT_WORD}, "h2": {"ingress": IN_WORD}}


def _call(answer: Callable[..., object], *words: object, **options: object) -> object:
    return answer(*words, **options)


def explain(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    for name in ("get", "items", "post"):
        monkeypatch.setattr(Client, name, partial(_call, getattr(fleet, name)))
    return main(["explain", *(words or ("web1", "db1", "tcp/5432"))])


def test_model_and_kernels_agree(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fleet = Fleet(AGREE)
    assert explain(fleet, monkeypatch) == 0
    told = capsys.readouterr()
    assert "kernel of h2: ingress allowed by policy db ingress[0]" in told.out and told.err == ""
    (asked,) = fleet.asked
    assert asked["hosts"] == ["h1", "h2"] and questions.packet_of(asked["question"]).destination_port == 5432


def test_where_they_differ_it_shouts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(Fleet(AGREE | {"h2": {"ingress": Word(False, "no policy allows it", "to-1")}}), monkeypatch) == 1
    told = capsys.readouterr().err
    assert "KERNEL AND MODEL DIFFER: ingress: the model says allow, the kernel of h2 says deny" in told
    assert explain(Fleet(AGREE), monkeypatch, "web1", "db1", "tcp/5433") == 1  # it lets through what it must not
    assert "the model says deny, the kernel of h2 says allow (policy db ingress[0])" in capsys.readouterr().err
    dropped = AGREE | {"h1": {"egress": OUT_WORD, "host_egress": Word(False, "policy hv egress[0]")}}
    assert explain(Fleet(dropped), monkeypatch) == 1
    assert "host egress: the model says allow, the kernel of h1 says deny" in capsys.readouterr().err
    assert explain(Fleet({"h1": {}, "h2": AGREE["h2"]}), monkeypatch) == 1  # it does not know the guest: nothing passes


def test_denied_by_both_is_three(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = AGREE | {"h2": {"ingress": Word(False, "no policy allows it", "to-1")}}
    assert explain(Fleet(words), monkeypatch, "web1", "db1", "tcp/5433") == 3
    assert capsys.readouterr().err == ""


def test_who_is_silent_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(Fleet({"h1": AGREE["h1"]}, silent=("h2",)), monkeypatch) == 0
    assert capsys.readouterr().err == "slash32 explain: host h2 did not answer: its kernel was not asked\n"


def test_an_outsider_has_one_witness(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fleet = Fleet({"h2": {"ingress": Word(False, "no policy allows it", "to-1")}})
    assert explain(fleet, monkeypatch, "203.0.113.7", "db1", "tcp/5432") == 3
    assert fleet.asked[0]["hosts"] == ["h2"] and capsys.readouterr().err == ""


def test_json_has_the_kernels_words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(Fleet(AGREE), monkeypatch, "web1", "db1", "tcp/5432", "-o", "json") == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert said["verdict"] == "allow" and said["ingress"]["policy"] == "db" and said["ingress"]["rule"] == 0
    assert said["kernel"]["ingress"] == {
        "host": "h2", "verdict": "allow", "rule": "policy db ingress[0]", "chain": "pi-db"
    }  # fmt: skip
    assert said["differs"] == [] and said["not_asked"] == []
