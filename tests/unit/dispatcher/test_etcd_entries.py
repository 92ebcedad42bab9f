# What lies under the prefix in etcd: names that sort as numbers do, entries and snapshots that come back as they went,
# or are refused; and what etcd's errors are taken for.
from __future__ import annotations

import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.store.commits import Entry, Key, Peer, Table, Write, encode_record, encode_writes
from dispatcher.store.etcd import entries, gateway
from dispatcher.store.etcd.entries import (
    NOTHING,
    PIECE,
    SNAPSHOT_PIECE,
    Chunked,
    Damage,
    Growth,
    Keys,
    Latest,
    Rows,
    Thawing,
    behind,
    check_body,
    decode_entry,
    decode_latest,
    decode_meta,
    decoded,
    encode_entry,
    encode_latest,
    encode_meta,
    freeze,
    new_entry,
    pieces,
    replay,
)
from dispatcher.store.etcd.gateway import Failure, Full, Hopeless

KEYS = Keys("/slash32/")
revisions = st.integers(1, 10**18)


@given(revisions, revisions)
def test_keys_sort_as_revisions_do(one: int, other: int) -> None:
    assert (KEYS.log(one) < KEYS.log(other)) == (one < other)
    assert (KEYS.chunks(one, "ff") < KEYS.chunks(other)) == (one < other)
    assert KEYS.log_revision(KEYS.log(one)) == one
    assert KEYS.chunk_owner(KEYS.chunks(one, "ab") + "000000") == (one, "ab")
    assert KEYS.all_of("snapshot") < KEYS.snapshot(one) < KEYS.latest < behind(KEYS.all_of("snapshot"))


@pytest.mark.parametrize("key", ["/slash32/log/7", "/slash32/log/" + "٣" * 20, "/slash32/log/", "x"])
def test_what_is_no_entry_is_refused(key: str) -> None:
    with pytest.raises(Damage, match="is no entry of a log"):
        KEYS.log_revision(key)


@given(revisions, st.binary(max_size=100))
def test_entries_come_back(revision: int, body: bytes) -> None:
    entry = new_entry(revision, "n", "b", body)
    assert decode_entry(revision, encode_entry(entry)) == entry
    assert check_body(entry, body) == body


@given(st.binary(min_size=1, max_size=100), st.data())
def test_damage_is_seen(body: bytes, data: st.DataObject) -> None:
    entry = new_entry(7, "nonce", "before", body)
    whole = bytearray(encode_entry(entry))
    where = data.draw(st.integers(0, len(whole) - 1))
    whole[where] ^= data.draw(st.integers(1, 255))
    with pytest.raises(Damage):
        # Who follows "before" asks for it by name.
        found = decode_entry(7, bytes(whole))
        if found.before != "before" or not isinstance(found.body, bytes):
            raise Damage("is seen")
        check_body(found, found.body)
    with pytest.raises(Damage):
        check_body(decode_entry(8, encode_entry(entry)), body)  # moved to another number


@settings(max_examples=50)
@given(st.binary(max_size=300))
def test_garbage_is_refused_as_damage(data: bytes) -> None:
    for decode in (lambda d: decode_entry(1, d), decode_latest, decode_meta):
        with pytest.raises(Damage):
            decode(data)


@pytest.mark.parametrize(("size", "count"), [(PIECE + 1, 2), (3 * PIECE, 3)])
def test_a_big_body_is_cut(size: int, count: int) -> None:
    body = bytes(range(256)) * (size // 256) + bytes(size % 256)
    entry = new_entry(1, "n", "b", body)
    assert entry.body == Chunked(count, size) == decode_entry(1, encode_entry(entry)).body
    assert b"".join(pieces(body)) == body and len(list(pieces(body))) == count
    assert isinstance(new_entry(1, "n", "b", body[:PIECE]).body, bytes)  # the control


def test_meta() -> None:
    assert decode_meta(encode_meta("abc")) == "abc"
    with pytest.raises(Damage, match=r"another version .* upgrade"):
        decode_meta(b'{"version": 2, "epoch": "abc"}')
    with pytest.raises(Damage, match="not a store of slash32"):
        decode_meta(b"\x1b[31m\n")


ROWS = {("dispatcher", (f"d{n}",)): encode_record(Peer(f"tcp://{n}", "k" * (n % 7))) for n in range(3000)}
ROWS["audit", ("1", "1")] = encode_record(Entry(1.0, "root", "w" * 3 * SNAPSHOT_PIECE, "created"))


def frozen(rows: Rows) -> tuple[list[bytes], str]:
    found = [data for data in freeze(rows) if data]
    thawing = Thawing()
    for data in found:
        thawing.feed(data)
    return found, thawing._digest.hexdigest()


@pytest.mark.parametrize("rows", [ROWS, {}])
def test_a_snapshot_comes_back(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "SNAPSHOT_PIECE", 4096)
    data, digest = frozen(rows)
    assert all(0 < len(piece) <= 4096 for piece in data) and (len(data) > 2 or not rows)
    thawing = Thawing()
    for piece in data:
        thawing.feed(piece)
    assert thawing.finish(digest) == rows


def test_a_damaged_snapshot_is_refused() -> None:
    data, digest = frozen(ROWS)
    harmed = [
        data[:-1],
        [*data[:-1], data[-1][:-1]],
        [zlib.compress(b"\xc1")],
        [b"hello"],
        [zlib.compress(encode_writes(()))],
    ]
    for wrong in harmed:
        thawing = Thawing()
        with pytest.raises(Damage, match="snapshot"):
            for piece in wrong:
                thawing.feed(piece)
            thawing.finish(digest)


def test_latest() -> None:
    latest = Latest(7, "tip", "nonce", 3, 1000, "ff")
    assert decode_latest(encode_latest(latest)) == latest
    with pytest.raises(Damage):
        decode_latest(encode_latest(latest._replace(revision="7")))  # type: ignore[arg-type]


def test_a_log_is_replayed_without_decoding() -> None:
    rows: Rows = {}
    keys: list[Key] = [("a",), ("b",)]
    replay(rows, 1, encode_writes([Write(Table.DISPATCHER, key, Peer("x", "y")) for key in keys]))
    replay(rows, 2, encode_writes([Write(Table.DISPATCHER, ("a",), None), Write(Table.DISPATCHER, ("z",), None)]))
    saved = decoded("e", 2, rows)
    assert (saved.epoch, saved.revision, saved.records) == ("e", 2, {(Table.DISPATCHER, ("b",)): Peer("x", "y")})
    assert not rows
    with pytest.raises(Damage, match="log entry 3 cannot be read"):
        replay(rows, 3, b"\xc1")
    with pytest.raises(Damage, match="newer slash32-dispatcher"):
        decoded("e", 1, {("new", ("a",)): b""})


def test_when_a_snapshot_is_due() -> None:
    growth = Growth()
    for revision in range(1, 5000):
        growth.add(revision, 10)
    assert not growth.due
    growth.add(5000, 10)
    assert growth.due
    growth.cut(NOTHING._replace(revision=4999, size=5 << 20))
    assert not growth.due
    growth.add(5001, 5 << 20)  # what the last snapshot had, and ten bytes
    assert growth.due


# --- etcd's errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "kind", "done", "names"),
    [
        ("etcdserver: mvcc: database space exceeded", Full, False, "etcdctl alarm disarm"),
        ("etcdserver: request is too large", Hopeless, False, "--max-request-bytes"),
        ("etcdserver: user name is empty", Hopeless, False, "without|none"),
        ("etcdserver: no leader", Failure, False, "no leader"),
        ("etcdserver: request timed out", Failure, True, "timed out"),
        ("something\nnew\x1b[0m", Failure, True, r"something new\\x1b"),
    ],
)
def test_what_errors_are_taken_for(said: str, kind: type[Failure], done: bool, names: str) -> None:
    for answer in ({"error": said, "code": 14}, {"message": said, "code": 14}):
        with pytest.raises(Failure, match=names) as found:
            raise gateway._refusal(503, answer)
        assert type(found.value) is kind and found.value.done == done
        assert "\n" not in str(found.value)


def test_what_is_not_etcd() -> None:
    assert "not etcd" in str(gateway._refusal(404, {"error": "Not Found"}))
    assert "https://" in str(gateway._no_etcd(400, b"Client sent an HTTP request to an HTTPS server.\n"))


def test_the_pure_part_is_pure() -> None:
    text = (Path(entries.__file__)).read_text()
    assert not [w for w in ("socket", "asyncio", "threading", "aiohttp", "time", "os") if f"import {w}\n" in text]
