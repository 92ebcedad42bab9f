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


class StrayGate(NamedTuple):
    """Closed by one that ended on the way: what it left may be half of a change."""


Stray = StrayPair | StrayClass | StrayExempt | StrayGate
