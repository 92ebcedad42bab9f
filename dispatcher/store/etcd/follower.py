# Owns: a dispatcher's place in the log: what is told of it and in which order, the one proposal under way, contact with
# etcd and its loss. A watch tells quickly; a linearizable read every half second tells for certain: a member that is
# cut off from its quorum keeps a watch open and silent. Runs in the store's event loop.
from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from typing import Any

from ..commits import Commit, Failed, Foreign, Head, Landed, Replaced, Saved, StoreError, decode_writes
from .content import Content, Found, Trimmed, clear
from .entries import Damage, Keys, LogEntry, Position, behind, check_body, decode_entry, decoded, size_of
from .gateway import EtcdConfig, Failure, Full, Gateway, Pair, alone, count, delete, get, pairs, txn
from .outbox import Outbox
from .proposal import PAUSE, PROPOSAL, Carrier, Proposal, new_proposal
from .upkeep import collect, snapshot

log = logging.getLogger("slash32.dispatcher")

START = 10.0  # seconds without a quorum until a start is given up
LOOK = 0.5  # seconds between two reads for certainty,
LOOK_MOST = 0.75  # and until one of them is given up
UPKEEP_AGAIN = 30.0  # seconds after a failed snapshot
UPKEEP_PATIENCE = 2.0


class Follower:
    def __init__(self, config: EtcdConfig, outbox: Outbox) -> None:
        self.title = config.title
        self.keys = Keys(config.prefix)
        self.gateway = Gateway(config)
        self._content = Content(self.gateway, self.keys, 0.0)
        self._outbox = outbox
        self._mine: Proposal | None = None
        self._asks = 0
        self._ring = asyncio.Event()
        self._deaf = asyncio.Event()
        self._missed = 0  # reads in a row that found what no watch had told
        self._unsure = True  # this may be another history than the one that was told
        self._tasks: set[asyncio.Task[None]] = set()
        self._upkeep_after = 0.0
        self._upkeep: asyncio.Task[None] | None = None
        self.lost = self.full = self.wrong = ""  # why it takes no proposals: for now, for now, for ever

    async def open(self) -> Saved:
        """Raises StoreError."""
        patient = Content(self.gateway, self.keys, START)
        try:
            self._beginning = await patient.begin(create=True)
            loaded = await patient.load(self._beginning)
        except (Failure, StoreError) as e:
            raise clear(self.title, e) from None
        self._carrier = Carrier(self.gateway, self.keys, self._beginning)
        self.at, self._growth = loaded.position, loaded.growth
        return decoded(self._beginning.tip, self.at.revision, loaded.rows)

    async def run(self, stop: asyncio.Event) -> None:
        for forever in (self._keep_looking(), self._keep_listening(), self._tidy()):
            self._start(forever)
        await stop.wait()
        while running := set(self._tasks):
            for task in running:
                task.cancel()
            await asyncio.wait(running, timeout=0.1)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the etcd store failed", exc_info=error)
            self._give_up(f"{self.title}: an error in slash32 itself ({type(error).__name__}): restart the dispatcher")

    # --- reading -----------------------------------------------------------------------------------------------------

    def ask_head(self) -> None:
        self._asks += 1
        self._ring.set()

    def look(self) -> None:
        self._ring.set()

    async def _keep_looking(self) -> None:
        while not self.wrong:
            await self._look()
            await _within(LOOK, self._ring)
            self._ring.clear()

    async def _look(self) -> None:
        asks = self._asks
        try:
            head = await self._head()
            await self._catch_up(head)
            if self.full:
                await self._ask_alarm()
        except Trimmed:
            await self._replace()
        except Failure as e:
            self._unsure = True
            self._set_lost(f"{self.title}: no contact ({e}): commits wait for it")
        except StoreError as e:
            self._give_up(str(clear(self.title, e)))
        else:
            self._unsure = False
            self._set_lost("")
            if self.at.revision >= head:
                self._asks -= asks
                for _ in range(asks):
                    self._outbox.put(Head(head))

    async def _head(self) -> int:
        """Of the log, now. Raises Trimmed, Damage, Failure."""
        keys, at = self.keys, self.at
        first = max(1, at.revision)
        since = get(keys.log(first), behind(keys.all_of("log")), 1, not self._unsure)
        answer = await self.gateway.ask_any("kv/txn", txn([], [get(keys.meta), since]), LOOK_MOST)
        (meta, entries), beginning = answer["responses"], self._beginning
        if [pair.made for pair in pairs(meta)] != [beginning.made]:
            raise Damage(f"it is no longer the store of epoch {beginning.tip}: restart the dispatcher")
        found = pairs(entries)
        if at.revision == 0:
            return count(entries)
        if found and found[0].key > keys.log(at.revision):
            raise Trimmed("too much was missed")
        if not found:
            raise Damage(f"revision {at.revision} is gone, it was put back to an older state: restart all dispatchers")
        same = found[0].made == at.made
        if self._unsure and same:
            same = decode_entry(at.revision, found[0].value).nonce == at.tip
        if not same:
            raise Damage(f"revision {at.revision} is another one now, its history was changed: restart all dispatchers")
        return at.revision + count(entries) - 1

    async def _catch_up(self, head: int) -> None:
        behind_watch = head > self.at.revision
        self._missed = self._missed + 1 if behind_watch else 0
        if self._missed > 1:
            self._missed = 0
            self._deaf.set()
        while self.at.revision < head and not self._outbox.crowded:
            page = await self._content.page(self.at)
            if not page:
                raise Damage(f"revision {head} was there and is gone")
            for found in page:
                self._deliver(found)

    async def _replace(self) -> None:
        try:
            loaded = await self._content.load(self._beginning)
            revision, size = loaded.position.revision, sum(map(len, loaded.rows.values()))
            if revision <= self.at.revision:
                raise Damage(f"log entry {self.at.revision + 1} is missing")
            saved = decoded(self._beginning.tip, revision, loaded.rows)
        except Failure as e:
            self._set_lost(f"{self.title}: no contact ({e}): commits wait for it")
        except StoreError as e:
            self._give_up(str(clear(self.title, e)))
        else:
            log.info("etcd: behind by more than its log; read all of revision %d", revision)
            self.at, self._growth = loaded.position, loaded.growth
            self._end_proposal()
            self._outbox.put(Replaced(saved), size)

    def _deliver(self, found: Found) -> None:
        """Raises StoreError."""
        revision, mine = found.entry.revision, self._mine
        if revision != self.at.revision + 1:
            return  # the watch, or a read, was quicker
        if mine is not None and mine.entry.nonce == found.entry.nonce:
            self._landed(found.position, mine)
            return
        commit = Commit(revision, decode_writes(found.body))
        self._advance(found.position, found.entry)
        if mine is not None and mine.entry.revision <= revision:
            self._end_proposal()
            if not isinstance(mine.entry.body, bytes):
                self._start(self._drop_chunks(mine.entry))
        self._outbox.put(Foreign(commit), len(found.body))

    def _advance(self, position: Position, entry: LogEntry) -> None:
        self.at = position
        self._growth.add(entry.revision, size_of(entry))

    # --- watching ----------------------------------------------------------------------------------------------------

    async def _keep_listening(self) -> None:
        while not self.wrong:
            self._deaf.clear()
            ends = [asyncio.create_task(w) for w in (self._listen(), self.gateway.moved.wait(), self._deaf.wait())]
            try:
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in ends:
                    task.cancel()
                results = await asyncio.gather(*ends, return_exceptions=True)
            if isinstance(results[0], Exception) and not isinstance(results[0], Failure):
                raise results[0]
            self._ring.set()
            await asyncio.sleep(LOOK if isinstance(results[0], Failure) else PAUSE)

    async def _listen(self) -> None:
        keys = self.keys
        try:
            async for found in self.gateway.watch(keys.all_of("log"), behind(keys.all_of("log"))):
                if not found:
                    self._ring.set()  # what came before this watch
                for pair in found:
                    self._hear(pair)
        except StoreError as e:
            self._give_up(str(clear(self.title, e)))

    def _hear(self, pair: Pair) -> None:
        self._missed = 0
        revision = self.keys.log_revision(pair.key)
        if revision <= self.at.revision or self.wrong:
            return
        if revision == self.at.revision + 1 and not self._outbox.crowded:
            entry = self._content.next_entry(self.at, pair)
            if isinstance(entry.body, bytes):
                position = Position(revision, entry.nonce, pair.made)
                self._deliver(Found(position, entry, check_body(entry, entry.body)))
                return
        self._ring.set()

    # --- proposing ---------------------------------------------------------------------------------------------------

    def propose(self, revision: int, body: bytes) -> None:
        if self.wrong:
            self._outbox.put(Failed(self.wrong))
        elif revision == self.at.revision + 1:  # or its Foreign was told already
            self._mine = new_proposal(self.at, body)
            self._start(self._carry(self._mine, self.at))

    async def _carry(self, mine: Proposal, after: Position) -> None:
        try:
            made = await self._carrier.carry(mine, after)
        except Full as e:
            self.full = f"{self.title}: {e}"
            self._fail(mine, self.full)
        except Failure as e:
            self._fail(mine, f"{self.title}: {e}")
        else:
            if made is None:
                await self._lost_race(mine)
            else:
                self._landed(Position(mine.entry.revision, mine.entry.nonce, made), mine)

    async def _lost_race(self, mine: Proposal) -> None:
        """Somebody has that revision: it is told as soon as it is read. It may even be ours, asked for twice."""
        self._ring.set()
        await _within(PROPOSAL, mine.over)
        mine.done = True
        self._fail(mine, f"{self.title}: revision {mine.entry.revision} was taken and cannot be read")

    def _landed(self, position: Position, mine: Proposal) -> None:
        if mine is not self._mine:
            return
        self._advance(position, mine.entry)
        self._end_proposal()
        self._outbox.put(Landed(position.revision))
        idle = self._upkeep is None or self._upkeep.done()
        if self._growth.due and idle and asyncio.get_running_loop().time() >= self._upkeep_after:
            self._upkeep = self._start(self._make_snapshot())

    def _fail(self, mine: Proposal, reason: str) -> None:
        if mine is self._mine:
            self._end_proposal()
            self._outbox.put(Failed(reason, mine.done))

    def _end_proposal(self) -> None:
        if self._mine is not None:
            self._mine.over.set()
            self._mine = None

    # --- trouble -----------------------------------------------------------------------------------------------------

    @property
    def trouble(self) -> str:
        return self.wrong or self.lost or self.full

    def _set_lost(self, why: str) -> None:
        if bool(why) != bool(self.lost):
            log.warning("%s", why) if why else log.info("%s: contact is back", self.title)
            self.lost = why
            self._outbox.wake()
        self.lost = why

    def _give_up(self, why: str) -> None:
        if not self.wrong:
            log.error("%s", why)
            self.wrong = why
            if self._mine is not None:
                self._fail(self._mine, why)
            self._outbox.wake()

    async def _ask_alarm(self) -> None:
        """Raises Failure."""
        answer = await self.gateway.ask_any("maintenance/alarm", b'{"action": "GET"}')
        if not any(alarm.get("alarm") == "NOSPACE" for alarm in answer.get("alarms", ())):
            log.info("%s: has room again", self.title)
            self.full = ""
            self._outbox.wake()

    # --- upkeep ------------------------------------------------------------------------------------------------------

    async def _make_snapshot(self) -> None:
        try:
            self._growth.cut(await snapshot(Content(self.gateway, self.keys, UPKEEP_PATIENCE), self._beginning))
        except (Failure, StoreError) as e:
            self._upkeep_after = asyncio.get_running_loop().time() + UPKEEP_AGAIN
            log.warning("%s: no snapshot could be made (%s): its log grows", self.title, e)

    async def _tidy(self) -> None:
        """What dispatchers that died have left."""
        try:
            await collect(Content(self.gateway, self.keys, UPKEEP_PATIENCE), self.at.revision)
        except (Failure, StoreError) as e:
            log.warning("%s: orphaned chunks could not be looked for (%s)", self.title, e)

    async def _drop_chunks(self, entry: LogEntry) -> None:
        stem = self.keys.chunks(entry.revision, entry.nonce)
        with contextlib.suppress(Failure):  # then they are collected later
            await self.gateway.ask("kv/deleterange", alone(delete(stem, behind(stem))))


async def _within(seconds: float, event: asyncio.Event) -> None:
    # Not wait_for: in Python 3.11 it may swallow a cancellation.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
