# Owns: what each libvirt hook operation asks of the agent, and which guests are between hooks, so that what libvirt's
# events say of a moment before does not undo what a hook has just said. Touches: nothing; `now` is monotonic seconds.
from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from slash32.tag import Domain, TagError, parse_domain, uuid_of

from ..agent import Agent

log = logging.getLogger("slash32.hostd")

LATE = 60.0  # seconds for which an event may lag behind a hook; the periodic scan heals what lasts longer

AWAY = 5.0  # seconds for which what was read of a guest before its migration may come in after it

_MAY_REFUSE = ("prepare", "start", "migrate")
_ENDS = (("stopped", "end"), ("release", "end"))


class Request(Protocol):
    """A hook's question (hostd.guests.inbox)."""

    @property
    def driver(self) -> str: ...
    @property
    def operation(self) -> str: ...
    @property
    def suboperation(self) -> str: ...
    @property
    def xml(self) -> bytes: ...
    def answer(self, code: int, message: str = "") -> bool: ...


@dataclass(slots=True)
class Operations:
    """Hooks come here. https://libvirt.org/hooks.html says when libvirt runs which."""

    agent: Agent
    rescan: Callable[[], None]
    _beginning: dict[str, float] = field(default_factory=dict)  # uuid -> when a start was announced
    _ended: dict[str, float] = field(default_factory=dict)
    _left: dict[str, float] = field(default_factory=dict)  # handed over to the destination of a migration

    def hook(self, request: Request, now: float) -> None:
        if request.operation == "reconnect":
            request.answer(0)  # whatever happens: a refusal here kills the running guest
            self.rescan()
            return
        try:
            domain = parse_domain(request.xml, request.driver, absent_ok=request.operation != "prepare")
        except TagError as error:
            self._unreadable(request, error, now)
            return
        self._note(domain.uuid, request.operation, now)
        self._told(domain, request, now)

    def _unreadable(self, request: Request, error: TagError, now: float) -> None:
        """A tag that went wrong while the guest ran must not keep what is its own alive after its end."""
        log.warning("%s", error)
        uuid = uuid_of(request.xml)
        if uuid and (request.operation, request.suboperation) in _ENDS:
            self._note(uuid, request.operation, now)
            (self.agent.released if request.operation == "release" else self.agent.stopped)(uuid)
            self.agent.settle()
        refuse = request.operation in _MAY_REFUSE
        request.answer(int(refuse), str(error) if refuse else "")

    def _told(self, domain: Domain, request: Request, now: float) -> None:
        def answer(code: int, message: str) -> None:
            request.answer(code, message)

        match (request.operation, request.suboperation):
            case ("prepare", "begin"):
                self.agent.prepare(domain, answer, now)
            case ("migrate", "begin"):
                self.agent.incoming(domain, answer, now)
            case ("start", "begin") | ("started", "begin"):
                self.agent.started(domain, answer, now)
            case ("stopped", "end"):
                self.agent.stopped(domain.uuid)
                self.agent.settle()
                answer(0, "")
            case ("release", "end"):
                self.agent.released(domain.uuid)
                self.agent.settle()
                answer(0, "")
            case _:
                answer(0, "")

    def _note(self, uuid: str, operation: str, now: float) -> None:
        if operation in ("stopped", "release"):
            self._beginning.pop(uuid, None)
            self._ended[uuid] = now
        else:
            self._ended.pop(uuid, None)
            self._left.pop(uuid, None)
            self._beginning[uuid] = now

    def beginning(self, uuid: str, now: float) -> bool:
        """Its start was announced lately: events that call it gone may be of its former life."""
        return now - self._beginning.get(uuid, -LATE) < LATE

    def begins(self, uuid: str, scan: float, now: float) -> bool:
        """Its start was announced after that scan began, or lately: between `prepare` and `started` libvirt's LXC
        driver does not list it."""
        return self._beginning.get(uuid, -LATE) >= scan or self.beginning(uuid, now)

    def ended(self, uuid: str, now: float) -> bool:
        """It ended lately: what shows it running may be of a moment before."""
        return now - self._ended.get(uuid, -LATE) < LATE

    def left(self, uuid: str, now: float) -> None:
        self._left[uuid] = now

    def came_back(self, uuid: str) -> None:
        self._left.pop(uuid, None)

    def left_lately(self, uuid: str, now: float) -> bool:
        return now - self._left.get(uuid, -LATE) < AWAY

    def forget(self, now: float) -> None:
        for notes in (self._beginning, self._ended, self._left):
            for uuid in [u for u, when in notes.items() if now - when >= LATE]:
                del notes[uuid]
