# Reads corpus/bad: malformed documents, and the one line that each is refused with. A file holds
#   valid:    a document of this kind, in full: it loads
#   refused:  what is wrong in it, each as
#     at:       the path of the change (a mapping, a list or a value; [n] past the end appends)
#     is:       the value there (null is one); or add: fields for the mapping there; or remove: one of its fields
#     times:    `is`, so many times over (a text or a list)
#     object:   as the line names it; else the valid one's
#     path:     as the line names it; else `at`
#     says:     the rest of the line
#     sense:    true where structure is sound, so that the JSON Schema cannot see it
#   documents: whole ones, each as {is, object, path, says, sense}
from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any, NamedTuple

from slash32.documents import load_yaml

BAD = sorted((Path(__file__).parent / "corpus" / "bad").glob("*.yaml"))
_STEP = re.compile(r"([^.\[\]]+)|\[([0-9]+)\]")


class Case(NamedTuple):
    file: str
    document: dict[str, Any]
    object: str
    path: str
    says: str
    sense: bool

    @property
    def line(self) -> str:
        return ": ".join(part for part in (self.object, self.path, self.says) if part)


def valid_documents() -> dict[str, dict[str, Any]]:
    """By file."""
    return {path.name: file["valid"] for path in BAD if "valid" in (file := _read(path))}


def cases() -> list[Case]:
    return [case for path in BAD for case in _cases(path)]


def _cases(path: Path) -> list[Case]:
    file = _read(path)
    found = []
    for entry in file.get("refused", ()):
        valid = file["valid"]
        named = entry.get("object", f"{valid['kind']} {valid['metadata']['name']}")
        where = entry.get("path", entry["at"])
        found.append(Case(path.name, changed(valid, entry), named, where, entry["says"], entry.get("sense", False)))
    for entry in file.get("documents", ()):
        found.append(
            Case(path.name, entry["is"], entry["object"], entry["path"], entry["says"], entry.get("sense", False))
        )
    return found


def changed(valid: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    document: Any = copy.deepcopy(valid)
    steps = [name or int(index) for name, index in _STEP.findall(entry["at"])]
    at, last = document, steps[-1] if steps else None
    for step in steps[:-1]:
        at = at[step]
    if "add" in entry or "remove" in entry:
        inner = at if last is None else at[last]
        inner.update(entry.get("add", {}))
        if "remove" in entry:
            del inner[entry["remove"]]
    elif isinstance(at, list) and last == len(at):
        at.append(entry["is"])
    else:
        at[last] = entry["is"] * entry["times"] if "times" in entry else entry["is"]
    return document


def _read(path: Path) -> dict[str, Any]:
    (document,) = load_yaml(path.read_text(), path.name)
    return dict(document.value)
