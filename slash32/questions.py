# Owns: what an operator may ask of hosts through the dispatcher, and what they answer, as JSON-able data. Pure.
# A host that does not know a question answers with `problem`: fleets are upgraded host by host.
from __future__ import annotations

import json
from typing import Any, NamedTuple

from slash32.net import Address, format_address, parse_address
from slash32.policy import Icmp
from slash32.verdict import Packet

EXPLAIN, STAGED = "explain", "staged"
EGRESS, INGRESS = "egress", "ingress"
HOST_EGRESS, HOST_INGRESS = "host_egress", "host_ingress"
_PROBLEMS = 16  # that are taken from one host
STAGES = (EGRESS, HOST_EGRESS, HOST_INGRESS, INGRESS)  # as a packet meets them

Json = dict[str, Any]


class QuestionError(ValueError):
    """One line."""


class Word(NamedTuple):
    """What a host's kernel says at one stage. `rule` is the comment of the rule that decided ("" for none)."""

    allowed: bool
    rule: str = ""
    chain: str = ""


class Answer(NamedTuple):
    """Of one host to `explain`: the stages it is asked at, and why it cannot say more."""

    stages: dict[str, Word]
    problems: tuple[str, ...] = ()


def explain(packet: Packet) -> Json:
    """The question: what does your kernel do with the first packet of this flow?"""
    question: Json = {
        "what": EXPLAIN,
        "source": format_address(packet.source),
        "destination": format_address(packet.destination),
        "protocol": packet.protocol,
        "sourcePort": packet.source_port,
        "port": packet.destination_port,
        "icmp": None if packet.icmp is None else list(packet.icmp),
    }
    return {key: value for key, value in question.items() if value is not None}


def staged() -> Json:
    """The question: what did staged policies count?"""
    return {"what": STAGED}


def read(text: str) -> Json:
    """A question as a host hears it. Raises QuestionError."""
    try:
        question = json.loads(text)
    except (ValueError, RecursionError):
        raise QuestionError("the question is not JSON") from None
    if not isinstance(question, dict) or not isinstance(question.get("what"), str):
        raise QuestionError('the question says not what it asks ("what")')
    return question


def packet_of(question: Json) -> Packet:
    """Raises QuestionError."""
    try:
        source, destination = _address(question["source"]), _address(question["destination"])
        icmp = question.get("icmp")
        ports = _number(question.get("sourcePort")), _number(question.get("port"))
        protocol = _number(question["protocol"])
        found = None if icmp is None else _icmp(icmp)
    except (KeyError, IndexError, TypeError, ValueError):
        raise QuestionError("the question names no packet: source, destination, protocol, port") from None
    if len(source) != len(destination) or protocol is None:
        raise QuestionError("source and destination are not of one IP version")
    return Packet(source, destination, protocol, *ports, found)


def _address(raw: object) -> Address:
    return parse_address(str(raw))


def _icmp(raw: Any) -> Icmp:
    kind, code = _number(raw[0]), _number(raw[1])
    if kind is None:
        raise ValueError("no type")
    return Icmp(kind, code)


def _number(raw: object) -> int | None:
    if raw is None:
        return None
    if type(raw) is not int or not 0 <= raw <= 65535:
        raise ValueError(f"{raw!r} is no number")
    return raw


def encode_answer(answer: Answer) -> Json:
    stages = {name: dict(zip(("allowed", "rule", "chain"), word, strict=True)) for name, word in answer.stages.items()}
    return {"stages": stages, "problems": list(answer.problems)}


def decode_answer(raw: object) -> Answer:
    """What a host said; whatever is not of the form becomes a problem."""
    if not isinstance(raw, dict):
        return Answer({}, ("its answer is of no known form",))
    said = raw.get("problems")
    problems = tuple(str(p)[:300] for p in said[:_PROBLEMS]) if isinstance(said, list) else ()
    stages: dict[str, Word] = {}
    given = raw.get("stages")
    for name, word in given.items() if isinstance(given, dict) else ():
        if name in STAGES and isinstance(word, dict) and isinstance(word.get("allowed"), bool):
            stages[name] = Word(word["allowed"], str(word.get("rule", ""))[:200], str(word.get("chain", ""))[:64])
    return Answer(stages, problems)
