# Owns: what is in a store's SQLite file: its tables, how a record becomes a row, and the sum over all rows. Touches:
# the connection that it is given.
from __future__ import annotations

import json
import sqlite3
from hashlib import blake2b

from .commits import Key, Record, Table, encode_record

VERSION = "2"
META = "create table meta (key text primary key, value text not null) without rowid"
RECORDS = "create table records (kind text, key text, value blob not null, primary key (kind, key)) without rowid"
_PUT, _DELETE = "insert or replace into records values (?, ?, ?)", "delete from records where kind = ? and key = ?"
_VALUE = "select value from records where kind = ? and key = ?"


def write(db: sqlite3.Connection, table: Table, key: Key, record: Record | None) -> int:
    """By how much it changes the sum."""
    name = json.dumps(key, separators=(",", ":"))
    changed = 0
    for (old,) in db.execute(_VALUE, (table.value, name)).fetchall():
        changed -= hash_of(table.value, name, old)
    if record is None:
        db.execute(_DELETE, (table.value, name))
    else:
        value = encode_record(record)
        db.execute(_PUT, (table.value, name, value))
        changed += hash_of(table.value, name, value)
    return changed


def hash_of(kind: str, name: str, value: bytes) -> int:
    found = blake2b(f"{kind} {name} ".encode(), digest_size=8)
    found.update(value)
    return int.from_bytes(found.digest(), "big")


def digest_of(epoch: str, revision: int, records: int) -> str:
    return blake2b(f"{epoch} {revision} {records}".encode(), digest_size=8).hexdigest()
