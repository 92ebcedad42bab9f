# Owns: what travels between a host and the dispatcher: the bytes of its messages (slash32.messages). Pure.
# A message is a stream of msgpack arrays over one or more frames: the header first, then (snapshot, delta) one array
# per change. A change is encoded once and its bytes are shared by every host that needs it. Values: slash32.pack.
from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import msgpack

from slash32 import pack
from slash32.messages import (
    PROTOCOL,
    Ack,
    Answer,
    Ask,
    Change,
    Claim,
    Claimed,
    Delete,
    Delta,
    Expect,
    Failure,
    FromDispatcher,
    FromHost,
    Hello,
    Members,
    Ping,
    Pong,
    Put,
    Refusal,
    Refused,
    Release,
    Report,
    Snapshot,
)
from slash32.model import Endpoint
from slash32.pack import AddressSet, Kind, ObjectKey, WireError

__all__ = [
    "PROTOCOL", "Ack", "AddressSet", "Answer", "Ask", "Change", "Claim", "Claimed", "Delete", "Delta", "Expect",
    "Failure", "FromDispatcher", "FromHost", "Hello", "Kind", "Members", "ObjectKey", "Ping", "Pong", "Put",
    "Refusal", "Refused", "Release", "Report",
    "Snapshot", "Tag", "WireError",
]  # fmt: skip

MAX_FRAME = 8 << 20  # bytes; MAXMSGSIZE on both sides
MAX_MESSAGE = 256 << 20
MAX_REPORT = 10_000  # endpoints of one host
LARGE = 512 << 10  # bytes; an endpoint has less, and a larger frame of a host is a report or an answer
_STRINGS = b"\xd9\xda\xdb"  # how msgpack begins a text that is not short
CHUNK = 50_000  # members in one change: a bigger set travels as a Put and Members that follow it
INLINE = 16 << 10  # changes up to this many bytes share a frame
_TEXT = 300  # characters of a message for people
ABOUT = ("version", "filter")  # what a Hello tells of its host; other words are passed over
_WORDS, _WORD = 32, 64  # words about a host, characters of each
AWAY = "go to another dispatcher: "  # how a Refused begins that is no alarm: this dispatcher sends all its hosts away
MAX_QUESTION = 4096  # characters
MAX_ANSWER = 1 << 20  # bytes of ASCII


class Tag(enum.IntEnum):
    HELLO = 1
    REPORT = 2
    CLAIM = 3
    RELEASE = 4
    ACK = 5
    PING = 6
    ANSWER = 7
    EXPECT = 8
    SNAPSHOT = 17
    DELTA = 18
    CLAIMED = 19
    PONG = 20
    REFUSED = 21
    ASK = 22


_PUT, _DELETE, _MEMBERS = range(3)

packb: Callable[[Any], bytes] = msgpack.Packer().pack  # msgpack.packb makes a packer each time
PING = packb([Tag.PING])


# --- changes ---------------------------------------------------------------------------------------------------------


def encode_change(change: Change) -> tuple[bytes, ...]:
    """The bytes of a change, in pieces of bounded size that are applied in order."""
    if isinstance(change, Members):
        return tuple(packb([_MEMBERS, change.name, a, r]) for a, r in _chunks(change.add, change.remove))
    name = pack.pack_name(change.kind, change.name)
    if isinstance(change, Delete):
        return (packb([_DELETE, pack.KINDS.index(change.kind), name]),)
    if not isinstance(change.value, AddressSet):
        return (packb([_PUT, pack.KINDS.index(change.kind), name, pack.pack_value(change.kind, change.value)]),)
    (first, _), *rest = _chunks(change.value, AddressSet())
    more = (packb([_MEMBERS, change.name, add, []]) for add, _ in rest)
    return packb([_PUT, pack.KINDS.index(Kind.SET), name, first]), *more


def _chunks(add: AddressSet, remove: AddressSet) -> list[tuple[list[bytes], list[bytes]]]:
    adds, removes = add.packed(), remove.packed()
    size = max(len(adds), len(removes), 1)
    return [(adds[i : i + CHUNK], removes[i : i + CHUNK]) for i in range(0, size, CHUNK)]


def _decode_change(raw: Any) -> Change:
    fields = pack.array(raw, "change")
    if fields and fields[0] == _MEMBERS and len(fields) == 4:
        return Members(pack.text(fields[1], "set"), pack.unpack_set(fields[2]), pack.unpack_set(fields[3]))
    if not fields or (fields[0], len(fields)) not in ((_PUT, 4), (_DELETE, 3)):
        raise WireError("change: neither put, delete nor members")
    kind = pack.KINDS[pack.integer(fields[1], "kind", len(pack.KINDS) - 1)]
    name = pack.unpack_name(kind, fields[2])
    return Delete(kind, name) if fields[0] == _DELETE else Put(kind, name, pack.unpack_value(kind, name, fields[3]))


def frames(header: bytes, changes: Iterable[bytes]) -> list[bytes]:
    """The frames of a message: small changes share a frame, big ones travel as the very same bytes object."""
    out: list[bytes] = []
    small, size = [header], len(header)
    for change in changes:
        if len(change) <= INLINE and size + len(change) <= MAX_FRAME // 8:
            small.append(change)
            size += len(change)
            continue
        out += [b"".join(small)] if small else []
        small, size = ([change], len(change)) if len(change) <= INLINE else ([], 0)
        out += [change] if len(change) > INLINE else []
    return out + ([b"".join(small)] if small else [])


# --- dispatcher -> host ----------------------------------------------------------------------------------------------


def encode_snapshot(epoch: str, revision: int, digest: int, adopt: bool, changes: Iterable[bytes]) -> list[bytes]:
    return frames(packb([Tag.SNAPSHOT, epoch, revision, digest, adopt]), changes)


def encode_delta(epoch: str, follows: tuple[int, int], digest: int, changes: Sequence[bytes]) -> list[bytes]:
    """`follows` is (previous, revision)."""
    header = _delta_head(epoch, *follows) + digest.to_bytes(8, "big")
    if len(changes) == 1 and len(changes[0]) <= INLINE:
        return [header + changes[0]]
    return frames(header, changes)


@lru_cache(maxsize=64)
def _delta_head(epoch: str, previous: int, revision: int) -> bytes:
    """All but the digest (a uint64), which alone differs between hosts that were told the same."""
    return b"\x95" + b"".join(map(packb, (int(Tag.DELTA), epoch, previous, revision))) + b"\xcf"


def encode_to_host(message: FromDispatcher) -> list[bytes]:
    match message:
        case Snapshot(epoch, revision, digest, adopt, objects):
            return encode_snapshot(epoch, revision, digest, adopt, _encoded(objects))
        case Delta(epoch, previous, revision, digest, changes):
            return encode_delta(epoch, (previous, revision), digest, list(_encoded(changes)))
        case Claimed(seq, refused):
            return [packb([Tag.CLAIMED, seq, [[*r.key, r.message[:_TEXT]] for r in refused]])]
        case Pong(revision):
            return [packb([Tag.PONG, revision])]
        case Refused(text):
            return [packb([Tag.REFUSED, text[:_TEXT]])]
        case Ask(seq, question):
            return [packb([Tag.ASK, seq, question])]


def _encoded(changes: Iterable[Change]) -> Iterable[bytes]:
    for change in changes:
        yield from encode_change(change)


def decode_from_dispatcher(message: Sequence[bytes]) -> FromDispatcher:
    """Raises WireError, one line."""
    header, *rest = _arrays(message)
    fields = pack.array(header, "header")
    match fields:
        case [Tag.SNAPSHOT, epoch, revision, digest, bool(adopt)]:
            return Snapshot(pack.text(epoch, "epoch", 64), pack.integer(revision, "revision"),
                            pack.integer(digest, "digest"), adopt, tuple(map(_decode_change, rest)))  # fmt: skip
        case [Tag.DELTA, epoch, previous, revision, digest]:
            return Delta(pack.text(epoch, "epoch", 64), pack.integer(previous, "previous"),
                         pack.integer(revision, "revision"), pack.integer(digest, "digest"),
                         tuple(map(_decode_change, rest)))  # fmt: skip
    if rest:
        raise WireError("message: more than its header")
    match fields:
        case [Tag.CLAIMED, seq, refused]:
            return Claimed(pack.integer(seq, "seq"), tuple(map(_refusal, pack.array(refused, "refused"))))
        case [Tag.PONG, revision]:
            return Pong(pack.integer(revision, "revision"))
        case [Tag.REFUSED, message_text]:
            return Refused(pack.text(message_text, "message", _TEXT))
        case [Tag.ASK, seq, question]:
            return Ask(pack.integer(seq, "seq"), pack.text(question, "question", MAX_QUESTION))
    raise WireError(f"message from the dispatcher: unknown form {pack.shown(fields)}")


def _refusal(raw: Any) -> Refusal:
    fields = pack.array(raw, "refused")
    if len(fields) != 3:
        raise WireError("refused: not three fields")
    return Refusal(pack.unpack_key(fields[:2]), pack.text(fields[2], "message", _TEXT))


def decode_stream(data: bytes) -> tuple[tuple[str, int, int], tuple[Change, ...]]:
    """(epoch, revision, digest) and changes, as a replica keeps them on disk."""
    header, *rest = _arrays([data])
    epoch, revision, digest = pack.fixed(header, "header", 3)
    position = pack.text(epoch, "epoch", 64), pack.integer(revision, "revision"), pack.integer(digest, "digest")
    return position, tuple(map(_decode_change, rest))


def decode_changes(data: bytes) -> tuple[Change, ...]:
    """What `encode_change` made, joined. Raises WireError, one line."""
    return tuple(map(_decode_change, _arrays([data]))) if data else ()


# --- host -> dispatcher ----------------------------------------------------------------------------------------------


def encode_to_dispatcher(message: FromHost) -> bytes:
    match message:
        case Hello(epoch, revision, digest, addresses, protocol, name, about):
            words = {word: value[:_WORD] for word, value in about.items()}
            return packb([Tag.HELLO, protocol, epoch, revision, digest, list(addresses), name, words])
        case Report(seq, endpoints):
            return packb([Tag.REPORT, seq, [pack.pack_endpoint(e) for e in endpoints]])
        case Claim(seq, endpoint):
            return packb([Tag.CLAIM, seq, pack.pack_endpoint(endpoint)])
        case Expect(seq, endpoint):
            return packb([Tag.EXPECT, seq, pack.pack_endpoint(endpoint)])
        case Release(seq, key):
            return packb([Tag.RELEASE, seq, list(key)])
        case Ack(revision, failures):
            return packb([Tag.ACK, revision, [[f.object[:_TEXT], f.message[:_TEXT]] for f in failures[:100]]])
        case Ping():
            return PING
        case Answer(seq, answer):
            return packb([Tag.ANSWER, seq, answer])


def plain_ack(frame: bytes) -> int:
    """The revision of an Ack without failures; -1 for anything else. By far the most frequent message."""
    if len(frame) <= _ACK_MOST and frame[:2] == _ACK_HEAD and frame[-1:] == _NO_FAILURES:
        return _plain_ack(frame)
    return -1


@lru_cache(maxsize=64)
def _plain_ack(frame: bytes) -> int:
    """Kept: of one commit all hosts say the same bytes."""
    raw = _one(frame)
    return raw[1] if type(raw[1]) is int and raw[2] == [] and raw[1] >= 0 else -1


_ACK_HEAD = b"\x93" + packb(int(Tag.ACK))
_NO_FAILURES = packb([])
_ACK_MOST = 12  # bytes: what is kept of them is little


def _one(frame: bytes) -> Any:
    try:
        return msgpack.unpackb(frame)
    except msgpack.ExtraData:
        raise WireError("message: more than one part") from None
    except (ValueError, msgpack.UnpackException) as e:
        raise WireError(f"message: not msgpack, or cut short ({type(e).__name__})") from None


def decode_from_host(frame: bytes, known: Callable[[Any], Endpoint | None] = lambda raw: None) -> FromHost:
    """Raises WireError, one line. Trusts nothing: a host may be hostile. `known` may have an endpoint that packs so."""
    if len(frame) > LARGE:
        return _large(frame, known)
    raw = _one(frame)
    match pack.array(raw, "header"):
        case [Tag.PING]:
            return Ping()
        case [Tag.ACK, revision, failures]:
            return Ack(pack.integer(revision, "revision"), tuple(map(_failure, pack.array(failures, "failures", 100))))
        case [Tag.CLAIM, seq, endpoint]:
            return Claim(pack.integer(seq, "seq"), pack.unpack_endpoint(endpoint))
        case [Tag.EXPECT, seq, endpoint]:
            return Expect(pack.integer(seq, "seq"), pack.unpack_endpoint(endpoint))
        case [Tag.RELEASE, seq, key]:
            return Release(pack.integer(seq, "seq"), pack.unpack_key(key))
        case [Tag.ANSWER, seq, answer]:
            return Answer(pack.integer(seq, "seq"), pack.text(answer, "answer", MAX_ANSWER))
        case [Tag.REPORT, seq, endpoints]:
            listed = pack.array(endpoints, "endpoints", MAX_REPORT)
            return Report(pack.integer(seq, "seq"), tuple(known(raw) or pack.unpack_endpoint(raw) for raw in listed))
        case [Tag.HELLO, int(protocol), *fields]:
            return _hello(protocol, fields)
    raise WireError(f"message from a host: unknown form {pack.shown(raw)}")


def _large(frame: bytes, known: Callable[[Any], Endpoint | None]) -> FromHost:
    """Whole, each of its bytes could become a list of 72 bytes: it is taken part by part, and none may be large."""
    scan = msgpack.Unpacker(max_buffer_size=len(frame))
    scan.feed(frame)
    try:
        fields = scan.read_array_header()
        tag, seq = _small(frame, scan, 16), _small(frame, scan, 16)
        if (fields, tag) == (3, Tag.ANSWER) and frame[scan.tell()] in _STRINGS:
            return Answer(pack.integer(seq, "seq"), pack.text(_one(frame)[2], "answer", MAX_ANSWER))
        if (fields, tag) != (3, Tag.REPORT):
            raise WireError(f"message from a host: {len(frame)} bytes, and neither a report nor an answer")
        listed = scan.read_array_header()
        if listed > MAX_REPORT:
            raise WireError(f"endpoints: {listed} entries, more than {MAX_REPORT}")
        parts = (_small(frame, scan, LARGE) for _ in range(listed))
        found = tuple(known(raw) or pack.unpack_endpoint(raw) for raw in parts)
    except WireError:
        raise
    except (ValueError, msgpack.UnpackException) as e:
        raise WireError(f"message: not msgpack, or cut short ({type(e).__name__})") from None
    if scan.tell() != len(frame):
        raise WireError("message: more than one part")
    return Report(pack.integer(seq, "seq"), found)


def _small(frame: bytes, scan: msgpack.Unpacker, most: int) -> Any:
    """The next part."""
    begin = scan.tell()
    scan.skip()
    if scan.tell() - begin > most:
        raise WireError(f"message: a part of {scan.tell() - begin} bytes, more than {most}")
    return _one(frame[begin : scan.tell()])


def _hello(protocol: int, fields: list[Any]) -> Hello:
    if protocol != PROTOCOL:
        raise WireError(f"hello: protocol {protocol} is not spoken here, only {PROTOCOL}: upgrade the older side")
    if len(fields) != 6:
        raise WireError("hello: not eight fields")
    epoch, revision, digest, addresses, name, about = fields
    found = tuple(pack.address(a, "hello.addresses") for a in pack.array(addresses, "hello.addresses", 2))
    if not pack.text(epoch, "epoch", 64).isprintable():
        raise WireError(f"epoch: {pack.shown(epoch)} is not printable")
    return Hello(epoch, pack.integer(revision, "revision"),
                 pack.integer(digest, "digest"), found, name=pack.text(name, "hello.name", 256),
                 about=_about(about))  # fmt: skip


def _about(raw: Any) -> Mapping[str, str]:
    if not isinstance(raw, dict) or len(raw) > _WORDS:
        raise WireError(f"hello.about: {pack.shown(raw)} is not a map of at most {_WORDS} words")
    found = {word: pack.text(raw[word], f"hello.about.{word}", _WORD) for word in ABOUT if word in raw}
    for word, value in found.items():
        if not value.isprintable():
            raise WireError(f"hello.about.{word}: {pack.shown(value)} is not printable")
    return found


def _failure(raw: Any) -> Failure:
    fields = pack.array(raw, "failures", 2)
    if len(fields) != 2:
        raise WireError("failures: not two fields")
    return Failure(pack.text(fields[0], "object", _TEXT), pack.text(fields[1], "message", _TEXT))


def _arrays(message: Sequence[bytes]) -> list[Any]:
    """Every msgpack object in the frames, in order; at least one."""
    found: list[Any] = []
    if sum(map(len, message)) > MAX_MESSAGE:
        raise WireError(f"message: more than {MAX_MESSAGE} bytes")
    for frame in message:
        unpacker = msgpack.Unpacker(max_buffer_size=max(len(frame), 1), strict_map_key=True)
        try:
            unpacker.feed(frame)
            found += unpacker
        except (ValueError, msgpack.UnpackException) as e:
            raise WireError(f"message: not msgpack ({type(e).__name__})") from None
        if unpacker.tell() != len(frame):
            raise WireError("message: cut short")
    if not found:
        raise WireError("message: empty")
    return found
