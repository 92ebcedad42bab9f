# Owns: the dispatch by class, as chains: device groups by their last hexadecimal digit, then by the one before, then
# one by one, so that what a packet costs does not grow with the number of classes. Pure.
from __future__ import annotations

from collections.abc import Mapping

from .lines import Line, goto, group
from .skeleton import FROM, TO

_HEADS = {FROM: "s32-cf-", TO: "s32-ct-"}
_WORD = "class"


def tree(root: str, base: int, chains: Mapping[int, str]) -> dict[str, tuple[Line, ...]]:
    """By name, for classes (device group -> chain)."""
    head, incoming = _HEADS[root], root == FROM
    found: dict[str, list[Line]] = {root: []}
    for number in sorted(chains):
        last, before = number & 0xF, number >> 4 & 0xF
        node, leaf = f"{head}{last:x}", f"{head}{last:x}{before:x}"
        if node not in found:
            found[node] = []
            found[root].append(Line(group(incoming, base | last, 0xFFFF000F), goto(node)))
        if leaf not in found:
            found[leaf] = []
            found[node].append(Line(group(incoming, base | before << 4 | last, 0xFFFF00FF), goto(leaf)))
        found[leaf].append(Line(group(incoming, number), goto(chains[number]), f"{_WORD} {number:x} {chains[number]}"))
    return {name: tuple(lines) for name, lines in found.items()}


def path(root: str, number: int) -> tuple[str, str, str]:
    """The chains in which a class stands."""
    head = _HEADS[root]
    return root, f"{head}{number & 0xF:x}", f"{head}{number & 0xF:x}{number >> 4 & 0xF:x}"


def is_of_tree(chain: str) -> bool:
    return chain.startswith(tuple(_HEADS.values()))


def class_of(comment: str) -> tuple[int, str] | None:
    """Of a rule's comment, without its digest."""
    words = comment.split()
    if len(words) == 3 and words[0] == _WORD:
        return int(words[1], 16), words[2]
    return None
