# Owns: which dispatcher is tried next, and when: each one in turn at once, and a pause that grows when all were tried.
# Pure; `now` is monotonic seconds, chance an argument.
from __future__ import annotations

from collections.abc import Callable

PAUSE, LONGEST = 0.1, 5.0  # seconds after the first round without success, at most
STEADY = 1.0  # seconds a session must last to have been a success


class Rounds:
    """A round is one attempt at each dispatcher. Every host has an order of its own, so that those of a dispatcher that
    dies do not all go to the same one."""

    def __init__(self, count: int, chance: Callable[[], float]) -> None:
        """`chance` gives numbers from 0 up to 1."""
        self._chance = chance
        self._order = sorted(range(count), key=lambda _: chance())
        self._tried = 0
        self._pause = PAUSE
        self.due = 0.0  # when the next attempt may be made

    @property
    def present(self) -> int:
        return self._order[0]

    def failed(self, now: float, lasted: float = 0.0) -> None:
        """The present dispatcher was not to be had, or was lost after a session of `lasted` seconds."""
        if lasted >= STEADY:
            self._tried, self._pause = 0, PAUSE
        self._order.append(self._order.pop(0))
        self._tried += 1
        self.due = now
        if self._tried >= len(self._order):
            self.due += self._pause * (0.5 + self._chance() / 2)
            self._tried, self._pause = 0, min(LONGEST, 2 * self._pause)
