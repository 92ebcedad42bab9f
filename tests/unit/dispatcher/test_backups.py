# The backup document: there and back, and what is refused of one that was changed on the way.
from __future__ import annotations

import base64
import json
import random
from typing import Any

import msgpack
import pytest

from dispatcher.store import backups
from dispatcher.store.backups import BackupError
from dispatcher.store.commits import Coming, Entry, Holding, HostState, Peer, Saved, Table, encode_record
from slash32.model import Endpoint, EndpointKey
from slash32.net import parse_address
from slash32.policy import Tier

KEY = EndpointKey("00000000-0000-0000-0000-000000000001", "52:54:00:00:00:01")
GUEST = Endpoint(KEY, "web", {"a": "b"}, addresses=(parse_address("10.0.0.1"),))
SAVED = Saved(
    "0123456789abcdef",
    42,
    {
        (Table.RESOURCE, ("Tier", "first")): Tier("first", 1.0),
        (Table.ENDPOINT, tuple(KEY)): Holding("h1", GUEST),
        (Table.EXPECTED, ("h2", *KEY)): Coming(GUEST),
        (Table.HOST, ("h1",)): HostState((parse_address("192.0.2.1"),), 7, "reason", ""),
        (Table.SUPERSEDED, ("feedbeef",)): 12,
        (Table.DISPATCHER, ("d1",)): Peer("tcp://10.0.0.1:5532", "k" * 40),
        (Table.AUDIT, (f"{42:020d}", "00001")): Entry(1.5, "root (unix socket)", "Tier first", "created"),
    },
)


def document(saved: Saved = SAVED) -> Any:
    return json.loads("".join(backups.written(saved, "2026-11-23T00:00:00Z")))


def row(table: str, key: list[str], record: object) -> list[Any]:
    body = record if isinstance(record, bytes) else bytes(msgpack.packb(record))
    return [table, key, base64.b64encode(body).decode()]


def test_there_and_back() -> None:
    assert backups.decode(document()) == SAVED
    assert {table for table, _ in SAVED.records} == set(Table), "of every table"


@pytest.mark.parametrize("count", [0, 1, 499, 500, 501, 1000, 1001])
def test_any_number_of_records(count: int) -> None:
    saved = Saved("e", 1, {(Table.RESOURCE, ("Tier", f"t{n}")): Tier(f"t{n}", float(n)) for n in range(count)})
    assert backups.decode(document(saved)) == saved


TIER = encode_record(Tier("first", 1.0))
WRONG = [
    ({"slash32Backup": 2}, "slash32Backup"),
    ({"slash32Backup": True}, "slash32Backup"),
    ({"slash32Backup": "1"}, "slash32Backup"),
    ({"more": 1}, '"more"'),
    ({"epoch": ""}, "epoch"),
    ({"epoch": "a b"}, "epoch"),
    ({"epoch": 1}, "epoch"),
    ({"revision": -1}, "revision"),
    ({"revision": 1.0}, "revision"),
    ({"revision": True}, "revision"),
    ({"revision": 1 << 63}, "revision"),
    ({"made": 5}, "made"),
    ({"records": {}}, "records"),
    ({"records": [1]}, "records[0]: is not [table"),
    ({"records": [["tier", ["x"], "AA=="]]}, "no table"),
    ({"records": [[["resource"], ["x"], "AA=="]]}, "no table"),
    ({"records": [row("resource", ["Tier"], TIER)]}, "the key is not 2 strings"),
    ({"records": [row("host", ["a", "b"], TIER)]}, "the key is not 1 strings"),
    ({"records": [["resource", ["Tier", 1], "AA=="]]}, "the key is not 2 strings"),
    ({"records": [["resource", ["Tier", "first"], "A"]]}, "not base64"),
    ({"records": [["resource", ["Tier", "first"], "AA==\n"]]}, "not base64"),
    ({"records": [["resource", ["Tier", "first"], ""]]}, "not base64"),
    ({"records": [["resource", ["Tier", "first"], 5]]}, "not base64"),
    ({"records": [row("resource", ["Tier", "second"], TIER)]}, "another one's"),
    ({"records": [row("resource", ["Profile", "first"], TIER)]}, "another one's"),
    ({"records": [row("resource", ["Tier", "first"], TIER)] * 2}, "records[1]: resource \"Tier/first\" is there twice"),
    ({"records": [row("resource", ["Tier", "first"], b"{}")]}, "cannot be read"),
    ({"records": [row("resource", ["Tier", "first"], b"[" * 10_000)]}, "records[0]:"),
    ({"records": [row("endpoint", ["u", "m"], ["h1", []])]}, "cannot be read"),
    ({"records": [row("endpoint", ["u", "m"], 5)]}, "cannot be read"),
    ({"records": [row("host", ["h1"], [["text"], None, "", ""])]}, "of another form"),
    ({"records": [row("host", ["h1"], [[b"123"], None, "", ""])]}, "of another form"),
    ({"records": [row("host", ["h1"], [[], -1, "", ""])]}, "of another form"),
    ({"records": [row("host", ["h1"], [[], None])]}, "cannot be read"),
    ({"records": [row("superseded", ["e"], -1)]}, "of another form"),
    ({"records": [row("superseded", ["e"], [])]}, "cannot be read"),
    ({"records": [row("audit", ["x", "y"], [1.0, "a", "b", "c"])]}, "of another form"),
    ({"records": [row("audit", ["00001", "00001"], [float("nan"), "a", "b", "c"])]}, "of another form"),
    ({"records": [row("audit", ["00001", "00001"], [1.0, "a"])]}, "cannot be read"),
    ({"records": [row("dispatcher", ["d"], ["a"])]}, "cannot be read"),
]


@pytest.mark.parametrize(("change", "piece"), WRONG)
def test_what_is_no_backup(change: dict[str, Any], piece: str) -> None:
    with pytest.raises(BackupError) as refused:
        backups.decode({**document(), **change})
    text = str(refused.value)
    assert piece in text and text.isprintable() and len(text) < 500


@pytest.mark.parametrize("missing", ["slash32Backup", "epoch", "revision", "made", "records"])
def test_what_is_not_whole(missing: str) -> None:
    with pytest.raises(BackupError, match=missing):
        backups.decode({key: value for key, value in document().items() if key != missing})
    for other in (None, [], "x", 1, {}):
        with pytest.raises(BackupError):
            backups.decode(other)


def test_flipped_bytes_are_refused_or_of_the_same_kind() -> None:
    """Nothing but BackupError comes of it, or a record that can be written again."""
    dice = random.Random(1)
    good = document()
    for _ in range(2000):
        index = dice.randrange(len(good["records"]))
        table, key, body = good["records"][index]
        data = bytearray(base64.b64decode(body))
        data[dice.randrange(len(data))] = dice.randrange(256)
        try:
            found = backups.decode({**good, "records": [[table, key, base64.b64encode(data).decode()]]})
        except BackupError as e:
            assert str(e).isprintable()
        else:
            assert backups.decode(document(found)) == found
