# Owns: the two kinds of inputs that are decided in turns: what a host said, and what an operator commands. Pure.
from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from slash32 import wire
from slash32.wire import Claim, Expect, Hello, Refusal, Release, Report

from ..store.commits import Failed
from .ledger import of_host

if TYPE_CHECKING:
    from ..core import Core
    from ..hosts.session import Session


log = logging.getLogger("slash32.dispatcher")


Asking = Claim | Expect | Release | Report | Hello


class Refused(Exception):
    """`status` is HTTP's; each error is one line."""

    def __init__(self, status: int, *errors: str) -> None:
        super().__init__(*errors)
        self.status = status
        self.errors = list(errors)


class Said:
    """Whatever happens to the store, it stays said: it is answered when it is durable."""

    patient = True

    def __init__(self, core: Core, session: Session, message: Asking, size: int) -> None:
        """`size`: its bytes, as they came."""
        self._core, self.session, self._message, self._size = core, session, message, size
        self._refused: list[Refusal] = []

    def decide(self) -> None:
        core, host = self._core, self.session.host
        if not core.present(self.session):
            return  # another connection says it all again
        core.ledger.who = of_host(host)
        match self._message:
            case Claim(_, endpoint):
                self._refused = core.claims.claim(host, endpoint)
            case Expect(_, endpoint):
                self._refused = core.claims.expect(host, endpoint)
            case Release(_, key):
                core.claims.release(host, key)
            case Report(_, endpoints):
                self._refused = core.claims.report(host, endpoints)
            case Hello():
                core.introduced(self.session, self._message)

    def landed(self) -> None:
        session = self.session
        if not self._core.present(session):
            return
        session.asked -= 1
        session.asked_bytes -= self._size
        if not isinstance(self._message, Hello):
            session.reported = session.reported or isinstance(self._message, Report)
            self._core.answer(session, wire.Claimed(self._message.seq, tuple(self._refused)))

    def failed(self, why: Failed) -> None:
        raise AssertionError("it is patient")


class Command:
    """Runs between two commits; its future has the result when what it changed is durable and was sent."""

    patient = False

    def __init__(self, core: Core, run: Callable[[Core], Any], who: str, seconds: float = 0.0) -> None:
        """`seconds`: for which whoever asked waits for the hosts, too, once it is durable."""
        self.future: Future[Any] = Future()
        self.seconds = seconds
        self._core, self._run, self._who = core, run, who
        self._result: Any = None
        self._error: Exception | None = None
        self._effects: list[Callable[[], None]] = []

    def decide(self) -> None:
        ledger = self._core.ledger
        mark, ledger.who = len(ledger.writes), self._who
        self._error, self._effects = None, []
        self._core.afterwards = self._effects
        try:
            self._result = self._run(self._core)
        except Refused as e:
            ledger.undo(mark)
            self._error = e
        except Exception:  # a mistake of ours in what one operator asked is no reason to leave all hosts alone
            log.exception("a command failed")
            ledger.undo(mark)
            self._error = Refused(500, "a fault in slash32-dispatcher; its journal has it, and nothing was changed")

    def landed(self) -> None:
        for effect in self._effects if self._error is None else ():
            effect()
        self._core.done.append(self)

    def failed(self, why: Failed) -> None:
        more = "; it may be done all the same: look, then run this again" if why.unknown else "; nothing was changed"
        self._error = Refused(503, why.reason + more)
        self._core.done.append(self)

    @property
    def awaited(self) -> Any:
        """What is to be told once the hosts have what it changed; None: nobody waits for them."""
        return self._result if self.seconds > 0 and self._error is None else None

    def finish(self) -> None:
        """Tells whoever waits."""
        if self._error is not None:
            self.future.set_exception(self._error)
        else:
            self.future.set_result(self._result)
