# Owns: requests' bodies: how much is read, how long it may take, and JSON read strictly. Touches: the connection.
from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Collection
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from slash32.errors import quoted

from ..decisions.inputs import Refused
from .gate import gate_of

MOST = 32 << 20  # bytes
MOST_OF_A_BACKUP = 1 << 30
DEPTH = 64  # lists and mappings in one another
STALL = 20.0  # seconds without a byte
GRACE = 30.0  # seconds, and
RATE = 50_000  # bytes a second: who is slower holds a connection for nothing
_NUMBER = re.compile(r"[0-9]{1,18}")


async def read(request: web.Request, most: int = MOST) -> bytes:
    """Raises Refused."""
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Refused(415, "the body is compressed; send it as it is")
    if (request.content_length or 0) > most:
        raise Refused(413, f"the body has {request.content_length} bytes; at most {most}")
    gate = gate_of(request)
    gate.reading = True
    try:
        return await _read(request, most)
    except TimeoutError:
        gate.abort()
        raise Refused(408, "the body did not come in time") from None
    except (web.RequestPayloadError, HttpProcessingError, ConnectionError):
        raise Refused(400, "the body is cut short, or not what its headers say") from None
    finally:
        gate.reading = False


async def _read(request: web.Request, most: int) -> bytes:
    clock = asyncio.get_running_loop().time
    until = clock() + GRACE
    parts: list[bytes] = []
    size = 0
    if request.content.is_eof():  # all of it is here: waiting has its price
        part = request.content.read_nowait()
        if len(part) <= most:
            return part
        size = len(part)
    while size <= most:
        patience = min(STALL, until + size / RATE - clock())
        part = await asyncio.wait_for(request.content.readany(), max(0.0, patience))
        if not part:
            return b"".join(parts)
        parts.append(part)
        size += len(part)
    raise Refused(413, f"the body has more than {most} bytes")


async def read_json(request: web.Request, most: int = MOST) -> Any:
    return decode(await read(request, most))


async def read_fields(request: web.Request, *known: str) -> dict[str, Any]:
    """A mapping with no other fields than these; nothing at all stands for an empty one. Raises Refused."""
    content = await read(request)
    body = decode(content) if content else {}
    if not isinstance(body, dict):
        raise Refused(400, f"the body is not a mapping of {', '.join(known) or 'nothing'}")
    for name in body:
        if name not in known:
            raise Refused(400, f"{quoted(name, 64)[1:-1]}: unknown field; known here: {', '.join(known) or 'none'}")
    return body


def decode(content: bytes) -> Any:
    """Raises Refused. What JSON leaves open, and what later steps cannot stand, is refused."""
    try:
        found = json.loads(content.decode(), object_pairs_hook=_mapping, parse_constant=_no_constant)
    except UnicodeDecodeError as e:
        raise Refused(400, f"the body is not JSON: not UTF-8 text, at byte {e.start}") from None
    except (ValueError, RecursionError) as e:
        raise Refused(400, f"the body is not JSON ({quoted(e, 120)[1:-1]})") from None
    if content.count(b"[") + content.count(b"{") > DEPTH and _deep(found):
        raise Refused(400, f"the body has more than {DEPTH} lists and mappings in one another")
    return found


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a mapping has the same key twice")
    return found


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def _deep(found: Any) -> bool:
    level: list[Any] = [found]
    for _ in range(DEPTH):
        level = [child for each in level for child in _children(each) if isinstance(child, dict | list)]
        if not level:
            return False
    return True


def _children(found: Any) -> Collection[Any]:
    return found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()


def whole(text: str, name: str) -> int:
    """Raises Refused."""
    if not _NUMBER.fullmatch(text):
        raise Refused(400, f"{name}={quoted(text, 64)} is not a whole number")
    return int(text)


def flag(request: web.Request, name: str) -> bool:
    value = request.query.get(name, "0")
    if value not in ("0", "1"):
        raise Refused(400, f"{name}={quoted(value, 64)} is neither 0 nor 1")
    return value == "1"
