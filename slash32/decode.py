# Owns: strict reading of plain data (mappings, lists, scalars) with the path of every value, so that each refusal
# names its field. Nothing is ever ignored: an unknown field, a null and a wrong type are refused. Pure.
from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import NoReturn

from slash32.errors import ResourceError, quoted

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

    def fields(self, known: Collection[str], unsupported: Collection[str] = ()) -> dict[str, Field]:
        """The mapping's fields. `unsupported` are those of the language that this version does not have yet."""
        result = self.entries()
        for key, child in result.items():
            if key in known:
                continue
            if key in unsupported:
                child.fail("is not supported by this version; remove the field")
            near = difflib.get_close_matches(key[:64], list(known), 1)
            hint = f"did you mean {near[0]}?" if near else "known here: " + ", ".join(known)
            child.fail(f"unknown field ({hint})")
        return result

    def entries(self) -> dict[str, Field]:
        """A mapping with free keys."""
        if not isinstance(self.value, dict):
            self.fail(f"{shown(self.value)} is not a mapping of fields")
        result: dict[str, Field] = {}
        for key, value in self.value.items():
            if not isinstance(key, str):
                self.fail(f"the key {shown(key)} is not a string")
            child = Field(value, self.subject, self._join(key))
            if value is None:
                child.fail("has no value: give it one or remove the field")
            result[key] = child
        return result

    def items(self, at_most: int, at_least: int = 0) -> list[Field]:
        if not isinstance(self.value, list):
            self.fail(f"{shown(self.value)} is not a list")
        if len(self.value) > at_most:
            self.fail(f"has {len(self.value)} entries; at most {at_most} are allowed")
        if len(self.value) < at_least:
            self.fail("is empty: name at least one, or remove the field")
        return [Field(value, self.subject, f"{self.path}[{index}]") for index, value in enumerate(self.value)]

    def string(self, at_most: int) -> str:
        """Any text, also with line breaks; selectors and names have their own grammar."""
        if not isinstance(self.value, str):
            hint = "; put it in quotes" if isinstance(self.value, (bool, int, float)) else ""
            self.fail(f"{shown(self.value)} is not a string{hint}")
        if len(self.value) > at_most:
            self.fail(f"has {len(self.value)} characters; at most {at_most} are allowed")
        return self.value

    def line(self, at_most: int) -> str:
        """Text without control characters."""
        text = self.string(at_most)
        if _CONTROL.search(text):
            self.fail(f"{quoted(text)} holds a control character")
        return text

    def integer(self, first: int, last: int) -> int:
        if type(self.value) is not int:  # a bool is no number here
            self.fail(f"{shown(self.value)} is not a whole number")
        if not first <= self.value <= last:
            self.fail(f"{shown(self.value)} is out of range: give {first}..{last}")
        return self.value

    def number(self) -> float:
        if type(self.value) not in (int, float):
            self.fail(f"{shown(self.value)} is not a number")
        assert isinstance(self.value, (int, float))
        try:
            number = float(self.value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            self.fail("is not a finite number")
        return number

    def one_of(self, choices: Collection[str], unsupported: Collection[str] = ()) -> str:
        text = self.string(64)
        if text not in choices:
            why = "supported by this version" if text in unsupported else "known here"
            self.fail(f"{quoted(text)} is not {why}; give {' or '.join(choices)}")
        return text

    def _join(self, key: str) -> str:
        name = key if _PLAIN_KEY.fullmatch(key) else quoted(key, 64)
        return f"{self.path}.{name}" if self.path else name


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
    return quoted(value) if isinstance(value, str) else quoted(str(value)).strip('"')
