# Owns: keeping the prefix small: snapshots, the trimming of what they make superfluous, chunks that no commit names;
# and writing a whole content into an empty prefix. Touches: etcd through the gateway.
from __future__ import annotations

import asyncio
import logging
import secrets
from hashlib import blake2b

from ..commits import Saved, encode_record, encode_writes
from .content import A_PAGE, Content
from .entries import (
    KEPT,
    NOTHING,
    Damage,
    Latest,
    Position,
    Rows,
    behind,
    decode_entry,
    encode_entry,
    encode_latest,
    encode_meta,
    freeze,
    new_entry,
    piece,
)
from .gateway import Json, alone, delete, get, is_made, is_value, pairs, put, txn

log = logging.getLogger("slash32.dispatcher")


async def snapshot(content: Content, beginning: Position) -> Latest:
    """Made of what is in etcd alone. Returns the one that counts now, which may be another dispatcher's.
    Raises Failure, StoreError."""
    loaded = await content.load(beginning)
    if not loaded.growth.due:
        return loaded.growth.base
    latest = await _write_pieces(content, loaded.position, loaded.rows)
    key, old = content.keys.latest, loaded.growth.base
    same = is_made(key, 0) if old == NOTHING else is_value(key, encode_latest(old))
    answer = await content.ask("kv/txn", txn([_is_store(content, beginning), same], [put(key, encode_latest(latest))]))
    counts = await content.latest()  # an answer that was lost and asked for again says no
    if not answer.get("succeeded") and counts != latest:
        await _drop(content, content.keys.snapshot(latest.revision, latest.nonce))
        return counts
    log.info("etcd: a snapshot of revision %d, %d bytes", latest.revision, latest.size)
    await _trim(content, latest)
    await collect(content, latest.revision)
    return latest


def _is_store(content: Content, beginning: Position) -> Json:
    return is_made(content.keys.meta, beginning.made)


async def _write_pieces(content: Content, position: Position, rows: Rows) -> Latest:
    nonce, digest, count, size = secrets.token_hex(8), blake2b(digest_size=16), 0, 0
    stem = content.keys.snapshot(position.revision, nonce)
    for data in freeze(rows):
        if not data:
            await asyncio.sleep(0)
            continue
        digest.update(data)
        await content.ask("kv/put", alone(put(piece(stem, count), data)), A_PAGE)
        count, size = count + 1, size + len(data)
    return Latest(position.revision, position.tip, nonce, count, size, digest.hexdigest())


async def _trim(content: Content, latest: Latest) -> None:
    keys, end = content.keys, max(0, latest.revision - KEPT + 1)
    gone = [
        delete(keys.log(0), keys.log(end)),
        delete(keys.chunks(0), keys.chunks(end)),
        delete(keys.snapshot(0), keys.snapshot(latest.revision)),
    ]
    await content.ask("kv/txn", txn([is_value(keys.latest, encode_latest(latest))], gone), A_PAGE)


async def collect(content: Content, revision: int) -> int:
    """Removes chunks whose commit is not, and can no longer be, among those up to `revision`. Returns how many."""
    keys = content.keys
    every = await content.ask("kv/range", alone(get(keys.all_of("chunk"), keys.chunks(revision + 1), keys_only=True)))
    owners = sorted({keys.chunk_owner(pair.key) for pair in pairs(every)})
    gone = 0
    for number, nonce in owners:
        # That number is taken, by this commit or by another one.
        found = pairs(await content.ask("kv/range", alone(get(keys.log(number))), A_PAGE))
        if not found or decode_entry(number, found[0].value).nonce != nonce:
            await _drop(content, keys.chunks(number, nonce))
            gone += 1
    if gone:
        log.info("etcd: removed the chunks of %d commits that were never made", gone)
    return gone


async def _drop(content: Content, stem: str) -> None:
    await content.ask("kv/deleterange", alone(delete(stem, behind(stem))))


async def create(content: Content, saved: Saved) -> None:
    """A store with this content, epoch and revision. Until the last request it is none. Raises Damage, Failure."""
    keys, rows = content.keys, Rows()
    for (table, key), record in saved.records.items():
        rows[table.value, key] = encode_record(record)
    taken, mark = keys.snapshot(saved.revision), secrets.token_bytes(8)
    empty = is_made(keys.prefix, 0, behind(keys.prefix))
    answer = await content.ask("kv/txn", txn([empty], [put(taken, mark)], [get(taken)]))
    if not answer.get("succeeded") and [pair.value for pair in pairs(answer["responses"][0])] != [mark]:
        raise Damage("it is not empty")
    entry = new_entry(saved.revision, secrets.token_hex(8), saved.epoch, encode_writes(()))
    tip = entry.nonce if saved.revision else saved.epoch
    latest = await _write_pieces(content, Position(saved.revision, tip, 0), rows)
    last = [delete(taken), put(keys.latest, encode_latest(latest)), put(keys.meta, encode_meta(saved.epoch))]
    if saved.revision:
        last.append(put(keys.log(saved.revision), encode_entry(entry)))
    answer = await content.ask("kv/txn", txn([is_made(keys.meta, 0)], last))
    if not answer.get("succeeded") and await content.latest() != latest:
        raise Damage("something else was written into it at the same time")


async def give_up(content: Content, beginning: Position, revision: int, where: str) -> None:
    """What was read up to `revision` is in another store now: nobody begins or goes on with this one. Raises Damage,
    Failure."""
    keys = content.keys
    same = [_is_store(content, beginning), is_made(keys.log(revision + 1), 0)]
    answer = await content.ask("kv/txn", txn(same, [delete(keys.meta)], [get(keys.meta)]))
    if not answer.get("succeeded") and pairs(answer["responses"][0]):  # else an answer was lost
        raise Damage("something was committed meanwhile: stop every dispatcher first")
    await content.ask("kv/put", alone(put(keys.meta, encode_meta(beginning.tip, where))))
