# Owns: the bookkeeping of what was asked of the dispatcher and not yet answered. Pure; `now` is monotonic seconds.
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from slash32.model import Endpoint, EndpointKey

from ..state import ELSEWHERE, Local, Locals

RETRY = 2.0  # seconds until a refused claim is made again: its address may have become free
GRACE = 5.0  # seconds a re-tagged endpoint keeps its old rights while the answer is awaited


@dataclass(slots=True)
class _Asked:
    endpoints: dict[EndpointKey, Endpoint]
    since: float


@dataclass(slots=True)
class Claims:
    """Level-triggered: `due` derives what must be claimed from the difference between wanted and granted."""

    locals: Locals
    _asked: dict[int, _Asked] = field(default_factory=dict)
    _refused: dict[EndpointKey, tuple[Endpoint, float]] = field(default_factory=dict)
    _arrived: set[EndpointKey] = field(default_factory=set)  # and nothing granted to them since

    def due(self, now: float) -> list[Endpoint]:
        if not self.locals.unclaimed:
            return []
        pending = {key: endpoint for asked in self._asked.values() for key, endpoint in asked.endpoints.items()}
        found = []
        for key in self.locals.unclaimed:
            endpoint = self.locals.by_key[key].endpoint
            if pending.get(key) == endpoint:
                continue
            said, when = self._refused.get(endpoint.key, (None, 0.0))
            if said != endpoint or now - when >= RETRY:
                found.append(endpoint)
        return found

    def asked(self, seq: int, endpoints: Iterable[Endpoint], now: float) -> None:
        self._asked[seq] = _Asked({e.key: e for e in endpoints}, now)

    def answered(self, seq: int, refused: Mapping[EndpointKey, str], now: float) -> list[tuple[Endpoint, str]]:
        """Every endpoint of that request with the refusal's one line, or "" where it was granted."""
        asked = self._asked.pop(seq, None)
        if asked is None:
            return []
        for key, endpoint in asked.endpoints.items():
            if key in refused:
                self._refused[key] = (endpoint, now)
            else:
                self._refused.pop(key, None)
                self._arrived.discard(key)
        return [(endpoint, refused.get(key, "")) for key, endpoint in asked.endpoints.items()]

    @property
    def open(self) -> bool:
        """Something is still to be answered."""
        return bool(self._asked)

    def arrived(self, key: EndpointKey) -> None:
        """By a migration: its source lets go of it at this moment."""
        self._arrived.add(key)

    def fleet_changed(self) -> None:
        """It may just have been let go of: a guest that runs waits for no clock."""
        for key in self._arrived:
            self._refused.pop(key, None)

    def lost(self) -> None:
        """The connection went: nothing that was asked will be answered."""
        self._asked.clear()

    def forget(self, key: EndpointKey) -> None:
        self._refused.pop(key, None)
        self._arrived.discard(key)
        for asked in self._asked.values():
            asked.endpoints.pop(key, None)

    def overdue(self, now: float) -> bool:
        return bool(self._asked) and any(now - asked.since > GRACE for asked in self._asked.values())


def reportable(locals_: Iterable[Local]) -> list[Endpoint]:
    """What this host claims as its own; an incoming guest is still its source's."""
    return [local.endpoint for local in locals_ if local.phase not in ELSEWHERE]
