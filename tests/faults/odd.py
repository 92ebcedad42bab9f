# Owns: what nobody should say: messages of both sides, each with something in it that does not belong there.
from __future__ import annotations

import copy
import random
from typing import Any

import msgpack

DEEP: Any = []
for _ in range(400):
    DEEP = [DEEP]
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 0.0, -0.0, 1e308, float("nan"),
    float("inf"), b"", b"\0", b"x" * 16, b"\xff" * 5000, "", "\0", "\n\x1b[2J", "a" * 300, "a" * 70_000, "é" * 200, [],
    [[]], [None] * 200, list(range(3000)), {}, {"a": 1}, {1: 2}, {"a": {"b": {"c": []}}}, DEEP,
    msgpack.ExtType(5, b"x"), msgpack.Timestamp(1, 1),
)  # fmt: skip


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(tree, list):
        for index, one in enumerate(tree[:50]):
            found += places(one, (*path, index))
    elif isinstance(tree, dict):
        for key, one in tree.items():
            found += places(one, (*path, key))
    return found


def changed(tree: Any, noise: random.Random) -> Any:
    """With one place of it otherwise: replaced, gone, twice, in another order."""
    tree = copy.deepcopy(tree)
    path = noise.choice(places(tree))
    if not path:
        return noise.choice(ODD)
    within = tree
    for step in path[:-1]:
        within = within[step]
    last = path[-1]
    match noise.randrange(8) if isinstance(within, list) else 0:
        case 1:
            del within[last]
        case 2:
            within.insert(last, copy.deepcopy(within[last]))
        case 3:
            noise.shuffle(within)
        case 4:
            within.append(noise.choice(ODD))
        case _:
            within[last] = noise.choice(ODD)
    return tree


def spoiled(body: bytes, noise: random.Random) -> bytes:
    """Bytes that were a message."""
    at = noise.randrange(len(body) + 1)
    match noise.randrange(5):
        case 0:
            return body[:at]
        case 1:
            return body[:at] + noise.randbytes(noise.randrange(1, 9)) + body[at:]
        case 2:
            return body + body
        case 3:
            return noise.randbytes(noise.randrange(200))
        case _:
            return body[: max(0, at - 1)] + noise.randbytes(1) + body[at:]


def frame(body: bytes, noise: random.Random) -> bytes:
    """An odd one of that kind."""
    if noise.random() < 0.4:
        return spoiled(body, noise)
    unpacker = msgpack.Unpacker(strict_map_key=False)
    unpacker.feed(body)
    parts = list(unpacker)
    for _ in range(noise.randrange(1, 3)):
        at = noise.randrange(len(parts))
        parts[at] = changed(parts[at], noise)
    try:
        return b"".join(map(msgpack.packb, parts))
    except ValueError:
        return b"\x91" * noise.randrange(500, 5000) + b"\xc0"  # deeper than our packer goes
