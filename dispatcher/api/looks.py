# Owns: what many ask at once: one look at the core at a time, shared by all who wait for it. With 100,000 endpoints one
# takes a second of the core's thread: clients that ask on and on would keep hosts waiting. Touches: nothing.
from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

REST = 1.0  # seconds, at most, after a look: as long as it took, the core is the hosts'


class Look:
    """Who asks is told what is there after it asked: while one look is under way, those who come share the next."""

    def __init__(self, look: Callable[[], Awaitable[bytes]]) -> None:
        self._look = look
        self._running: asyncio.Future[bytes] | None = None
        self._next: asyncio.Future[bytes] | None = None
        self._due = 0.0

    async def ask(self) -> bytes:
        """Raises what the look raises."""
        if self._next is None:
            self._next = asyncio.ensure_future(self._take(self._running))
            self._next.add_done_callback(lambda done: done.cancelled() or done.exception())  # all may be gone
        return await asyncio.shield(self._next)

    async def _take(self, before: asyncio.Future[bytes] | None) -> bytes:
        clock = asyncio.get_running_loop().time
        if before is not None:
            await asyncio.wait([before])
        await asyncio.sleep(max(0.0, self._due - clock()))
        self._running, self._next = self._next, None
        begun = clock()
        try:
            return await self._look()
        finally:
            self._running = None
            self._due = clock() + min(REST, clock() - begun)
