# Owns: how a piece that belongs to nothing whole is named between read() and sweep(). Pure.
from __future__ import annotations

from typing import NamedTuple

from slash32.net import Prefix


class StrayPair(NamedTuple):
    set: str
    tap: str
    source: Prefix


class StrayClass(NamedTuple):
    group: int


class StrayExempt(NamedTuple):
    tap: str


Stray = StrayPair | StrayClass | StrayExempt
