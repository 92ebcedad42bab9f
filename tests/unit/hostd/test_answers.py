# What hostd answers to an operator's question, from a kernel of three chains; and what it says to nonsense.
from __future__ import annotations

import json
import select
from typing import Any

from hostd.compiler.desired import ClassChains, Tap
from hostd.compiler.ruleset import (
    HOST_FORWARD_IN,
    HOST_FORWARD_OUT,
    Family,
    InSet,
    Interface,
    Ports,
    Protocol,
    Rule,
    SetKind,
    Side,
    Verdict,
)
from hostd.reporting.answers import Answers, explained, inquiry
from slash32 import questions
from slash32.net import Address, pack_mac, parse_address, parse_prefix
from slash32.policy import Icmp, PortRange
from slash32.questions import Word
from slash32.verdict import Packet
from slash32.wire import MAX_ANSWER

WEB, DB, FAR = map(parse_address, ("10.65.0.2", "10.65.0.3", "203.0.113.7"))
CHAINS = ClassChains("from-1", "to-1")
TAPS = {
    7: Tap(7, "vnet7", pack_mac("52:54:00:00:00:02"), (WEB,), (parse_prefix("10.66.0.0/24"),), CHAINS),
    8: Tap(8, "vnet8", pack_mac("52:54:00:00:00:03"), (DB,), (parse_prefix("10.66.0.0/26"),), CHAINS),
}
OPEN = Rule((Family(4), InSet(Side.SRC, "webs", SetKind.ADDR4), Protocol(6), Ports(Side.DST, (PortRange(5432, 5432),))),
            Verdict.ACCEPT, "policy db ingress[0]")  # fmt: skip


class Kernel:
    """Taps 7 and 8 are in class 1; 9 is in none."""

    chains = {
        "from-1": (Rule((), Verdict.ACCEPT, "policy out egress[0]"),),
        "to-1": (OPEN, Rule((), Verdict.DROP, "no policy allows it")),
        HOST_FORWARD_OUT: (Rule((Interface(False, "eth0"), Protocol(17)), Verdict.DROP, "policy hv egress[0]"),),
    }
    broken = False

    def listed(self) -> Kernel:
        if self.broken:
            raise OSError("nft list table: no")
        return self

    def chains_from(self, start: str) -> dict[str, tuple[Rule, ...]]:
        return {start: self.chains.get(start, ())}

    def contains(self, name: str, address: Address) -> bool:
        return name == "webs" and address == WEB

    def class_of(self, group: int, egress: bool) -> str | None:
        return ("from-1" if egress else "to-1") if group == 1 else None

    def group_of(self, ifindex: int) -> int:
        return int(ifindex in (7, 8))

    def way_to(self, address: Address) -> str:
        return "eth0"


def tcp(source: Address, target: Address, port: int) -> Packet:
    return Packet(source, target, 6, 40000, port)


def test_each_stage_of_this_host_is_asked() -> None:
    both = explained(inquiry(tcp(WEB, DB, 5432), TAPS), Kernel())
    assert both.stages == {
        "egress": Word(True, "policy out egress[0]", "from-1"), "ingress": Word(True, "policy db ingress[0]", "to-1")
    }  # fmt: skip
    other = explained(inquiry(tcp(WEB, DB, 5433), TAPS), Kernel())
    assert other.stages["ingress"] == Word(False, "no policy allows it", "to-1")
    arriving = explained(inquiry(tcp(FAR, DB, 5432), TAPS), Kernel())
    assert set(arriving.stages) == {"ingress"} and HOST_FORWARD_IN not in Kernel.chains


def test_a_host_endpoint_on_the_way() -> None:
    assert explained(inquiry(Packet(WEB, FAR, 17, 5, 53), TAPS), Kernel()).stages["host_egress"].allowed is False
    assert set(explained(inquiry(tcp(WEB, FAR, 53), TAPS), Kernel()).stages) == {"egress"}


def test_whose_an_address_is() -> None:
    behind = parse_address("10.66.0.9")
    assert inquiry(tcp(behind, FAR, 1), TAPS).sender == TAPS[8]  # the longer prefix
    assert inquiry(tcp(parse_address("10.66.0.99"), FAR, 1), TAPS).sender == TAPS[7]
    nobody = explained(inquiry(tcp(FAR, FAR, 1), TAPS), Kernel())
    assert nobody.stages == {} and nobody.problems == ("neither end is a guest of this host",)


def test_a_tap_without_a_class_is_the_guards() -> None:
    taps = {9: TAPS[7]._replace(ifindex=9)}
    word = explained(inquiry(tcp(WEB, DB, 5432), taps), Kernel()).stages["egress"]
    assert not word.allowed and "guard" in word.rule


def test_a_kernel_that_does_not_answer_is_a_problem_not_a_verdict() -> None:
    kernel = Kernel()
    kernel.broken = True
    answer = explained(inquiry(tcp(WEB, DB, 5432), TAPS), kernel)
    assert answer.stages == {} and answer.problems == ("nft list table: no",)


def heard(asked: list[str]) -> list[dict[str, Any]]:
    said: dict[int, str] = {}
    answers = Answers(Kernel, said.__setitem__)
    for seq, text in enumerate(asked):
        answers.ask(seq, text, TAPS, [{"policy": "p", "packets": 3}])
    while len(said) < len(asked):
        assert select.select([answers.fileno()], [], [], 30)[0], "no answer"
        answers.ready()
    answers.close()
    return [json.loads(said[seq]) for seq in range(len(asked))]


def test_answers_are_said_in_the_daemons_thread() -> None:
    packet = tcp(WEB, DB, 5432)
    explained_, staged = heard([json.dumps(questions.explain(packet)), json.dumps(questions.staged())])
    answer = questions.decode_answer(explained_)
    assert answer.stages["ingress"].rule == "policy db ingress[0]" and answer.problems == ()
    assert staged == {"staged": [{"policy": "p", "packets": 3}]}


def test_nonsense_is_answered_in_one_line() -> None:
    packet = questions.explain(tcp(WEB, DB, 1))
    bad = ["", "[]", '{"what": 3}', '{"what": "weather"}', json.dumps(packet | {"source": "fd00::1"}),
           *(json.dumps(packet | odd) for odd in ({"port": 70000}, {"icmp": [1]}, {"protocol": None}))]  # fmt: skip
    for said in heard(bad):
        (problem,) = questions.decode_answer(said).problems
        assert problem and "\n" not in problem


def test_a_packet_survives_the_way() -> None:
    for packet in (tcp(WEB, FAR, 80), Packet(WEB, DB, 47), Packet(WEB, DB, 1, icmp=Icmp(8, 0)), Packet(WEB, DB, 1)):
        assert questions.packet_of(questions.read(json.dumps(questions.explain(packet)))) == packet


def test_what_a_host_says_is_not_trusted() -> None:
    odd = {"egress": {"allowed": "yes"}}, {"moon": {"allowed": True}}
    for raw in (None, [], {"stages": 3}, *({"stages": stages} for stages in odd)):
        assert questions.decode_answer(raw).stages == {}


def test_no_question_ends_hostd_or_its_thread() -> None:
    """All of these pass through the dispatcher's API, and come from whoever may speak to it."""
    packet = json.dumps(questions.explain(Packet(WEB, DB, 1, icmp=Icmp(8, 0))))
    numbers = "Infinity", "NaN", "-1", "true", "null"
    hostile = [packet.replace("[8, 0]", f"[{number}, 0]") for number in numbers]
    hostile += ['{"what": "explain", "source": ' + "[" * 1500 + "]" * 1500 + "}", "[" * 4000, '{"what": 1e999}']
    *refused, last = heard([*hostile, packet])
    assert all(len(questions.decode_answer(said).problems) == 1 for said in refused)
    assert questions.decode_answer(last).stages, "the control"


def test_what_nobody_foresaw_is_answered_too() -> None:
    class Odd(Kernel):
        def class_of(self, group: int, egress: bool) -> str | None:
            raise KeyError("odd")

    for kernel, works in ((Odd(), False), (Kernel(), True)):
        said: dict[int, str] = {}
        answers = Answers(lambda kernel=kernel: kernel, said.__setitem__)
        for seq in (1, 2):  # the thread lives on
            answers.ask(seq, json.dumps(questions.explain(tcp(WEB, DB, 5432))), TAPS, [])
            assert select.select([answers.fileno()], [], [], 30)[0], "no answer"
            answers.ready()
            assert bool(questions.decode_answer(json.loads(said[seq])).stages) == works
        answers.close()


def test_an_answer_that_is_too_long_is_not_sent() -> None:
    said: dict[int, str] = {}
    answers = Answers(Kernel, said.__setitem__)
    for seq, count in ((1, 10), (2, 100_000)):
        answers.ask(seq, json.dumps(questions.staged()), TAPS, [{"policy": "p", "packets": 3}] * count)
    answers.close()
    assert len(json.loads(said[1])["staged"]) == 10
    assert len(said[2]) <= MAX_ANSWER and "too long" in said[2]


def test_a_hosts_problems_are_its_own() -> None:
    for problems in (5, True, {"a": 1}, "text"):
        assert questions.decode_answer({"problems": problems}).problems == ()
    assert 1 <= len(questions.decode_answer({"problems": ["no"] * 100_000}).problems) <= 100
