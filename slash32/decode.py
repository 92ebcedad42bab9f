# Owns: strict reading of plain data (mappings, lists, scalars) with the path of every value, so that each refusal
# names its field. Nothing is ever ignored: an unknown field, a null and a wrong type are refused. Pure.
from __future__ import annotations

import difflib
import ipaddress
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from slash32.errors import ResourceError, quoted
from slash32.net import Address, Prefix, parse_address, parse_prefix

NAME_LIMIT = 253
LABELS_LIMIT = 128
LABEL_VALUE_LIMIT = 512
_PART = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
NAME = re.compile(rf"{_PART}(\.{_PART})*")
LABEL = re.compile(r"[A-Za-z0-9_./-]{1,512}")
PREFIX = re.compile(r"[0-9a-fA-F:.]+(/(0|[1-9][0-9]{0,2}))?")  # no netmask, no wildcard mask, no zone

_PLAIN_KEY = re.compile(r"[A-Za-z0-9_./-]{1,64}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Field:
    """One value of a document, and where it stands."""

    value: object
    subject: str  # of which object, for the message
    path: str = ""

    def fail(self, message: str) -> NoReturn:
        raise ResourceError(self.subject, self.path, message)

    def fields(
        self, known: Collection[str], unsupported: Collection[str] = (), required: Sequence[str] = ()
    ) -> dict[str, Field]:
        """The mapping's fields. `unsupported` are those of the language that this version does not have; where it is a
        mapping, it says what to do instead."""
        result = self.entries()
        for key, child in result.items():
            if key in known:
                continue
            if key in unsupported:
                instead = unsupported.get(key) if isinstance(unsupported, Mapping) else None
                child.fail(f"is not supported by this version; {instead or 'remove the field'}")
            near = difflib.get_close_matches(key[:64], list(known), 1)
            hint = f"did you mean {near[0]}?" if near else "known here: " + ", ".join(known)
            child.fail(f"unknown field ({hint})")
        for key in required:
            if key not in result:
                self.fail(f"{key} is missing; add it")
        return result

    def entries(self) -> dict[str, Field]:
        """A mapping with free keys."""
        if not isinstance(self.value, dict):
            self.fail(f"{shown(self.value)} is not a mapping of fields; write it as name: value")
        result: dict[str, Field] = {}
        for key, value in self.value.items():
            if not isinstance(key, str):
                self.fail(f"the key {shown(key)} is not a string")
            child = self.child(key, value)
            if value is None:
                child.fail("has no value: give it one or remove the field")
            result[key] = child
        return result

    def child(self, key: str, value: object = None) -> Field:
        return Field(value, self.subject, self._join(key))

    def items(self, at_most: int, at_least: int = 0) -> list[Field]:
        if not isinstance(self.value, list):
            self.fail(f"{shown(self.value)} is not a list; write it in brackets, as in [a, b]")
        if len(self.value) > at_most:
            self.fail(f"has {len(self.value)} entries; give at most {at_most}")
        if len(self.value) < at_least:
            self.fail("is empty: name at least one, or remove the field")
        return [Field(value, self.subject, f"{self.path}[{index}]") for index, value in enumerate(self.value)]

    def string(self, at_most: int) -> str:
        """Any text, also with line breaks; selectors and names have their own grammar."""
        if not isinstance(self.value, str):
            hint = "put it in quotes" if isinstance(self.value, (bool, int, float)) else "give one text"
            self.fail(f"{shown(self.value)} is not a string; {hint}")
        if len(self.value) > at_most:
            self.fail(f"has {len(self.value)} characters; give at most {at_most}")
        return self.value

    def line(self, at_most: int) -> str:
        """Text without control characters."""
        text = self.string(at_most)
        if _CONTROL.search(text):
            self.fail(f"{short(text)} holds a control character; remove it")
        return text

    def integer(self, first: int, last: int) -> int:
        if type(self.value) is not int:  # a bool is no number here
            self.fail(f"{shown(self.value)} is not a whole number; give {first}..{last}")
        if not first <= self.value <= last:
            self.fail(f"{shown(self.value)} is out of range: give {first}..{last}")
        return self.value

    def number(self) -> float:
        if type(self.value) not in (int, float):
            self.fail(f"{shown(self.value)} is not a number; give one like 10 or 2.5")
        assert isinstance(self.value, (int, float))
        try:
            number = float(self.value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            self.fail("is not a finite number; give one like 10 or 2.5")
        return number

    def boolean(self) -> bool:
        if not isinstance(self.value, bool):
            self.fail(f"{shown(self.value)} is neither true nor false; give one of them, without quotes")
        return self.value

    def one_of(self, choices: Sequence[str], unsupported: Mapping[str, str] | None = None) -> str:
        """`unsupported`: what this version does not have, and what to do instead."""
        if not isinstance(self.value, str):
            self.fail(f"{shown(self.value)} is not known here; give {listed(choices)}")
        text = self.string(64)
        if unsupported and text in unsupported:
            self.fail(f"{short(text)} is not supported by this version; {unsupported[text]}")
        if text not in choices:
            self.fail(f"{short(text)} is not known here; give {listed(choices)}")
        return text

    def name(self, at_most: int = NAME_LIMIT) -> str:
        """Of a resource, or a reference to one."""
        text = self.line(at_most)
        if not NAME.fullmatch(text):
            self.fail(f"{short(text)} is not a name: use a-z, 0-9, '-' and '.', as in web-1.rack2")
        return text

    def labels(self) -> dict[str, str]:
        return {key: child.line(LABEL_VALUE_LIMIT) for key, child in self.label_entries().items()}

    def label_entries(self) -> dict[str, Field]:
        """A mapping whose keys are names of labels."""
        entries = self.entries()
        if len(entries) > LABELS_LIMIT:
            self.fail(f"has {len(entries)} labels; give at most {LABELS_LIMIT}")
        for key, child in entries.items():
            if not LABEL.fullmatch(key):
                child.fail("is not a label name: use 1 to 512 letters, digits and _ . / -")
        return entries

    def address(self) -> Address:
        text = self.line(64)
        try:
            return parse_address(text)
        except ValueError:
            self.fail(f"{short(text)} is not an IP address: give one like 192.0.2.1 or fd00::1, without a mask")

    def prefix(self) -> Prefix:
        """An address is its own prefix."""
        text = self.line(64)
        try:
            if not PREFIX.fullmatch(text):
                raise ValueError(text)
            return parse_prefix(text)
        except ValueError:
            self.fail(f"{short(text)} is not a prefix: {_prefix_near(text)}")

    def _join(self, key: str) -> str:
        name = key if _PLAIN_KEY.fullmatch(key) else short(key, 64)
        return f"{self.path}.{name}" if self.path else name


def _prefix_near(text: str) -> str:
    try:
        near = str(ipaddress.ip_network(text.partition("%")[0], strict=False))
    except ValueError:
        return "write it as 10.0.0.0/8 or fd00::/8"
    return f"write it as {near}"


def listed(choices: Sequence[str]) -> str:
    """`a, b or c`."""
    return " or ".join(part for part in (", ".join(choices[:-1]), *choices[-1:]) if part)


def short(text: str, limit: int = 80) -> str:
    """In quotes, and short even where every character is escaped: a line is read as a line."""
    whole = quoted(text, limit)
    return whole if len(whole) <= 2 * limit else quoted(text, limit // 8)


def shown(value: object) -> str:
    """A value in a message: its text where it is short, else only what it is."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and value.bit_length() > 256:
        return "a number of that size"  # printing it could cost more than reading it
    return short(value) if isinstance(value, str) else short(str(value)).strip('"')
