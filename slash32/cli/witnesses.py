# Owns: what the kernels of the hosts say of a flow beside the model's verdict, and where the two differ.
# Touches: the dispatcher, by the client that it is given.
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from slash32 import questions
from slash32.errors import printable
from slash32.questions import Word
from slash32.verdict import Stage, Verdict

from .client import CallError, Client
from .judgement import Answer

_SIDES = {questions.EGRESS: "source", questions.HOST_EGRESS: "source"}  # at whose host; the others: the destination's


@dataclass(slots=True)
class Testimony:
    """Of one answer: by stage, which host's kernel says what; what it could not say; where it differs."""

    words: dict[str, tuple[str, Word]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)

    def as_data(self) -> dict[str, object]:
        said = {
            stage: {"host": host, "verdict": _word(word.allowed), "rule": word.rule or None, "chain": word.chain}
            for stage, (host, word) in self.words.items()
        }
        return {"kernel": said, "not_asked": self.missing, "differs": self.differs}

    def as_lines(self) -> list[str]:
        lines = [
            f"  kernel of {host}: {stage.replace('_', ' ')} {'allowed' if word.allowed else 'denied'}"
            + (f" by {word.rule}" if word.rule else "")
            for stage in questions.STAGES
            if stage in self.words
            for host, word in [self.words[stage]]
        ]
        return [printable(line) for line in lines]


def _word(allowed: bool) -> str:
    return "allow" if allowed else "deny"


def testimony(client: Client, answer: Answer) -> Testimony:
    """Asks the hosts of both ends, as far as they are known."""
    hosts = sorted({end.host for end in (answer.source, answer.destination) if end.host})
    found = Testimony()
    if not hosts:
        return found
    try:
        said = client.post("ask", body={"hosts": hosts, "question": questions.explain(answer.packet)})
    except CallError as error:
        found.missing += error.lines
        return found
    found.missing += [f"host {host} did not answer: its kernel was not asked" for host in said.get("silent") or ()]
    answers: dict[str, Any] = said.get("answers") or {}
    for host, raw in answers.items():
        heard = questions.decode_answer(raw)
        found.missing += [f"host {host}: {printable(problem)}" for problem in heard.problems]
        for stage, word in heard.stages.items():
            if host == (answer.source if stage in _SIDES else answer.destination).host:
                found.words[stage] = host, word
        if not heard.problems:
            found.differs += _differences(answer, host, heard.stages)
    return found


def _differences(answer: Answer, host: str, words: dict[str, Word]) -> list[str]:
    """Stages of this host at which kernel and model do not say the same. What the host itself says and hears is judged
    by the model alone."""
    lines = []
    for stage in _stages(answer.verdict, answer, host):
        model: Stage | None = getattr(answer.verdict, stage)
        word = words.get(stage)
        forwarded = stage in (questions.HOST_EGRESS, questions.HOST_INGRESS)
        model_allows = model is None or model.allowed
        kernel_allows = word.allowed if word is not None else forwarded  # no host endpoint decided: it passes
        if model_allows != kernel_allows:
            by = f" ({word.rule})" if word is not None and word.rule else ""
            lines.append(
                f"{stage.replace('_', ' ')}: the model says {_word(model_allows)}, "
                f"the kernel of {host} says {_word(kernel_allows)}{printable(by)}"
            )
    return lines


def _stages(verdict: Verdict, answer: Answer, host: str) -> Sequence[str]:
    """That this host's kernel is a witness of: those of guests, and of what is forwarded between two of them."""
    at_source, at_destination = answer.source.host == host, answer.destination.host == host
    found = [questions.EGRESS] * (at_source and verdict.egress is not None)
    found += [questions.INGRESS] * (at_destination and verdict.ingress is not None)
    if at_source and not at_destination and verdict.egress is not None:
        found.append(questions.HOST_EGRESS)
    if at_destination and not at_source and verdict.ingress is not None:
        found.append(questions.HOST_INGRESS)
    return found
