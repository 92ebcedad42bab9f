# Owns: outcomes on their way from the thread that follows etcd to the one that uses the store, and how many bytes of
# them wait.
from __future__ import annotations

import threading
from collections.abc import Callable

from ..commits import Outcome

MOST = 16 << 20  # bytes that wait; then no more is read


class Outbox:
    def __init__(self, wake: Callable[[], None]) -> None:
        self.wake = wake
        self._lock = threading.Lock()
        self._waiting: list[Outcome] = []
        self._bytes = 0

    @property
    def crowded(self) -> bool:
        return self._bytes > MOST

    def put(self, outcome: Outcome, size: int = 0) -> None:
        with self._lock:
            self._waiting.append(outcome)
            self._bytes += size
        self.wake()

    def take(self) -> tuple[list[Outcome], bool]:
        """And whether reading had stopped."""
        with self._lock:
            found, crowded = self._waiting, self.crowded
            self._waiting, self._bytes = [], 0
        return found, crowded
