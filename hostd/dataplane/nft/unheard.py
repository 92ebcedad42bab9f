# Owns: writing much without being told of it. As long as anybody in any namespace listens, the kernel tells of every
# element by itself, which takes twice as long as to write it; our own listener hears nothing of what we write anyhow.
# So it turns away meanwhile. What others do then shows in the generation, the kernel's count of transactions.
from __future__ import annotations

from collections.abc import Callable

from ..netlink import NetlinkSocket, Refusal
from .reading import generation


class Unheard:
    """`listen`: turns our own listener on or off, if there is one."""

    def __init__(self, socket: NetlinkSocket, nothing: bytes) -> None:
        """`nothing`: an empty batch."""
        self._socket, self._nothing = socket, nothing
        self.listen: Callable[[bool], None] | None = None
        self.missed = False  # maybe: somebody else's transaction

    def exchange(self, batch: bytes, last: int) -> list[Refusal]:
        """As the socket's, of one transaction that the kernel counts if it takes it."""
        if self.listen is None:
            return self._socket.exchange(batch, last)
        before, missed = generation(self._socket), self.missed
        self._socket.send(self._nothing)  # takes its turn: a transaction that was counted before has told all by now
        self.missed = True
        self.listen(False)
        try:
            refused = self._socket.exchange(batch, last)
        finally:
            self.listen(True)
        self.missed = missed or generation(self._socket) != before + (not refused)
        return refused
