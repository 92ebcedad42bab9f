# Owns: the way of a logged packet from the kernel to the journal, as a running hostd has it. Touches: its listener in
# hostd.dataplane, the journal's socket.
from __future__ import annotations

import logging
from collections.abc import Callable

from slash32.policy import Direction

from ..agent import Agent
from ..compiler.desired import LogPoint
from ..dataplane.nflog import LogListener
from .journald import Journald
from .packetlog import Logged, PacketLog

log = logging.getLogger("slash32.hostd")

_AGAIN = 30.0  # seconds until a group that somebody else has is tried again


class Logs:
    """`name`: of an interface, by its index."""

    def __init__(self, agent: Agent, name: Callable[[int], str | None]) -> None:
        self._agent = agent
        self._name = name
        self._listener = LogListener()
        self._journal = Journald()
        self._packets = PacketLog(self._journal.write, self._who)
        self._bound = False
        self._trouble = ""
        self._tried = float("-inf")
        self._lost = 0

    def fileno(self) -> int:
        return self._listener.fileno()

    def close(self) -> None:
        self._listener.close()
        self._journal.close()

    @property
    def counts(self) -> tuple[int, int]:
        """Packets that Log rules met, and those of them that are not in the journal."""
        return self._packets.told + self._packets.untold, self._packets.untold

    def hear(self, now: float) -> None:
        self._packets.heard(self._listener.read(), self._agent.calc.desired.logs, now)
        self._packets.lost(self._listener.lost - self._lost)
        self._lost = self._listener.lost

    def tick(self, now: float) -> None:
        if not self._bound and now - self._tried >= _AGAIN:
            self._tried = now
            self._bind()
        self._packets.tick(now)

    def _bind(self) -> None:
        try:
            self._listener.bind()
        except OSError as error:
            if self._trouble != str(error):
                self._trouble = str(error)
                log.warning("logged packets cannot be heard: %s: tried again every %.0f s", error, _AGAIN)
        else:
            self._bound = True

    def _who(self, logged: Logged, point: LogPoint | None) -> str:
        """The guest that is asked, or else the host's interface."""
        egress = point is not None and point.direction is Direction.EGRESS
        for ifindex in (logged.indev, logged.outdev) if point is None else (logged.indev if egress else logged.outdev,):
            local = self._agent.locals.carried_by(ifindex) if ifindex else None
            if local is not None:
                return local.endpoint.domain
        ifindex = logged.outdev if egress else logged.indev
        interface = self._name(ifindex) if ifindex else None
        return f"{self._agent.calc.host}/{interface}" if interface else self._agent.calc.host
