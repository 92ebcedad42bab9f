# Owns: the same tables as text for `nft -f`, for people, `compile` and goldens. Pure: every statement's text comes
# from where its bytes come from (statements.py, skeleton.py).
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from slash32.net import Address, Prefix, format_address

from ...compiler.ruleset import Guard, Rule, SetSpec
from . import kernel as k
from .admission import Admission, Element
from .elements import Member
from .rules import statement
from .shapes import FROM, TABLE, TO, Field, SetShape
from .skeleton import FAMILIES, SKELETONS
from .statements import Statement
from .transaction import shape_of


@dataclass(frozen=True)
class Content:
    """What stands in the tables besides the skeleton. A chain comes after those that it jumps to."""

    sets: Mapping[str, SetSpec] = field(default_factory=dict)
    members: Mapping[str, Iterable[Member]] = field(default_factory=dict)
    chains: Mapping[str, Sequence[Rule]] = field(default_factory=dict)
    classes: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    admissions: Iterable[Admission] = ()


def render(guard: Guard, content: Content | None = None) -> str:
    """Creates both tables where there are none of this name. Interfaces stand by index: it fits this host only."""
    content = content or Content()
    return "".join(line + "\n" for family in (k.INET, k.ARP) for line in _table(family, guard, content))


def _table(family: int, guard: Guard, content: Content) -> Iterator[str]:
    skeleton = SKELETONS[family](guard)
    elements = _admitted(family, content.admissions, skeleton.sets)
    yield f"table {FAMILIES[family]} {TABLE} {{"
    for name, shape in skeleton.sets.items():
        yield from _set(name, shape, [*elements.get(name, ()), *_classes(name, content.classes)])
    if family == k.INET:
        for name, spec in content.sets.items():
            yield from _set(name, shape_of(spec), map(_member, sorted(content.members.get(name, ()))))
    for name, chain in skeleton.chains.items():
        yield from _chain(name, chain.rules, str(chain.base) if chain.base else "")
    if family == k.INET:
        for name, rules in content.chains.items():
            yield from _chain(name, [statement(r) for r in rules])
    yield "}"


def _set(name: str, shape: SetShape, elements: Iterable[str]) -> Iterator[str]:
    yield f"\t{'map' if shape.verdicts else 'set'} {name} {{"
    yield f"\t\t{shape}"
    listed = list(elements)
    if listed:
        yield f"\t\telements = {{ {(',' + chr(10) + chr(9) * 3).join(listed)} }}"
    yield "\t}"


def _chain(name: str, rules: Iterable[Statement], base: str = "") -> Iterator[str]:
    yield f"\tchain {name} {{"
    if base:
        yield f"\t\t{base}"
    for rule in rules:
        yield f"\t\t{rule}"
    yield "\t}"


def _classes(name: str, classes: Mapping[int, tuple[str, str]]) -> Iterator[str]:
    if name in (FROM, TO):
        for group, chains in sorted(classes.items()):
            yield f"{group} : jump {chains[name == TO]}"


def _member(member: Member) -> str:
    if isinstance(member, Prefix):
        alone = member.length == 8 * len(member.network)
        return format_address(member.network) if alone else str(member)
    return format_address(member)


def _admitted(family: int, admissions: Iterable[Admission], shapes: Mapping[str, SetShape]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for admission in admissions:
        for element in admission.elements():
            if element.family == family:
                found.setdefault(element.set, []).append(_element(element, shapes[element.set]))
    return found


def _element(element: Element, shape: SetShape) -> str:
    shown, offset = [], 0
    for fld in shape.fields:
        part = slice(offset, offset + fld.length)
        shown.append(_field(fld, element.key[part], element.last[part], shape.interval))
        offset += (fld.length + 3) & ~3
    return " . ".join(shown)


def _field(fld: Field, first: bytes, last: bytes, interval: bool) -> str:
    if fld.text == "iface_index":
        return str(int.from_bytes(first, "big" if interval else "little"))
    if fld.text == "ether_addr":
        return first.hex(":")
    return format_address(first) if first == last or not last else _prefix(first, last)


def _prefix(first: Address, last: Address) -> str:
    host_bits = (int.from_bytes(first, "big") ^ int.from_bytes(last, "big")).bit_length()
    return f"{format_address(first)}/{8 * len(first) - host_bits}"
