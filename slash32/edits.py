# Owns: what a change does to resources: which are created, configured, deleted, and in which fields. Pure.
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal, NamedTuple

from slash32.policy import THE_DEFAULT_TIER
from slash32.resources import Resource, encode, kind_of

Id = tuple[str, str]  # kind, name
_ALWAYS: dict[Id, Resource] = {("Tier", THE_DEFAULT_TIER.name): THE_DEFAULT_TIER}  # nobody stores it


class Field(NamedTuple):
    """`before` or `after` None: it is new, or gone. Of a list, each entry that differs."""

    path: str
    before: object = None
    after: object = None


@dataclass(frozen=True, slots=True)
class Edit:
    kind: str
    name: str
    change: Literal["created", "configured", "unchanged", "deleted"]
    fields: tuple[Field, ...] = ()  # where it is configured


def identified(resources: Iterable[Resource]) -> dict[Id, Resource]:
    return {(kind_of(resource), resource.name): resource for resource in resources}


def edits(before: Mapping[Id, Resource], after: Mapping[Id, Resource], named: Iterable[Id]) -> list[Edit]:
    """Of those that differ, and of those that are named."""
    before, after = {**before, **_ALWAYS}, {**after, **_ALWAYS}
    ids = [*named, *sorted(set(before) | set(after))]
    found = (_edit(each, before.get(each), after.get(each)) for each in dict.fromkeys(ids))
    wanted = set(named)
    return [edit for edit in found if edit.change != "unchanged" or (edit.kind, edit.name) in wanted]


def _edit(each: Id, before: Resource | None, after: Resource | None) -> Edit:
    if before is None or after is None:
        return Edit(*each, "created" if before is None else "deleted")
    if before == after:
        return Edit(*each, "unchanged")
    old, new = encode(before), encode(after)
    return Edit(*each, "configured", tuple(_fields("", _about(old), _about(new))))


def _about(document: Mapping[str, object]) -> dict[str, object]:
    """Without the frame."""
    metadata, spec = document["metadata"], document["spec"]
    assert isinstance(metadata, dict) and isinstance(spec, dict)
    return {**{f"metadata.{key}": value for key, value in metadata.items() if key != "name"}, **spec}


def _fields(path: str, before: Mapping[str, object], after: Mapping[str, object]) -> Iterator[Field]:
    for key in dict.fromkeys((*before, *after)):
        old, new, here = before.get(key), after.get(key), f"{path}{key}"
        if isinstance(old, list | None) and isinstance(new, list | None):
            yield from _entries(here, old or [], new or [])
        elif isinstance(old, dict) and isinstance(new, dict):
            yield from _fields(f"{here}.", old, new)
        elif old != new:
            yield Field(here, old, new)


def _entries(path: str, before: list[object], after: list[object]) -> Iterator[Field]:
    old, new = list(map(repr, before)), list(map(repr, after))
    for kind, i, i_end, j, j_end in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind != "equal":
            yield from (Field(f"{path}[{n}]", before=before[n]) for n in range(i, i_end))
            yield from (Field(f"{path}[{n}]", after=after[n]) for n in range(j, j_end))
