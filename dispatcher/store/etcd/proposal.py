# Owns: carrying one commit to etcd: its chunks, then the transaction that makes it the next entry of the log, asked
# again of one member after another until an answer comes or the time is over. Touches: etcd through the gateway.
from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, field

from .entries import Keys, LogEntry, Position, encode_entry, new_entry, piece, pieces
from .gateway import ONE_REQUEST, Failure, Full, Gateway, Hopeless, Json, alone, is_made, is_there, put, txn

PROPOSAL = 2.0  # seconds without progress until a proposal's outcome is called unknown
PAUSE = 0.05  # before the next member is tried


@dataclass(slots=True)
class Proposal:
    entry: LogEntry
    body: bytes
    done: bool = False  # a request that may have made it a commit was sent, and what became of it is not known
    over: asyncio.Event = field(default_factory=asyncio.Event)  # its outcome is told


def new_proposal(after: Position, body: bytes) -> Proposal:
    return Proposal(new_entry(after.revision + 1, secrets.token_hex(8), after.tip, body), body)


class Carrier:
    def __init__(self, gateway: Gateway, keys: Keys, beginning: Position) -> None:
        self._gateway, self._keys, self._beginning = gateway, keys, beginning

    async def carry(self, mine: Proposal, after: Position) -> int | None:
        """etcd's revision that made it the next commit; None: that number was taken. Raises Failure."""
        keys, entry = self._keys, mine.entry
        conditions = [is_made(keys.meta, self._beginning.made), is_made(keys.log(entry.revision), 0)]
        if after.revision:
            conditions.append(is_made(keys.log(after.revision), after.made))
        if not isinstance(entry.body, bytes):
            stem = keys.chunks(entry.revision, entry.nonce)
            conditions.append(is_there(piece(stem, 0)))
            for number, data in enumerate(pieces(mine.body)):
                await self._insist(mine, "kv/put", alone(put(piece(stem, number), data)))
            mine.done = False  # chunks make no commit
        question = txn(conditions, [put(keys.log(entry.revision), encode_entry(entry))])
        answer = await self._insist(mine, "kv/txn", question)
        return int(answer["header"]["revision"]) if answer.get("succeeded") else None

    async def _insist(self, mine: Proposal, what: str, body: bytes) -> Json:
        """What was done is not done twice, so it may be asked again and again. Raises Failure."""
        loop = asyncio.get_running_loop()
        end, hopeless = loop.time() + PROPOSAL, 0
        failure = Failure("it is void")
        while not mine.over.is_set() and (left := end - loop.time()) > 0:
            try:
                return await self._attempt(what, body, min(left, ONE_REQUEST))
            except Full:
                raise
            except Failure as e:
                failure, mine.done = e, mine.done or (e.done and what == "kv/txn")
                hopeless += isinstance(e, Hopeless)
                if hopeless >= len(self._gateway.endpoints):
                    break
            await asyncio.sleep(PAUSE)
        raise failure

    async def _attempt(self, what: str, body: bytes, seconds: float) -> Json:
        """Given up as soon as another member is found to be the better one."""
        if len(self._gateway.endpoints) == 1:
            return await self._gateway.ask(what, body, seconds)
        asked = asyncio.create_task(self._gateway.ask(what, body, seconds))
        moved = asyncio.create_task(self._gateway.moved.wait())
        try:
            await asyncio.wait((asked, moved), return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                return asked.result()
        finally:
            asked.cancel()
            moved.cancel()
        raise Failure("no answer until another member was found", done=True)
