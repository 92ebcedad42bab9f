# Owns: what `-f` names: files, directories, standard input; their documents, checked here before anything is sent.
from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from slash32.errors import ResourceError, printable, quoted
from slash32.resources import Resource, decode, kind_of, load_yaml

if TYPE_CHECKING:
    from slash32.documents import Document

RESOURCES = (".yaml", ".yml", ".json")
DOMAINS = (".xml",)
NAME_LIMIT = 200  # characters of a file name in a message


@dataclass(slots=True)
class Checked:
    documents: list[Document] = field(default_factory=list)
    resources: list[Resource] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # one line for each document or file that is wrong


def expand(names: Sequence[str], suffixes: tuple[str, ...] = RESOURCES) -> Iterator[tuple[str, bytes | str]]:
    """(name for messages, content), or (name, why it cannot be read). Of a directory: its files with these suffixes."""
    for name in names:
        if name == "-":
            yield "stdin", _read_stdin()
            continue
        try:
            inside = _inside(Path(name), suffixes) if name else None
        except OSError as error:
            yield _short(name), error.strerror or str(error)
            continue
        if inside is None:
            yield _short(name) or "-f", _read(Path(name)) if name else "the file name is empty"
        elif not inside:
            yield _short(name), f"this directory holds no {', '.join(suffixes)} file"
        for file in inside or ():
            yield _short(str(file)), _read(file)


def _short(name: str) -> str:
    shown = printable(name)
    return shown if len(shown) <= NAME_LIMIT else f"{shown[:NAME_LIMIT]}..."


def _inside(path: Path, suffixes: tuple[str, ...]) -> list[Path] | None:
    """None: no directory."""
    return sorted(p for p in path.iterdir() if p.suffix in suffixes) if path.is_dir() else None


def _read_stdin() -> bytes | str:
    from slash32.documents import MAX_BYTES  # with PyYAML: only where something is read

    if sys.stdin is None:
        return "it is closed"
    try:
        return sys.stdin.buffer.read(MAX_BYTES + 1)
    except OSError as error:
        return error.strerror or str(error)


def _read(path: Path) -> bytes | str:
    from slash32.documents import MAX_BYTES

    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)  # one more than is allowed: enough to be refused
    except OSError as error:
        return error.strerror or str(error)


def is_xml(content: bytes) -> bool:
    return content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<")


def check(names: Sequence[str]) -> Checked:
    """All documents of all files. A document given twice is an error: which of the two was meant?"""
    found = Checked()
    for name, content in expand(names):
        if isinstance(content, str):
            found.errors.append(f"{name}: {content}")
        else:
            check_text(name, content, found)
    found.errors += duplicates(found)
    return found


def duplicates(found: Checked) -> list[str]:
    errors = []
    seen: dict[tuple[str, str], Document] = {}
    for document, resource in zip(found.documents, found.resources, strict=True):
        key = (kind_of(resource), resource.name)
        first = seen.setdefault(key, document)
        if first is not document:
            where = f"{document.source}:{document.line}"
            errors.append(f"{where}: {' '.join(key)}: given before, at {first.source}:{first.line}; keep one")
    return errors


def check_text(name: str, content: bytes, found: Checked) -> None:
    if is_xml(content):
        found.errors.append(f"{name}: is XML: domains go to virsh define; slash32 validate checks their tags")
        return
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found.errors.append(f"{name}:{line}: not UTF-8 text: {quoted(error.reason)}")
        return
    try:
        documents = load_yaml(text, name)
    except ResourceError as error:
        found.errors.append(str(error))
        return
    if not documents:
        found.errors.append(f"{name}: holds no document")
    for document in documents:
        try:
            resource = decode(document)
        except ResourceError as error:
            found.errors.append(str(error))
        else:
            found.documents.append(document)
            found.resources.append(resource)
