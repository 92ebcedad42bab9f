# Owns: hostd's answers to operators' questions (slash32.questions). The kernel is asked in a thread of its own, so that
# no hook waits for it; what is asked about is gathered in the daemon's thread. Touches: that thread, one eventfd.
from __future__ import annotations

import json
import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from slash32 import questions
from slash32.net import Address
from slash32.questions import Answer, QuestionError, Word
from slash32.verdict import Packet
from slash32.wire import MAX_ANSWER

from ..compiler.desired import Tap
from ..compiler.ruleset import HOST_FORWARD_IN, HOST_FORWARD_OUT, Rule
from ..revocation.judge import View, Ways, judge

log = logging.getLogger("slash32.hostd")


class Listed(Protocol):
    """The packet filter as the kernel lists it now."""

    def chains_from(self, start: str) -> dict[str, tuple[Rule, ...]]: ...
    def contains(self, name: str, address: Address) -> bool: ...
    def class_of(self, group: int, egress: bool) -> str | None: ...


class Door(Protocol):
    """To the kernel; used in the thread. Each raises OSError, or ValueError for what it cannot read."""

    def listed(self) -> Listed: ...
    def group_of(self, ifindex: int) -> int: ...
    def way_to(self, address: Address) -> str: ...


class Inquiry(NamedTuple):
    """`taps`: this host's guests at either end, if they are its own."""

    packet: Packet
    sender: Tap | None
    receiver: Tap | None


def inquiry(packet: Packet, taps: Mapping[int, Tap]) -> Inquiry:
    return Inquiry(packet, _owner(packet.source, taps), _owner(packet.destination, taps))


def _owner(address: Address, taps: Mapping[int, Tap]) -> Tap | None:
    """Who has the address itself, else the longest prefix that holds it."""
    found: tuple[int, Tap | None] = (-1, None)
    for tap in taps.values():
        if address in tap.addresses:
            return tap
        longest = max((p.length for p in tap.prefixes if p.contains(address)), default=-1)
        found = max(found, (longest, tap), key=lambda pair: pair[0])
    return found[1]


def explained(asked: Inquiry, door: Door) -> Answer:
    """What the kernel says of the packet, at every stage that is this host's."""
    if asked.sender is None and asked.receiver is None:
        return Answer({}, ("neither end is a guest of this host",))
    stages: dict[str, Word] = {}
    problems: list[str] = []
    try:
        listed = door.listed()
        for stage, tap in ((questions.EGRESS, asked.sender), (questions.INGRESS, asked.receiver)):
            if tap is not None:
                stages[stage] = _of_guest(asked.packet, tap, stage == questions.EGRESS, (listed, door))
        if asked.sender is None:
            _on_the_way(stages, asked.packet, Ways(incoming=door.way_to(asked.packet.source)), listed)
        if asked.receiver is None:
            _on_the_way(stages, asked.packet, Ways(outgoing=door.way_to(asked.packet.destination)), listed)
    except (OSError, ValueError) as error:
        problems.append(str(error)[:300])
    return Answer(stages, tuple(problems))


def _of_guest(packet: Packet, tap: Tap, egress: bool, kernel: tuple[Listed, Door]) -> Word:
    listed, door = kernel
    chain = listed.class_of(door.group_of(tap.ifindex), egress)
    if chain is None:
        return Word(False, "the guard: its tap is in no class", "")
    judged = judge(View(listed.chains_from(chain), listed.contains), chain, packet)
    comment = judged.rule.comment if judged.rule is not None else ""
    return Word(bool(judged.accept), comment, judged.chain or chain)


def _on_the_way(stages: dict[str, Word], packet: Packet, ways: Ways, listed: Listed) -> None:
    """Host endpoints that it is forwarded through. Where none decides, it passes."""
    stage, chain = (
        (questions.HOST_INGRESS, HOST_FORWARD_IN) if ways.incoming else (questions.HOST_EGRESS, HOST_FORWARD_OUT)
    )
    judged = judge(View(listed.chains_from(chain), listed.contains), chain, packet, ways)
    if judged.accept is not None:
        stages[stage] = Word(judged.accept, judged.rule.comment if judged.rule else "", judged.chain)


class Answers:
    """`say(seq, text)` is called in the daemon's thread only, from `ready` and `ask`."""

    def __init__(self, door: Callable[[], Door], say: Callable[[int, str], None]) -> None:
        self._tell = say
        self._asked: queue.Queue[tuple[int, Inquiry] | None] = queue.Queue(64)
        self._answered: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._work, args=(door,), daemon=True, name="answers")
        self._thread.start()

    def fileno(self) -> int:
        return self._wake

    def close(self) -> None:
        self._asked.put(None)
        self._thread.join(12)
        os.close(self._wake)

    def ask(self, seq: int, text: str, taps: Mapping[int, Tap], staged: list[dict[str, Any]]) -> None:
        """Answered at once, or by `ready` when the kernel has been asked."""
        try:
            question = questions.read(text)
            if question["what"] == questions.STAGED:
                self._say(seq, json.dumps({"staged": staged}))
                return
            if question["what"] != questions.EXPLAIN:
                raise QuestionError(f"this host does not know the question {question['what'][:32]!r}: upgrade it")
            self._asked.put_nowait((seq, inquiry(questions.packet_of(question), taps)))
        except QuestionError as error:
            self._say(seq, _problem(str(error)))
        except queue.Full:
            self._say(seq, _problem("too many questions at once; ask again"))

    def ready(self, _now: float = 0.0) -> None:
        os.eventfd_read(self._wake)
        while not self._answered.empty():
            self._say(*self._answered.get())

    def _say(self, seq: int, text: str) -> None:
        """A longer answer than the dispatcher takes would cost this host its connection."""
        self._tell(seq, text if len(text) <= MAX_ANSWER else _problem("the answer is too long to be sent"))

    def _work(self, make: Callable[[], Door]) -> None:
        while (asked := self._asked.get()) is not None:
            seq, about = asked
            try:
                answer = explained(about, make())
            except Exception as error:  # whatever it is: nobody else would answer the questions after this one
                if not isinstance(error, OSError | ValueError):
                    log.exception("a question could not be answered")
                answer = Answer({}, (str(error)[:300],))
            self._answered.put((seq, json.dumps(questions.encode_answer(answer))))
            os.eventfd_write(self._wake, 1)


def _problem(why: str) -> str:
    return json.dumps(questions.encode_answer(Answer({}, (why,))))
