# Owns: the errors that users read, and the one way hostile text enters a message (escaped, bounded, one line). Pure.
from __future__ import annotations

QUOTE_LIMIT = 200


def quoted(value: object, limit: int = QUOTE_LIMIT) -> str:
    """`value` as text in quotes: control characters escaped, cut at `limit` characters."""
    text = value if isinstance(value, str) else str(value)
    cut = text if len(text) <= limit else text[:limit] + "..."
    escaped = printable(cut)
    return f"'{escaped}'" if '"' in escaped and "'" not in escaped else '"' + escaped.replace('"', '\\"') + '"'


def printable(text: str) -> str:
    """`text` on one line, with nothing in it that a terminal obeys."""
    return "".join(_escaped(c) for c in text)


def visible(text: str) -> str:
    """One line, of text whose hostile parts may be escaped already."""
    return "".join(c if c.isprintable() else printable(c) for c in text)


def _escaped(character: str) -> str:
    if character == "\\" or not character.isprintable():
        return character.encode("unicode_escape").decode("ascii")
    return character


class Slash32Error(Exception):
    """Anything a user caused and can mend. `str()` is one line."""


class SelectorError(Slash32Error, ValueError):
    """A selector that does not parse. `column` counts characters from 1."""

    def __init__(self, text: str, column: int, message: str) -> None:
        super().__init__(text, column, message)
        self.text = text
        self.column = column
        self.message = message

    def __str__(self) -> str:
        return f"selector {quoted(self.text)}: column {self.column}: {self.message}"


class ResourceError(Slash32Error, ValueError):
    """A document that is refused: which object, which field (a path from the document's root), what to do."""

    def __init__(self, subject: str, path: str, message: str) -> None:
        super().__init__(subject, path, message)
        self.subject = subject
        self.path = path
        self.message = message

    def __str__(self) -> str:
        return ": ".join(part for part in (self.subject, self.path, self.message) if part)
