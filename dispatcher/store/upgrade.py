# Owns: what older versions wrote, made what this one reads. Touches: the connection that it is given, in a transaction.
from __future__ import annotations

import sqlite3

import msgpack

from .commits import ANY, Holding, HostState, Table, decode_record
from .rows import RECORDS, VERSION, write

_TABLES = ("resources", "endpoints", "hosts", "superseded")


def upgrade(db: sqlite3.Connection) -> None:
    """From the schema of 0.1.0."""
    db.execute(RECORDS)
    for kind, name, document in db.execute("select kind, name, document from resources").fetchall():
        resource = decode_record(Table.RESOURCE, document.encode())
        write(db, Table.RESOURCE, (kind, name), resource)
    for host, body in db.execute("select host, body from endpoints").fetchall():
        holding = decode_record(Table.ENDPOINT, msgpack.packb([host, msgpack.unpackb(body)]))
        assert isinstance(holding, Holding)
        write(db, Table.ENDPOINT, tuple(holding.endpoint.key), holding)
    for name, addresses, ahead in db.execute("select name, addresses, ahead from hosts").fetchall():
        write(db, Table.HOST, (name,), HostState(tuple(msgpack.unpackb(addresses)), ahead))
    for (epoch,) in db.execute("select epoch from superseded").fetchall():
        write(db, Table.SUPERSEDED, (epoch,), ANY)
    for table in _TABLES:
        db.execute(f"drop table {table}")
    db.execute("update meta set value = ? where key = 'version'", (VERSION,))
