# Owns: how things look to people: tables, durations, counts, label lists. Pure.
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from slash32.errors import printable


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as their widest cell; empty cells are a dash. The last column is not padded."""
    cells = [list(head), *([printable(str(c)) or "-" for c in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = ("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)
    return "\n".join(lines)


def fields(pairs: Iterable[tuple[str, object]]) -> str:
    """`name:  value` lines, values aligned."""
    listed = [(f"{name}:", printable(str(value)) or "-") for name, value in pairs]
    width = max((len(name) for name, _ in listed), default=0)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in listed)


def labels(have: Mapping[str, object]) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(have.items()))


def duration(milliseconds: float) -> str:
    if milliseconds < 10_000:
        return f"{milliseconds:.0f} ms"
    return f"{milliseconds / 1000:.1f} s"


def age(seconds: float) -> str:
    """Coarser the longer it is."""
    for limit, unit, name in ((1, 0.001, "ms"), (120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit and (seconds or unit == 1):
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86_400:.0f} d"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def names(listed: Sequence[str], at_most: int = 10) -> str:
    shown = ", ".join(printable(name) for name in listed[:at_most])
    return shown if len(listed) <= at_most else f"{shown} and {len(listed) - at_most} more"
