# Owns: the guests that are on their way here, as far as the dispatcher was told: which of its answers are about them,
# and whether it has to be told again. Pure.
from __future__ import annotations

from dataclasses import dataclass, field

from slash32.model import Endpoint


@dataclass(slots=True)
class Coming:
    """Apart from claims: that a guest may come is no answer to a claim which was made since."""

    _asked: dict[int, Endpoint] = field(default_factory=dict)

    def asked(self, seq: int, endpoint: Endpoint) -> None:
        self._asked[seq] = endpoint

    def answered(self, seq: int) -> Endpoint | None:
        """Which one that answer is about; None: about something else."""
        return self._asked.pop(seq, None)

    def lost(self) -> None:
        """The connection went: nothing that was asked will be answered."""
        self._asked.clear()
