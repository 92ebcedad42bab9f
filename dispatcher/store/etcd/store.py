# Owns: the store in etcd as the dispatcher uses it: a thread with an event loop, in which the follower lives.
# Touches: threads; etcd through the room's other modules.
from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from ..commits import Commit, Outcome, Saved, StoreError, encode_writes
from .content import Content, clear
from .entries import Keys, decoded
from .follower import START, Follower
from .gateway import EtcdConfig, Failure, Gateway
from .outbox import Outbox
from .upkeep import create, give_up

__all__ = ["EtcdConfig", "EtcdStore"]

_END = 5.0  # seconds that the thread has to end
T = TypeVar("T")


class EtcdStore:
    """See `commits.Store`. `wake` is called in the store's thread."""

    shared = True

    def __init__(self, config: EtcdConfig, wake: Callable[[], None]) -> None:
        self._config = config
        self._outbox = Outbox(wake)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop
        self._follower: Follower
        self._stop: asyncio.Event | None = None  # it was opened

    @property
    def trouble(self) -> str:
        return self._follower.trouble

    def load(self) -> Saved:
        """Waits up to ten seconds for a quorum. Raises StoreError."""
        opened: Future[Saved] = Future()
        self._thread = threading.Thread(target=self._live, args=(opened,), name="etcd", daemon=True)
        self._thread.start()
        return opened.result()

    def propose(self, commit: Commit) -> None:
        if commit.revision > self._follower.at.revision + 1:
            raise ValueError(f"revision {commit.revision} does not follow {self._follower.at.revision}")
        body = encode_writes(commit.writes)
        self._loop.call_soon_threadsafe(self._follower.propose, commit.revision, body)

    def ask_head(self) -> None:
        self._loop.call_soon_threadsafe(self._follower.ask_head)

    def take(self) -> list[Outcome]:
        found, crowded = self._outbox.take()
        if crowded:
            self._loop.call_soon_threadsafe(self._follower.look)
        return found

    def close(self) -> None:
        if self._thread is not None and self._thread.is_alive():
            if self._stop is not None:
                self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(_END)

    def _live(self, opened: Future[Saved]) -> None:
        asyncio.run(self._follow(opened))

    async def _follow(self, opened: Future[Saved]) -> None:
        try:
            follower = Follower(self._config, self._outbox)
        except StoreError as e:
            opened.set_exception(e)
            return
        try:
            saved = await follower.open()
        except Exception as e:  # whoever waits for it raises it
            opened.set_exception(e)
        else:
            stop = asyncio.Event()
            self._loop, self._follower, self._stop = asyncio.get_running_loop(), follower, stop
            opened.set_result(saved)
            await follower.run(stop)
        finally:
            await follower.gateway.close()

    @classmethod
    def create(cls, config: EtcdConfig, saved: Saved) -> None:
        """Writes a whole content, with its epoch and revision, under an empty prefix. Raises StoreError."""

        async def work(content: Content) -> None:
            await create(content, saved)

        _once(config, work)

    @classmethod
    def read(cls, config: EtcdConfig) -> Saved:
        """What is there, of a store that is there. Raises StoreError."""

        async def work(content: Content) -> Saved:
            loaded = await content.load(beginning := await content.begin(create=False))
            return decoded(beginning.tip, loaded.position.revision, loaded.rows)

        return _once(config, work)

    @classmethod
    def moved_to(cls, config: EtcdConfig, revision: int, where: str) -> None:
        """It is not opened again, and dispatchers that still run are refused. Raises StoreError, also where there is
        more than that revision."""

        async def work(content: Content) -> None:
            await give_up(content, await content.begin(create=False), revision, where)

        _once(config, work)


def _once(config: EtcdConfig, work: Callable[[Content], Coroutine[Any, Any, T]]) -> T:
    async def run() -> T:
        gateway = Gateway(config)
        try:
            return await work(Content(gateway, Keys(config.prefix), START))
        except (Failure, StoreError) as e:
            raise clear(config.title, e) from None
        finally:
            await gateway.close()

    return asyncio.run(run())
