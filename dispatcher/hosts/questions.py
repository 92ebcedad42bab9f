# Owns: operators' questions that wait for hosts' answers: bounded in number and in time. Pure. A host answers only
# what it was asked itself; whatever else it says is ignored.
from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

MOST = 64  # that wait at once, counting each host; an answer has up to 1 MiB
SECONDS = 2.0  # until a host that has not answered is silent


class Outcome(NamedTuple):
    """Answers by host, as they came (JSON texts, unchecked), and the hosts that gave none."""

    answers: dict[str, str]
    silent: list[str]


@dataclass(slots=True, eq=False)
class Inquiry:
    """One question to some hosts."""

    until: float
    future: Future[Outcome]
    waiting: dict[int, str] = field(default_factory=dict)  # seq -> host
    answers: dict[str, str] = field(default_factory=dict)
    silent: list[str] = field(default_factory=list)


class Questions:
    def __init__(self) -> None:
        self._open: dict[int, Inquiry] = {}  # by seq
        self._seq = 0

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, absent: list[str], until: float) -> Inquiry:
        """`absent`: hosts that cannot be asked."""
        future: Future[Outcome] = Future()
        future.set_running_or_notify_cancel()  # whoever waits may go; the result is set all the same
        return Inquiry(until, future, silent=list(absent))

    def ask(self, inquiry: Inquiry, host: str) -> int:
        """The number of the question to this host."""
        self._seq += 1
        self._open[self._seq] = inquiry
        inquiry.waiting[self._seq] = host
        return self._seq

    def answer(self, host: str, seq: int, text: str) -> bool:
        """False: it was not asked that, or too long ago."""
        inquiry = self._open.get(seq)
        if inquiry is None or inquiry.waiting[seq] != host:
            return False
        inquiry.answers[host] = text
        self._close(seq, inquiry)
        return True

    def silent(self, seq: int) -> None:
        """Whoever was asked that will not answer."""
        inquiry = self._open.get(seq)
        if inquiry is not None:
            self._silent(seq, inquiry)

    def lost(self, host: str) -> None:
        """It is not connected any more."""
        for seq, inquiry in list(self._open.items()):
            if inquiry.waiting[seq] == host:
                self._silent(seq, inquiry)

    def expire(self, now: float) -> None:
        for seq, inquiry in list(self._open.items()):
            if inquiry.until <= now:
                self._silent(seq, inquiry)

    @property
    def deadline(self) -> float:
        """When `expire` is needed next."""
        return min((inquiry.until for inquiry in self._open.values()), default=float("inf"))

    def settle(self, inquiry: Inquiry) -> None:
        """Tells whoever waits, if nothing is open any more."""
        if not inquiry.waiting:
            inquiry.future.set_result(Outcome(inquiry.answers, sorted(inquiry.silent)))

    def _silent(self, seq: int, inquiry: Inquiry) -> None:
        inquiry.silent.append(inquiry.waiting[seq])
        self._close(seq, inquiry)

    def _close(self, seq: int, inquiry: Inquiry) -> None:
        del self._open[seq], inquiry.waiting[seq]
        self.settle(inquiry)
