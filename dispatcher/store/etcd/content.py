# Owns: reading what lies under the prefix: whose store it is, all of its content, and the log from a position on. What
# is missing, damaged or somebody else's is refused with one line. Touches: etcd through the gateway.
from __future__ import annotations

import asyncio
import logging
import secrets
from typing import NamedTuple

from ..commits import StoreError
from .entries import (
    NOTHING,
    Chunked,
    Damage,
    Growth,
    Keys,
    Latest,
    LogEntry,
    Moved,
    Position,
    Rows,
    Thawing,
    behind,
    check_body,
    decode_entry,
    decode_latest,
    decode_meta,
    encode_meta,
    piece,
    replay,
    size_of,
)
from .gateway import Failure, Gateway, Hopeless, Json, Pair, alone, get, is_made, pairs, put, txn

log = logging.getLogger("slash32.dispatcher")

A_PAGE = 4.0  # seconds for an answer that may be long
PAGE_BYTES = 2 << 20  # more of them, and the next page is a shorter one
PAGE_MOST = 512
AGAIN = 0.5  # seconds between two attempts of who is patient
SAY_SO = 2.0  # seconds between two lines in the journal


class Trimmed(Damage):
    """What should come next is older than the log."""


class Found(NamedTuple):
    position: Position
    entry: LogEntry
    body: bytes


class Loaded(NamedTuple):
    rows: Rows
    position: Position
    growth: Growth


class Content:
    """`patience`: seconds for which each request is tried again."""

    def __init__(self, gateway: Gateway, keys: Keys, patience: float) -> None:
        self.gateway = gateway
        self.keys = keys
        self.patience = patience
        self._page = 8

    async def ask(self, what: str, body: bytes, seconds: float = 1.0) -> Json:
        """Raises Failure."""
        loop = asyncio.get_running_loop()
        end, said = loop.time() + self.patience, loop.time()
        while True:
            try:
                return await self.gateway.ask_any(what, body, seconds)
            except Hopeless:
                raise
            except Failure as e:
                if (now := loop.time()) >= end:
                    raise
                if now - said >= SAY_SO:
                    said = now
                    log.info("waiting for etcd: %s", e)
            await asyncio.sleep(AGAIN)

    async def begin(self, create: bool) -> Position:
        """Of the store's beginning: its `tip` is the epoch. An empty prefix becomes a store, if `create`."""
        keys, epoch = self.keys, secrets.token_hex(8)
        then = [put(keys.meta, encode_meta(epoch))] if create else []
        question = txn([is_made(keys.prefix, 0, behind(keys.prefix))], then, [get(keys.meta)])
        answer = await self.ask("kv/txn", question)
        if answer.get("succeeded"):
            if not create:
                raise Damage("there is no store")
            log.info("a new store of epoch %s", epoch)
            return Position(0, epoch, int(answer["header"]["revision"]))
        found = pairs(answer["responses"][0])
        if not found:
            raise Damage(
                "there are keys but no meta: half a migration, or somebody else's; to give them up run"
                f" `etcdctl del --prefix {keys.prefix}`"
            )
        return Position(0, decode_meta(found[0].value), found[0].made)

    async def latest(self) -> Latest:
        found = pairs(await self.ask("kv/range", alone(get(self.keys.latest))))
        return decode_latest(found[0].value) if found else NOTHING

    async def load(self, beginning: Position) -> Loaded:
        while True:
            latest = await self.latest()
            try:
                return await self._load(latest, beginning)
            except Damage:
                # Another dispatcher may have made a snapshot and trimmed what was being read.
                if await self.latest() == latest:
                    raise

    async def _load(self, latest: Latest, beginning: Position) -> Loaded:
        growth = Growth()
        growth.cut(latest)
        rows, position = await self._thaw(latest), beginning
        if latest.revision:
            position = await self._at(latest)
        while page := await self.page(position):
            for _, entry, body in page:
                replay(rows, entry.revision, body)
                growth.add(entry.revision, size_of(entry))
            position = page[-1].position
        return Loaded(rows, position, growth)

    async def _thaw(self, latest: Latest) -> Rows:
        thawing, stem = Thawing(), self.keys.snapshot(latest.revision, latest.nonce)
        for number in range(latest.pieces):
            thawing.feed(await self._value(piece(stem, number), f"a piece of snapshot {latest.revision}"))
        return thawing.finish(latest.digest) if latest.pieces else {}

    async def _value(self, key: str, what: str, missing: type[Damage] = Damage) -> bytes:
        found = pairs(await self.ask("kv/range", alone(get(key)), A_PAGE))
        if not found:
            raise missing(f"{what} is missing")
        return found[0].value

    async def _at(self, latest: Latest) -> Position:
        revision = latest.revision
        found = pairs(await self.ask("kv/range", alone(get(self.keys.log(revision))), A_PAGE))
        if not found:
            raise Damage(f"log entry {revision} is missing")
        if decode_entry(revision, found[0].value).nonce != latest.tip:
            raise Damage(f"log entry {revision} is not the one that the snapshot was made of")
        return Position(revision, latest.tip, found[0].made)

    async def page(self, after: Position) -> list[Found]:
        """The next entries; none: there are no more. Raises Trimmed, Damage, Failure."""
        keys = self.keys
        wanted = get(keys.log(after.revision + 1), behind(keys.all_of("log")), self._page)
        found = pairs(await self.ask("kv/range", alone(wanted), A_PAGE))
        size = sum(len(pair.value) for pair in found)
        self._page = min(PAGE_MOST, self._page * 2) if size < PAGE_BYTES // 2 else self._page
        self._page = max(1, self._page // 2) if size > PAGE_BYTES else self._page
        read = []
        for pair in found:
            entry = self.next_entry(after, pair)
            read.append(Found(Position(entry.revision, entry.nonce, pair.made), entry, await self.body(entry)))
            after = read[-1].position
        return read

    def next_entry(self, after: Position, pair: Pair) -> LogEntry:
        """Raises Trimmed, Damage."""
        revision = self.keys.log_revision(pair.key)
        if revision != after.revision + 1:
            raise Trimmed(f"log entry {after.revision + 1} is missing")
        entry = decode_entry(revision, pair.value)
        if entry.before != after.tip:
            raise Damage(f"log entry {revision} does not follow the entry before it: two histories were mixed")
        return entry

    async def body(self, entry: LogEntry) -> bytes:
        """Raises Damage."""
        if isinstance(entry.body, bytes):
            return check_body(entry, entry.body)
        return check_body(entry, await self._joined(entry, entry.body))

    async def _joined(self, entry: LogEntry, chunked: Chunked) -> bytes:
        whole, stem = bytearray(), self.keys.chunks(entry.revision, entry.nonce)
        try:
            for number in range(chunked.pieces):
                whole += await self._value(piece(stem, number), f"a chunk of log entry {entry.revision}")
        except Damage:
            await self._value(self.keys.log(entry.revision), f"log entry {entry.revision}", Trimmed)
            raise
        return bytes(whole)


def clear(title: str, error: Exception) -> StoreError:
    """One line for an operator."""
    if isinstance(error, Moved):
        return StoreError(f"{title}: {error}")
    if isinstance(error, StoreError):
        return StoreError(f"{title}: {error}; nothing was changed: restore it, or name another etcd_prefix")
    if isinstance(error, Hopeless):
        return StoreError(f"{title}: {error}")
    return StoreError(f"{title}: cannot be read ({error}): start its members, or mend `etcd` in the configuration")
