# Owns: the backup document: a store's content as JSON, and back, read strictly: what is not exactly a backup is refused
# whole. Pure. How documents are shown to people may change; what stands in a record is what stores keep (commits.py).
from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterator
from typing import Any

from slash32 import resources
from slash32.errors import Slash32Error, quoted

from .commits import (
    Coming,
    Entry,
    Holding,
    HostState,
    Key,
    Peer,
    Record,
    Saved,
    StoreError,
    Table,
    decode_record,
    encode_record,
)

VERSION = 1
_EPOCH = re.compile(r"[0-9A-Za-z_-]{1,64}")
_FIELDS = ("slash32Backup", "epoch", "revision", "made", "records")
_PARTS = {
    Table.RESOURCE: 2,
    Table.ENDPOINT: 2,
    Table.EXPECTED: 3,
    Table.HOST: 1,
    Table.SUPERSEDED: 1,
    Table.DISPATCHER: 1,
    Table.AUDIT: 2,
}
_NUMBER = re.compile(r"[0-9]{4,20}")
_PIECE = 500  # records


class BackupError(Slash32Error):
    """One line: which record, what is wrong."""


def written(saved: Saved, made: str) -> Iterator[str]:
    """The document, in pieces. `made`: when, RFC 3339."""
    head = {"slash32Backup": VERSION, "epoch": saved.epoch, "revision": saved.revision, "made": made}
    yield json.dumps(head)[:-1] + ', "records": ['
    rows: list[str] = []
    between = "\n"
    for (table, key), record in saved.records.items():
        body = base64.b64encode(encode_record(record)).decode("ascii")
        rows.append(json.dumps([table.value, list(key), body]))
        if len(rows) == _PIECE:
            yield between + ",\n".join(rows)
            rows, between = [], ",\n"
    yield (between + ",\n".join(rows) if rows else "") + "\n]}\n"


def decode(document: Any) -> Saved:
    """Raises BackupError."""
    if not isinstance(document, dict) or "slash32Backup" not in document:
        raise BackupError("this is not a backup of slash32: it has no field slash32Backup")
    if document["slash32Backup"] != VERSION or isinstance(document["slash32Backup"], bool):
        raise BackupError(f"slash32Backup: {quoted(document['slash32Backup'], 64)} is not {VERSION}; upgrade slash32")
    if set(document) != set(_FIELDS):
        odd = ", ".join(quoted(key, 64) for key in sorted(set(document) ^ set(_FIELDS))[:5])
        raise BackupError(f"a backup has the fields {', '.join(_FIELDS)}; missing or unknown: {odd}")
    epoch, revision, rows = document["epoch"], document["revision"], document["records"]
    if not isinstance(epoch, str) or not _EPOCH.fullmatch(epoch):
        raise BackupError(f"epoch: {quoted(epoch, 64)} is none")
    if type(revision) is not int or not 0 <= revision < 1 << 63:
        raise BackupError(f"revision: {quoted(revision, 64)} is none")
    if not isinstance(document["made"], str):
        raise BackupError("made: is not a string")
    if not isinstance(rows, list):
        raise BackupError("records: is not a list")
    saved = Saved(epoch, revision)
    for index, row in enumerate(rows):
        try:
            table, key, record = _row(row)
        except Slash32Error as e:
            raise BackupError(f"records[{index}]: {e}") from None
        if (table, key) in saved.records:
            raise BackupError(f"records[{index}]: {table.value} {quoted('/'.join(key), 64)} is there twice")
        saved.records[table, key] = record
    return saved


def _row(row: Any) -> tuple[Table, Key, Record]:
    if not isinstance(row, list) or len(row) != 3:
        raise BackupError("is not [table, [key...], base64]")
    name, parts, body = row
    if not isinstance(name, str) or name not in (table.value for table in Table):
        raise BackupError(f"{quoted(name, 64)} is no table that this version knows")
    table = Table(name)
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts) or len(parts) != _PARTS[table]:
        raise BackupError(f"the key is not {_PARTS[table]} strings")
    try:
        data = base64.b64decode(body, validate=True) if isinstance(body, str) else b""
    except (binascii.Error, ValueError):
        data = b""
    if not data:
        raise BackupError("the third part is not base64")
    record = _typed(table, data)
    key = tuple(parts)
    if not _belongs(table, key, record):
        raise BackupError(f"{table.value} {quoted('/'.join(key), 64)}: the record is another one's, or of another form")
    return table, key, record


def _typed(table: Table, data: bytes) -> Record:
    try:
        return decode_record(table, data)
    except (StoreError, RecursionError) as e:
        raise BackupError(str(e)) from None


def _belongs(table: Table, key: Key, record: Record) -> bool:
    match record:
        case Holding(host, endpoint):
            return tuple(endpoint.key) == key and bool(host)
        case Coming(endpoint):
            return tuple(endpoint.key) == key[1:] and bool(key[0])
        case HostState(addresses, ahead):
            known = all(isinstance(each, bytes) and len(each) in (4, 16) for each in addresses)
            return known and (ahead is None or (type(ahead) is int and ahead >= 0))
        case Peer():
            return True
        case Entry(at):
            return abs(at) < 1e12 and all(map(_NUMBER.fullmatch, key))
        case int():
            return not isinstance(record, bool) and record >= 0
        case _:
            return (resources.kind_of(record), record.name) == key
